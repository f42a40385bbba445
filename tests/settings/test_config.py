"""What is refused, with value, reason and remedy in one line; and what the flags resolve to."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import REPOSITORY, write_pipeline

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.checks import resolve
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import WAN_NEGATIVE_PROMPT, Config
from wan_distill.settings.description import read_teacher


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
        (["--sampling_steps", "0"], ["--sampling_steps", "'0'"]),
        (["--sampling_steps", "3,4"], ["--sampling_steps 3,4", "divisors"]),
        (["--sampling_steps", "1", "--expert", "low"], ["low expert owns none", "--expert high"]),
        (["--flow_shift", "7"], ["--flow_shift 7", "0.8750 sits on the boundary"]),
        (["--boundary_ratio", "0.95"], ["--boundary_ratio 0.95", "0.9375", "other expert"]),
        (["--boundary_ratio", "1.5"], ["between 0 and 1"]),
        (["--teacher_path", "/no/such place"], ["/no/such place", "neither a folder"]),
        (["--prompts", "/no/such/file"], ["--prompts /no/such/file"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml", "cannot be read"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(flags, words, capsys):
    assert train_distillation.main([*flags, "--dry_run"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(word in error for word in words), error


def test_one_transformer_means_one_expert(tmp_path, capsys):
    folder = write_pipeline(tmp_path / "wan21", two_experts=False)
    config = resolved("--teacher_path", str(folder))
    assert config.experts == ("high",) and config.boundary is None
    assert (config.guidance_scale, config.teacher_shift, config.negative_prompt) == (
        5.0,
        5.0,
        WAN_NEGATIVE_PROMPT,
    )
    assert (
        train_distillation.main(["--teacher_path", str(folder), "--expert", "low", "--dry_run"])
        == 2
    )
    assert "single transformer" in capsys.readouterr().err


def test_the_embedded_teacher_is_known_by_its_folder():
    assert resolved() == resolved("--teacher_path", str(EMBEDDED_TEACHER)).__class__(
        **{**vars(resolved("--teacher_path", str(EMBEDDED_TEACHER))), "teacher_path": None}
    )
    assert resolved().max_sequence_length == 16 and resolved().evaluate and resolved().save_merged


def test_real_teachers_get_wans_own_settings(random_teacher):
    config = resolved("--teacher_path", str(random_teacher))
    assert (config.teacher_steps, config.teacher_shift) == (40, 12.0)
    assert (config.guidance("high"), config.guidance("low")) == (4.0, 3.0)
    assert (config.height, config.width, config.num_frames, config.max_sequence_length) == (
        480,
        832,
        81,
        512,
    )
    assert (
        config.mixed_precision == "bf16" and config.gradient_checkpointing and not config.evaluate
    )


def test_the_other_names_of_a_flag():
    config = parse_args(
        [
            "--pretrained_teacher_model",
            "x",
            "--lora_rank",
            "8",
            "--lora_target_modules",
            "to_q,to_k",
        ]
    )
    assert (config.teacher_path, config.rank, config.lora_layers) == ("x", 8, ("to_q", "to_k"))


def test_a_config_file_is_checked_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("height: 32\nwidth: 48\nevaluate: false\nsampling_steps: [2, 4]\n")
    config = parse_args(["--config", str(file), "--width", "64"])
    assert (config.height, config.width, config.evaluate, config.sampling_steps) == (
        32,
        64,
        False,
        (2, 4),
    )
    file.write_text("heigth: 32\n")
    with pytest.raises(UsageError, match="--height"):
        parse_args(["--config", str(file)])


def test_the_dry_run_prints_the_plan():
    code = "import sys, train_distillation as t; sys.exit(t.main(['--dry_run', '--sampling_steps', '2,4']))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for words in (
        "1.0000 high | 0.9375 high | 0.8333 low | 0.6250 low",
        "steps [1, 2] (transformer)",
        "steps [3, 4] (transformer_2)",
        "outputs",
        "600 updates",
    ):
        assert words in result.stdout, words
