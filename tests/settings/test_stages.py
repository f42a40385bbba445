"""A job's stages and the rules by which their settings follow from the teacher."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from wan_distill.data.prompts import split_prompts
from wan_distill.errors import UsageError
from wan_distill.layout import FIRST_STAGES
from wan_distill.settings import defaults
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.job import STAGES
from wan_distill.settings.recipes import RECIPES
from wan_distill.settings.resolve import resolve_stages
from wan_distill.settings.scale import Scale

EMBEDDED = Scale(width=128, parameters=6e5, tokens=80, devices=1)
A14B = Scale(width=5120, parameters=14e9, tokens=32_760, devices=1)
# The only settings that may differ between teachers of one width and one length of clips.
SIZES_AND_COUNTS = {
    "max_train_steps",
    "lr_warmup_steps",
    "ema_start",
    "num_trajectories",
    "eval_samples",
    "evaluation",
    "sample_batch_size",
    "checkpointing_steps",
    "validation_steps",
    "logging_steps",
    "monitor_steps",
    "monitor_samples",
    "critic_warmup_steps",
    "critic_updates",
    "mixed_precision",
    "gradient_checkpointing",
    "save_merged",
}


def stages(*flags: str) -> tuple[Config, ...]:
    config = parse_args(list(flags))
    return resolve_stages(config, read_teacher(config))


# -------------------------------------------------------------------------------------- the stages


def test_a_job_is_a_regression_and_then_its_refinement():
    first, second = stages("--output_dir=out")
    assert (first.method, second.method) == ("trajectory", "dmd")
    assert Path(first.output_dir) == Path("out/trajectory") and second.output_dir == "out"
    assert Path(second.init_student_from or "") == Path(first.output_dir)
    assert first.samples_dir == "out" and second.samples_dir is None  # one store
    assert second.is_second_stage and not first.is_second_stage
    assert (first.method_title, second.method_title) == ("trajectory", "trajectory+dmd")
    assert not first.evaluate and not first.save_merged and second.evaluate


def test_scores_begin_with_the_first_stages_student_and_files_are_the_second_ones():
    first, second = stages("--critic_from_student", "--export=comfyui", "--mixed_precision=bf16")
    assert (first.critic_from_student, second.critic_from_student) == (False, True)
    assert (first.export, second.export) == ((), ("comfyui",))
    # One file of an expert that is not refined: what it hands over is solved once.
    assert first.lora_dtype == second.lora_dtype == "bf16"


def test_a_samples_folder_is_both_stages():
    assert {stage.samples_dir for stage in stages("--samples_dir=shared")} == {"shared"}


def test_each_stage_has_its_own_updates_and_rate():
    first, second = stages("--max_train_steps=1200", "--learning_rate=1e-3")
    assert (first.max_train_steps, second.max_train_steps) == (1200, 30)
    assert (first.learning_rate, second.learning_rate) == (1e-3, 2e-5)
    first, second = stages("--refine_steps=3", "--refine_learning_rate=7e-5")
    assert (first.max_train_steps, second.max_train_steps) == (200, 3)
    assert (first.learning_rate, second.learning_rate) == (2.8e-3, 7e-5)


@pytest.mark.parametrize("chosen", ["low", "high", "both"])
def test_the_second_stage_refines_the_experts_that_are_chosen(chosen):
    first, second = stages(f"--refine_expert={chosen}")
    assert first.experts == ("high", "low")
    assert second.experts == (("high", "low") if chosen == "both" else (chosen,))
    if chosen == "low":
        with pytest.raises(UsageError, match="--refine_expert low: --expert high trains that one"):
            stages("--expert=high", "--refine_expert=low")
        return
    first, second = stages("--expert=high", f"--refine_expert={chosen}")
    assert first.experts == second.experts == ("high",)


def test_of_the_high_expert_alone_nothing_is_refined_unless_asked():
    """The second stage is the low expert's."""
    (only,) = stages("--expert=high")
    assert (only.method, only.experts) == ("trajectory", ("high",))
    assert [stage.experts for stage in stages("--expert=low")] == [("low",)] * 2


