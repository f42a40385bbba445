"""The runs that users make: another teacher than the embedded one, default flags and so bf16, only
sizes and counts made small; to the very end, and once more with one update more.

    python -m pytest tests/journeys/test_real_settings.py -m "journey or long"     every option
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_flags
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline
from processes import compare
from random_teachers import write_pipeline

import train_distillation
from wan_distill.layout import LORA_FILE
from wan_distill.training.metrics import read_lines

# What tiny_flags sets and users do not; and what the defaults decide by size, as they do for A14B.
AS_USERS_DO = dict(
    mixed_precision="bf16",
    gradient_checkpointing=True,
    negative_prompt=None,
    evaluation="pairs",
    eval_samples=2,
    evaluate=None,
    save_merged=None,
    monitor_steps=2,
    monitor_samples=2,
    validation_steps=2,
    train_batch_size=None,
    sample_batch_size=None,
    num_trajectories=6,
    teacher_steps=4,
)
RUNS = {
    "trajectory": dict(method="trajectory"),
    "default": {},
    "dmd samples": dict(method="dmd", real_score="samples"),
    "consistency": dict(method="consistency"),
    "merged": dict(method="trajectory", save_merged=True),
    "fp8": dict(method="dmd", base_precision="fp8"),
    "int8": dict(method="trajectory", base_precision="int8"),
    "nf4": dict(method="dmd", base_precision="nf4"),
    "offload": dict(method="dmd", offload=True),
    "8-bit Adam": dict(method="dmd", use_8bit_adam=True),
    "compile": dict(method="dmd", compile=True),
    "kept attention": dict(method="dmd", keep_attention=True),
    "deterministic": dict(method="dmd", deterministic=True),
}
SHORT = ("trajectory", "default")


@pytest.fixture(scope="module")
def strangers_teacher(random_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that nobody tuned for, in a folder of its own name."""
    return Path(shutil.copytree(random_teacher, tmp_path_factory.mktemp("hub") / "Stranger-T2V"))


def flags(teacher: Path, out: Path, **changes: object) -> list[str]:
    return tiny_flags(teacher, out, **(AS_USERS_DO | changes))


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in RUNS],
)
def test_a_run_as_users_make_it_ends_well_loads_and_goes_on(
    name: str,
    strangers_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    # A block that falls back to run uncompiled raises, instead of being named in a warning.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert train_distillation.main(flags(strangers_teacher, out, **RUNS[name])) == 0
    lines = read_lines(out / "metrics.jsonl")
    assert {line["expert"] for line in lines} == {"high", "low"}
    assert all(math.isfinite(line["student_loss"]) for line in lines)
    assert (out / "evaluation.json").exists() and "clips" in capsys.readouterr().out
    assert sampled(strangers_teacher, out).isfinite().all()
    last = f"{AS_USERS_DO['num_trajectories'] - 1:06d}.safetensors"
    assert name not in SHORT or len([*out.glob(f"handovers/*/{last}")]) == 1  # solved once
    longer = flags(strangers_teacher, out, max_train_steps=3, **RUNS[name])
    assert train_distillation.main(longer) == 0
    assert "Going on from" in capsys.readouterr().out


@pytest.mark.long
def test_a_student_is_refined_as_users_do_it(
    strangers_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_distillation.main(flags(strangers_teacher, first, method="trajectory")) == 0
    refined = dict(method="dmd", init_student_from=first)
    assert train_distillation.main(flags(strangers_teacher, second, **refined)) == 0
    assert sampled(strangers_teacher, second).isfinite().all()
    longer = flags(strangers_teacher, second, max_train_steps=3, evaluate=False, **refined)
    assert train_distillation.main(longer) == 0
    assert "Going on from" in capsys.readouterr().out


@pytest.mark.long
def test_a_shallower_student_is_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_pipeline(tmp_path / "Deep-T2V", layers=3)
    out = tmp_path / "out"
    shallower = dict(method="trajectory", student_layers=2)
    assert train_distillation.main(flags(teacher, out, **shallower)) == 0
    pipe = WanPipeline.from_pretrained(out / "student", dtype=torch.bfloat16)
    assert len(pipe.transformer.blocks) == len(pipe.transformer_2.blocks) == 2
    longer = flags(teacher, out, max_train_steps=3, evaluate=False, **shallower)
    assert train_distillation.main(longer) == 0
    assert "Going on from" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_do_in_bf16_what_one_does(
    shard: bool, strangers_teacher: Path, tmp_path: Path
) -> None:
    changes = {name: AS_USERS_DO[name] for name in ("mixed_precision", "negative_prompt")}
    changes |= dict(evaluate=True, evaluation="pairs", eval_samples=2)
    worst = compare(
        strangers_teacher, tmp_path, "trajectory", only_two=dict(shard=shard), **changes
    )
    assert worst < 1e-6
    assert sampled(strangers_teacher, tmp_path / "two").isfinite().all()


def sampled(teacher: Path, out: Path) -> torch.Tensor:
    """Latents that stock diffusers samples in bf16 with the exported LoRAs."""
    pipe = WanPipeline.from_pretrained(teacher, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    for expert, second in (("high", False), ("low", True)):
        pipe.load_lora_weights(
            str(out),
            weight_name=LORA_FILE[expert],
            adapter_name=expert,
            load_into_transformer_2=second,
        )
    pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    call = dict(
        prompt="a red ball",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=12,
        output_type="latent",
    )
    return pipe(generator=torch.Generator().manual_seed(0), **call).frames
