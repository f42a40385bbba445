"""Before a run: is there a repository's name, does the hub answer, and what would it be given?"""

from __future__ import annotations

import pytest
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from wan_distill.errors import UsageError
from wan_distill.layout import NOT_UPLOADED, UPLOADED
from wan_distill.results.hub import check_hub, repository
from wan_distill.settings.config import Config


@pytest.mark.parametrize("folder", ["tiny_wan22-trajectory+dmd-4steps", "a b", "-x--y.", "Wän+å"])
def test_every_output_folder_gives_a_name_that_the_hub_takes(folder, tmp_path):
    name = repository(Config(output_dir=str(tmp_path / folder)))
    validate_repo_id(name)
    assert name == {"a b": "a-b", "-x--y.": "x-y", "Wän+å": "W-n"}.get(folder, name)
    assert repository(Config(hub_model_id="me/mine", output_dir=folder)) == "me/mine"


def test_without_a_network_it_is_refused_in_one_line(tmp_path):
    config = Config(output_dir=str(tmp_path / "out"), hub_token="hf_some")
    with pytest.raises(UsageError, match=r"--push_to_hub: the hub does not answer \(.+\)") as error:
        check_hub(config)
    assert "\n" not in str(error.value)


TAKEN = """
    high_noise_lora.safetensors low_noise_lora.safetensors scheduler/scheduler_config.json
    comfyui_workflow.json wanvideowrapper_workflow.json evaluation.json report.html
    comparison.png clips/few-0000.mp4 clips/student-0000.mp4 pairs/0000.mp4
    previews/low-000045-0.mp4 previews/low-teacher-0.mp4 previews/prompts.json
"""
LEFT = """
    run.json .lock .student.json .student.partial/transformer/diffusion_pytorch_model.safetensors
    high_noise_student.safetensors README.md model_card.md plan.json spent.json metrics.jsonl
    low/best.safetensors low/checkpoint-45/state.json low/checkpoint-45/fake_score.safetensors
    low/set-aside-0-checkpoint-4/fake_score.safetensors low/.partial-45/student.safetensors
    high/set-aside-1-checkpoint-4/student.safetensors high/checkpoint-200/student.safetensors
    trajectory/high_noise_lora.safetensors trajectory/low_noise_lora.safetensors
    trajectory/comfyui_workflow.json trajectory/run.json trajectory/report.html
    trajectory/scheduler/scheduler_config.json trajectory/previews/high-000200-0.mp4
    trajectory/high/best.safetensors trajectory/high/checkpoint-200/student.safetensors
    trajectory/low/set-aside-0-checkpoint-4/student.safetensors
    prompts/0f/embedding.safetensors prompts/encoder.json pictures/0f.safetensors
    image_source/pictures/0f.png image_source/trajectories/0f/000000.safetensors
    trajectories/0f/000000.safetensors anchors/0f/000000.safetensors handovers/0f/key.json
    evaluation/0f.safetensors evaluation-pairs-4.json logs/events clips/small/few-0000.mp4
    clips/.student-0000.partial.mp4 previews/small/low-000045-0.mp4 student/model_index.json
    student/transformer/diffusion_pytorch_model.safetensors mine/lora.safetensors
    comfyui/high_noise_bf16.safetensors .high_noise_lora.safetensors.17.tmp
"""


def test_an_upload_takes_the_student_and_what_shows_it_alone():
    """Checkpoints have the optimizer's moments and the critics, under more names than one."""
    files = [*LEFT.split(), *TAKEN.split()]
    given = filter_repo_objects(
        files, allow_patterns=list(UPLOADED), ignore_patterns=list(NOT_UPLOADED)
    )
    assert list(given) == TAKEN.split()
