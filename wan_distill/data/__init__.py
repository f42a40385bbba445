"""What training reads: prompts, their embeddings, and samples that were solved before."""
