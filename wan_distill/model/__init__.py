"""The teacher's networks, the adapters on them, and the files they come from and go to."""
