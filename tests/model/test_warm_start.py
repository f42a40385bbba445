"""A student that begins where another run's ended."""

from __future__ import annotations

import pytest
import torch
from foreign_loras import write_in
from lessons import make_lesson
from random_teachers import TEXT_DIM, random_transformer, write_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from written_students import write_student

from wan_distill.errors import UsageError
from wan_distill.layout import LORA_FILE
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import save_lora
from wan_distill.model.warm_start import begin_as, carry_over, check_warm_start
from wan_distill.settings.description import read_teacher
from wan_distill.settings.job import LORA_TARGETS
from wan_distill.settings.lora_headers import LoraHeader

BOUNDARY = 0.875


def test_a_warm_start_begins_with_the_other_runs_student(make_run, tmp_path):
    run = make_run(method="dmd", lora_alpha=16.0, diversity_weight=0.0)
    lesson = make_lesson(run, "high", moved=0.05)
    first = lesson.denoiser
    file = tmp_path / LORA_FILE["high"]
    save_lora(file, lesson.learners["student"].exported(), run.config, run.info, "high")
    second = random_transformer(1)
    add_adapter(second, "student", rank=4, alpha=2.0, layers=LORA_TARGETS, seed=9)
    begin_as(second, "student", LoraHeader(file, "--init_student_from"))
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = Condition(torch.zeros(1, 12, TEXT_DIM))
    sigma = torch.tensor([0.9], dtype=torch.float64)
    with torch.no_grad():
        expected = first.velocity(x, sigma, condition, role="student")
        begun = Denoiser({"high": second}, BOUNDARY).velocity(x, sigma, condition, role="student")
        teacher = first.velocity(x, sigma, condition, role="teacher")
    torch.testing.assert_close(begun, expected, rtol=1e-4, atol=1e-5)
    assert (expected - teacher).abs().max() > 1e-3


def test_a_warm_start_of_equal_alpha_takes_the_weights_as_they_are(make_run, tmp_path):
    run = make_run(method="trajectory")
    weights = make_lesson(run, "high", moved=0.05).learners["student"].exported()
    file = tmp_path / LORA_FILE["high"]
    save_lora(file, weights, run.config, run.info, "high")
    second = random_transformer(1)
    alpha = run.config.lora_alpha
    add_adapter(second, "student", rank=4, alpha=alpha, layers=LORA_TARGETS, seed=9)
    begin_as(second, "student", LoraHeader(file, "--init_student_from"))
    begun = adapter_parameters(second, "student")
    assert set(begun) == set(weights)
    assert all(torch.equal(p, weights[name]) for name, p in begun.items())


@pytest.mark.parametrize("rank", [4, 6, 2])
def test_another_rank_has_the_same_effect_as_far_as_it_can(make_run, tmp_path, rank):
    run = make_run(method="trajectory", lora_alpha=6.0)
    weights = make_lesson(run, "high", moved=0.05).learners["student"].exported()
    file = tmp_path / LORA_FILE["high"]
    save_lora(file, weights, run.config, run.info, "high")
    second = random_transformer(1)
    add_adapter(second, "student", rank=rank, alpha=2.0, layers=LORA_TARGETS, seed=9)
    fresh = {n: p.detach().clone() for n, p in adapter_parameters(second, "student").items()}
    note = begin_as(second, "student", LoraHeader(file, "--init_student_from"))
    lost = total = 0.0
    for name, module in second.named_modules():
        if hasattr(module, "get_delta_weight"):
            a, b = (weights[f"{name}.lora_{half}.student.weight"] for half in "AB")
            wanted, got = b @ a * (6.0 / 4), module.get_delta_weight("student").detach()
            lost += float((got - wanted).square().sum())
            total += float(wanted.square().sum())
            if rank == 6:  # can learn: the additional rows are random, what they are added by is 0
                down = module.lora_A["student"].weight
                assert torch.equal(down[4:], fresh[f"{name}.lora_A.student.weight"][4:])
                assert (down[4:] != 0).all() and (module.lora_B["student"].weight[:, 4:] == 0).all()
    error = (lost / total) ** 0.5
    if rank >= 4:
        assert error < 1e-6 and note is None
    else:
        assert 0.01 < error < 0.9
        assert note == (
            f"{file.name}: cut from rank 4 to 2; relative error of its matrices {error:.2g}"
        )


