"""What training reads: prompts, their embeddings, and stored samples."""

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.first_frames import FirstFrames, PicturedPrompt, Prompt, text_of
from wan_distill.data.picture_sets import (
    PictureSets,
    encode_pictures,
    keys_of,
    prompts_of,
    read_picture_sets,
)
from wan_distill.data.picture_source import PictureSource
from wan_distill.data.prompts import read_prompts, split_prompts
from wan_distill.data.run import Run, caches_of
from wan_distill.data.samples import Inputs, open_inputs
from wan_distill.data.solving import solve_missing

__all__ = [
    "FirstFrames",
    "Inputs",
    "PictureSets",
    "PictureSource",
    "PicturedPrompt",
    "Prompt",
    "PromptEmbeddings",
    "Run",
    "caches_of",
    "encode_pictures",
    "keys_of",
    "open_inputs",
    "prompts_of",
    "read_picture_sets",
    "read_prompts",
    "solve_missing",
    "split_prompts",
    "text_of",
]
