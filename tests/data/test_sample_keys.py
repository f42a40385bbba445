"""The names under which stored samples are found again: what a sample depends on, and no more."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import compare_recorded
from safetensors.torch import load_file, save_file

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleStore
from wan_distill.model.loading import Teacher
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.settings.resolve import resolve
from wan_distill.settings.sample_specs import anchors, handovers, trajectories
from wan_distill.system.runtime import Runtime
from wan_distill.training.resume import identity


def with_settings(run: Run, **changes) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))


def name_of(run: Run) -> str:
    return SampleStore(run, trajectories(run.config)).folder.name


# Another value of each setting that the trajectories depend on. The prompts, the teacher's
# files and the text length are compared by what they hold: see below.
DECIDE = dict(
    seed=1,
    height=48,
    width=48,
    num_frames=9,
    boundary_ratio=0.86,
    mixed_precision="bf16",
    base_precision="fp8",
    negative_prompt="ugly",
    guidance_scale=4.5,
    guidance_scale_2=3.5,
    teacher_steps=7,
    teacher_shift=11.0,
    teacher_solver="ab2",
    flow_shift=6.0,
    sampling_steps=(2, 4, 8),
)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_a_setting_is_in_the_name_exactly_if_samples_depend_on_it(make_run, name):
    run = make_run(method="trajectory")
    changed = with_settings(run, **{name: DECIDE.get(name, another(getattr(run.config, name)))})
    assert getattr(changed.config, name) != getattr(run.config, name)
    assert (name_of(changed) != name_of(run)) == (name in DECIDE)
    assert name_of(with_settings(changed, **vars(run.config))) == name_of(run)


def test_the_solvers_steps_are_in_the_name_where_it_has_its_own(make_run):
    run = make_run(method="trajectory", teacher_solver="ab2")
    assert name_of(with_settings(run, solver_steps=12)) != name_of(run)
    assert name_of(with_settings(run, teacher_steps=12)) == name_of(run)


def another(value):
    """Another value of its type."""
    if isinstance(value, bool):
        return not value
    return {int: 77, float: 0.77, tuple: (7,)}.get(type(value), "another")


def test_what_guides_no_sample_is_not_in_the_name(make_run):
    """Neither a negative prompt without guidance, nor the expert that the anchors do not reach."""
    run = make_run(method="trajectory", guidance_scale=1.0, guidance_scale_2=1.0)
    assert name_of(with_settings(run, negative_prompt="ugly")) == name_of(run)

    def name_of_anchors(run: Run) -> str:
        return SampleStore(run, anchors(run.config)).folder.name

    assert name_of_anchors(with_settings(run, guidance_scale_2=9.0)) == name_of_anchors(run)
    assert name_of_anchors(with_settings(run, guidance_scale=9.0)) != name_of_anchors(run)


def add_one(file: Path) -> None:
    """Changes one value of a weight file."""
    tensors = load_file(file)
    first = tensors[min(tensors)]
    first.view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def set_value(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"a_setting": 1}), encoding="utf-8")


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "samples", "text"),
    [
        (f"transformer/{WEIGHTS}", add_one, True, False),
        (f"transformer_2/{WEIGHTS}", add_one, True, False),
        ("transformer/config.json", set_value, True, False),
        ("transformer_2/config.json", set_value, True, False),
        (f"vae/{WEIGHTS}", add_one, False, False),
        ("vae/config.json", set_value, False, False),
        ("text_encoder/model.safetensors", add_one, False, True),
        ("text_encoder/config.json", set_value, False, True),
        ("tokenizer/tokenizer.json", set_value, False, True),
        ("tokenizer/tokenizer_config.json", set_value, False, True),
        ("scheduler/scheduler_config.json", set_value, False, False),
        ("model_index.json", set_value, False, False),
    ],
)
def test_a_file_of_the_teacher_is_in_each_key_exactly_if_its_content_counts(
    make_run, random_teacher, tmp_path, name, change, samples, text
):
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")
    run = make_run(method="trajectory", teacher_path=str(folder))
    before = name_of(run), identity(run.config, run.info, run.prompts, 1)
    (folder / name).parent.mkdir(exist_ok=True)
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    change(folder / name)
    after = name_of(run), identity(run.config, run.info, run.prompts, 1)
    assert (after[0] != before[0]) == samples
    changed = {what for what in after[1] if after[1][what] != before[1][what]}
    expected = {"the text encoder's and the tokenizer's files"} if text else set()
    if samples or name.startswith("vae"):  # frames decide which weights are exported
        expected = {"the teacher's files"}
    assert changed == expected


def test_height_and_width_are_not_the_same(make_run):
    run = make_run(method="trajectory")
    flat, tall = with_settings(run, width=48), with_settings(run, height=48)
    assert flat.latent_shape == (16, 2, 4, 6) and tall.latent_shape == (16, 2, 6, 4)
    assert len({name_of(run), name_of(flat), name_of(tall)}) == 3


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
    write_student(run.folder.lora("high"), 1.0)
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


def write_student(file: Path, value: float, teacher: str = "here") -> None:
    save_file({"a": torch.full((2,), value)}, file, {"teacher": teacher})


def test_the_weights_of_the_distilled_expert_are_in_the_name(make_run):
    """And not what its file says of the teacher's place."""
    run = make_run(method="dmd")
    spec = handovers(run.config, steps=4, distilled=True, complete=False)
    run.folder.path.mkdir(parents=True, exist_ok=True)
    names = []
    for value, teacher in ((1.0, "here"), (1.0, "there"), (2.0, "there")):
        write_student(run.folder.lora("high"), value, teacher)
        names.append(SampleStore(run, spec).folder.name)
    assert names[0] == names[1] != names[2]
    # Without guidance: neither its scale nor the negative prompt changes what the student samples.
    unguided = with_settings(run, guidance_scale=9.0, negative_prompt="ugly")
    assert SampleStore(unguided, spec).folder.name == names[2]


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
    write_student(run.folder.lora("high"), 1.0)
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
