"""What people look at after a run: the run.json and the output folder's README."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

from wan_distill.layout import student_file
from wan_distill.model.loading import Teacher
from wan_distill.results.evaluation import as_markdown
from wan_distill.results.export import snippet
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.files import write_atomically

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def write_run(folder: Path, config: Config, **results) -> None:
    """run.json: the resolved settings, what they ran on, and what came out."""
    versions = {name: version(name) for name in PACKAGES}
    run = dict(
        config=config.to_json(),
        versions=versions,
        python=platform.python_version(),
        platform=platform.platform(),
        written=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **results,
    )
    write_atomically(folder / "run.json", json.dumps(run, indent=1, ensure_ascii=False).encode())


def readme(
    folder: Path, config: Config, info: TeacherInfo, evaluation: dict | None, repository: str = ""
) -> str:
    """README.md of the output folder, or the model card of a hub `repository`: what this is, how to
    run it.
    """
    experts = tuple(e for e in info.experts if student_file(folder, e).exists())
    what = (
        "LoRA" if config.student_layers is None else f"all weights, {config.student_layers} blocks,"
    )
    files = "\n".join(
        f"- `{student_file(folder, e).name}`: {what} of the {e}-noise expert" for e in experts
    )
    steps = " or ".join(map(str, config.sampling_steps))
    text = f"""# {info.name}, distilled to {steps} steps

A student of `{info.source}` that samples in {steps} steps without guidance (method: {config.method}).

{files}
- `scheduler/`: the sampler it was trained for (sigmas {", ".join(f"{s:.4f}" for s in config.sigmas()[:-1])})
{"- `student/`: the complete pipeline, adapters merged in" if config.save_merged and not repository else ""}

## Use

{"" if repository else "In this folder:"}

```python
{snippet(config, info, experts, repository or ".")}```

"""
    if config.student_layers is None:
        text += f"""In ComfyUI load each file into the model of its expert with strength 1, and sample with Euler,
guidance (cfg) 1, shift {config.flow_shift:g}, {config.grid_steps} steps.
"""
    if evaluation:
        text += f"\n## Measured\n\n{as_markdown(evaluation)}\n"
    return text


def describe_results(config: Config, teacher: Teacher, verdict, evaluation: dict | None) -> None:
    """Writes run.json and README.md."""
    folder = Path(config.output_dir)
    write_run(
        folder,
        config,
        teacher=teacher.info.fingerprint(),
        text_encoder=verdict.to_json(),
        evaluation=evaluation,
    )
    write_atomically(
        folder / "README.md", readme(folder, config, teacher.info, evaluation).encode()
    )
