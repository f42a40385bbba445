"""LoRA files of every layout that people have for Wan."""
