"""The merged experts as single files: what ComfyUI reads is the student."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from written_students import write_student

from wan_distill.errors import ExportError, UsageError
from wan_distill.model.expert_weights import ExpertWeights
from wan_distill.results import single_files
from wan_distill.results.export import export_student
from wan_distill.settings.lora_names import original_tensor


@pytest.fixture
def exported(make_run):
    """Makes a run whose LoRAs lie in its folder and are exported."""

    def make(*experts, **changes):
        run = make_run(**dict(method="trajectory", lora_alpha=4.0) | changes)
        write_student(run, *experts or run.config.experts)
        export_student(run)
        return run

    return make


def test_a_bf16_file_holds_the_merged_pipelines_weights(exported, capsys):
    run = exported(export=("comfyui", "diffusers"))
    assert "high_noise_bf16.safetensors: read back; tensors differ by at most 0.00" in (
        capsys.readouterr().out
    )
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        merged = WanTransformer3DModel.from_pretrained(run.folder.merged, subfolder=part)
        tensors = load_file(run.folder.single_file(expert, "bf16"))
        expected = {original_tensor(n): t.bfloat16() for n, t in merged.state_dict().items()}
        assert tensors.keys() == expected.keys()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=8e-3, atol=1e-6)
    with safe_open(run.folder.single_file("low", "bf16"), framework="pt") as file:
        assert json.loads(file.metadata()["wan_distill"])["expert"] == "low"


def test_an_fp8_file_has_a_scale_for_each_matrix(exported):
    run = exported(export=("comfyui-fp8",))
    file = run.folder.single_file("high", "fp8_scaled")
    tensors = load_file(file)
    assert tensors["scaled_fp8"].dtype == torch.float8_e4m3fn
    merged = single_files.merged(run, "high")
    again = ExpertWeights([file])
    for name, tensor in merged.items():
        stored = tensors[original_tensor(name)]
        if tensor.dim() == 2 and name.endswith(".weight"):
            assert stored.dtype == torch.float8_e4m3fn
            scale = tensors[original_tensor(name).removesuffix(".weight") + ".scale_weight"]
            assert stored.float().abs().max() == 448 and scale.shape == ()
            error = (again[name] - tensor.float()).norm() / tensor.float().norm()
            assert 1e-3 < error < 0.04
        else:
            assert stored.dtype == torch.bfloat16


def test_an_expert_without_a_student_is_the_teachers(exported):
    run = exported("high", export=("comfyui",), expert="high")
    tensors = load_file(run.folder.single_file("low", "bf16"))
    plain = run.teacher.load_expert("low").state_dict()
    for name, tensor in plain.items():
        assert torch.equal(tensors[original_tensor(name)], tensor.bfloat16())


def test_a_file_that_does_not_give_the_student_back_is_refused(exported, monkeypatch):
    run = exported()
    honest = single_files.stored

    def wrong(name, tensor, kind):
        parts = honest(name, tensor, kind)
        return {n: t * 1.02 if "ffn.2.weight" in n else t for n, t in parts.items()}

    monkeypatch.setattr(single_files, "stored", wrong)
    with pytest.raises(ExportError, match=r"a tensor differs by 0\.02"):
        single_files._write(run, "high", "bf16")


def test_formats_are_checked(small_config):
    assert small_config(export=("diffusers",)).save_merged is True
    with pytest.raises(UsageError, match="there is no gguf format; choose from diffusers,comfyui"):
        small_config(export=("gguf",))
    with pytest.raises(UsageError, match="contradicts --no-save_merged"):
        small_config(export=("diffusers",), save_merged=False)


def test_the_merged_pipeline_tells_vllm_omni_its_steps(exported):
    run = exported(save_merged=True, sampling_steps=(8,))
    index = json.loads((run.folder.merged / "model_index.json").read_text(encoding="utf-8"))
    few = index["dmd2_config"]
    assert (few["num_inference_steps"], few["solver"], few["guidance_scale"]) == (8, "ode", 1.0)
    # As its scheduler uses them (a subclass of this one): timesteps given, shift 1.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(timesteps=few["denoising_timesteps"], device="cpu")
    assert scheduler.sigmas.tolist() == pytest.approx(run.config.sigmas(), abs=1e-6)
    assert WanPipeline.from_pretrained(run.folder.merged).config.boundary_ratio == 0.875
