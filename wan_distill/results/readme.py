"""run.json and the output folder's README.md: what a run was, and how to use its student."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.results.elsewhere import elsewhere
from wan_distill.results.progress import exported_updates
from wan_distill.results.snippet import snippet
from wan_distill.results.table import as_markdown
from wan_distill.results.workflows import write_workflows
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.files import write_atomically
from wan_distill.system.records import read_record

if TYPE_CHECKING:
    from wan_distill.model.loading import Teacher
    from wan_distill.umt5.verify import Verdict

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def package_versions() -> dict[str, str]:
    """The installed version of each package that decides what a run computes."""
    return {name: version(name) for name in PACKAGES}


def describe_results(
    stages: Sequence[Config],
    teacher: Teacher,
    verdict: Verdict,
    evaluation: dict[str, Any] | None,
) -> None:
    """Writes run.json and README.md into the output folder. With `--evaluate_only` what run.json
    says of the training stays.

    Args:
        stages: the settings of the job's stages, in order.
        verdict: what was found out about the text encoder.
        evaluation: the evaluation's values, None where none was asked for.
    """
    config = stages[-1]
    folder = RunFolder(Path(config.output_dir))
    run = dict(
        config=config.to_json(),
        stages=[stage.to_json() for stage in stages],
        versions=package_versions(),
        python=platform.python_version(),
        platform=platform.platform(),
        written=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        teacher=teacher.info.fingerprint(),
        text_encoder=verdict.to_json(),
        # What is known of each clip stands in evaluation.json.
        evaluation={k: v for k, v in (evaluation or {}).items() if k != "clips"} or None,
    )
    if config.evaluate_only and folder.run_json.exists():
        trained = read_record(folder.run_json, "delete it, and run again")
        run |= {name: trained[name] for name in ("config", "stages") if name in trained}
    write_atomically(folder.run_json, json.dumps(run, indent=1, ensure_ascii=False).encode())
    write_workflows(config, teacher.info, folder)
    text = readme(folder.path, config, teacher.info, evaluation)
    write_atomically(folder.readme, text.encode())


def readme(
    folder: Path,
    config: Config,
    info: TeacherInfo,
    evaluation: dict[str, Any] | None,
    repository: str = "",
) -> str:
    """README.md of the output folder: what this student is, how to use it and how good it is.

    Args:
        folder: the output folder; files that it does not hold are not named.
        evaluation: the evaluation's values, None where none was asked for.
        repository: of the hub, for its model card: the code then reads from there.
    """
    files = RunFolder(folder)
    experts = tuple(e for e in info.experts if files.has_student(e))
    counts = " or ".join(map(str, config.sampling_steps))
    what = f"all weights, {config.student_layers} blocks," if config.whole_student else "LoRA"
    listed = [
        f"- `{files.student(e).name}`: {what} of the {e}-noise expert{_learned(config, files, e)}"
        for e in experts
    ]
    sigmas = " or ".join(
        ", ".join(f"{sigma:.4f}" for sigma in config.sigmas(steps)[:-1])
        for steps in config.sampling_steps
    )
    listed.append(f"- `{files.scheduler.name}/`: the sampler it was trained for (sigmas {sigmas})")
    if config.save_merged and not repository:
        listed.append(
            f"- `{files.merged.name}/`: the complete pipeline, adapters merged in (needs diffusers "
            "0.39 or newer, which says that it ignores `dmd2_config`: vLLM-Omni's steps)"
        )
    if files.first_frame.exists() and not repository:
        listed.append(
            f"- `{files.first_frame.name}`: a picture to try it with; put your own in its place"
        )
    parts = [
        f"# {info.name}, distilled to {counts} steps",
        f"A student of `{info.title}` that samples in {counts} steps without guidance "
        f"(method: {config.method_title}).",
        *([f"The teacher was changed: {'; '.join(info.changes.words())}."] if info.changes else []),
        "\n".join(listed),
        "## Use",
    ]
    if not repository:
        parts.append("In this folder:")
    parts.append(f"```python\n{snippet(config, info, experts, repository or '.')}```")
    parts += elsewhere(config, info, files)
    if evaluation:
        parts.append(f"## Measured\n\n{as_markdown(evaluation)}")
    return "\n\n".join(parts) + "\n"


def _learned(config: Config, files: RunFolder, expert: Expert) -> str:
    """The updates that made one expert's file, in words; nothing where it does not say.

    An expert that a second stage refined has those of the first stage too.
    """
    updates = exported_updates(files, expert)
    if updates is None:
        return ""
    if not config.is_second_stage or expert not in config.experts:
        return f", after {updates} updates"
    first = RunFolder(Path(config.init_student_from or ""))
    begun = exported_updates(first, expert)
    made = f", after {'the' if begun is None else begun} updates of `{first.path.name}`"
    if updates:
        return f"{made} and {updates} of `{config.method}`"
    return f"{made}; `{config.method}` brought it no nearer to the teacher"
