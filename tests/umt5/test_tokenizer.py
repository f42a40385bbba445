"""A vocabulary that is missing, damaged or another model's never makes an embedding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_distill.errors import FileError, TextEncoderError
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.umt5.text import load_text, tokenizer_of
from wan_distill.umt5.tokenizer import describe_prompts, load_tokenizer, tokenise

ROWS = 433


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded teacher's tokenizer, to be changed."""
    return shutil.copytree(EMBEDDED_TEACHER / "tokenizer", tmp_path / "tokenizer")


@pytest.fixture
def pipeline(random_teacher: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may change."""
    return shutil.copytree(random_teacher, tmp_path / "teacher")


def change(file: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


# ------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize(
    "left", [("spiece.model",), ("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")]
)
def test_either_vocabulary_alone_is_enough(left, folder):
    for file in folder.iterdir():
        if file.name not in left:
            file.unlink()
    ids = load_tokenizer(folder, ROWS)("a small red circle moving left").input_ids
    assert ids == [260, 263, 271, 265, 261, 269, 1]


def keep_settings(folder: Path) -> None:
    for name in ("tokenizer.json", "spiece.model"):
        (folder / name).unlink()


def link_to_nothing(folder: Path) -> None:
    keep_settings(folder)
    (folder / "tokenizer.json").symlink_to(folder / "blobs" / "abc")


def pointer(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        keep_settings(folder)
        (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n")

    return write


def cut(name: str) -> Callable[[Path], None]:
    def halve(folder: Path) -> None:
        data = (folder / name).read_bytes()
        keep_settings(folder)
        (folder / name).write_bytes(data[: len(data) // 2])

    return halve


def garble_settings(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")


def swap_special_ids(content: dict) -> None:
    """The unknown token where the end mark was, and the other way round."""
    for token in content["added_tokens"]:
        token["id"] = {1: 2, 2: 1}.get(token["id"], token["id"])
    pieces = content["model"]["vocab"]
    pieces[1], pieces[2] = pieces[2], pieces[1]


def shorten(content: dict) -> None:
    content["model"]["vocab"] = content["model"]["vocab"][:300]


def lengthen(content: dict) -> None:
    content["model"]["vocab"] += [[f"more {i}", -9.0] for i in range(20)]


def know_nothing(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[3:] = [[f"\x01{i}", -9.0] for i in range(len(vocabulary) - 3)]


def editing(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "tokenizer.json", edit)


@pytest.mark.parametrize(
    ("damage", "reason", "remedy"),
    [
        (shutil.rmtree, "holds no vocabulary", "download the tokenizer's files"),
        (keep_settings, "holds no vocabulary", "download the tokenizer's files"),
        (link_to_nothing, "tokenizer.json is a link to nothing", "download"),
        (pointer("tokenizer.json"), "pointer of Git LFS", "git lfs pull"),
        (pointer("spiece.model"), "pointer of Git LFS", "git lfs pull"),
        (cut("tokenizer.json"), "tokenizer.json: cannot be read", "download it again"),
        (cut("spiece.model"), "does not load (INTERNAL: could not parse", "download it again"),
        (garble_settings, "tokenizer_config.json: cannot be read", "download it again"),
        (editing(shorten), "has 300 entries, the text encoder's table 433 rows", "of one model"),
        (editing(lengthen), "has ids up to 452", "of one model"),
        (editing(swap_special_ids), "its eos token has the id 2, UMT5's has 1", "of one model"),
        (editing(know_nothing), "become the same tokens", "of one model"),
    ],
)
def test_another_vocabulary_is_refused(damage, reason, remedy, folder):
    damage(folder)
    with pytest.raises(FileError) as error:
        load_tokenizer(folder, ROWS)
    assert reason in error.value.reason and remedy in error.value.remedy


def test_a_table_may_be_padded_a_little(folder):
    """UMT5's has 256384 rows for 256000 pieces."""
    assert len(load_tokenizer(folder, ROWS + 4)) == ROWS
    with pytest.raises(TextEncoderError, match="433 entries"):
        load_tokenizer(folder, ROWS + 5)
    with pytest.raises(TextEncoderError, match=r"ids up to 432, .* only 432 rows"):
        load_tokenizer(folder, ROWS - 1)


def test_an_encoder_without_a_size_is_refused(pipeline):
    change(pipeline / "text_encoder" / "config.json", lambda c: c.update(vocab_size="433"))
    with pytest.raises(TextEncoderError, match="gives 433 as vocab_size"):
        tokenizer_of(pipeline)


# ---------------------------------------------------------------------------------------- prompts


def test_unknown_text_is_counted_by_its_characters(folder):
    tokenizer = load_tokenizer(folder, ROWS)
    known = tokenise(tokenizer, "a small  red circle ")
    assert known.ids == (260, 263, 271, 265, 1)
    assert (known.unknown, known.characters, known.count) == (0, 15, 5)
    mixed = tokenise(tokenizer, "a 一只猫 &amp; x")
    assert (mixed.unknown, mixed.characters) == (4, 6)  # "&" is unknown too
    assert mixed.count == len(mixed.ids) + 2


def test_prompts_are_described_and_unknown_ones_refused(folder):
    tokenizer = load_tokenizer(folder, ROWS)
    prompts = ["a red circle", "a blue square", "a red circle"]
    said = describe_prompts(tokenizer, prompts, folder, strict=True)
    assert said == "8 tokens in 2 prompts, 0.0 % of their text unknown"
    chinese = ["红", "蓝"]
    with pytest.raises(TextEncoderError, match="'红' and '蓝' become the same tokens"):
        describe_prompts(tokenizer, [*prompts, *chinese], folder, strict=True)
    with pytest.raises(TextEncoderError, match="100 % of the prompts' characters are unknown"):
        describe_prompts(tokenizer, chinese[:1], folder, strict=True)
    assert "100.0 %" in describe_prompts(tokenizer, chinese, folder, strict=False)


# ------------------------------------------------------------------------- tokenizer and encoder


def test_the_verdict_is_on_both(pipeline):
    _, tokenizer, verdict = load_text(pipeline)
    assert verdict.verdict == "PASS" and verdict.entries == len(tokenizer) == ROWS
    assert 0.1 < verdict.difference < 3
    assert "The tokenizer has 433 entries" in verdict.explain()[1]
    other = shutil.copytree(pipeline, pipeline.with_name("other"))
    change(other / "tokenizer" / "tokenizer_config.json", lambda c: c.update(model_max_length=9))
    changed = load_text(other)[2]
    assert changed.tokenizer != verdict.tokenizer and changed.fingerprint == verdict.fingerprint


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("encoder.final_layer_norm.weight", 0.0, "nearly equal embeddings"),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", float("nan"), "NaN"),
    ],
)
def test_an_encoder_that_does_not_tell_prompts_apart_is_refused(name, value, reason, pipeline):
    file = pipeline / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    stored[name] = torch.full_like(stored[name], value)
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(TextEncoderError, match=reason):
        load_text(pipeline)
