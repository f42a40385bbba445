"""What may change between a run and its continuation, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from lessons import make_lesson

from wan_distill.errors import NonFiniteError, UsageError
from wan_distill.layout import RunFolder
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.training import checkpoint, resume
from wan_distill.training.belonging import check_measured
from wan_distill.training.metrics import Metrics
from wan_distill.training.resume import FREE, Progress, check_resume, identity
from wan_distill.training.stages import check_left, check_stages, is_done, is_trained

# Everything else decides what an update does or which weights are exported. Of these the teacher's
# and the prompts' paths may change because their contents are compared, and the micro-batches of an
# update because their number is.
MAY_CHANGE = {
    "samples_dir",
    "refine_steps",
    "teacher_lora",
    "teacher_transformer",
    "teacher_transformer_2",
    "teacher_path",
    "prompts",
    "images",
    "image_source",
    "output_dir",
    "max_train_steps",
    "dry_run",
    "clean",
    "expert",
    "cache_dir",
    "verbose_loading",
    "allow_pickle",
    "gradient_accumulation_steps",
    "shard",
    "context_parallel",
    "offload",
    "gradient_checkpointing",
    "keep_attention",
    "deterministic",
    "sample_batch_size",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "allow_config_change",
    "on_nonfinite",
    "nonfinite_limit",
    "logging_steps",
    "save_merged",
    "export",
    "evaluate",
    "evaluate_only",
    "eval_samples",
    "eval_seed",
    "validation_steps",
    "validation_prompt",
    "serve",
    "fps",
    "report_to",
    "tracker_project_name",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_token",
    "debug",
    "gpu",
    "gpu_hour_price",
    "budget",
    "plan_json",
    "evaluation",
}
IDENTITY = {
    "the teacher's files": "abc",
    "the text encoder's and the tokenizer's files": "ghi",
    "the prompts": "def",
    "processes x gradient_accumulation_steps": 1,
}
OTHER_VALUES = {bool: True, int: 77, float: 0.77, str: "another", tuple: (7,)}


def save(config: Config, step: int = 3, run: dict | None = None) -> Path:
    """A checkpoint of a run with these settings."""
    state = dict(config=config.to_json(), expert="high", run=run or IDENTITY)
    tensors = {"student": {"a": torch.ones(2)}}
    return checkpoint.save(Path(config.output_dir) / "high", step, tensors, state, None)


def changed(config: Config, name: str) -> Config:
    """`config` with another value of one setting, as if it had been given."""
    value = getattr(config, name)
    other = not value if isinstance(value, bool) else OTHER_VALUES.get(type(value), "another")
    return dataclasses.replace(config, **{name: other})


# ---------------------------------------------------------------------------------------- settings


def test_every_setting_says_whether_it_may_change():
    stated = {field.name: field.metadata["free"] for field in dataclasses.fields(Config)}
    assert all(isinstance(free, bool) for free in stated.values())
    assert {name for name, free in stated.items() if free} == FREE == MAY_CHANGE
    assert not {"monitor_steps", "monitor_samples"} & FREE and "logging_steps" in FREE


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_a_setting_that_matters_is_refused_and_named(small_config, name):
    config = small_config(method="trajectory")
    save(config)
    other = changed(config, name)
    assert getattr(other, name) != getattr(config, name)
    # These say where checkpoints are looked for, or allow any change.
    if name in ("output_dir", "resume_from_checkpoint", "allow_config_change"):
        assert name in MAY_CHANGE
        return
    if name in MAY_CHANGE:
        check_resume(other, IDENTITY, print)
        return
    with pytest.raises(UsageError, match=rf"checkpoint-3.*{name} was .*--allow_config_change"):
        check_resume(other, IDENTITY, print)
    said = []
    check_resume(dataclasses.replace(other, allow_config_change=True), IDENTITY, said.append)
    (line,) = said
    assert f"going on although {name} was" in line


def test_the_checks_of_the_student_may_not_change_but_logging_may(small_config):
    """The best of those checks is exported."""
    config = small_config(method="dmd", monitor_steps=20, monitor_samples=8, logging_steps=10)
    save(config)
    for change in (dict(monitor_steps=10), dict(monitor_samples=16)):
        ((name, value),) = change.items()
        with pytest.raises(UsageError, match=f"{name} was .*, is {value}"):
            check_resume(dataclasses.replace(config, **change), IDENTITY, print)
    check_resume(dataclasses.replace(config, logging_steps=1), IDENTITY, print)


# ---------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("what", IDENTITY)
def test_another_teacher_other_prompts_or_another_batch_is_refused(small_config, what):
    config = small_config(method="trajectory")
    save(config)
    check_resume(config, dict(IDENTITY), print)
    with pytest.raises(UsageError, match=f"{what} were .*, are other"):
        check_resume(config, IDENTITY | {what: "other"}, print)


def test_a_run_is_known_by_its_teacher_prompts_and_batch(make_run, monkeypatch):
    run = make_run(method="trajectory", gradient_accumulation_steps=2)
    usual = identity(run.config, run.info, run.prompts, 3)
    assert set(usual) == set(IDENTITY)
    assert usual["processes x gradient_accumulation_steps"] == 6
    once = dataclasses.replace(run.config, gradient_accumulation_steps=1)
    assert identity(once, run.info, run.prompts, 6) == usual  # another split of the same work
    others = [
        identity(run.config, run.info, run.prompts, 4),
        identity(run.config, run.info, run.prompts[:2], 3),
        identity(run.config, run.info, run.prompts[::-1], 3),
        identity(run.config, run.info, ["\n".join(run.prompts)], 3),
    ]
    monkeypatch.setattr(TeacherInfo, "fingerprint", lambda self, parts=(): "other files")
    others.append(identity(run.config, run.info, run.prompts, 3))
    assert len({json.dumps(found) for found in [usual, *others]}) == 6


def test_a_damaged_checkpoint_refuses_nothing(small_config):
    """An older one will be resumed from, which is checked when it is the newest."""
    config = small_config(method="trajectory")
    (save(config) / "state.json").write_text("damaged")
    check_resume(dataclasses.replace(config, rank=2), IDENTITY, print)
    save(config, step=2)
    with pytest.raises(UsageError, match=r"checkpoint-2 was trained with other settings"):
        check_resume(dataclasses.replace(config, rank=2), IDENTITY, print)


# ---------------------------------------------------------------------------------------- Progress


@pytest.fixture
def make_progress(make_run):
    def make(**changes) -> tuple[Progress, object]:
        run = make_run(**dict(method="trajectory") | changes)
        lesson = make_lesson(run, "high")
        metrics = Metrics(run.folder.metrics, run.runtime)
        return Progress(run, "high", lesson.learners, metrics, run.folder.path), lesson.denoiser

    return make


def test_a_checkpoint_is_due_after_half_an_hour(make_progress, monkeypatch):
    """However few updates that were: of A14B one takes minutes."""
    clock = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    progress, _ = make_progress()
    for now, due in ((0.0, False), (1700.0, False), (1900.0, True)):
        clock[0] = now
        assert progress.overdue() == due
    progress.save(1)
    assert not progress.overdue()


# What another --method began is not gone on from.
MIXED = [
    ("", "trajectory", {}, "is of --method trajectory, and this is --method dmd; choose another"),
    ("trajectory", "trajectory", {}, "is of a job of two stages; leave out --method dmd to go on"),
    ("", "dmd", {}, None),
    ("", "trajectory", dict(allow_config_change=True), None),
]


@pytest.mark.parametrize(("place", "method", "changes", "reason"), MIXED)
def test_a_folder_of_another_method_is_refused(small_config, place, method, changes, reason):
    config = small_config(method="dmd", **changes)
    folder = Path(config.output_dir) / place
    save(small_config(method=method, output_dir=str(folder)))
    info = read_teacher(config)
    if reason is None:
        check_stages(config, info)
        return
    with pytest.raises(UsageError, match=reason):
        check_stages(config, info)


def test_a_student_whose_checkpoints_are_gone_is_not_replaced(small_config):
    config = small_config(method="trajectory", expert="high")
    info, folder = read_teacher(config), RunFolder(Path(config.output_dir))
    folder.path.mkdir(parents=True)
    folder.lora("low").write_bytes(b"carried over")
    check_left(config, info)
    folder.lora("high").write_bytes(b"a student")
    folder.expert("high").mkdir()
    folder.best("high").write_bytes(b"the best check's")
    with pytest.raises(UsageError, match=r"high_noise_lora\.safetensors: is a student whose check"):
        check_left(config, info)
    check_left(dataclasses.replace(config, evaluate_only=True), info)
    aside = folder.expert("high") / "set-aside-0-checkpoint-3"  # it is being made anew
    aside.mkdir(parents=True)
    check_left(config, info)


def test_an_expert_is_done_where_the_same_command_trains_nothing(small_config):
    """Only then are its samples not solved again."""
    config = small_config(method="trajectory", max_train_steps=3)
    info = read_teacher(config)
    assert not is_done(config, info, "high")
    state = dict(config={}, expert="high", run=IDENTITY, done=dict(student=3), begun_with={})
    tensors = {"student": {"a": torch.ones(2)}}

    def write(step: int, **changes) -> Path:
        folder = Path(config.output_dir) / "high"
        return checkpoint.save(folder, step, tensors, state | changes, None)

    folder = write(3)
    assert is_done(config, info, "high")
    explicit = dataclasses.replace(config, resume_from_checkpoint=str(folder))
    assert not is_done(explicit, info, "high")  # it goes back
    assert not is_done(dataclasses.replace(config, max_train_steps=4), info, "high")
    one_skipped = dict(done=dict(student=2))  # by --on_nonfinite skip
    shutil.rmtree(folder)
    write(3, **one_skipped)
    assert is_done(config, info, "high") and is_trained(dataclasses.replace(config, expert="high"))
    longer = dataclasses.replace(config, max_train_steps=4)
    assert not is_done(longer, info, "high")
    assert not is_trained(dataclasses.replace(longer, expert="high"))
    assert not is_trained(config)  # the low expert
    write(4, begun_with={"high": "another"})  # of a first stage that has changed since
    assert not is_done(config, info, "high")
    damaged = write(5) / "student.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert not is_done(config, info, "high")


def test_a_skipped_update_is_counted_up_to_the_limit(make_progress, capsys):
    """Two may be skipped; the third stops the run, with the state before it saved."""
    progress, denoiser = make_progress(on_nonfinite="skip", nonfinite_limit=2)
    learner = progress.learners["student"]
    error = NonFiniteError("loss nan")
    learner.done = 4
    progress.skip_or_stop(4, "student", denoiser, error)
    learner.done = 6  # of seven updates one was skipped
    progress.skip_or_stop(7, "student", denoiser, error)
    said = capsys.readouterr().out
    assert "skipped (1 of at most 2)" in said and "skipped (2 of at most 2)" in said
    assert not checkpoint.found(progress.root)
    with pytest.raises(NonFiniteError, match="loss nan at update 9, student, high expert"):
        progress.skip_or_stop(8, "student", denoiser, error)
    assert checkpoint.latest(progress.root).name == "checkpoint-8"


def test_a_weight_that_is_not_finite_is_named_and_never_skipped(make_progress):
    progress, denoiser = make_progress(on_nonfinite="skip", nonfinite_limit=9)
    denoiser.experts["high"].blocks[0].ffn.net[2].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"weight blocks\.0\.ffn\.net\.2\.\S*weight is not"):
        progress.skip_or_stop(0, "student", denoiser, NonFiniteError("loss nan"))


def test_a_student_is_measured_with_the_settings_of_its_training(small_config, tmp_path):
    """Also once its checkpoints, which the closing line offers for deletion, are gone."""
    config = small_config(output_dir=str(tmp_path), evaluate_only=True)
    check_measured(config)  # nothing is known of it
    (tmp_path / "run.json").write_text(json.dumps(dict(config=config.to_json())))
    check_measured(dataclasses.replace(config, eval_samples=99))
    other = dataclasses.replace(config, rank=8, seed=3)
    words = r"trained with other settings \(seed was 0, is 3; rank was 4, is 8\); set them back"
    with pytest.raises(UsageError, match=words):
        check_measured(other)
    for accepted in (dict(allow_config_change=True), dict(evaluate_only=False)):
        check_measured(dataclasses.replace(other, **accepted))
    older = config.to_json()
    del older["optimizer"]  # of a version without that setting
    (tmp_path / "run.json").write_text(json.dumps(dict(config=older)))
    check_measured(config)


def test_an_update_that_is_not_finite_stops_by_default(make_progress):
    """In the job's folder, whose default name another rate would change."""
    progress, denoiser = make_progress()
    words = rf"no weight was changed.*--learning_rate and .* --output_dir {progress.job} to go on"
    with pytest.raises(NonFiniteError, match=words):
        progress.skip_or_stop(3, "student", denoiser, NonFiniteError("loss nan"))
    assert checkpoint.latest(progress.root).name == "checkpoint-3"