@pytest.mark.parametrize(
    ("flag", "own"),
    [
        ("--refine_steps=5", "--max_train_steps"),
        ("--refine_learning_rate=1e-5", "--learning_rate"),
        ("--refine_expert=low", "--expert"),
    ],
)
def test_a_refinement_alone_has_flags_of_its_own(flag, own):
    with pytest.raises(UsageError, match=f"has no second stage; give {own}$"):
        stages("--init_student_from=x", flag)
    assert len(stages("--method=trajectory", flag)) == 1  # a recipe that stops after its first


def test_the_first_stage_keeps_nothing_of_the_second():
    """Another refinement is no other first stage."""
    out, flags = "--output_dir=x", ("--refine_learning_rate=1e-6", "--fake_score_lora_alpha=32")
    assert stages(out, *flags)[0] == stages(out)[0]
    assert stages(out, *flags)[1] != stages(out)[1]


def test_the_folders_of_first_stages_are_known():
    """`--clean` looks for caches there."""
    assert {first for first, *_ in STAGES.values()} == {*FIRST_STAGES}


def test_a_demo_with_pictures_has_fewer_samples_and_more_updates():
    counts = lambda stage: (stage.num_trajectories, stage.max_train_steps)  # noqa: E731
    assert counts(stages()[0]) == (1024, 200)
    assert counts(stages("--teacher_path=tiny-i2v")[0]) == (512, 300)
    assert counts(stages("--sampling_steps=2")[0]) == (2048, 600)
    assert counts(stages("--teacher_path=tiny-i2v", "--sampling_steps=2")[0]) == (1024, 300)


def test_a_student_of_the_first_stage_is_matched_in_pairs_and_one_of_others_is_not():
    """Only the first stage's begins each clip from the noise of the teacher's."""
    assert stages()[1].real_score == "paired"
    (of_others,) = stages("--init_student_from=high.safetensors,low.safetensors")
    (from_nothing,) = stages("--method=dmd")
    assert of_others.real_score == from_nothing.real_score == "samples"
    assert of_others.learning_rate == 2e-5
    # One that lies below the output folder is a stranger's still.
    (below,) = stages("--init_student_from=runs/lightning", "--output_dir=runs")
    assert not below.is_second_stage and below.real_score == "samples"


def test_a_stage_names_the_flags_that_change_it():
    first, second = stages("--output_dir=out")
    assert (first.flag("learning_rate"), first.flag("rank")) == ("learning_rate", "rank")
    assert second.flag("learning_rate") == "refine_learning_rate"
    assert second.flag("max_train_steps") == "refine_steps"
    assert second.flag("rank") == "rank"


def test_a_short_refinement_has_time_to_learn_and_exports_what_it_learned():
    """The peak rate and the exported average come after so many updates that there is a rest."""
    for scale in (EMBEDDED, A14B):
        values = {k: d.value(scale) for k, d in (defaults.DMD | defaults.DMD_SECOND_STAGE).items()}
        updates = values["max_train_steps"]
        assert values["lr_warmup_steps"] <= updates / 3
        assert updates / 2 < values["ema_start"] < updates


def test_a_short_trial_is_short_in_both_stages():
    first, second = stages("--max_train_steps=100")
    assert (first.max_train_steps, second.max_train_steps) == (100, 15)
    assert (second.critic_warmup_steps, second.ema_start) == (50, 10)
    assert (first.lr_warmup_steps, second.lr_warmup_steps) == (10, 5)
    first, second = stages("--max_train_steps=2")
    assert (second.max_train_steps, second.critic_warmup_steps) == (1, 1)
    _, second = stages("--max_train_steps=2", "--refine_steps=9", "--critic_warmup_steps=8")
    assert (second.max_train_steps, second.critic_warmup_steps) == (9, 8)


def test_what_is_given_otherwise_holds_for_both_stages():
    assert {stage.rank for stage in stages("--rank=8")} == {8}
    assert {stage.train_batch_size for stage in stages("--train_batch_size=4")} == {4}
    assert {s.gradient_accumulation_steps for s in stages("--train_batch_size=4")} == {1}


@pytest.mark.parametrize(
    "flag, method",
    [
        ("--method=trajectory", "trajectory"),
        ("--method=consistency", "consistency"),
        ("--sampling_steps=1", "trajectory"),
        ("--student_layers=2", "trajectory"),
        ("--init_student_from=x", "dmd"),
    ],
)
def test_where_refining_makes_no_sense_there_is_one_stage(flag, method):
    (only,) = stages(flag)
    assert only.method == method


