"""Stored embeddings of prompts: what is read is what was written, or it is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.errors import Halted, UsageError


@pytest.fixture
def embeddings(tmp_path) -> PromptEmbeddings:
    return PromptEmbeddings(tmp_path, {"encoder": "one"}, 6, torch.device("cpu"))


def test_prompts_are_kept_at_their_length_and_padded(embeddings):
    rows = torch.arange(1.0, 9.0).reshape(4, 2)
    embeddings.store("long", rows)
    embeddings.store("short", torch.cat([rows[:1], torch.zeros(3, 2)]))
    batch = embeddings.batch(["short", "long", "short"])
    assert batch.shape == (3, 6, 2)
    assert torch.equal(batch[1, :4], rows) and not batch[1, 4:].any()
    assert torch.equal(batch[0, :1], rows[:1]) and not batch[[0, 2], 1:].any()


def test_a_prompt_is_encoded_once(embeddings):
    asked = []

    def encode(prompt):
        asked.append(prompt)
        return torch.full((4, 2), float(len(asked)))

    embeddings.fill([*PROMPTS, *PROMPTS], encode, shown=False)
    embeddings.fill([*PROMPTS, "a new one"], encode, shown=False)
    assert asked == [*PROMPTS, "a new one"]


@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_an_embedding_that_changed_on_the_disk_is_refused(embeddings, damage):
    embeddings.store("a cat", torch.ones(4, 2))
    file = embeddings.file("a cat")
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] + b"x" if damage == "altered" else data[:40])
    with pytest.raises(UsageError, match=r"a damaged prompt embedding, .*delete it and run again"):
        embeddings.batch(["a cat"])


def test_an_embedding_that_is_not_finite_is_not_stored(embeddings):
    with pytest.raises(Halted, match="not finite"):
        embeddings.store("a cat", torch.tensor([[1.0, float("nan")]]))
    assert embeddings.missing(["a cat"]) == ["a cat"]
