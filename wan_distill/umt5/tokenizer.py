"""The tokenizer beside a text encoder: is its vocabulary UMT5's, and what does it make of prompts?

Without a vocabulary transformers makes a tokenizer of a few entries, to which every word is
unknown: all prompts become the same embedding, and nothing reports it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase, T5TokenizerFast

from wan_distill.errors import TextEncoderError, one_line
from wan_distill.settings.fingerprints import TOKENIZER_FILES
from wan_distill.settings.reading import AGAIN, check_vocabulary, read_json

VOCABULARIES = ("tokenizer.json", "spiece.model")  # transformers reads the first that is there
SPECIAL_IDS = {"pad": 0, "eos": 1, "unk": 2}  # of UMT5
EXTRA = re.compile(r"<extra_id_\d+>")
# UMT5's table is padded: 256384 rows for 256000 pieces and 300 marks. Other tokenizers lack more.
ROWS_WITHOUT_ENTRY = 0.01
# Two prompts that no working text encoder takes for the same.
UNLIKE = ("a small red circle moving left", "a large blue square moving right")
FLOOD = 0.5  # share of unknown text at which prompts are refused
SAME_TEACHER = "give the tokenizer and the text encoder of one model"


def load_tokenizer(folder: Path, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, verified to be one for a token table of `rows` rows.

    Raises FileError where it has no vocabulary, a damaged one, or another model's.
    """
    files = [file for name in TOKENIZER_FILES if (file := folder / name).is_file()]
    states = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _load(folder, rows, states)


@lru_cache(maxsize=2)  # UMT5's takes seconds, and one run asks for it several times
def _load(
    folder: Path, rows: int, states: tuple[tuple[str, int, int], ...]
) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`; `states` are those of the files that are read."""
    names = [name for name, _, _ in states]
    vocabulary = next((folder / name for name in VOCABULARIES if name in names), None)
    if vocabulary is None:
        links = [name for name in VOCABULARIES if (folder / name).is_symlink()]
        why = f"{links[0]} is a link to nothing" if links else f"no {' or '.join(VOCABULARIES)}"
        raise TextEncoderError(
            f"{folder}: holds no vocabulary ({why}), so every word would be unknown",
            "download the tokenizer's files too",
        )
    for name in names:
        if name.endswith(".json"):
            read_json(folder / name)
    check_vocabulary(vocabulary)
    try:
        if vocabulary.suffix == ".model":
            SentencePieceProcessor(model_file=str(vocabulary))
        tokenizer = T5TokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # damaged vocabularies fail in any way
        raise TextEncoderError(f"{folder}: does not load ({one_line(error)})", AGAIN) from error
    _check_size(tokenizer, folder, rows)
    _check_ids(tokenizer, folder)
    return tokenizer


def _check_size(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int) -> None:
    """Raises TextEncoderError where the vocabulary is not one for a table of `rows` rows."""
    # Without tokenizer_config.json transformers adds places for its own marks, beyond the table.
    ids = [number for token, number in tokenizer.get_vocab().items() if not EXTRA.match(token)]
    if max(ids, default=0) >= rows:
        raise TextEncoderError(
            f"{folder}: has ids up to {max(ids)}, the text encoder's table only {rows} rows",
            SAME_TEACHER,
        )
    if len(ids) < (1 - ROWS_WITHOUT_ENTRY) * rows:
        raise TextEncoderError(
            f"{folder}: has {len(ids)} entries, the text encoder's table {rows} rows", SAME_TEACHER
        )


def _check_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises TextEncoderError where special tokens, or those of two prompts, are not as UMT5's."""
    for name, expected in SPECIAL_IDS.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if number != expected:
            raise TextEncoderError(
                f"{folder}: its {name} token has the id {number}, UMT5's has {expected}",
                SAME_TEACHER,
            )
    first, second = (tokenizer(text).input_ids for text in UNLIKE)
    if first == second:
        raise TextEncoderError(
            f"{folder}: {UNLIKE[0]!r} and {UNLIKE[1]!r} become the same tokens", SAME_TEACHER
        )


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer makes of one prompt.

    Attributes:
        ids: with the end mark, not cut.
        unknown: characters that it does not know.
        characters: those of the prompt that are not white space.
    """

    ids: tuple[int, ...]
    unknown: int
    characters: int

    @property
    def count(self) -> int:
        """Tokens of the prompt. A run of unknown characters is one token; it counts as many as it
        has characters, since it would be that long if they were known.
        """
        runs = self.ids.count(SPECIAL_IDS["unk"])
        return len(self.ids) - runs + self.unknown


def tokenise(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tokens:
    """The tokens of a prompt, cleaned as WanPipeline cleans it."""
    text = prompt_clean(prompt)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = tuple(encoded.input_ids)
    unknown = {
        place
        for number, (begin, end) in zip(ids, encoded.offset_mapping, strict=True)
        if number == SPECIAL_IDS["unk"]
        for place in range(begin, end)
        if not text[place].isspace()
    }
    return Tokens(ids, len(unknown), sum(not character.isspace() for character in text))


def describe_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], folder: Path, strict: bool
) -> str:
    """How many tokens `prompts` have, and which share of their text is unknown, in words.

    Args:
        strict: refuse prompts that the tokenizer does not know.

    Raises TextEncoderError where most of their text is unknown, or where unknown text makes two of
    them the same.
    """
    known: dict[tuple[int, ...], str] = {}
    tokens = unknown = characters = 0
    for prompt in dict.fromkeys(prompts):
        made = tokenise(tokenizer, prompt)
        tokens += len(made.ids)
        unknown += made.unknown
        characters += made.characters
        other = known.setdefault(made.ids, prompt)
        if strict and other != prompt and made.unknown:
            raise TextEncoderError(
                f"{folder}: {other[:40]!r} and {prompt[:40]!r} become the same tokens, since "
                f"{made.unknown} of {made.characters} characters are unknown to it",
                "give prompts in the tokenizer's languages, or the teacher's own tokenizer",
            )
    share = unknown / max(1, characters)
    if strict and share > FLOOD:
        raise TextEncoderError(
            f"{folder}: {100 * share:.0f} % of the prompts' characters are unknown to it",
            "give prompts in the tokenizer's languages, or the teacher's own tokenizer",
        )
    return f"{tokens} tokens in {len(known)} prompts, {100 * share:.1f} % of their text unknown"
