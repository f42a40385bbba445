"""What a run has to do, as its plan says it, against what a run then does."""

from __future__ import annotations

import dataclasses
import math

import pytest
from conftest import tiny_flags
from foreign_loras import write_in
from random_teachers import write_pipeline
from safetensors.torch import load_file
from written_students import write_student

import train_distillation
from wan_distill.data.samples import SampleStore
from wan_distill.layout import LORA_FILE
from wan_distill.planning import work
from wan_distill.planning.disk import disk_needs
from wan_distill.planning.memory import shape_of
from wan_distill.planning.parts import evaluation_counts, evaluation_flops
from wan_distill.planning.trace import trace
from wan_distill.settings import sample_specs
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve

KINDS = ("trajectories", "anchors", "handovers")


def planned(flags: list[str]):
    """(settings, teacher, cost of an update) as a run with these flags resolves them."""
    config = parse_args(flags)
    info = read_teacher(config)
    config = resolve(config, info)
    return config, info, trace(shape_of(config, info))


@pytest.mark.journey  # as long as a whole run
@pytest.mark.parametrize(
    "changes",
    [
        dict(method="dmd"),
        dict(method="dmd", real_score="samples", monitor_steps=1, monitor_samples=4),
        dict(method="dmd", real_score="paired"),
        dict(
            method="trajectory",
            num_trajectories=40,
            validation_steps=1,
            validation_prompt="a dog|a cat|a bird|a cow",
            monitor_steps=1,
            monitor_samples=4,
        ),
    ],
    ids=["dmd", "dmd-samples", "dmd-paired", "trajectory"],
)
def test_the_plan_has_the_samples_that_the_run_then_solves(random_teacher, tmp_path, changes):
    """Not all of --num_trajectories: those that updates, checks and previews read."""
    out = tmp_path / "out"
    flags = tiny_flags(random_teacher, out, evaluate=False, **changes)
    config, info, cost = planned(flags)
    rows = sum(part.rows for part in work.sample_work((config,), info))
    written = disk_needs((config,), info, cost)["for solved samples"]
    assert train_distillation.main(flags) == 0
    files = [file for kind in KINDS for file in out.glob(f"{kind}/*/*.safetensors")]
    assert rows == len(files) > 0
    assert written == sum(load_file(file)["latents"].nbytes for file in files)


