"""One expert's training: who learns, what is kept, what is watched."""
