"""What is exported is loaded back; the snippet puts each LoRA where it belongs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from written_students import write_student

from wan_distill.errors import ExportError
from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.model.student_files import load_student
from wan_distill.results.export import export_student
from wan_distill.results.merged import probe
from wan_distill.results.snippet import snippet
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.teacher_changes import TeacherChanges, TeacherLora


@pytest.fixture
def exported(make_run):
    """Makes a run whose LoRAs lie in its folder and are exported."""

    def make(**changes):
        run = make_run(**dict(method="trajectory", lora_alpha=4.0) | changes)
        write_student(run, *run.config.experts)
        export_student(run)
        return run

    return make


# --------------------------------------------------------------------------------------- the LoRAs


def test_every_lora_is_loaded_back(exported, capsys):
    exported()
    said = capsys.readouterr().out
    for name in LORA_FILE.values():
        assert f"{name}: float32, loaded back as diffusers and as ComfyUI do; equal to" in said


def test_a_lora_that_does_not_come_back_is_refused(make_run):
    """Here a layer that no block of this teacher has."""
    run = make_run(method="trajectory", lora_alpha=4.0)
    write_student(run, "high", "low")
    file = run.folder.lora("low")
    tensors = {
        name.replace("blocks.0.self_attn.q.", "blocks.7.self_attn.q."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ExportError, match="low_noise_lora"):
        export_student(run)
    assert not run.folder.scheduler.exists()


def test_the_scheduler_gives_the_trained_sigmas(exported):
    run = exported(sampling_steps=(2,))
    scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(run.folder.scheduler)
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == pytest.approx(run.config.sigmas(), abs=1e-12)


# ------------------------------------------------------------------------------------- the snippet


def test_the_snippet_loads_each_lora_onto_its_expert(exported, monkeypatch):
    """Run as it stands, up to the first sample."""
    run = exported()
    monkeypatch.chdir(run.folder.path)
    code = snippet(run.config, run.info, ("high", "low"))
    names: dict = {}
    exec(code.split("pipe.to(")[0], names)
    pipe = names["pipe"]
    assert pipe.get_list_adapters() == {"transformer": ["high"], "transformer_2": ["low"]}
    for expert, part in (("high", pipe.transformer), ("low", pipe.transformer_2)):
        wanted = run.teacher.load_expert(expert)
        load_student(wanted, run.folder.lora(expert))
        torch.testing.assert_close(probe(part), probe(wanted), rtol=0, atol=1e-5)
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(run.config.sigmas(), abs=1e-12)


def test_the_snippet_of_half_a_student_loads_that_half(exported, monkeypatch):
    run = exported(expert="low")
    monkeypatch.chdir(run.folder.path)
    names: dict = {}
    exec(snippet(run.config, run.info, ("low",)).split("pipe.to(")[0], names)
    assert names["pipe"].get_list_adapters() == {"transformer_2": ["low"]}


@pytest.mark.parametrize(
    "style, layer",
    [
        ("kohya", "lora_unet_head_head.lora_"),
        ("kohya", "lora_unet_blocks_0_ffn_0.lora_"),
        ("diff", ""),
    ],
)
def test_what_diffusers_does_not_read_of_a_teachers_lora_is_said(exported, tmp_path, style, layer):
    run = exported()
    file = tmp_path / "style.safetensors"
    tensors = {f"{layer}{half}.weight": torch.ones(4, 4) for half in ("down", "up")}
    if style == "diff":
        tensors = {"diffusion_model.blocks.0.norm3.diff": torch.ones(4)}
    save_file(tensors, file)
    lora = TeacherLora("high", LoraHeader(file, "--teacher_lora"), 1.0)
    info = dataclasses.replace(run.info, changes=TeacherChanges(loras=(lora,)))
    code = snippet(run.config, info, ("high", "low"))
    compile(code, "snippet", "exec")
    assert ("style.safetensors: sample with sample.py" in code) == ("ffn" not in layer)
    assert ("load_lora_weights" in code) == ("ffn" in layer)


def test_the_snippet_asks_for_what_was_trained(exported):
    run = exported(mixed_precision="bf16")
    code = snippet(run.config, run.info, ("high", "low"), "me/student")
    compile(code, "snippet", "exec")
    several = dataclasses.replace(run.config, sampling_steps=(2, 4))
    assert "num_inference_steps=4," in snippet(several, run.info, ("high", "low"))
    for line in (
        'from_pretrained("me/student", subfolder="scheduler")',
        "dtype=torch.bfloat16",
        'subfolder="vae", dtype=torch.float32)\npipe = ',  # bf16 shows as banding
        'pipe.to("cuda")  # too little memory: pipe.enable_model_cpu_offload() instead',
        "height=32,",
        "num_frames=5,",
        "num_inference_steps=4,",
        "guidance_scale=1.0,",
        "max_sequence_length=12,",
    ):
        assert line in code, line
    whole = dataclasses.replace(run.config, student_layers=1)
    code = snippet(whole, run.info, ("high", "low"))
    compile(code, "snippet", "exec")
    assert 'WanPipeline.from_pretrained("student", vae=vae' in code and "load_lora" not in code
    assert 'AutoencoderKLWan.from_pretrained("student"' in code


def test_stock_diffusers_loads_the_loras_in_bf16(exported, random_teacher):
    run = exported(mixed_precision="bf16")
    pipe = WanPipeline.from_pretrained(random_teacher, dtype=torch.bfloat16)
    folder = RunFolder(run.folder.path)
    pipe.load_lora_weights(folder.path, weight_name=LORA_FILE["high"], adapter_name="high")
    pipe.load_lora_weights(
        folder.path,
        weight_name=LORA_FILE["low"],
        adapter_name="low",
        load_into_transformer_2=True,
    )
    for expert, part in (("high", pipe.transformer), ("low", pipe.transformer_2)):
        wanted = run.teacher.load_expert(expert)
        load_student(wanted, run.folder.lora(expert))
        with torch.autocast("cpu", torch.bfloat16):
            ours = probe(wanted)
        torch.testing.assert_close(probe(part), ours, rtol=0.05, atol=0.05)
