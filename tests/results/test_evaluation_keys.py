"""The names under which the evaluation finds its teacher samples again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import compare_recorded

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.run import Run
from wan_distill.model.loading import Teacher
from wan_distill.results.evaluation import Evaluation
from wan_distill.results.samplers import Sampler, samplers
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.settings.resolve import resolve
from wan_distill.system.runtime import Runtime

ROW = Sampler("a teacher", "teacher", (1.0, 0.9, 0.5, 0.0), guided=True)


def name_of(run: Run, row: Sampler = ROW) -> str:
    return Evaluation(run, run.prompts).cache_file(row).name


def with_settings(run: Run, **changes) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        dict(eval_seed=2),
        dict(eval_samples=9),
        dict(guidance_scale=4.5),
        dict(guidance_scale_2=3.5),
        dict(negative_prompt="ugly"),
        dict(height=48),
        dict(width=48),
        dict(num_frames=9),
        dict(boundary_ratio=0.86),
        dict(mixed_precision="bf16"),
        dict(base_precision="fp8"),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_that_the_samples_depend_on_is_in_their_name(make_run, changes):
    run = make_run(method="trajectory")
    changed = with_settings(run, **changes)
    assert name_of(changed) != name_of(run)
    assert name_of(with_settings(changed, **vars(run.config))) == name_of(run)


@pytest.mark.parametrize(
    "changes",
    [
        dict(sigmas=(1.0, 0.9, 0.0)),
        dict(guided=False),
        dict(noise="independent"),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_sampler_is_in_the_name(make_run, changes):
    run = make_run(method="trajectory")
    assert name_of(run, dataclasses.replace(ROW, **changes)) != name_of(run)


def test_the_teacher_the_encoder_and_the_prompts_are_in_the_name(make_run, monkeypatch):
    run = make_run(method="trajectory")
    length, device = run.embeddings.length, run.runtime.device
    other = PromptEmbeddings(run.embeddings.folder, {"encoder": "another"}, length, device)
    names = [
        name_of(run),
        name_of(dataclasses.replace(run, embeddings=other)),
        name_of(dataclasses.replace(run, prompts=run.prompts[::-1])),
    ]
    monkeypatch.setattr(TeacherInfo, "fingerprint", lambda self, parts=(): "other files")
    assert len({*names, name_of(run)}) == 4


@pytest.mark.parametrize(
    "changes",
    [dict(seed=1), dict(num_trajectories=9), dict(learning_rate=1.0), dict(sample_batch_size=3)],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_change_no_sample_are_not_in_the_name(make_run, changes):
    run = make_run(method="trajectory")
    assert name_of(with_settings(run, **changes)) == name_of(run)
    assert name_of(run, dataclasses.replace(ROW, name="another name")) == name_of(run)


def test_the_independent_reference_has_noise_of_its_own(make_run, monkeypatch):
    """Otherwise the teacher's distance from itself, the floor of the table, would be 0."""
    run = make_run(method="trajectory", eval_samples=3)
    evaluation, starts = Evaluation(run, run.prompts), []

    def carry(run, denoiser, expert, latents, *rest, **options):
        starts.append(latents.clone())
        return iter(())

    monkeypatch.setattr("wan_distill.results.evaluation.carry", carry)
    rows = samplers(run.config)
    for row in (rows.independent, rows.paired, rows.few_guided):
        evaluation._sample(row)
    independent, paired, few = starts[::2]  # of each, what its high expert begins with
    assert torch.equal(paired, few)
    every = torch.cat([independent, paired])
    assert all(not torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


def test_the_names_of_the_evaluations_samples(tmp_path: Path) -> None:
    """Of the embedded teacher, as recorded: a change has users sample the teacher again."""
    config = Config(output_dir=str(tmp_path), num_trajectories=4)
    config = resolve(config, read_teacher(config))
    runtime = Runtime(config)
    key = dict(encoder="of this test", length=16, dtype="no")
    embeddings = PromptEmbeddings(tmp_path / "prompts", key, 16, torch.device("cpu"))
    teacher = Teacher(read_teacher(config), config, runtime)
    run = Run(config, teacher, embeddings, ("a red ball", "a blue box"), runtime)
    evaluation, rows = Evaluation(run, run.prompts), samplers(config)
    teachers = [rows.independent, rows.paired, rows.few_guided, rows.few_unguided]
    names = {row.name: evaluation.cache_file(row).stem for row in teachers}
    compare_recorded("evaluation_names.json", names)
    json.dumps(evaluation.key(rows.paired))  # plain values