def test_weights_that_an_update_has_spoilt_are_not_saved(make_progress):
    """Nobody could go on from there. The critic's rate is another one than the student's."""
    progress, denoiser = make_progress(method="dmd", diversity_weight=0.0)
    next(iter(progress.learners["fake_score"].parameters.values())).data[0] = math.inf
    words = r"the last checkpoint is the last good .*Lower --fake_score_learning_rate and"
    with pytest.raises(NonFiniteError, match=words):
        progress.skip_or_stop(3, "fake_score", denoiser, NonFiniteError("loss nan"))
    assert not checkpoint.found(progress.root)


def test_tensors_that_do_not_fit_are_refused_in_one_line(make_progress):
    progress, _ = make_progress(method="dmd", diversity_weight=0.0)
    progress.save(5)
    del progress.learners["fake_score"]
    run = progress.run
    other = Progress(run, "high", progress.learners, progress.metrics, run.folder.path)
    assert other.resume() == 5  # what is there for this role fits
    progress.learners["student"].parameters["of another rank"] = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError, match="do not fit these settings"):
        other.resume()


def test_a_checkpoint_that_exists_is_not_written_again(make_progress):
    progress, _ = make_progress()
    progress.save(5)
    state = progress.root / "checkpoint-5" / "state.json"
    before = state.stat().st_mtime_ns
    progress.save(5)
    assert state.stat().st_mtime_ns == before
    state.write_text(state.read_text().replace('"step": 5', '"step": 6'))  # damaged
    progress.save(5)
    assert checkpoint.latest(progress.root).name == "checkpoint-5"
