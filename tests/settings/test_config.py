"""What is refused, with value, reason and remedy in one line; and what the flags resolve to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from random_teachers import write_pipeline

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.command_line import TYPES, parse_args
from wan_distill.settings.config import WAN_NEGATIVE_PROMPT, Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve


def resolved(*flags: str) -> Config:
    config = parse_args(list(flags))
    return resolve(config, read_teacher(config))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hieght", "64"], ["--hieght", "--height"]),
        (["--num_frames", "80"], ["--num_frames 80", "4k+1", "77 or 81"]),
        (["--height", "65"], ["--height 65", "64 or 80"]),
        (["--learning_rate", "0"], ["--learning_rate 0", "greater than 0"]),
        (["--learning_rate", "nan"], ["--learning_rate nan", "finite"]),
        (["--guidance_scale", "0.5"], ["--guidance_scale 0.5", "1"]),
        (["--sampling_steps", "0"], ["--sampling_steps 0: is not a step count"]),
        (["--sampling_steps", "3,4"], ["--sampling_steps 3,4", "divisors"]),
        (["--sampling_steps", "1", "--expert", "low"], ["low expert owns none", "--expert high"]),
        (["--flow_shift", "7"], ["--flow_shift 7", "0.8750 sits on the boundary", "such as 5"]),
        (["--sampling_steps", "12"], ["--flow_shift 5 with 12", "sits on", "such as 5.1"]),
        (["--boundary_ratio", "0.95"], ["--boundary_ratio 0.95", "0.9375", "other expert"]),
        (["--boundary_ratio", "1.5"], ["between 0 and 1"]),
        (["--validation_prompt", " | "], ["--validation_prompt ' | ': holds no prompt"]),
        (["--plan_json", "."], ["--plan_json .: cannot be written (it names no file)"]),
        (["--resume_from_checkpoint", "/no/such"], ["/no/such: there is no such folder"]),
        (["--evaluate_only", "--output_dir", "/no/such"], ["/no/such holds no high_noise_lora"]),
        (["--teacher_path", "/no/such place"], ["/no/such place", "no such folder"]),
        (["--prompts", "/no/such/file"], ["--prompts /no/such/file"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml", "cannot be read"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(flags, words, capsys):
    assert train_distillation.main([*flags, "--dry_run"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(word in error for word in words), error


# Every number that a user can give: values just outside its range, and the last ones inside.
ABOVE_0 = ("0", "-1"), ("1",)
FROM_0 = ("-1",), ("0",)
FRACTION = ("-0.1", "1"), ("0", "0.999")
GUIDANCE = ("0.99", "0"), ("1",)
RANGES = {
    "max_train_steps": ABOVE_0,
    "height": (("0", "8", "65"), ("16", "64")),
    "width": (("0", "-16", "40"), ("16", "48")),
    "num_frames": (("0", "-3", "2", "80"), ("1", "5", "81")),
    "seed": FROM_0,
    "flow_shift": (("0", "-5", "inf"), ("3",)),
    "boundary_ratio": (("0", "1", "-0.5"), ("0.875",)),
    "max_sequence_length": (("0", "1"), ("2",)),
    "rank": ABOVE_0,
    "lora_alpha": ABOVE_0,
    "teacher_steps": ABOVE_0,
    "solver_steps": ABOVE_0,
    "teacher_shift": ABOVE_0,
    "guidance_scale": GUIDANCE,
    "guidance_scale_2": GUIDANCE,
    "train_batch_size": ABOVE_0,
    "gradient_accumulation_steps": ABOVE_0,
    "learning_rate": (("0", "-1", "nan", "inf"), ("1e-5",)),
    "refine_steps": ABOVE_0,
    "refine_learning_rate": ABOVE_0,
    "lr_warmup_steps": FROM_0,
    "adam_beta1": FRACTION,
    "adam_beta2": FRACTION,
    "adam_weight_decay": FROM_0,
    "adam_epsilon": ABOVE_0,
    "max_grad_norm": ABOVE_0,
    "ema_decay": FRACTION,
    "ema_start": FROM_0,
    "num_trajectories": ABOVE_0,
    "critic_warmup_steps": FROM_0,
    "critic_updates": ABOVE_0,
    "fake_score_learning_rate": ABOVE_0,
    "fake_score_lora_alpha": ABOVE_0,
    "score_sigma_max": (("0.89", "1"), ("0.9", "0.999")),
    "score_draws": ABOVE_0,
    "real_score_guidance_scale": GUIDANCE,
    "real_score_guidance_scale_2": GUIDANCE,
    "diversity_weight": FROM_0,
    "solver_points": ABOVE_0,
    "huber_c": ABOVE_0,
    "sample_batch_size": ABOVE_0,
    "checkpointing_steps": ABOVE_0,
    "checkpoints_total_limit": (("0", "-1"), ("1",)),
    "nonfinite_limit": ABOVE_0,
    "logging_steps": ABOVE_0,
    "monitor_steps": FROM_0,
    "monitor_samples": ABOVE_0,
    "eval_samples": (("1", "0", "-1"), ("2",)),
    "eval_seed": FROM_0,
    "validation_steps": FROM_0,
    "fps": (("0", "-1", "1001"), ("1", "1000")),
    "gpu_hour_price": ABOVE_0,
    "budget": ABOVE_0,
    "serve": (("-1", "65536"), ("0", "8765")),
}
NUMBERS = [name for name, kind in TYPES.items() if kind in (int, float)]


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "student_layers"])
def test_every_number_has_a_range(name):
    outside, inside = RANGES[name]
    method = "--method=trajectory+dmd" if name.startswith("refine_") else "--method=dmd"
    for value in outside:
        with pytest.raises(UsageError, match=f"--{name} {value}"):
            resolved(method, f"--{name}={value}")
    for value in inside:
        assert getattr(resolved(method, f"--{name}={value}"), name) == float(value)


@pytest.mark.parametrize("name", ["negative_prompt", "validation_prompt"])
def test_a_prompt_is_text(name):
    with pytest.raises(UsageError, match="is no text of the terminal's encoding"):
        resolved(f"--{name}=caf\udce9")


def test_layers_that_no_block_has_get_no_adapter():
    assert resolved("--lora_layers=to_q ffn.net.2").lora_layers == ("to_q", "ffn.net.2")
    with pytest.raises(UsageError, match="no adapter goes to a to_x layer; choose from to_q"):
        resolved("--lora_layers=to_q,to_x")


# -------------------------------------------------------------------------------- what is filled in


def test_one_transformer_means_one_expert(tmp_path):
    folder = f"--teacher_path={write_pipeline(tmp_path / 'wan21', two_experts=False)}"
    config = resolved(folder)
    assert config.experts == ("high",) and config.boundary_ratio is None
    assert (config.guidance_scale, config.teacher_shift) == (5.0, 5.0)
    for flag in ("--expert=low", "--boundary_ratio=0.875"):
        with pytest.raises(UsageError, match="single transformer; leave"):
            resolved(folder, flag)


def test_the_embedded_teacher_is_known_by_its_folder():
    by_path = resolved("--teacher_path", str(EMBEDDED_TEACHER))
    assert resolved() == dataclasses.replace(by_path, teacher_path=None)
    assert resolved().max_sequence_length == 16 and resolved().evaluate and resolved().save_merged


def test_real_teachers_get_wans_own_settings(tmp_path):
    folder = write_pipeline(tmp_path / "teacher")
    for part in ("transformer", "transformer_2"):
        a14b = dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40)
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | a14b | dict(text_dim=4096)))
    config = resolved("--teacher_path", str(folder))
    assert (config.teacher_steps, config.teacher_shift) == (40, 12.0)
    assert (config.guidance("high"), config.guidance("low")) == (4.0, 3.0)
    assert (config.height, config.width, config.num_frames) == (480, 832, 81)
    assert config.max_sequence_length == 512 and config.mixed_precision == "bf16"
    assert config.negative_prompt == WAN_NEGATIVE_PROMPT
    assert config.gradient_checkpointing and not config.save_merged
    assert (config.evaluate, config.evaluation) == (True, "pairs")  # sets would take days


def test_what_is_given_is_not_filled_in(random_teacher):
    given = resolved(
        "--teacher_path", str(random_teacher), "--width=64", "--no-gradient_checkpointing"
    )
    assert given.width == 64 and given.height == 480 and given.gradient_checkpointing is False


def test_the_output_folder_is_named_after_teacher_method_and_steps():
    given = resolved("--method=dmd", "--sampling_steps=8,2")
    assert Path(given.output_dir) == Path("outputs") / "tiny_wan22-dmd-2-8steps"


@pytest.mark.journey  # as long as a whole run
def test_the_dry_run_prints_the_plan(capsys):
    assert train_distillation.main(["--dry_run", "--sampling_steps", "2,4"]) == 0
    plan = capsys.readouterr().out
    for words in (
        "1.0000 high | 0.9375 high | 0.8333 low | 0.6250 low",
        "steps 1 and 2 (transformer)",
        "steps 3 and 4 (transformer_2)",
        "outputs",
        "1. trajectory",
        "200 updates",
        "2. dmd",
        "30 updates",
    ):
        assert words in plan, words