def test_layers_that_a_file_lacks_stay_without_effect(make_run, tmp_path):
    run = make_run(method="trajectory", lora_layers=("to_q",))
    weights = make_lesson(run, "high", moved=0.05).learners["student"].exported()
    file = tmp_path / LORA_FILE["high"]
    save_lora(file, weights, run.config, run.info, "high")
    second = random_transformer(1)
    add_adapter(second, "student", rank=4, alpha=4.0, layers=("to_q", "to_k"), seed=9)
    begin_as(second, "student", LoraHeader(file, "--init_student_from"))
    moved = {
        name.rsplit(".", 1)[-1]: bool(module.get_delta_weight("student").any())
        for name, module in second.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert moved == {"to_q": True, "to_k": False}


# ------------------------------------------------------------------------------ before a run begins


def found(config) -> str:
    return check_warm_start(config, read_teacher(config))


def test_what_the_student_begins_with_is_said(make_run, small_config, tmp_path):
    first = make_run(method="trajectory", output_dir=str(tmp_path / "first"))
    write_student(first, "high", "low")
    changes = dict(method="dmd", init_student_from=str(tmp_path / "first"))
    said = "high from high_noise_lora.safetensors (comfyui layout, rank 4); low from low_noise_"
    assert found(small_config(**changes)) == said + "lora.safetensors (comfyui layout, rank 4)"
    other = found(small_config(rank=8, flow_shift=3.0, **changes))
    assert "rank 4 in --rank 8" in other
    assert "trained for sigmas [1.0, 0.9375, 0.8333, 0.625]; this run trains sigmas [1.0, " in other
    source = first.folder.lora("high")
    theirs = write_in("lightning with extras", source, tmp_path / "x_high.safetensors")
    foreign = found(small_config(method="dmd", expert="high", init_student_from=str(theirs)))
    assert "1 tensors (diffusion_model.blocks.0.cross_attn.k.diff_b)" in foreign
    assert "which sigmas it was trained for it does not say; this run trains sigmas" in foreign


def test_a_lora_for_another_model_is_refused(make_run, small_config, tmp_path):
    teacher = write_pipeline(tmp_path / "deep", layers=2)
    first = make_run(
        method="trajectory", teacher_path=str(teacher), output_dir=str(tmp_path / "first")
    )
    write_student(first, "high")
    settings = dict(method="dmd", expert="high", init_student_from=str(tmp_path / "first"))
    with pytest.raises(UsageError, match=r"has a layer blocks\.1\..*random has 1 blocks"):
        found(small_config(**settings))
    file = first.folder.lora("high")
    wider = {
        name: torch.zeros(4, 99) if name.endswith("lora_down.weight") else tensor
        for name, tensor in load_file(file).items()
        if ".blocks.0." in name
    }
    save_file(wider, file)
    with pytest.raises(UsageError, match=r"is a matrix of 24x99, random's is 24x24"):
        found(small_config(**settings))


def test_an_expert_that_is_not_trained_here_is_carried_over(make_run, tmp_path):
    first = make_run(method="trajectory", output_dir=str(tmp_path / "first"))
    write_student(first, "high", "low")
    settings = dict(method="trajectory", expert="low")
    own = make_run(init_student_from=str(tmp_path / "first"), **settings)
    (line,) = carry_over(own.config, own.info)
    assert line.startswith("high_noise_lora.safetensors: not trained here; carried over from")
    source, target = first.folder.lora("high"), own.folder.lora("high")
    assert source.read_bytes() == target.read_bytes()
    assert not own.folder.lora("low").exists()
    target.write_bytes(b"trained here")
    assert carry_over(own.config, own.info) == []
    assert target.read_bytes() == b"trained here"
    files = [
        write_in("kohya", first.folder.lora(expert), tmp_path / f"{expert}.safetensors")
        for expert in ("high", "low")
    ]
    out = str(tmp_path / "third")
    other = make_run(init_student_from=",".join(map(str, files)), output_dir=out, **settings)
    carry_over(other.config, other.info)
    target = other.folder.lora("high")
    assert target.read_bytes() == source.read_bytes()  # metadata and names are this tool's


def test_what_no_reader_of_our_files_reads_is_not_carried_over(make_run, tmp_path):
    first = make_run(method="trajectory", output_dir=str(tmp_path / "first"))
    write_student(first, "high", "low")
    start = tmp_path / "theirs"
    for expert in ("high", "low"):
        file = start / f"{expert}_noise.safetensors"
        write_in("lightning with extras", first.folder.lora(expert), file)
    settings = dict(method="trajectory", expert="low", init_student_from=str(start))
    own = make_run(output_dir=str(tmp_path / "second"), **settings)
    assert "2 tensors (diffusion_model.blocks.0.cross_attn.k.diff_b, " in found(own.config)
    carry_over(own.config, own.info)
    source, target = first.folder.lora("high"), own.folder.lora("high")
    assert target.read_bytes() == source.read_bytes()
    file = start / "high_noise.safetensors"
    wider = {k: v.repeat(1, 2) if ".lora_down" in k else v for k, v in load_file(file).items()}
    save_file(wider, file)
    target.unlink()
    with pytest.raises(UsageError, match=r"high_noise.*is a matrix of 24x48, random's is 24x24"):
        found(own.config)
    # One of ours, to which somebody added a bias.
    with safe_open(source, "pt") as opened:
        about = opened.metadata()
    bias = {"diffusion_model.blocks.0.cross_attn.k.diff_b": torch.ones(24)}
    save_file(load_file(source) | bias, file, about)
    carry_over(own.config, own.info)
    assert load_file(target).keys() == load_file(source).keys()
