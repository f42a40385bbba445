"""The table in use is compared with the file's on every path by which it can be loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, UMT5EncoderModel
from umt5_layouts import LAYOUTS, REFUSED, SHARED, garbage, true_weights, write_layout

from wan_distill.errors import TextEncoderError
from wan_distill.umt5 import evidence, inspect, repair, verify, weights

TRUE = true_weights()[SHARED]


@pytest.fixture
def folder(tmp_path):
    """A text encoder that holds the true table as `shared.weight`, as Wan's do."""
    return write_layout("shared only", tmp_path / "encoder")


def in_use(encoder: UMT5EncoderModel, table: torch.Tensor) -> UMT5EncoderModel:
    """The encoder with another table in use, under the name that looks tokens up alone."""
    parameter = torch.nn.Parameter(table, requires_grad=False)
    encoder.encoder.embed_tokens.weight = parameter
    return encoder


@pytest.mark.parametrize(("row", "column"), [(0, 0), (41, 3), (95, 31)])
def test_one_changed_value_is_noticed_wherever_it_is(folder, row, column):
    encoder, _ = repair.load_text_encoder(folder)
    with torch.no_grad():
        encoder.shared.weight[row, column] += 0.01
    assert verify.verify(encoder, folder).matches is False
    repair.repair(encoder, folder)
    assert verify.verify(encoder, folder).matches


def test_the_table_of_transformers_5_0_is_repaired(folder):
    """Not tied, the table in use uninitialised memory, the file sound."""
    encoder = in_use(UMT5EncoderModel.from_pretrained(folder), garbage())
    verdict = repair.verify_or_repair(encoder, inspect.inspect_text_encoder(folder))
    assert verdict.verdict == "REPAIRED"
    assert torch.equal(encoder.encoder.embed_tokens.weight, TRUE)


def test_equal_but_separate_tables_are_tied(folder):
    encoder = in_use(UMT5EncoderModel.from_pretrained(folder), TRUE.clone())
    verdict = repair.verify_or_repair(encoder, inspect.inspect_text_encoder(folder))
    assert verdict.verdict == "REPAIRED"
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_a_wrong_class_is_refused(folder):
    with pytest.raises(TextEncoderError, match="T5EncoderModel"):
        verify.verify(T5EncoderModel.from_pretrained(folder), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(TextEncoderError, match="UMT5"):
        repair.load_text_encoder(folder)


def test_a_table_on_the_meta_device_cannot_be_verified(folder):
    with torch.device("meta"):
        empty = UMT5EncoderModel(UMT5EncoderModel.config_class.from_pretrained(folder))
    verification = verify.verify(empty, folder)
    assert verification.matches is None and "meta" in verification.reason


def test_a_quantised_table_cannot_be_verified(folder):
    encoder, _ = repair.load_text_encoder(folder)
    verification = verify.verify(in_use(encoder, TRUE.to(torch.int8)), folder)
    assert verification.matches is None and "quantised" in verification.reason
    with pytest.raises(TextEncoderError, match="load it unquantised first"):
        repair.verify_or_repair(encoder, inspect.inspect_text_encoder(folder))


def test_a_table_of_another_shape_does_not_match(folder):
    encoder, _ = repair.load_text_encoder(folder)
    verification = verify.verify(in_use(encoder, TRUE[:-1].clone()), folder)
    assert verification.matches is False and "(95, 32)" in verification.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_rows_are_compared_at_the_loaded_dtype(folder, dtype):
    encoder, _ = repair.load_text_encoder(folder)
    assert verify.verify(in_use(encoder, TRUE.to(dtype)), folder).matches


def test_accelerate_offloading_is_followed(folder):
    from accelerate import cpu_offload

    encoder, verdict = repair.load_text_encoder(folder)
    cpu_offload(encoder, execution_device=torch.device("cpu"))
    assert verify.verify(encoder, folder).matches
    assert weights.fingerprint(encoder) == verdict.fingerprint


def test_the_fingerprint_is_of_every_tensor_however_it_was_stored(tmp_path):
    loaded = [
        repair.load_text_encoder(write_layout(name, tmp_path / str(n)), allow_pickle=True)
        for n, name in enumerate(name for name in LAYOUTS if name not in REFUSED)
    ]
    assert len({verdict.fingerprint for _, verdict in loaded}) == 1
    encoder, verdict = loaded[0]
    for name, parameter in encoder.named_parameters():
        with torch.no_grad():
            kept = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] += 1
            assert weights.fingerprint(encoder) != verdict.fingerprint, name
            parameter.view(-1)[-1] = kept
    assert weights.fingerprint(encoder) == verdict.fingerprint
    assert weights.fingerprint(encoder.bfloat16()) != verdict.fingerprint


