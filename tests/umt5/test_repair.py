"""Loading and repairing text encoders whose tables lie in their files in every possible way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel
from umt5_layouts import (
    CONFIG,
    EMBED,
    LAYOUTS,
    REFUSED,
    SHARED,
    garbage,
    true_weights,
    write_layout,
)

from wan_distill.errors import FileError, TextEncoderError
from wan_distill.umt5.inspect import inspect_text_encoder
from wan_distill.umt5.repair import load_text_encoder, repair_on_disk
from wan_distill.umt5.verify import read_rows

IDS = torch.tensor([[5, 17, 60, 1], [9, 9, 44, 1]])
TRUE = true_weights()[SHARED]


def reference_states() -> torch.Tensor:
    """Embeddings of an encoder whose table was put in by hand."""
    model = UMT5EncoderModel(UMT5EncoderModel.config_class(**CONFIG)).eval()
    model.load_state_dict(true_weights() | {EMBED: TRUE})
    return states(model)


def states(encoder: UMT5EncoderModel) -> torch.Tensor:
    with torch.no_grad():
        return encoder(IDS).last_hidden_state


# ------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in REFUSED])
def test_after_our_loader_the_embeddings_are_right(tmp_path, name):
    encoder, verdict = load_text_encoder(write_layout(name, tmp_path / "e"), allow_pickle=True)
    assert verdict.verdict == ("REPAIRED" if "poisoned" in name else "PASS")
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert verdict.rows_compared == verdict.rows_total == len(TRUE)
    torch.testing.assert_close(states(encoder), reference_states(), rtol=0, atol=1e-6)
    said = verdict.explain()
    assert len(said) == 3 and "MISSING is harmless only if" in said[0]
    assert f"{len(TRUE)} of {len(TRUE)} rows" in said[1]


@pytest.mark.parametrize("name", REFUSED)
def test_an_encoder_that_nobody_can_repair_is_refused(tmp_path, name):
    with pytest.raises(TextEncoderError, match=r"original checkpoint|download"):
        load_text_encoder(write_layout(name, tmp_path / "encoder"))


def test_a_file_whose_only_table_is_garbage_is_refused(tmp_path):
    folder = write_layout("shared only", tmp_path / "encoder")
    save_file(true_weights() | {SHARED: garbage()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TextEncoderError, match="no healthy token table"):
        load_text_encoder(folder)


def test_two_different_tables_in_a_pickle_are_judged_as_elsewhere(tmp_path):
    folder = write_layout(".bin both", tmp_path / "encoder")
    torch.save(true_weights() | {EMBED: garbage()}, folder / "pytorch_model.bin")
    _, verdict = load_text_encoder(folder, allow_pickle=True)
    assert verdict.verdict == "REPAIRED" and "shared.weight is healthy" in verdict.reason


def test_two_checkpoints_side_by_side_are_refused(tmp_path):
    """transformers loads the single file; the table of the other one must not be put into it."""
    folder = write_layout("sharded", tmp_path / "encoder")
    other = {name: 1.5 * values for name, values in true_weights().items()}
    save_file(other, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match=r"two checkpoints, model.safetensors and"):
        load_text_encoder(folder)


@pytest.mark.parametrize("name", ["shared only", "poisoned embed", "sharded", ".bin"])
def test_a_variant_is_verified_against_its_own_files(tmp_path, name):
    folder = write_layout("shared only", tmp_path / "encoder", scale=0.5)
    write_layout(name, folder, variant="fp16")
    encoder, _ = load_text_encoder(folder, variant="fp16", allow_pickle=True)
    torch.testing.assert_close(states(encoder), reference_states(), rtol=0, atol=1e-6)
    plain, verdict = load_text_encoder(folder)
    assert verdict.verdict == "PASS" and torch.equal(plain.shared.weight, 0.5 * TRUE)


def test_an_encoder_without_the_variant_is_loaded_plain(tmp_path):
    _, verdict = load_text_encoder(write_layout("sharded", tmp_path / "e"), variant="ema")
    assert verdict.verdict == "PASS"


def test_the_dtype_is_the_one_that_was_asked_for(tmp_path):
    folder = write_layout("shared only", tmp_path / "encoder")
    encoder, _ = load_text_encoder(folder, dtype=torch.bfloat16)
    assert encoder.shared.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------ a clean copy


def stock_states(folder: Path) -> torch.Tensor:
    """Embeddings of the encoder as transformers alone loads it."""
    return states(UMT5EncoderModel.from_pretrained(folder).eval())


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in REFUSED])
def test_a_clean_copy_is_loaded_right_without_us(tmp_path, name):
    source = write_layout(name, tmp_path / "source")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    verdict = repair_on_disk(source, tmp_path / "clean", allow_pickle=True)
    assert verdict.verdict == "REPAIRED" and verdict.keys_in_file == "shared only"
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    clean = inspect_text_encoder(tmp_path / "clean")
    config = json.loads((tmp_path / "clean" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is True
    assert torch.equal(read_rows(clean.tables[SHARED]), TRUE)
    torch.testing.assert_close(
        stock_states(tmp_path / "clean"), reference_states(), rtol=0, atol=1e-6
    )
    leftovers = [file.name for file in tmp_path.iterdir()]
    assert sorted(leftovers) == ["clean", "source"]


def test_a_clean_copy_of_shards_has_an_index_of_all_their_tensors(tmp_path):
    source = write_layout("sharded", tmp_path / "source")
    shards = {file.name: file for file in source.glob("*.safetensors")}
    weights = {name: t for file in shards.values() for name, t in load_file(file).items()}
    bad = "model-00001-of-00003.safetensors"
    save_file(load_file(shards[bad]) | {EMBED: garbage()}, shards[bad], {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][EMBED] = bad
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    repair_on_disk(source, tmp_path / "clean")
    copied = json.loads((tmp_path / "clean" / "model.safetensors.index.json").read_text())
    assert copied["weight_map"].keys() == weights.keys()
    assert copied["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    for name, file in copied["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "clean" / file)[name], weights[name])


def test_a_shard_of_the_bad_table_alone_is_not_copied(tmp_path):
    source = write_layout("sharded", tmp_path / "source")
    save_file({EMBED: garbage()}, source / "extra.safetensors", {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][EMBED] = "extra.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    repair_on_disk(source, tmp_path / "clean")
    assert not (tmp_path / "clean" / "extra.safetensors").exists()
    torch.testing.assert_close(
        stock_states(tmp_path / "clean"), reference_states(), rtol=0, atol=1e-6
    )


def test_a_clean_copy_of_a_variant_has_plain_names(tmp_path):
    source = write_layout("shared only", tmp_path / "source", scale=0.5)
    write_layout("poisoned embed", source, variant="fp16")
    repair_on_disk(source, tmp_path / "clean", variant="fp16")
    torch.testing.assert_close(
        stock_states(tmp_path / "clean"), reference_states(), rtol=0, atol=1e-6
    )


def test_nothing_is_left_of_a_copy_that_failed(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("wan_distill.umt5.repair._copy_settings", fail)
    with pytest.raises(OSError, match="no space"):
        repair_on_disk(write_layout("shared only", tmp_path / "source"), tmp_path / "clean")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
