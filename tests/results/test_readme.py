"""The output folder's README, and run.json."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL
from random_teachers import write_pipeline
from safetensors.torch import save_file

from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.model.loading import Teacher
from wan_distill.results.card import model_card
from wan_distill.results.elsewhere import comfyui, elsewhere
from wan_distill.results.readme import describe_results, package_versions, readme
from wan_distill.results.workflows import write_workflows
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.lora_headers import METADATA_KEY
from wan_distill.settings.resolve import resolve_stages
from wan_distill.settings.schedulers import older_diffusers
from wan_distill.system.runtime import Runtime
from wan_distill.umt5.verify import Verdict


@pytest.mark.parametrize(
    "steps, shift, high",
    [
        (4, 5.0, 2),  # 1 .9375 | .8333 .625
        (8, 5.0, 4),  # 1 .9722 .9375 .8929 | .8333 .75 .625 .4167
        (4, 12.0, 3),  # 1 .9730 .9231 | .8
        (4, 1.0, 1),  # 1 | .75 .5 .25
        (6, 5.0, 3),  # 1 .9615 .9091 | .8333 .7143 .5
    ],
)
def test_comfyui_gets_the_split_of_this_students_sigmas(small_config, steps, shift, high):
    config = small_config(sampling_steps=(steps,), flow_shift=shift)
    words = comfyui(config, read_teacher(config), None)
    assert f"{steps} steps, cfg 1, sampler `euler` and scheduler `simple`" in words
    assert f"the shift of each model to {shift:g} " in words
    assert "in two KSampler (Advanced) nodes:\n\n1. " in words
    assert f"1. high-noise expert: steps 0 to {high}; add noise: enable; return with" in words
    assert f"2. low-noise expert: steps {high} to {steps}; add noise: disable; return" in words
    assert ("template *Wan 2.2 14B Text to Video*" in words) == ((steps, shift) == (4, 5.0))
    assert ("`simple` itself rounds" in words) == (steps == 6)


def test_a_student_of_several_step_counts_says_how_each_is_sampled(small_config, tmp_path):
    config = small_config(sampling_steps=(1, 2, 4), boundary_ratio=0.875)
    words = comfyui(config, read_teacher(config), None)
    assert "In 2 steps: the same with 2 instead of 4, the low-noise expert from step 1." in words
    assert "In 1 steps: the same with 1 instead of 4." in words
    text = readme(tmp_path, config, read_teacher(config), None)
    assert "(sigmas 1.0000 or 1.0000, 0.8333 or 1.0000, 0.9375, 0.8333, 0.6250)" in text


def test_a_teacher_of_one_expert_needs_one_node(small_config, tmp_path):
    teacher = write_pipeline(tmp_path / "one", two_experts=False)
    config = small_config(teacher_path=str(teacher))
    words = comfyui(config, read_teacher(config), None)
    assert "in one KSampler node." in words and "low-noise" not in words


def paragraphs(config, folder):
    return "\n\n".join(elsewhere(config, read_teacher(config), RunFolder(folder)))


def test_a_student_of_another_text_length_is_not_for_comfyui(small_config, tmp_path):
    words = paragraphs(small_config(max_sequence_length=12), tmp_path)
    assert "**Not for ComfyUI:** it pads every prompt to 512 tokens" in words
    assert "trained with 12" in words and "KSampler" not in words


def test_the_workflows_that_are_there_are_named(small_config, tmp_path):
    config = small_config(max_sequence_length=512)
    assert "workflow" not in paragraphs(config, tmp_path)
    (tmp_path / LORA_FILE["low"]).touch()
    write_workflows(config, read_teacher(config), RunFolder(tmp_path))
    words = paragraphs(config, tmp_path)
    assert f"copy `{LORA_FILE['low']}` to `models/loras` and open `comfyui_workflow.json`" in words
    assert "open `wanvideowrapper_workflow.json`. Its scheduler is `flowmatch_distill`" in words


def test_older_versions_of_diffusers_get_the_trained_sigmas(small_config):
    config = small_config(flow_shift=12.0, sampling_steps=(8,))
    said = older_diffusers(config.flow_shift, config.grid_steps)
    code = re.search(r"```python\n(.*?)```", said, re.S)[1]
    scope = dict(pipe=SimpleNamespace())
    exec(code, scope)
    scheduler = scope["pipe"].scheduler
    scheduler.set_timesteps(8, device="cpu")
    assert scheduler.sigmas.tolist() == pytest.approx(config.sigmas(), abs=1e-6)
    timesteps = [1000 * sigma for sigma in config.sigmas()[:-1]]
    assert scheduler.timesteps.tolist() == pytest.approx(timesteps, abs=1e-3)


def test_the_readme_names_the_files_that_are_there(small_config, tmp_path):
    config = small_config(output_dir=str(tmp_path))
    (tmp_path / LORA_FILE["low"]).touch()
    text = readme(tmp_path, config, read_teacher(config), None)
    assert text.startswith("# random, distilled to 4 steps\n\nA student of `")
    assert f"- `{LORA_FILE['low']}`: LoRA of the low-noise expert" in text
    assert "(sigmas 1.0000, 0.9375, 0.8333, 0.6250)" in text
    assert LORA_FILE["high"] not in text and "## Measured" not in text
    assert 'pipe.load_lora_weights("."' in text and "Not for ComfyUI" in text


@pytest.fixture
def two_stages(random_teacher, tmp_path):
    """Gives the settings of both stages of the default job, and its teacher."""

    def make(**changes):
        paths = dict(teacher_path=str(random_teacher), output_dir=str(tmp_path / "out"))
        settings = SMALL | paths | dict(method="trajectory+dmd", max_train_steps=200)
        config = Config(**settings | dict(refine_steps=45) | changes)
        info = read_teacher(config)
        return resolve_stages(config, info), info

    return make


def write_lora(folder, expert, updates):
    """The file of a student, of which only the header matters."""
    file = RunFolder(Path(folder)).lora(expert)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({}, file, {METADATA_KEY: json.dumps(dict(updates=updates))})


def test_the_readme_has_the_updates_of_both_stages(two_stages):
    (first, second), info = two_stages()
    for expert in ("high", "low"):
        write_lora(first.output_dir, expert, 180)
    write_lora(second.output_dir, "high", 180)  # carried over
    for refined, words in (
        (30, "after 180 updates of `trajectory` and 30 of `dmd`"),
        (0, "after 180 updates of `trajectory`; `dmd` brought it no nearer to the teacher"),
    ):
        write_lora(second.output_dir, "low", refined)
        lines = readme(Path(second.output_dir), second, info, None).splitlines()
        assert f"- `{LORA_FILE['high']}`: LoRA of the high-noise expert, after 180 updates" in lines
        assert f"- `{LORA_FILE['low']}`: LoRA of the low-noise expert, {words}" in lines
    RunFolder(Path(first.output_dir)).lora("low").unlink()
    said = readme(Path(second.output_dir), second, info, None)
    assert "after the updates of `trajectory`; `dmd` brought it no nearer" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(),
            "Method: trajectory, 200 updates of the high expert and of the low expert each; then "
            "dmd, 45 updates of the low expert.",
        ),
        (dict(refine_expert="both"), "; then dmd, 45 updates of the high expert and of the low"),
        (dict(method="trajectory", expert="low"), "trajectory, 200 updates of the low expert."),
    ],
)
def test_the_model_card_says_who_learned_in_which_stage(two_stages, changes, words, tmp_path):
    stages, info = two_stages(**changes)
    assert words in model_card(tmp_path, stages, info, None, "me/mine")


def test_a_shallower_student_is_described_as_a_pipeline(small_config, tmp_path):
    teacher = write_pipeline(tmp_path / "deep", layers=2)
    config = small_config(teacher_path=str(teacher), student_layers=1, method="trajectory")
    (tmp_path / "high_noise_student.safetensors").touch()
    text = readme(tmp_path, config, read_teacher(config), None)
    assert "`high_noise_student.safetensors`: all weights, 1 blocks, of the high-noise" in text
    assert "`student/`: the complete pipeline" in text and "ComfyUI" not in text


def test_run_json_holds_settings_versions_and_results(small_config, tmp_path):
    config = small_config(output_dir=str(tmp_path), hub_token="hf_secret")
    info = read_teacher(config)
    verdict = Verdict("PASS", "", "", "both names", 3, 3, "5.0")
    row = dict(sampler="student 4", evaluations=4)
    evaluation = dict(rows=[row], gap_closed_by_steps={"4": 0.5}, floor=1.0, samples=8)
    describe_results([config], Teacher(info, config, Runtime(config)), verdict, evaluation)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    run = json.loads(text)
    assert run["config"]["rank"] == 4 and run["versions"] == package_versions()
    assert run["teacher"] == info.fingerprint() and run["evaluation"] == evaluation
    assert run["text_encoder"]["verdict"] == "PASS" and "hf_secret" not in text
    assert "Gap closed: 0.500 in 4 steps" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_run_json_keeps_what_training_was_when_the_student_is_measured(small_config, tmp_path):
    config = small_config(output_dir=str(tmp_path))
    teacher = Teacher(info := read_teacher(config), config, Runtime(config))
    verdict = Verdict("PASS", "", "", "both names", 3, 3, "5.0")
    first = dataclasses.replace(config, method="trajectory")
    describe_results([first, config], teacher, verdict, None)
    other = dataclasses.replace(config, rank=8, evaluate_only=True)
    row = dict(sampler="student 4", evaluations=4)
    evaluation = dict(rows=[row], gap_closed_by_steps={"4": 0.5}, floor=1.0, samples=8)
    describe_results([other], teacher, verdict, evaluation)
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run["config"]["rank"] == 4 and run["evaluation"] == evaluation
    assert [stage["method"] for stage in run["stages"]] == ["trajectory", config.method]
    assert run["teacher"] == info.fingerprint()