def test_of_large_tensors_rows_at_three_places_are_hashed(folder, monkeypatch):
    encoder, _ = repair.load_text_encoder(folder)
    monkeypatch.setattr(weights, "HASHED_WHOLE", 0)
    monkeypatch.setattr(weights, "ROWS", 1)
    before = weights.fingerprint(encoder)
    matrix = encoder.encoder.block[0].layer[1].DenseReluDense.wi_0.weight
    for row in (0, matrix.shape[0] // 2, -1):
        with torch.no_grad():
            kept = matrix[row, 0].clone()
            matrix[row, 0] += 1
            assert weights.fingerprint(encoder) != before
            matrix[row, 0] = kept
    assert weights.fingerprint(encoder) == before


@pytest.mark.parametrize("row", [0, -1])
def test_a_block_that_is_not_the_files_is_refused(folder, row):
    encoder, _ = repair.load_text_encoder(folder)
    with torch.no_grad():
        encoder.encoder.block[1].layer[0].SelfAttention.relative_attention_bias.weight[row] += 1
    with pytest.raises(TextEncoderError, match=r"relative_attention_bias.weight in use is not"):
        repair.verify_or_repair(encoder, inspect.inspect_text_encoder(folder))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_encoder_that_lacks_a_tensor_is_refused(folder, suffix):
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    del stored["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    file.unlink()
    if suffix == ".bin":
        torch.save(stored, folder / "pytorch_model.bin")
    else:
        save_file(stored, file, {"format": "pt"})
    with pytest.raises(TextEncoderError, match=r"lacks 1 tensors, encoder.block.1.*wo.weight"):
        repair.load_text_encoder(folder, allow_pickle=True)


def test_evidence_names_what_is_wrong_with_a_table(folder):
    encoder, _ = repair.load_text_encoder(folder)
    assert evidence.unhealthy(TRUE) == ""
    assert evidence.canary(encoder, TRUE) == ""
    assert "NaN" in evidence.unhealthy(garbage())
    assert "spread" in evidence.unhealthy(TRUE * 1e-30)
    assert "spread" in evidence.unhealthy(TRUE * 1e9)
    assert "constant" in evidence.unhealthy(TRUE.mean(1, keepdim=True).expand_as(TRUE))
    assert "nearly equal" in evidence.canary(encoder, TRUE[:1].expand_as(TRUE))
    assert "NaN" in evidence.canary(encoder, TRUE * float("nan"))
    assert "nearly equal" in evidence.why_alike(torch.zeros(3, 2, 2))[1]
    assert "two embeddings" in evidence.why_alike(torch.arange(3.0).view(3, 1, 1) + 1)[1]


def test_a_remembered_verdict_is_for_the_same_files_and_the_same_transformers(folder, tmp_path):
    _, verdict = repair.load_text_encoder(folder)
    note = tmp_path / "notes" / "encoder.json"
    assert verify.recall(note, "files") is None
    verify.remember(verdict, note, "files")
    assert verify.recall(note, "files") == verdict
    assert verify.recall(note, "other files") is None
    content = json.loads(note.read_text())
    content["verdict"]["transformers"] = "5.0.0"
    note.write_text(json.dumps(content))
    assert verify.recall(note, "files") is None
    note.write_text("{")
    assert verify.recall(note, "files") is None
