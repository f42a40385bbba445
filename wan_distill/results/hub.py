"""The student on the Hugging Face Hub: LoRAs, scheduler, previews, report, and a card that says how
to use them.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from wan_distill.errors import Halted, UsageError
from wan_distill.results.readme import readme
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo

SHARED = [
    "*.safetensors",
    "scheduler/*",
    "previews/*",
    "comparison.png",
    "report.html",
    "run.json",
    "evaluation.json",
]
UNSHARED = [
    "prompts/*",
    "trajectories/*",
    "anchors/*",
    "handovers/*",
    "evaluation/*",
    "*/best.safetensors",
    "*/checkpoint-*",
    "student/*",
    "*_student.safetensors",
]


def repository(config: Config) -> str:
    return config.hub_model_id or Path(config.output_dir).resolve().name


def check_hub(config: Config) -> None:
    """Before days of training: is the name a name, and may this token write? Raises UsageError."""
    try:
        validate_repo_id(repository(config))
        HfApi(token=config.hub_token).whoami()
    except HFValidationError as error:
        raise UsageError(
            f"--hub_model_id {repository(config)}: is no repository name ({error}); give user/name"
        ) from error
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--push_to_hub: the hub does not know you ({reason}); `hf auth login`, or --hub_token "
            "with a "
            "token that may write"
        ) from error


def push(config: Config, info: TeacherInfo, evaluation: dict | None) -> str:
    """Uploads the output folder without its caches and returns the page's address.

    Raises Halted where the upload fails: everything is on disk, and the same command tries again.
    """
    folder, api = Path(config.output_dir), HfApi(token=config.hub_token)
    try:
        name = api.create_repo(repository(config), exist_ok=True).repo_id
        card = folder / "model_card.md"
        card.write_text(model_card(folder, config, info, evaluation, name), encoding="utf-8")
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=name)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=SHARED, ignore_patterns=UNSHARED
        )
        if (
            config.student_layers is not None
        ):  # nothing to put on the teacher: the repository is the pipeline
            api.upload_folder(repo_id=name, folder_path=folder / "student")
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Halted(
            f"--push_to_hub: {reason}; all is in {folder}, run the same command to try again"
        ) from error
    return f"{api.endpoint}/{name}"


def model_card(
    folder: Path, config: Config, info: TeacherInfo, evaluation: dict | None, name: str
) -> str:
    """The output folder's README with the hub's front matter, its snippet reading from the hub, and
    the previews.
    """
    front = [
        "library_name: diffusers",
        "pipeline_tag: text-to-video",
        "tags: [lora, text-to-video, wan, distillation, few-step]",
    ]
    if not Path(info.source).is_dir():
        front.append(f"base_model: {info.source}")
    if info.source.startswith("Wan-AI/"):
        front.append("license: apache-2.0")
    schedule = dict(
        sigmas=config.sigmas(),
        flow_shift=config.flow_shift,
        boundary_ratio=config.boundary,
        guidance_scale=1.0,
        max_sequence_length=config.max_sequence_length,
    )
    clips = "".join(
        f'<video controls muted loop src="https://huggingface.co/{name}/resolve/main/previews/{f.name}">'
        f"</video> {'teacher' if '-teacher-' in f.name else 'student'}\n"
        for f in shown_clips(folder / "previews")
    )
    return (
        "---\n"
        + "\n".join(front)
        + "\n---\n\n"
        + readme(folder, config, info, evaluation, name)
        + f"\n## Schedule\n\n```json\n{json.dumps(schedule)}\n```\n"
        + (f"\n## Clips\n\n{clips}" if clips else "")
    )


def shown_clips(previews: Path) -> list[Path]:
    """The low expert's (or the only expert's) last previews, each after the teacher's of the same
    prompt.
    """
    expert = "low" if list(previews.glob("low-*.mp4")) else "high"
    newest: dict[str, Path] = {}
    for file in sorted(previews.glob(f"{expert}-[0-9]*.mp4")):
        newest[file.stem.rsplit("-", 1)[1]] = file
    pairs = (
        (previews / f"{expert}-teacher-{prompt}.mp4", file)
        for prompt, file in sorted(newest.items())
    )
    return [file for pair in pairs for file in pair if file.exists()]
