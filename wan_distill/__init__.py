"""Few-step distillation of Wan text-to-video models: both experts, one frozen base each."""
