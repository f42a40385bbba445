"""What training reads: prompts, their embeddings, and stored samples."""

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.first_frames import FirstFrames, Prompt, text_of
from wan_distill.data.prompts import read_prompts, split_prompts
from wan_distill.data.run import Run, caches_of
from wan_distill.data.samples import Inputs, open_inputs
from wan_distill.data.solving import solve_missing

__all__ = [
    "FirstFrames",
    "Inputs",
    "Prompt",
    "PromptEmbeddings",
    "Run",
    "caches_of",
    "open_inputs",
    "read_prompts",
    "solve_missing",
    "split_prompts",
    "text_of",
]
