"""The names under which stored samples are found again: what a sample depends on, and no more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import compare_recorded

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleStore
from wan_distill.model.loading import Teacher
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.settings.resolve import resolve
from wan_distill.settings.sample_specs import anchors, handovers, trajectories
from wan_distill.system.runtime import Runtime


def with_settings(run: Run, **changes) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))


def name_of(run: Run) -> str:
    return SampleStore(run, trajectories(run.config)).folder.name


@pytest.mark.parametrize(
    "changes",
    [
        dict(seed=1),
        dict(height=48),
        dict(width=48),
        dict(num_frames=9),
        dict(boundary_ratio=0.86),
        dict(mixed_precision="bf16"),
        dict(base_precision="fp8"),
        dict(variant="fp16"),
        dict(negative_prompt="ugly"),
        dict(guidance_scale=4.5),
        dict(guidance_scale_2=3.5),
        dict(teacher_steps=7),
        dict(teacher_shift=11.0),
        dict(flow_shift=6.0),
        dict(sampling_steps=(2, 4, 8)),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_that_a_sample_depends_on_is_in_its_name(make_run, changes):
    run = make_run(method="trajectory")
    changed = with_settings(run, **changes)
    assert name_of(changed) != name_of(run)
    assert name_of(with_settings(changed, **vars(run.config))) == name_of(run)


def test_height_and_width_are_not_the_same(make_run):
    run = make_run(method="trajectory")
    flat, tall = with_settings(run, width=48), with_settings(run, height=48)
    assert flat.latent_shape == (16, 2, 4, 6) and tall.latent_shape == (16, 2, 6, 4)
    assert len({name_of(run), name_of(flat), name_of(tall)}) == 3


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_trajectories=9),
        dict(method="consistency"),
        dict(learning_rate=1.0),
        dict(sample_batch_size=3),
        dict(offload=True),
        dict(shard=True),
        dict(eval_seed=5),
        dict(max_train_steps=77),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_change_no_sample_are_not_in_its_name(make_run, changes):
    run = make_run(method="trajectory")
    assert name_of(with_settings(run, **changes)) == name_of(run)


def test_the_teachers_files_are_in_the_name(make_run, monkeypatch):
    run = make_run(method="trajectory")
    before = name_of(run)
    monkeypatch.setattr(TeacherInfo, "fingerprint", lambda self, parts=(): "other files")
    assert name_of(run) != before


def test_the_text_encoder_and_the_prompts_are_in_the_name(make_run):
    run = make_run(method="trajectory")
    length, device = run.embeddings.length, run.runtime.device
    other = PromptEmbeddings(run.embeddings.folder, {"encoder": "another"}, length, device)
    named = {
        name_of(run),
        name_of(dataclasses.replace(run, embeddings=other)),
        name_of(dataclasses.replace(run, prompts=run.prompts[:2])),
        name_of(dataclasses.replace(run, prompts=run.prompts[::-1])),
    }
    assert len(named) == 4
    store = SampleStore(run, trajectories(run.config), prompts=run.prompts[:2])
    assert store.folder.name == name_of(dataclasses.replace(run, prompts=run.prompts[:2]))


def test_the_sampler_its_points_and_what_is_stored_are_in_the_name(make_run):
    run = make_run(method="trajectory")
    spec = trajectories(run.config)
    (run.folder.path).mkdir(parents=True, exist_ok=True)
    run.folder.lora("high").write_bytes(b"a student")
    specs = [
        spec,
        dataclasses.replace(spec, sampler="student"),
        dataclasses.replace(spec, sigmas=(1.0, 0.5, *spec.sigmas[1:])),
        dataclasses.replace(spec, stored=spec.stored[1:]),
        dataclasses.replace(spec, noise="evaluation"),
    ]
    assert len({SampleStore(run, s).folder.name for s in specs}) == len(specs)
    longer = dataclasses.replace(spec, count=spec.count + 1)
    assert SampleStore(run, longer).folder == SampleStore(run, spec).folder


def test_the_evaluations_noise_has_a_seed_of_its_own(make_run):
    run = make_run(method="trajectory")
    spec = trajectories(run.config)
    apart = dataclasses.replace(spec, noise="evaluation")
    other = with_settings(run, eval_seed=5)
    again = with_settings(run, seed=5)
    assert SampleStore(other, apart).folder != SampleStore(run, apart).folder
    assert SampleStore(again, apart).folder == SampleStore(run, apart).folder
    alike = with_settings(run, seed=5, eval_seed=5)
    assert SampleStore(alike, apart).folder != SampleStore(alike, spec).folder
    noises = [SampleStore(run, s).noise(0) for s in (spec, apart)]
    noises.append(SampleStore(other, apart).noise(0))
    assert len({float(noise.sum()) for noise in noises}) == 3


def test_the_bytes_of_the_distilled_expert_are_in_the_name(make_run):
    run = make_run(method="dmd")
    spec = handovers(run.config, steps=4, distilled=True, complete=False)
    run.folder.path.mkdir(parents=True, exist_ok=True)
    names = []
    for student in (b"a student", b"another one"):
        run.folder.lora("high").write_bytes(student)
        names.append(SampleStore(run, spec).folder.name)
    assert names[0] != names[1]
    # Without guidance: neither its scale nor the negative prompt changes what the student samples.
    unguided = with_settings(run, guidance_scale=9.0, negative_prompt="ugly")
    assert SampleStore(unguided, spec).folder.name == names[1]


def test_the_order_in_which_a_key_is_written_does_not_matter(make_run, monkeypatch):
    """Days of work are found again after a refactor that only moves lines."""
    run = make_run(method="trajectory")
    before, key = name_of(run), SampleStore.key

    def reversed_key(self):
        return dict(reversed(key(self).items()))

    monkeypatch.setattr(SampleStore, "key", reversed_key)
    assert name_of(run) == before


def test_the_names_of_stored_samples(tmp_path: Path) -> None:
    """Of the embedded teacher, as recorded: a change throws away what users have solved."""
    config = Config(output_dir=str(tmp_path), num_trajectories=4, method="dmd")
    config = resolve(config, read_teacher(config))
    runtime = Runtime(config)
    key = dict(encoder="of this test", length=16, dtype="no")
    embeddings = PromptEmbeddings(tmp_path / "prompts", key, 16, torch.device("cpu"))
    teacher = Teacher(read_teacher(config), config, runtime)
    run = Run(config, teacher, embeddings, ("a red ball", "a blue box"), runtime)
    run.folder.lora("high").write_bytes(b"a student")
    specs = [
        trajectories(config),
        anchors(config),
        handovers(config, steps=4, distilled=True, complete=False),
        handovers(config, steps=4, distilled=False, complete=False),
    ]
    names = {f"{spec.kind} of the {spec.sampler}": SampleStore(run, spec).folder for spec in specs}
    assert [folder.parent.name for folder in names.values()] == [spec.kind for spec in specs]
    compare_recorded("sample_names.json", {what: folder.name for what, folder in names.items()})
    key = SampleStore(run, specs[0]).key()
    assert json.loads(json.dumps(key)) == key  # plain values: written and read back, they are equal