def test_a_shallower_student_is_not_refined():
    with pytest.raises(UsageError, match=r"--student_layers 2: --method trajectory\+dmd needs"):
        stages("--student_layers=2", "--method=trajectory+dmd")


# --------------------------------------------------------------------------------------- the rules


def every_rule() -> list[tuple[str, str, defaults.Default]]:
    tables: dict[str, Any] = {name: recipe.defaults for name, recipe in RECIPES.items()}
    tables["dmd, warm start"] = defaults.DMD_WARM_START
    tables["trajectory, short"] = defaults.SHORT_TRAJECTORY
    tables["trajectory, AdamW"] = defaults.ADAMW_TRAJECTORY
    tables["whole student"] = defaults.WHOLE_STUDENT
    return [(title, name, rule) for title, table in tables.items() for name, rule in table.items()]


def test_only_sizes_and_counts_and_rates_depend_on_the_teacher():
    """A rate follows the width alone, whatever else the teacher is: 1 / width, Muon's its root."""
    same_width = Scale(width=128, parameters=14e9, tokens=32_760, devices=1)
    for title, name, rule in every_rule():
        assert rule.reason, f"{title}: {name}"
        if name in SIZES_AND_COUNTS:
            continue
        assert rule.value(EMBEDDED) == rule.value(same_width), f"{title}: {name}"
        if rule.value(EMBEDDED) != rule.value(A14B):
            assert name.endswith("learning_rate"), f"{title}: {name}"
            ratio = 40**0.5 if (title, name) == ("trajectory", "learning_rate") else 40  # Muon's
            assert rule.value(A14B) == pytest.approx(rule.value(EMBEDDED) / ratio, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "rounds"),
    [
        ((), 1),  # 120 captions
        (("--teacher_path=tiny-pairs",), 3),  # 300
        (("--teacher_path=tiny-pairs", "--prompts=mine.txt"), 1),
    ],
)
@pytest.mark.parametrize(("steps", "samples", "updates"), [(4, 1024, 200), (2, 2048, 600)])
def test_more_captions_of_a_tiny_teacher_take_more_samples_and_updates(
    flags, rounds, steps, samples, updates
):
    first, second = stages(*flags, f"--sampling_steps={steps}")
    assert (first.num_trajectories, second.num_trajectories) == (samples * rounds, 1024 * rounds)
    assert first.max_train_steps == updates * rounds
    assert second.max_train_steps == 30


def test_captions_that_are_no_text_are_left_to_the_reader_of_prompts(tmp_path):
    """It names the file, the line and the remedy; the settings count lines alone."""
    folder = shutil.copytree(REPOSITORY / "assets" / "tiny_pairs", tmp_path / "pairs")
    (folder / "prompts.txt").write_bytes(b"caf\xe9\n" * 121)
    first, _ = stages(f"--teacher_path={folder}")
    assert first.num_trajectories == 2 * 1024
    with pytest.raises(UsageError, match=r"prompts\.txt:1: not UTF-8 text"):
        split_prompts(first, read_teacher(first))


def test_captions_change_no_count_of_a_large_teacher():
    many = replace(A14B, captions=1000)
    for _, _, rule in every_rule():
        assert rule.value(many) == rule.value(A14B)


def test_the_plan_gives_each_reason_once():
    """Two texts about one setting would contradict each other one day."""
    for title, recipe in RECIPES.items():
        for name, reason in recipe.explained.items():
            assert (reason is None) == (name in recipe.defaults), f"{title}: {name}"


def test_the_reasons_in_the_plan_are_those_of_the_values_beside_them():
    matching, refinement = stages("--method=dmd")[0], stages()[1]
    for config, table in ((matching, defaults.DMD), (refinement, defaults.DMD_WARM_START)):
        said = RECIPES["dmd"].reasons(config)
        for name in ("learning_rate", "critic_updates", "critic_warmup_steps"):
            assert said[name] == table[name].reason
        assert said["adam_beta1"] == "large rates need momentum; 0 in DMD2"
        assert "colours saturate" in said["real_score_guidance_scale"]
    assert RECIPES["trajectory"].reasons(stages()[0]) == {}


def test_the_advice_on_a_single_step_names_the_page_that_measures_it():
    (note,) = RECIPES["dmd"].notes(stages("--method=dmd", "--sampling_steps=1")[0])
    page = note.split("(")[1].rstrip(")")
    assert "**A single step**" in (REPOSITORY / page).read_text(encoding="utf-8")


