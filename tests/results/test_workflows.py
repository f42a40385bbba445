"""The workflows of ComfyUI: nodes that exist, wired by type, with this student's numbers."""

from __future__ import annotations

import json

import pytest
from conftest import REPOSITORY
from random_teachers import write_pipeline

from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.maths.sigmas import sigma_grid
from wan_distill.results.workflow_nodes import base_file
from wan_distill.results.workflows import comfyui_workflow, write_workflows
from wan_distill.results.wrapper_workflow import wrapper_workflow
from wan_distill.settings.description import read_teacher

RECORDED = REPOSITORY / "tests" / "recorded"
# Written by tests/compat/comfyui_tables.py with ComfyUI's own code.
NODES = json.loads((RECORDED / "comfyui_nodes.json").read_text(encoding="utf-8"))
SIGMAS = json.loads((RECORDED / "comfyui_simple_sigmas.json").read_text(encoding="utf-8"))
MAKERS = [comfyui_workflow, wrapper_workflow]
FOR_COMFYUI = dict(max_sequence_length=512, flow_shift=5.0, sampling_steps=(4,))


@pytest.fixture
def made(small_config):
    """Makes a workflow of both experts' students."""

    def make(maker, experts=("high", "low"), **changes):
        config = small_config(**(FOR_COMFYUI | changes))
        return maker(config, read_teacher(config), experts)

    return make


def of_class(workflow, name):
    return [node["inputs"] for node in workflow.values() if node["class_type"] == name]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("experts", [("high", "low"), ("low",)])
def test_every_node_has_its_inputs_and_they_are_of_their_types(made, maker, experts):
    check_types(made(maker, experts))


def test_a_picture_goes_to_both_samplers(made, random_picture_teacher):
    workflow = made(comfyui_workflow, teacher_path=str(random_picture_teacher))
    check_types(workflow)
    assert not of_class(workflow, "EmptyHunyuanLatentVideo")
    (picture,) = of_class(workflow, "WanImageToVideo")
    loaded, _ = picture["start_image"]
    assert workflow[loaded]["class_type"] == "LoadImage"
    assert (picture["width"], picture["height"], picture["length"]) == (32, 32, 5)
    high, low = of_class(workflow, "KSamplerAdvanced")
    number = next(n for n, node in workflow.items() if node["inputs"] is picture)
    for sampler in (high, low):
        assert (sampler["positive"], sampler["negative"]) == ([number, 0], [number, 1])
    assert high["latent_image"] == [number, 2]
    assert workflow[low["latent_image"][0]]["inputs"] is high


def test_the_wrapper_is_given_the_picture_cropped(made, random_picture_teacher):
    """Its node stretches what has another aspect."""
    workflow = made(wrapper_workflow, teacher_path=str(random_picture_teacher))
    check_types(workflow)
    assert not of_class(workflow, "WanVideoEmptyEmbeds")
    (picture,) = of_class(workflow, "WanVideoImageToVideoEncode")
    assert (picture["width"], picture["height"], picture["num_frames"]) == (32, 32, 5)
    assert picture["noise_aug_strength"] == 0 and picture["start_latent_strength"] == 1
    (scaled,) = of_class(workflow, "ImageScale")
    assert workflow[picture["start_image"][0]]["inputs"] is scaled
    assert (scaled["width"], scaled["height"], scaled["crop"]) == (32, 32, "center")
    assert workflow[scaled["image"][0]]["class_type"] == "LoadImage"
    number = next(n for n, node in workflow.items() if node["inputs"] is picture)
    samplers = of_class(workflow, "WanVideoSampler")
    assert len(samplers) == 2 and all(s["image_embeds"] == [number, 0] for s in samplers)


def check_types(workflow):
    """Every node has what it needs, of the right types, and its outputs are used."""
    for number, node in workflow.items():
        known = NODES[node["class_type"]]
        types = known["required"] | known["optional"]
        assert known["required"].keys() <= node["inputs"].keys() <= types.keys(), number
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source, index = value
                assert NODES[workflow[source]["class_type"]]["outputs"][index] == types[name]
            else:
                expected = dict(COMBO=str, STRING=str, INT=int, FLOAT=float, BOOLEAN=bool)
                assert type(value) is expected[types[name]], f"{number} {name}"
    inputs = [value for node in workflow.values() for value in node["inputs"].values()]
    used = {value[0] for value in inputs if isinstance(value, list)}
    ends = {n for n, node in workflow.items() if not NODES[node["class_type"]]["outputs"]}
    assert workflow.keys() - used == ends