@pytest.mark.journey  # as long as a whole run
@pytest.mark.parametrize("both", [True, False])
def test_the_plan_of_the_low_expert_knows_whether_a_high_one_begins(
    both, make_run, random_teacher, tmp_path, capsys
):
    """With LoRAs of another tool: whose hand-over is solved is the same in plan and run."""
    first = make_run(method="trajectory", lora_alpha=2.0, output_dir=str(tmp_path / "first"))
    write_student(first, "high", "low")
    start = tmp_path / "theirs"
    for expert in ("high", "low") if both else ("low",):
        write_in("kohya", first.folder.lora(expert), start / f"{expert}_noise.safetensors")
    out = tmp_path / "out"
    changes = dict(method="trajectory", expert="low", init_student_from=start, monitor_steps=1)
    flags = tiny_flags(random_teacher, out, monitor_samples=4, **changes)
    config, info, _ = planned(flags)
    specs = [(part.spec, part.rows) for part in work.sample_work((config,), info)]
    rows = sum(rows for _, rows in specs)
    assert ("student" in {spec.sampler for spec, _ in specs}) == both
    assert train_distillation.main([*flags, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "low from low_noise.safetensors (kohya layout, rank 4)" in said
    carried = "high, which is not trained here, carried over from high_noise.safetensors (kohya"
    assert (carried in said) == both
    assert train_distillation.main(flags) == 0
    files = [file for kind in KINDS for file in out.glob(f"{kind}/*/*.safetensors")]
    assert rows == len(files) > 0
    assert (out / LORA_FILE["high"]).exists() == both


def solved_rows(stages, info) -> dict[str, int]:
    return {part.spec.kind: part.rows for part in work.sample_work(stages, info)}


def test_the_plan_knows_what_an_earlier_run_has_solved(make_run, tmp_path):
    """Of another guidance, size or seed they are other samples."""
    settings = dict(method="dmd", real_score="samples", num_trajectories=40, monitor_steps=0)
    run = make_run(**settings, max_train_steps=40)
    config, info, first = run.config, run.info, tmp_path / "first"
    earlier = make_run(**settings, max_train_steps=40, output_dir=str(first))
    store = SampleStore(earlier, sample_specs.trajectories(config))
    store.create()
    for row in range(30):
        store.file(row).touch()
    assert solved_rows((config,), info) == dict(trajectories=40, handovers=40)
    shared = dict(init_student_from=str(first)), dict(samples_dir=str(first))
    for changes in shared:
        again = dataclasses.replace(config, **changes)
        assert solved_rows((again,), info) == dict(trajectories=10, handovers=40)
        for other in (dict(guidance_scale_2=9.0), dict(num_frames=9), dict(seed=4)):
            changed = dataclasses.replace(again, **other)
            assert solved_rows((changed,), info) == dict(trajectories=40, handovers=40)
    (store.folder / "key.json").write_text("{")
    assert solved_rows((again,), info)["trajectories"] == 40  # nobody can tell what they are


def test_a_job_that_goes_on_is_planned_as_it_was(make_run, tmp_path):
    """What it has solved into --samples_dir itself is a part of it."""
    run = make_run(method="trajectory", samples_dir=str(tmp_path / "shared"), monitor_steps=0)
    store = SampleStore(run, sample_specs.trajectories(run.config))
    store.create()
    store.file(0).touch()
    before = solved_rows((run.config,), run.info)["trajectories"]
    run.folder.path.mkdir(parents=True, exist_ok=True)
    run.folder.plan_numbers.touch()
    assert solved_rows((run.config,), run.info)["trajectories"] == before + 1


def test_a_shallower_student_is_taught_and_judged_by_the_whole_teacher(small_config, tmp_path):
    teacher = write_pipeline(tmp_path / "deep", layers=3)
    deep = small_config(teacher_path=str(teacher), method="trajectory", monitor_steps=0)
    shallow, info = dataclasses.replace(deep, student_layers=1), read_teacher(deep)
    costs = [trace(shape_of(config, info)) for config in (deep, shallow)]
    assert costs[1].forward_flops < 0.5 * costs[0].forward_flops
    both = list(zip((deep, shallow), costs, strict=True))
    solving = [work.solve_flops((config,), info, cost) for config, cost in both]
    judging = [evaluation_flops(config, info, cost) for config, cost in both]
    handed_over = work.sample_work((shallow,), info)[-1]
    assert handed_over.spec.sampler == "student"
    spared = handed_over.rows * handed_over.evaluations / deep.train_batch_size
    less = costs[0].forward_flops - costs[1].forward_flops
    assert solving[0] - solving[1] == pytest.approx(spared * less)
    own = deep.eval_samples * evaluation_counts(deep)["student"] / deep.train_batch_size
    assert judging[0] - judging[1] == pytest.approx(own * less)


def test_solved_samples_spare_disk_and_arithmetic(make_run, tmp_path):
    settings = dict(method="dmd", real_score="samples", num_trajectories=40, monitor_steps=0)
    run = make_run(**settings, max_train_steps=40)
    config, info = run.config, run.info
    warm = dataclasses.replace(config, init_student_from=str(run.folder.path))
    cost, values = trace(shape_of(config, info)), math.prod(info.latent_shape(config))
    sizes = [disk_needs((c,), info, cost)["for solved samples"] for c in (config, warm)]
    # 40 trajectories of 4 sigmas, 40 hand-overs of one
    assert sizes[0] == sizes[1] == 40 * (4 + 1) * 4 * values
    store = SampleStore(run, sample_specs.trajectories(config))
    store.create()
    for row in range(30):
        store.file(row).touch()
    assert disk_needs((warm,), info, cost)["for solved samples"] == 40 * (1 + 1) * 4 * values
    rows, less = (
        {part.spec.kind: (part.rows, part.evaluations) for part in work.sample_work((c,), info)}
        for c in (config, warm)
    )
    assert rows["trajectories"][0] == 40 and less["trajectories"][0] == 10
    assert rows["handovers"] == less["handovers"] == (40, 2)
    spared = work.solve_flops((config,), info, cost) - work.solve_flops((warm,), info, cost)
    each = cost.forward_flops / config.train_batch_size * rows["trajectories"][1]
    assert spared == pytest.approx(30 * each)


@pytest.mark.journey  # as long as a whole run
def test_the_disk_holds_the_optimizers_moments_of_every_checkpoint(random_teacher, tmp_path):
    """Against a run's own files: a checkpoint is a role's weights, its two moments, the average."""
    out = tmp_path / "out"
    changes = dict(checkpointing_steps=1, evaluate=False, export="comfyui,comfyui-fp8")
    flags = tiny_flags(random_teacher, out, method="dmd", **changes)
    config, info, cost = planned(flags)
    needs = disk_needs((config,), info, cost)
    assert train_distillation.main(flags) == 0
    checkpoints = list(out.glob("*/checkpoint-*"))
    assert len(checkpoints) == 2 * config.checkpoints_total_limit
    tensors = [
        sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())
        for folder in checkpoints
    ]
    most = config.checkpoints_total_limit + 1  # one more while the newest is written
    predicted = needs["for checkpoints"] / (2 * most)
    assert max(tensors) == pytest.approx(predicted, rel=0.01)
    loras = sum(t.nbytes for f in out.glob("*_lora.safetensors") for t in load_file(f).values())
    assert loras == pytest.approx(needs["for the exported LoRA files"], rel=0.01)
    for name, ending in (("comfyui", "bf16"), ("comfyui-fp8", "fp8_scaled")):
        files = out.glob(f"comfyui/*_{ending}.safetensors")
        size = sum(t.nbytes for file in files for t in load_file(file).values())
        # Matrices outside of the blocks are a large part of a tiny teacher only.
        assert 0.99 * size < needs[f"for --export {name}"] < 1.5 * size


def test_evaluations_of_a_sample_are_two_where_guidance_is_on(small_config):
    config = small_config(method="trajectory")
    info = read_teacher(config)
    solved = (part.spec for part in work.sample_work((config,), info))
    (spec,) = {s for s in solved if (s.kind, s.count) == ("trajectories", 4)}
    steps = len(spec.sigmas) - 1
    assert config.evaluations(spec.sigmas, guided=True) == 2 * steps
    plain = dataclasses.replace(config, guidance_scale=1.0, guidance_scale_2=1.0)
    assert plain.evaluations(spec.sigmas, guided=True) == steps


def test_an_update_takes_all_of_its_micro_batches(small_config):
    config = small_config(method="dmd")
    twice = dataclasses.replace(config, gradient_accumulation_steps=2)
    cost = trace(shape_of(config, read_teacher(config)))
    for one, two in zip(work.update_work(config, cost), work.update_work(twice, cost), strict=True):
        assert two.flops == pytest.approx(2 * one.flops) and two.updates == one.updates
