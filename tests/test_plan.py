"""The plan: predicted memory against measured memory, arithmetic against formulas, and what stops a
run beforehand.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.denoiser import Denoiser
from wan_distill.planning import needs, plan, preflight, trace
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.checks import resolve
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.system.runtime import Runtime
from wan_distill.training.learner import Learner

A14B = dict(
    num_attention_heads=40,
    attention_head_dim=128,
    ffn_dim=13824,
    num_layers=40,
    text_dim=4096,
    freq_dim=256,
    in_channels=16,
    out_channels=16,
    patch_size=[1, 2, 2],
)
MIDDLE = A14B | dict(
    num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=6, text_dim=64
)

CLIP = [
    "--height",
    "32",
    "--width",
    "32",
    "--num_frames",
    "5",
    "--prompts",
    str(EMBEDDED_TEACHER / "prompts.txt"),
]


def teacher_of(transformer: dict, tmp_path, **changes) -> TeacherInfo:
    settings = dict(
        source="random",
        folder=tmp_path,
        name="random",
        embedded=False,
        boundary_ratio=0.875,
        expand_timesteps=False,
        transformer=transformer,
        vae={},
    )
    return TeacherInfo(**settings | changes)


def measured_update(config: Config, info: TeacherInfo) -> trace.Ledger:
    """A ledger of everything alive during two real updates, model and optimizer included."""
    ledger = trace.Ledger()
    shape = needs.shape_of(config, info)
    with ledger:
        model = WanTransformer3DModel(**{k: v for k, v in shape.transformer}).requires_grad_(False)
        add_adapter(
            model,
            "student",
            rank=config.rank,
            alpha=config.lora_alpha,
            layers=config.lora_layers,
            seed=0,
        )
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        denoiser = Denoiser({"high": model}, config.boundary)
        learner = Learner("student", adapter_parameters(model, "student"), config, 2)
        x = torch.randn(config.train_batch_size, *shape.latents)
        sigma = torch.full((config.train_batch_size,), 0.9, dtype=torch.float64)
        prompt = torch.randn(config.train_batch_size, shape.text, info.transformer["text_dim"])
        for _ in range(2):
            with denoiser.training("student"):
                loss = (denoiser.velocity(x, sigma, prompt, role="student") - x).square().mean()
                loss.backward()
            learner.update(Runtime(config), loss)
    return ledger


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_peak_of_a_middling_model_is_within_a_tenth_of_the_measured_one(
    checkpointing, tmp_path
):
    info = teacher_of(MIDDLE, tmp_path)
    config = resolve(
        Config(
            teacher_path="random",
            method="trajectory",
            height=64,
            width=64,
            num_frames=17,
            mixed_precision="no",
            rank=8,
            max_sequence_length=32,
            gradient_checkpointing=checkpointing,
        ),
        info,
    )
    predicted = needs.estimate(config, info).peak
    measured = measured_update(config, info).peak
    assert predicted == pytest.approx(measured, rel=0.1)


def test_predicted_peak_of_the_embedded_teacher_is_within_a_tenth_of_the_measured_one():
    config = Config(train_batch_size=8)
    info = read_teacher(config)
    config = resolve(config, info)
    assert needs.estimate(config, info).peak == pytest.approx(
        measured_update(config, info).peak, rel=0.1
    )


def test_the_graph_is_what_autograd_says_it_saves(tmp_path):
    """Independent of the ledger: autograd's own hooks see every tensor that is kept for backward."""
    info = teacher_of(MIDDLE, tmp_path)
    config = resolve(
        Config(
            teacher_path="random",
            method="trajectory",
            height=64,
            width=64,
            num_frames=17,
            mixed_precision="no",
            rank=8,
            max_sequence_length=32,
            gradient_checkpointing=False,
        ),
        info,
    )
    shape = needs.shape_of(config, info)
    model = WanTransformer3DModel(**dict(shape.transformer)).requires_grad_(False)
    add_adapter(model, "student", rank=8, alpha=8, layers=config.lora_layers, seed=0)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(
            torch.randn(1, *shape.latents), torch.tensor([900.0]), torch.randn(1, 32, 64)
        )
    assert trace.trace(shape).graph == pytest.approx(sum(saved.values()), rel=0.1)
    del output


def test_a14b_is_described_without_weights(tmp_path):
    info = teacher_of(A14B, tmp_path)
    config = resolve(Config(teacher_path="random"), info)
    cost = trace.trace(needs.shape_of(config, info))
    assert cost.parameters == 14_288_491_584  # as the hosted files' headers sum to
    assert needs.shape_of(config, info).tokens == 21 * 30 * 52
    # Matrices act on every token (text keys and values: a few); attention adds two products of
    # tokens^2 * width.
    tokens, width, layers = 32760, 5120, 40
    linear = (
        2 * tokens * layers * (6 * width**2 + 2 * width * 13824) + 2 * 512 * layers * 2 * width**2
    )
    attention = 4 * layers * width * (tokens**2 + tokens * 512)
    adapters = 2 * tokens * cost.adapter
    assert cost.forward_flops == pytest.approx(linear + attention + adapters, rel=0.01)
    text = plan.describe_needs(config, info)
    assert (
        "32760 tokens" in text
        and "14.3B parameters" in text
        and "141 GB   --base_precision bf16" in text
    )
    peaks = {p: needs.estimate(config, info, p).peak for p in ("bf16", "fp8", "nf4")}
    assert peaks["bf16"] - peaks["fp8"] > 13e9 and peaks["fp8"] - peaks["nf4"] > 6e9
    # The default dmd update outgrows an 80 GB card, and the plan says what makes it fit.
    lighter = dataclasses.replace(config, score_draws=1, diversity_weight=0.0)
    assert peaks["bf16"] > 80e9 > 76e9 > needs.estimate(lighter, info).peak
    assert "80 GB   --base_precision fp8 --num_frames 81 --score_draws 1 (peak" in text


