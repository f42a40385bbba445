"""Tied weights: every layout of the file, on the installed transformers; tests/compat covers the
other versions.
"""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import time
import warnings

import pytest
import torch
from conftest import REPOSITORY, SMALL, write_pipeline
from transformers import T5EncoderModel, UMT5EncoderModel
from umt5_layouts import CONFIG, EMBED, LAYOUTS, SHARED, garbage, true_weights, write_layout

import test_umt5_weights as script
import train_distillation
from wan_distill import errors
from wan_distill.umt5 import evidence, inspect, repair, silence, tables, verify

REFUSED = ("both healthy but different", "neither")
IDS = torch.tensor([[5, 17, 60, 1], [9, 9, 44, 1]])
TRUE = true_weights()[SHARED]


@pytest.fixture
def layout(tmp_path):
    return lambda name, **how: write_layout(name, tmp_path / name.replace(" ", "_"), **how)


def reference_states() -> torch.Tensor:
    """Embeddings of an encoder whose table was put in by hand."""
    model = UMT5EncoderModel(UMT5EncoderModel.config_class(**CONFIG)).eval()
    model.load_state_dict(true_weights() | {EMBED: TRUE})
    with torch.no_grad():
        return model(IDS).last_hidden_state


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in REFUSED])
def test_after_our_loader_the_embeddings_are_right(layout, name):
    encoder, verdict = repair.load_text_encoder(layout(name), allow_pickle=True)
    assert verdict.verdict == ("REPAIRED" if "poisoned" in name else "PASS")
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert verdict.rows_compared == verdict.rows_total == len(TRUE)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(IDS).last_hidden_state, reference_states(), rtol=0, atol=1e-6
        )
    assert len(verdict.explain()) == 3 and str(len(TRUE)) in verdict.explain()[1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_can_repair_is_refused(layout, name):
    with pytest.raises(errors.TextEncoderError, match=r"original checkpoint|download"):
        repair.load_text_encoder(layout(name))


def test_a_file_whose_only_table_is_garbage_is_refused(layout, tmp_path):
    from safetensors.torch import save_file

    folder = layout("shared only")
    save_file(true_weights() | {SHARED: garbage()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(errors.TextEncoderError, match="no healthy token table"):
        repair.load_text_encoder(folder)


def test_evidence_names_what_is_wrong_with_a_table(layout):
    encoder, _ = repair.load_text_encoder(layout("shared only"))
    assert evidence.unhealthy(TRUE) == "" and evidence.canary(encoder, TRUE) == ""
    assert "NaN" in evidence.unhealthy(garbage())
    assert "spread" in evidence.unhealthy(TRUE * 1e-30) and "spread" in evidence.unhealthy(
        TRUE * 1e9
    )
    assert "constant" in evidence.unhealthy(TRUE.mean(1, keepdim=True).expand_as(TRUE))
    assert "nearly equal" in evidence.canary(encoder, TRUE[:1].expand_as(TRUE))
    assert "NaN" in evidence.canary(encoder, TRUE * float("nan"))


def test_inspection_needs_neither_torch_nor_transformers(layout):
    code = (
        "import sys, json\nfrom wan_distill.umt5.inspect import inspect_text_encoder as look\n"
        "print(json.dumps([look(f).keys_in_file for f in "
        f"{[str(layout(n)) for n in LAYOUTS]!r}]))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [
        "shared only",
        "embed_tokens only",
        "both, equal",
        "both, different",
        "both, different",
        "both, different",
        "neither",
        "shared only",
        "shared only",
    ]


def test_a_table_that_is_not_the_files_is_seen(layout):
    folder = layout("shared only")
    encoder, _ = repair.load_text_encoder(folder)
    with torch.no_grad():
        encoder.shared.weight[41, 3] += 0.01
    assert verify.verify(encoder, folder).matches is False
    repair.repair(encoder, folder)
    assert verify.verify(encoder, folder).matches


def test_what_transformers_5_0_does_is_repaired(layout):
    """Untied, the table in use left as uninitialised memory, the file sound."""
    folder = layout("shared only")
    encoder = UMT5EncoderModel.from_pretrained(folder)
    encoder.encoder.embed_tokens.weight = torch.nn.Parameter(garbage())
    verdict = repair.verify_or_repair(encoder, inspect.inspect_text_encoder(folder))
    assert verdict.verdict == "REPAIRED" and torch.equal(encoder.encoder.embed_tokens.weight, TRUE)


def test_equal_but_separate_tables_are_tied(layout):
    folder = layout("shared only")
    encoder = UMT5EncoderModel.from_pretrained(folder)
    encoder.encoder.embed_tokens.weight = torch.nn.Parameter(TRUE.clone())
    verdict = repair.verify_or_repair(encoder, inspect.inspect_text_encoder(folder))
    assert (
        verdict.verdict == "REPAIRED"
        and encoder.shared.weight is encoder.encoder.embed_tokens.weight
    )


def test_a_wrong_class_is_refused(layout):
    folder = layout("shared only")
    with pytest.raises(errors.TextEncoderError, match="T5EncoderModel"):
        verify.verify(T5EncoderModel.from_pretrained(folder), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(errors.TextEncoderError, match="UMT5"):
        repair.load_text_encoder(folder)


def test_meta_and_quantised_tables_are_said_to_be_unverifiable(layout):
    folder = layout("shared only")
    with torch.device("meta"):
        empty = UMT5EncoderModel(UMT5EncoderModel.config_class.from_pretrained(folder))
    assert (
        verify.verify(empty, folder).matches is None
        and "meta" in verify.verify(empty, folder).reason
    )
    encoder, _ = repair.load_text_encoder(folder)
    encoder.encoder.embed_tokens.weight = torch.nn.Parameter(
        TRUE.to(torch.int8), requires_grad=False
    )
    assert (
        verify.verify(encoder, folder).matches is None
        and "quantised" in verify.verify(encoder, folder).reason
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_rows_are_compared_at_the_loaded_dtype(layout, dtype):
    folder = layout("shared only")
    encoder, _ = repair.load_text_encoder(folder)
    encoder.encoder.embed_tokens.weight = torch.nn.Parameter(TRUE.to(dtype), requires_grad=False)
    assert verify.verify(encoder, folder).matches


def test_accelerate_offloading_is_followed(layout):
    from accelerate import cpu_offload

    folder = layout("shared only")
    encoder, verdict = repair.load_text_encoder(folder)
    cpu_offload(encoder, execution_device=torch.device("cpu"))
    assert (
        verify.verify(encoder, folder).matches
        and verify.fingerprint(encoder) == verdict.fingerprint
    )


def test_the_fingerprint_follows_the_table_and_nothing_else(layout):
    loaded = [
        repair.load_text_encoder(layout(name), allow_pickle=True)
        for name in LAYOUTS
        if name not in REFUSED
    ]
    assert len({verdict.fingerprint for _, verdict in loaded}) == 1
    encoder, verdict = loaded[0]
    with torch.no_grad():
        encoder.shared.weight[0, 0] += 1
    assert verify.fingerprint(encoder) != verdict.fingerprint


# ------------------------------------------------------------------------------------ the real size


def test_the_real_encoder_is_inspected_in_seconds(tmp_path):
    """A sparse file of the hosted encoder's shape: 256384 x 4096 in bfloat16."""
    shape = [256384, 4096]
    size = shape[0] * shape[1] * 2
    header = json.dumps(
        {SHARED: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
    ).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "umt5", "architectures": ["UMT5EncoderModel"]})
    )
    started = time.perf_counter()
    found = inspect.inspect_text_encoder(tmp_path)
    assert found.keys_in_file == "shared only" and time.perf_counter() - started < 2
    rows = tables.rows_to_compare(tuple(shape), 2)
    assert 4000 < len(rows) < 0.1 * shape[0] and rows[0] == 0 and rows[-1] == shape[0] - 1


# ---------------------------------------------------------------------------------------- silencing


def test_silencing_ends_with_its_block_even_after_an_error():
    with pytest.raises(RuntimeError), silence.silence_tied_weight_report():
        raise RuntimeError
    assert logged(script.REPORT)


def test_the_warnings_path_is_covered_too():
    newly = (
        "Some weights of UMT5EncoderModel were not initialized from the model checkpoint at x and "
        "are newly "
        "initialized: ['encoder.embed_tokens.weight']"
    )
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: shown.append(str(message))
        with silence.silence_tied_weight_report():
            warnings.warn(newly, stacklevel=1)
            warnings.warn(newly.replace("embed_tokens", "block.0"), stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert [newly in s for s in shown] == [False, False]


def test_verbose_shows_everything():
    with silence.silence_tied_weight_report(verbose=True):
        assert logged(script.REPORT)


def logged(message: str) -> bool:
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    logger = logging.getLogger(script.LOADERS[0])
    logger.addHandler(handler)
    try:
        logger.warning(message)
    finally:
        logger.removeHandler(handler)
    return bool(seen)


# ----------------------------------------------------------------------------- the script, the disk


def test_repair_writes_a_clean_copy_and_leaves_the_source_alone(layout, tmp_path):
    source = layout("poisoned embed")
    before = {f.name: f.read_bytes() for f in source.iterdir()}
    assert script.main(["--teacher_path", str(source), "--repair", str(tmp_path / "clean")]) == 0
    assert {f.name: f.read_bytes() for f in source.iterdir()} == before
    found = inspect.inspect_text_encoder(tmp_path / "clean")
    assert found.keys_in_file == "shared only" and found.tie_word_embeddings is True
    assert torch.equal(verify.read_rows(found.tables[SHARED]), TRUE)
    assert (
        script.main(["--teacher_path", str(source), "--repair", str(tmp_path / "clean")]) == 2
    )  # never overwrites


@pytest.mark.parametrize(
    "name, code, verdict",
    [
        ("shared only", 0, "PASS"),
        ("poisoned embed", 0, "REPAIRED"),
        ("poisoned shared", 0, "REPAIRED"),
        ("both healthy but different", 1, "BROKEN"),
        ("neither", 1, "BROKEN"),
        ("sharded", 0, "PASS"),
    ],
)
def test_the_scripts_verdict_and_exit_code(layout, capsys, name, code, verdict):
    assert script.main(["--teacher_path", str(layout(name)), "--json"]) == code
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict


def test_the_script_refuses_bad_arguments(layout, capsys):
    assert script.main(["--teacher_path", "no such place"]) == 2
    assert script.main(["--teacher_path", str(layout(".bin"))]) == 2
    assert "--allow_pickle" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        script.main(["--nonsense"])
    assert error.value.code == 2


def test_a_damaged_file_is_refused(layout):
    folder = layout("shared only")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(errors.TextEncoderError, match="truncated"):
        inspect.inspect_text_encoder(folder)


# --------------------------------------------------------------------------- in the training script


def poisoned_pipeline(folder, second_table) -> list[str]:
    """Arguments of a one-update run on a pipeline whose file holds a second table beside the true
    one.
    """
    from safetensors.torch import load_file, save_file

    file = write_pipeline(folder / "teacher") / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {EMBED: second_table(weights[SHARED])}, file, {"format": "pt"})
    (folder / "prompts.txt").write_text("a red ball\na blue ball\n")
    flags = {k: v for k, v in SMALL.items() if k not in ("negative_prompt", "mixed_precision")}
    return [
        f"--teacher_path={folder / 'teacher'}",
        f"--prompts={folder / 'prompts.txt'}",
        f"--output_dir={folder / 'out'}",
        "--method=trajectory",
        "--negative_prompt=",
        "--mixed_precision=no",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def test_training_on_a_poisoned_teacher_repairs_it_and_says_so(tmp_path, capsys):
    arguments = poisoned_pipeline(tmp_path, lambda table: torch.full_like(table, float("nan")))
    assert train_distillation.main(arguments) == 0
    assert "Repaired in memory" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "run.json").read_text())["text_encoder"]
    assert told["verdict"] == "REPAIRED" and told["fingerprint"]


def test_training_on_an_undecidable_teacher_is_refused_before_anything_is_trained(tmp_path, capsys):
    arguments = poisoned_pipeline(tmp_path, lambda table: table.flip(0).contiguous())
    assert train_distillation.main(arguments) == 2
    assert "both look healthy" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))
