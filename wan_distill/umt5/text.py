"""A teacher's text side, whole: tokenizer and encoder, each verified, and both together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from wan_distill.errors import TextEncoderError
from wan_distill.settings.fingerprints import fingerprint_part
from wan_distill.settings.reading import read_json
from wan_distill.umt5.evidence import why_alike
from wan_distill.umt5.repair import load_text_encoder
from wan_distill.umt5.tokenizer import SAME_TEACHER, UNLIKE, load_tokenizer
from wan_distill.umt5.verify import Verdict


def tokenizer_of(pipeline: Path) -> PreTrainedTokenizerBase:
    """The verified tokenizer of a pipeline folder. Raises FileError; loads no weights."""
    rows = read_json(pipeline / "text_encoder" / "config.json").get("vocab_size")
    if type(rows) is not int or rows < 1:
        raise TextEncoderError(
            f"{pipeline / 'text_encoder'}: config.json gives {rows} as vocab_size",
            "download it again",
        )
    return load_tokenizer(pipeline / "tokenizer", rows)


def load_text(
    pipeline: Path,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    verbose: bool = False,
) -> tuple[UMT5EncoderModel, PreTrainedTokenizerBase, Verdict]:
    """Text encoder, tokenizer, and the verdict on both, of a pipeline folder.

    The arguments are those of `load_text_encoder`. Raises FileError where either must not be used,
    or where together they do not tell two prompts apart.
    """
    tokenizer_of(pipeline)  # before any weights load
    encoder, verdict = load_text_encoder(
        pipeline, dtype=dtype, variant=variant, allow_pickle=allow_pickle, verbose=verbose
    )
    tokenizer, verdict = add_tokenizer(verdict, encoder, pipeline / "tokenizer")
    return encoder, tokenizer, verdict


def add_tokenizer(
    verdict: Verdict, encoder: UMT5EncoderModel, folder: Path
) -> tuple[PreTrainedTokenizerBase, Verdict]:
    """The tokenizer in `folder`, and the verdict on a loaded encoder extended to both.

    Raises FileError where the tokenizer must not be used, or both do not tell two prompts apart.
    """
    tokenizer = load_tokenizer(folder, encoder.config.vocab_size)
    found = replace(
        verdict,
        tokenizer=fingerprint_part(folder),
        entries=len(tokenizer),
        difference=compare_unlike(encoder, tokenizer),
    )
    return tokenizer, found


def tokenizer_beside(folder: Path) -> Path | None:
    """Where the tokenizer of a pipeline folder, or of a text encoder's, should be; None where a
    text encoder lies alone.
    """
    if (folder / "text_encoder").is_dir():
        return folder / "tokenizer"
    beside = folder.absolute().parent / "tokenizer"
    return beside if beside.is_dir() else None


@torch.no_grad()
def compare_unlike(encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """How far apart the embeddings of two unlike prompts are, relative to their norm.

    Raises TextEncoderError where they are not finite or nearly equal, and where the same prompt
    does not give the same embedding again.
    """
    device = next(p.device for p in encoder.encoder.block.parameters() if not p.is_meta)
    tokens = tokenizer([*UNLIKE, UNLIKE[0]], padding=True, return_tensors="pt").to(device)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
    states = states * tokens.attention_mask[..., None]
    difference, fault = why_alike(states)
    if fault:
        raise TextEncoderError(f"the text encoder {fault}", f"{SAME_TEACHER}, undamaged")
    return difference