@pytest.mark.parametrize(
    ("steps", "shift", "split"), [(4, 5.0, 2), (8, 5.0, 4), (4, 12.0, 3), (2, 5.0, 1)]
)
def test_the_samplers_have_the_students_schedule(made, steps, shift, split):
    workflow = made(comfyui_workflow, sampling_steps=(steps,), flow_shift=shift)
    high, low = of_class(workflow, "KSamplerAdvanced")
    for sampler in (high, low):
        assert (sampler["steps"], sampler["cfg"]) == (steps, 1.0)
        assert (sampler["sampler_name"], sampler["scheduler"]) == ("euler", "simple")
    assert (high["start_at_step"], high["end_at_step"], high["add_noise"]) == (0, split, "enable")
    assert (low["start_at_step"], low["end_at_step"], low["add_noise"]) == (split, steps, "disable")
    assert high["return_with_leftover_noise"] == "enable"
    assert low["return_with_leftover_noise"] == "disable"
    assert [node["shift"] for node in of_class(workflow, "ModelSamplingSD3")] == [shift, shift]
    loras = of_class(workflow, "LoraLoaderModelOnly")
    assert [node["lora_name"] for node in loras] == list(LORA_FILE.values())
    assert {node["strength_model"] for node in loras} == {1.0}
    # Each sampler has its own expert's model behind it.
    for sampler, expert in ((high, "high"), (low, "low")):
        node, kinds = workflow[sampler["model"][0]], []
        while "model" in node["inputs"]:
            kinds.append(node["class_type"])
            node = workflow[node["inputs"]["model"][0]]
        assert kinds == ["ModelSamplingSD3", "LoraLoaderModelOnly"]
        assert expert in node["inputs"]["unet_name"]


def test_the_wrappers_samplers_have_it_too(made):
    high, low = of_class(made(wrapper_workflow), "WanVideoSampler")
    for sampler in (high, low):
        assert (sampler["steps"], sampler["cfg"], sampler["shift"]) == (4, 1.0, 5.0)
        assert sampler["scheduler"] == "flowmatch_distill"
    assert (high["start_step"], high["end_step"]) == (0, 2)
    assert (low["start_step"], low["end_step"]) == (2, -1)
    assert "samples" not in high and low["samples"]


@pytest.mark.parametrize("name", SIGMAS)
def test_comfyuis_sigmas_are_the_trained_ones(name):
    steps, shift = int(name.split()[0]), float(name.split()[-1])
    tolerance = 1e-3 if 1000 % steps else 1e-6
    assert SIGMAS[name] == pytest.approx(sigma_grid(steps, shift), abs=tolerance)


def test_what_cannot_work_is_not_written(small_config, tmp_path):
    def written(**changes):
        config = small_config(output_dir=str(tmp_path), **(FOR_COMFYUI | changes))
        return write_workflows(config, read_teacher(config), RunFolder(tmp_path))

    (tmp_path / LORA_FILE["high"]).touch()
    assert written() == ["comfyui_workflow.json", "wanvideowrapper_workflow.json"]
    text = (tmp_path / "comfyui_workflow.json").read_text(encoding="utf-8")
    assert LORA_FILE["high"] in text and LORA_FILE["low"] not in text
    assert written(sampling_steps=(8,)) == ["comfyui_workflow.json"]
    assert written(max_sequence_length=12) == []


def test_a_single_expert_has_one_sampler(small_config, tmp_path):
    teacher = write_pipeline(tmp_path / "one", two_experts=False)
    config = small_config(teacher_path=str(teacher), **FOR_COMFYUI)
    info = read_teacher(config)
    (sampler,) = of_class(comfyui_workflow(config, info, ("high",)), "KSamplerAdvanced")
    assert (sampler["start_at_step"], sampler["end_at_step"]) == (0, 4)
    assert sampler["return_with_leftover_noise"] == "disable"


def test_the_a14bs_files_have_the_names_of_comfyuis_templates(small_config):
    info = read_teacher(small_config())
    assert base_file(info, "low") == "random_low_noise.safetensors"
    info.transformer.update(num_layers=40, num_attention_heads=40)
    assert base_file(info, "low") == "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"