def test_a14bs_rate_of_adamw_is_a_published_one():
    """5e-5 to 1e-4 for LoRA of rank 64 (docs/methods.md)."""
    assert defaults.ADAMW_TRAJECTORY["learning_rate"].value(A14B) == 1e-4


def test_muons_rate_falls_as_the_root_of_the_width():
    """Measured to width 512: 1 / width is too low there (benchmarks/RESULTS.md)."""
    rate = RECIPES["trajectory"].defaults["learning_rate"].value
    assert rate(replace(EMBEDDED, width=512)) == pytest.approx(rate(EMBEDDED) / 2)
    assert rate(A14B) == 4.43e-4


def test_a_regression_learns_by_muon_and_matching_by_adamw():
    assert [stage.optimizer for stage in stages()] == ["muon", "adamw"]
    rates = [stage.learning_rate for stage in stages()]
    said = stages("--optimizer=muon")
    assert [(s.optimizer, s.learning_rate) for s in said] == [
        ("muon", rates[0]),
        ("adamw", rates[1]),
    ]


@pytest.mark.parametrize(
    "flags", [["--use_8bit_adam"], ["--student_layers=2"], ["--optimizer=adamw"]], ids=str
)
def test_what_muon_cannot_do_adamw_does_at_its_own_rate(flags):
    (stage,) = stages("--method=trajectory", *flags)
    assert stage.optimizer == "adamw"
    whole = flags == ["--student_layers=2"]
    assert stage.learning_rate == (1e-3 if whole else 4e-3)


def test_8_bit_moments_of_two_stages_are_those_of_adamw():
    found = [(s.optimizer, s.use_8bit_adam) for s in stages("--use_8bit_adam")]
    assert found == [("muon", False), ("adamw", True)]
    found = [(s.optimizer, s.use_8bit_adam) for s in stages("--use_8bit_adam", "--optimizer=adamw")]
    assert found == [("adamw", True), ("adamw", True)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--method=trajectory", "--use_8bit_adam"],
        ["--method=trajectory", "--student_layers=2"],
        ["--method=dmd"],
        ["--method=consistency"],
    ],
    ids=str,
)
def test_muon_is_refused_where_it_cannot_work(flags):
    with pytest.raises(UsageError, match="--optimizer muon"):
        stages("--optimizer=muon", *flags)


@pytest.mark.parametrize(
    "tokens, devices, total, wanted",
    [
        (80, 1, 32, (32, 1)),  # the embedded teacher: at once
        (180, 1, 32, (16, 2)),
        (32_760, 1, 16, (1, 16)),  # A14B on one card
        (32_760, 8, 16, (1, 2)),  # and on 8: the same 16 samples
        (32_760, 64, 16, (1, 1)),  # more cards than samples: one each
    ],
)
def test_an_update_has_the_same_samples_on_any_number_of_devices(tokens, devices, total, wanted):
    assert Scale(128, 6e5, tokens, devices).batch(total) == wanted


@pytest.mark.parametrize("steps, clips", [("1", 32), ("2", 32), ("4", 16), ("8", 8), ("2,4,8", 8)])
def test_an_update_of_a_regression_has_as_many_steps_whatever_a_phase_has(steps, clips):
    first = stages(f"--sampling_steps={steps}")[0]
    assert (first.train_batch_size, first.gradient_accumulation_steps) == (clips, 1)


def test_several_processes_share_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    first, second = stages()
    assert (first.train_batch_size, first.gradient_accumulation_steps) == (4, 1)
    assert second.train_batch_size == 4
    planned, _ = stages("--dry_run", "--gpu=h100:2")
    assert planned.train_batch_size == 8


def test_nothing_depends_on_whether_the_teacher_is_the_embedded_one(tmp_path):
    """A copy of it elsewhere gets the same settings."""
    copy = shutil.copytree(EMBEDDED_TEACHER, tmp_path / "tiny_wan22")
    config = parse_args([f"--teacher_path={copy}"])
    info = read_teacher(config)
    assert not info.embedded
    for mine, own in zip(resolve_stages(config, info), stages(), strict=True):
        assert mine.to_json() | dict(teacher_path=None) == own.to_json()
