"""What a run leaves behind, and how good it is."""
