"""What must be right before a run begins: versions, files, free disk and memory, settings against
this machine.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
from pathlib import Path

from wan_distill.errors import UsageError, one_line
from wan_distill.maths.sigmas import SUBFOLDER
from wan_distill.planning import needs, trace
from wan_distill.planning.needs import _size, disk_needs
from wan_distill.settings.assets import REPOSITORY
from wan_distill.settings.config import Config
from wan_distill.system import runtime
from wan_distill.umt5.inspect import EMBED, SHARED


def check_surroundings(config: Config, info) -> list[str]:
    """Versions, files, free disk and RAM. Returns what was found; raises UsageError on what must
    stop a run.
    """
    from wan_distill.planning.preflight import check_tracker

    check_tracker(config)
    check_processes(config, info)
    check_optional(config)
    if config.init_student_from and not config.evaluate_only:
        from wan_distill.model.student_files import check_init

        check_init(config)
    if config.push_to_hub:
        from wan_distill.results.hub import check_hub

        check_hub(config)
    found = [f"Versions  {check_versions()}", f"Files     {check_files(info, config.variant)}"]
    cost = trace.trace(needs.shape_of(config, info))
    needed = sum(disk_needs(config, info, cost).values())
    place = next(
        p
        for p in (Path(config.output_dir).resolve(), *Path(config.output_dir).resolve().parents)
        if p.exists()
    )
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(
            f"--output_dir {config.output_dir}: {_size(free)} free on its disk, this run writes up "
            "to "
            f"{_size(needed)}; free some, choose another, or lower --num_trajectories"
        )
    found.append(f"Disk      {_size(free)} free at {place}")
    found.append(f"RAM       {_size(check_memory(config, info, cost))} available")
    return found


def check_processes(config: Config, info) -> None:
    """Raises UsageError where `--shard` or `--context_parallel` does not go together with the rest."""

    asked = [name for name in ("shard", "context_parallel") if getattr(config, name)]
    if not asked:
        return
    flag = f"--{asked[0]}"
    if "WORLD_SIZE" not in os.environ and not config.dry_run:
        raise UsageError(
            f"{flag}: there is one process only; start several, with torchrun or accelerate launch"
        )
    if config.evaluate or config.evaluate_only:
        raise UsageError(
            f"{flag}: the evaluation runs in one process; give --no-evaluate, and measure "
            "afterwards with "
            f"--evaluate_only and without {flag}"
        )
    if config.shard and config.base_precision != "bf16":
        raise UsageError(
            f"--base_precision {config.base_precision}: a quantised base is not sharded; leave one "
            "out"
        )
    for name in ("compile", *(["context_parallel", "offload"] if config.shard else [])):
        if getattr(config, name):
            raise UsageError(f"--{name}: does not go together with {flag}; leave one out")
    if config.context_parallel:
        import torch

        if not torch.accelerator.device_count() and not config.dry_run:
            raise UsageError(
                "--context_parallel: diffusers' needs an accelerator, and there is none; leave it "
                "out"
            )
        processes = int(os.environ.get("WORLD_SIZE", 1))
        counts = dict(
            tokens=needs.shape_of(config, info).tokens,
            heads=info.transformer["num_attention_heads"],
        )
        for name, count in counts.items():
            if count % processes:
                raise UsageError(
                    f"--context_parallel: {count} {name} are not shared evenly by {processes} "
                    "processes; "
                    "start another number of them"
                )


def check_optional(config: Config) -> None:
    """Raises UsageError where what `--use_8bit_adam` or `--compile` needs is not here."""
    if config.use_8bit_adam:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"--use_8bit_adam: needs bitsandbytes ({one_line(error)}); pip install "
                "bitsandbytes, or "
                "leave the flag out"
            ) from error
    if config.compile:
        import torch

        from wan_distill.system.runtime import process_state

        try:
            torch.compile(torch.cos)(torch.zeros(2, device=process_state().device))
        except Exception as error:  # a missing compiler shows in any way
            raise UsageError(
                f"--compile: torch cannot compile here ({one_line(error)[:200]}); install a C++ "
                "compiler "
                "(on CUDA: triton), or leave the flag out"
            ) from error


def check_memory(config: Config, info, cost) -> float:
    """Available bytes of host memory. Raises UsageError where loading, or training on a CPU, cannot
    fit.
    """
    import psutil

    from wan_distill.system.runtime import process_state

    available = psutil.virtual_memory().available
    on_cpu = process_state().device.type == "cpu"
    kept = (
        needs.BASE_BYTES.get(config.base_precision, runtime.DTYPES[config.mixed_precision].itemsize)
        * cost.matrices
    )
    needed = kept if config.offload else 0.1 * cost.base_bytes
    if on_cpu:  # there, offloading keeps the base in the same memory
        needed = needs.estimate(
            dataclasses.replace(config, offload=False), info, config.base_precision
        ).peak
    if needed > available:
        raise UsageError(
            f"--teacher_path {info.source}: needs {_size(needed)} of host memory, "
            f"{_size(available)} are available; "
            + ("use a CUDA device" if on_cpu else "close other programs")
        )
    return available


PACKAGE = "wan-distill"


def check_versions() -> str:
    """Installed versions of what requirements.txt names. Raises UsageError where one is missing or
    too old.
    """
    from packaging.requirements import Requirement

    found = []
    file = (
        REPOSITORY / "requirements.txt"
    )  # of a checkout; installed by pip, its lines are the package's metadata
    lines = (
        file.read_text(encoding="utf-8").splitlines()
        if file.exists()
        else importlib.metadata.requires(PACKAGE)
    )
    for line in filter(None, (line.split("#")[0].strip() for line in lines)):
        wanted = Requirement(line)
        try:
            installed = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UsageError(
                f"{wanted.name}: not installed; pip install -r requirements.txt"
            ) from error
        if not wanted.specifier.contains(installed, prereleases=True):
            raise UsageError(
                f"{wanted.name} {installed}: need {wanted.specifier}; pip install -r "
                "requirements.txt"
            )
        found.append(f"{wanted.name} {installed}")
    return ", ".join(found)


def check_files(info, variant: str | None = None) -> str:
    """Every weight file that is here is whole, by its header. Raises UsageError naming a damaged or
    missing one.
    """
    from wan_distill.errors import TextEncoderError
    from wan_distill.system.weight_files import read_header, variant_or_none, weight_files
    from wan_distill.umt5.inspect import check_class, inspect_text_encoder

    if not Path(info.source).is_dir():
        return "on the hub; downloaded when needed"
    for file in sorted(info.folder.glob("*/*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--teacher_path {info.source}: {file.parent.name}/{file.name} cannot be read "
                f"({one_line(error)}); download it again"
            ) from error
    try:
        folder = info.folder / "text_encoder"
        encoder = inspect_text_encoder(folder, variant_or_none(folder, variant))
        check_class(encoder, "UMT5EncoderModel")
    except TextEncoderError as error:
        raise UsageError(f"--teacher_path {info.source}: {error}") from error
    tensors: dict[str, dict] = {}
    for part in ("text_encoder", "vae", *(SUBFOLDER[e] for e in info.experts)):
        try:
            wanted = variant  # the experts' alone must exist: the other parts may be plain
            if part in ("text_encoder", "vae"):
                wanted = variant_or_none(info.folder / part, variant)
            files = weight_files(info.folder / part, wanted)
            headers = [read_header(file)[0] for file in files if file.suffix == ".safetensors"]
        except TextEncoderError as error:
            raise UsageError(f"--teacher_path {info.source}: {error}") from error
        tensors[part] = {
            name: t for header in headers for name, t in header.items() if name != "__metadata__"
        }
        if headers:
            _check_shapes(info, part, tensors[part])
    dtypes = {
        part: "/".join(sorted({t["dtype"] for t in held.values()}))
        for part, held in tensors.items()
    }
    return "whole by their headers; " + ", ".join(
        f"{part} {dtype}" for part, dtype in dtypes.items()
    )


def _check_shapes(info, part: str, stored: dict[str, dict]) -> None:
    """Raises UsageError where a part's files lack or misshape a tensor that its configuration asks
    for.
    """
    import torch

    try:
        with torch.device("meta"):
            wanted = {
                name: list(t.shape) for name, t in _build(info.folder / part).state_dict().items()
            }
    except Exception as error:  # a wrong value makes constructors fail in any way
        raise UsageError(
            f"--teacher_path {info.source}: {part}/config.json describes no model that can be "
            "built "
            f"({one_line(error)}); download it again"
        ) from error
    found = {name: t["shape"] for name, t in stored.items()}
    if part == "text_encoder":  # its table goes by two names: umt5.py looks into that
        wanted = {name: shape for name, shape in wanted.items() if name not in (SHARED, EMBED)}
        found = {name: shape for name, shape in found.items() if name in wanted}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"--teacher_path {info.source}: {part} stores {name} as "
                f"{found.get(name, 'nothing')}, its "
                f"configuration asks for {wanted.get(name, 'nothing')}; download it again"
            )


def _build(folder: Path):
    """The model that a part's config.json describes."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if folder.name == "text_encoder":
        return UMT5EncoderModel(UMT5Config.from_dict(settings))
    kind = AutoencoderKLWan if folder.name == "vae" else WanTransformer3DModel
    return kind(**{name: value for name, value in settings.items() if not name.startswith("_")})


def check_tracker(config: Config) -> None:
    """Raises UsageError where the tracker's package is not installed."""
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UsageError(
            f"--report_to {config.report_to}: not installed; pip install {config.report_to}"
        )