def test_what_fits_never_promises_more_than_the_card_has(tmp_path):
    info = teacher_of(A14B, tmp_path)
    config = resolve(Config(teacher_path="random"), info)
    fits = needs.what_fits(config, info)
    assert list(fits) == [24, 48, 80, 141] and all(fits.values())
    for card, text in fits.items():
        assert float(text.split("peak ")[1].split()[0]) < card


def test_dry_run_prints_the_plan_and_loads_no_weights(
    random_teacher, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    flags = [
        "--teacher_path",
        str(random_teacher),
        "--output_dir",
        str(tmp_path / "out"),
        "--dry_run",
        *CLIP,
    ]
    assert train_distillation.main(flags) == 0
    shown = capsys.readouterr().out
    for heading in ("Model", "Memory", "Disk", "Work", "Time", "Cards", "Versions", "Files", "RAM"):
        assert any(line.startswith(heading) for line in shown.splitlines()), heading
    assert not (tmp_path / "out").exists()


def test_the_plan_knows_what_the_warm_start_has_solved(small_config, tmp_path):
    """Neither the disk nor the arithmetic of samples that are taken over is asked for."""
    config = small_config(method="dmd", real_score="samples", num_trajectories=40)
    solved = tmp_path / "first" / "trajectories" / "abc" / "00000.safetensors"
    solved.parent.mkdir(parents=True)
    warm = dataclasses.replace(config, init_student_from=str(tmp_path / "first"))
    info = read_teacher(config)
    cost = trace.trace(needs.shape_of(config, info))
    sizes = [needs.disk_needs(c, info, cost)["for solved samples"] for c in (config, warm)]
    assert sizes[0] == sizes[1] == 40 * (4 + 1) * 4 * math.prod(info.latent_shape(config))
    solved.write_bytes(bytes(int(0.75 * 40 * 4 * 4 * math.prod(info.latent_shape(config)))))
    assert needs.disk_needs(warm, info, cost)["for solved samples"] == sizes[0] * (1 + 1) / (4 + 1)
    assert needs.arithmetic(warm, info, cost)[0] == pytest.approx(
        needs.arithmetic(config, info, cost)[0] / 4
    )


def test_a_console_without_the_characters_shows_escapes(random_teacher, tmp_path):
    """As on Windows, where a pipe is cp1252 and Wan's negative prompt Chinese."""
    command = [
        sys.executable,
        str(REPOSITORY / "train_distillation.py"),
        "--teacher_path",
        str(random_teacher),
        "--method",
        "dmd",
        "--dry_run",
        "--output_dir",
        str(tmp_path / "out"),
        *CLIP,
    ]
    ended = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False
    )
    assert ended.returncode == 0 and b"--negative_prompt \\u8272" in ended.stdout, ended.stderr[
        -1000:
    ]


@pytest.fixture
def broken(random_teacher, tmp_path, capsys):
    """Copies the teacher, lets a test break the copy, and returns what a dry run says about it."""
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")

    def complaint(damage=lambda folder: None) -> str:
        damage(folder)
        flags = [
            "--teacher_path",
            str(folder),
            "--output_dir",
            str(tmp_path / "out"),
            "--dry_run",
            *CLIP,
        ]
        assert train_distillation.main(flags) == 2
        return capsys.readouterr().err

    return complaint


def test_a_missing_expert_is_named(broken):
    said = broken(
        lambda folder: (folder / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    )
    assert "transformer_2" in said and "no weight file" in said


def test_a_truncated_expert_is_named(broken):
    def cut(folder):
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    assert "diffusion_pytorch_model.safetensors" in broken(cut)


def test_weights_of_another_shape_are_named(broken):
    def swap(folder):
        file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["proj_out.weight"] = torch.zeros(3, 3)
        save_file(weights, file, {"format": "pt"})

    said = broken(swap)
    assert "transformer_2" in said and "proj_out.weight" in said


def test_too_little_disk_stops_the_run(broken, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage(10, 10, 0))
    assert "--output_dir" in broken()


def test_too_little_memory_stops_the_run(broken, monkeypatch):
    import psutil

    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    assert "of host memory" in broken()


def test_an_old_package_stops_the_run(broken, monkeypatch):
    real = preflight.importlib.metadata.version
    monkeypatch.setattr(
        preflight.importlib.metadata,
        "version",
        lambda name: "0.1" if name == "diffusers" else real(name),
    )
    assert "diffusers 0.1: need >=" in broken()


def test_out_of_memory_says_what_to_try_by_saving(tmp_path):
    info = teacher_of(MIDDLE, tmp_path)
    config = resolve(
        Config(
            teacher_path="random",
            method="dmd",
            height=64,
            width=64,
            num_frames=17,
            gradient_checkpointing=False,
            max_sequence_length=32,
        ),
        info,
    )
    with (
        pytest.raises(UsageError) as raised,
        needs.explain_out_of_memory(config, info, "training the high expert"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    said = str(raised.value)
    assert (
        "while training the high expert" in said and "--gradient_checkpointing saves about" in said
    )
    saved = [float(part.split("about ")[1].split()[0]) for part in said.split("; ")[2:]]
    assert len(saved) > 2 and saved == sorted(saved, reverse=True)
