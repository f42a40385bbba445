"""The resolved plan of a run, in words, before anything heavy is loaded: what, how big, how long, and does it fit."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from wan_distill.config import REASONS, REPOSITORY, Config, UsageError, one_line
from wan_distill.schedule import SUBFOLDER, expert_of, steps_of
from wan_distill.umt5 import EMBED, SHARED


def describe_plan(config: Config, info, prompts: list[str], held_out: list[str]) -> str:
    """What will happen: teacher, clip, student sigmas and their experts, updates, roles, where things go."""
    kind = "the embedded tiny teacher" if info.embedded else f"{len(info.experts)} expert(s)"
    split = "one transformer" if config.boundary is None else f"high expert at sigma >= {config.boundary:g}, low below"
    lines = [
        f"Teacher   {info.source} ({kind}; {split})",
        f"          guided ODE: {config.teacher_steps} Euler steps, shift {config.teacher_shift:g}, guidance "
        f"{config.guidance_scale:g} (high), {config.guidance_scale_2:g} (low)",
        f"Clip      {config.num_frames} frames of {config.height}x{config.width}, latents "
        f"{'x'.join(map(str, info.latent_shape(config)))}, text of {config.max_sequence_length} tokens",
        f"Student   {' or '.join(map(str, config.sampling_steps))} step{'s' * (config.grid_steps > 1)}, "
        f"no guidance, shift {config.flow_shift:g}; "
        + (f"LoRA rank {config.rank} on a frozen {config.mixed_precision.replace('no', 'fp32')} base"
           if config.student_layers is None else
           f"{config.student_layers} of the teacher's {info.transformer['num_layers']} blocks, all weights trained"),
    ]
    for steps in config.sampling_steps:
        sigmas = config.sigmas(steps)
        owners = [f"{s:.4f} {expert_of(s, config.boundary)}" for s in sigmas[:-1]]
        lines.append(f"  sigmas  {' | '.join(owners)} | {sigmas[-1]:.0f}")
    roles = ", ".join(config.roles).replace("fake_score", "critic (fake_score)")
    lines.append(f"Method    {config.method}; roles on one frozen base: teacher, {roles}")
    if 1 in config.sampling_steps and config.boundary is not None and config.method != "trajectory":
        lines.append("  note    a single step is the high expert's, whose range ends far above all detail: for it "
                     "--method trajectory is better by far (docs/methods.md)")
    if config.method == "dmd":
        lines += [f"  --{name} {getattr(config, name)}: {reason}" for name, reason in REASONS.items()]
    for expert in config.experts:
        owned = [i + 1 for i in steps_of(expert, config.sigmas(), config.boundary)]
        lines.append(f"  {expert:<7} {config.max_train_steps} updates of {config.train_batch_size} x "
                     f"{config.gradient_accumulation_steps} samples, steps {owned} ({SUBFOLDER[expert]})")
    lines += [
        f"Prompts   {len(prompts)} to train on, {len(held_out)} held out for the evaluation",
        f"Output    {config.output_dir} (checkpoints every {config.checkpointing_steps} updates)",
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- memory and time

CARDS = (24, 48, 80, 141)  # GB: RTX 4090, L40S, H100, H200
CLIPS = ((49, 480, 832), (17, 480, 832), (33, 256, 448), (17, 256, 448))
SHARE = 0.5  # of the measured matrix rate that training is assumed to reach


def describe_needs(config: Config, info) -> str:
    """Parameters, tokens, memory by kind, disk, arithmetic, time here, and what fits which card; loads no weights."""
    import torch

    from wan_distill import memory
    from wan_distill.runtime import process_state

    need = memory.estimate(config, info, config.base_precision)
    cost, batch = need.trace, config.train_batch_size * config.gradient_accumulation_steps
    shape = memory.shape_of(config, info)
    device = process_state().device
    rate = memory.matrix_rate(device, shape.dtype)
    lines = [
        f"Model     {len(info.experts)} x {_count(cost.parameters)} parameters, one expert resident at a time; "
        f"{shape.tokens} tokens a sample; {_count(cost.adapter)} trained a role",
        f"Memory    predicted peak {_size(need.peak)} while an expert trains ({device.type} here)",
        *(f"  {name:<12}{_size(value):>9}" for name, value in need.by_kind().items()),
    ]
    lines += [f"Disk      {_size(size)} {what}" for what, size in disk_needs(config, info, cost).items()]
    solve, updates = memory.arithmetic(config, info, cost)
    lines.append(f"Work      {_flops(solve)} to solve the samples that are stored, once")
    total = solve
    for role, (flops, count) in updates.items():
        total += flops * count * len(config.experts)
        lines.append(f"  {role:<11} {_flops(flops)} an update ({batch} samples), {count} updates an expert")
    processes = process_state().num_processes
    lines.append(f"Time      about {_duration(total / (SHARE * rate * processes))} on {processes} x {device.type}: "
                 f"{_flops(total)} at {SHARE:.0%} of the matrix rate measured here ({rate / 1e12:.3g} TFLOP/s)")
    if device.type == "cuda" and need.peak > (free := memory.USABLE * torch.cuda.mem_get_info(device)[1]):
        lines.append(f"  warning  does not fit this card ({_size(free)} usable); choose from the lines below")
    if not info.embedded:
        lines += ["Cards     the largest clip that fits, with the most exact base"]
        lines += [f"  {card:>3} GB   {fits or 'nothing tried fits; use several cards with --shard'}"
                  for card, fits in what_fits(config, info).items()]
    return "\n".join(lines)


def what_fits(config: Config, info) -> dict[int, str]:
    """For each card size in GB: flags of the largest clip, then the most exact base, whose predicted peak fits."""
    from wan_distill import memory

    found = dict.fromkeys(CARDS, "")
    for changed in _candidates(config):
        for card in CARDS:
            need = None if found[card] else memory.estimate(changed, info, changed.base_precision)
            if need and need.peak < memory.USABLE * card * memory.GB:
                flags = ["--offload"] * changed.offload
                flags += [f"--{name} {getattr(changed, name)}" for name in VARIED
                         if name in ("base_precision", "num_frames") or getattr(changed, name) != getattr(config, name)]
                found[card] = f"{' '.join(flags)} (peak {_size(need.peak)})"
    return found


VARIED = ("base_precision", "num_frames", "height", "width", "score_draws", "diversity_weight")


def _candidates(config: Config) -> Iterator[Config]:
    """This run's settings, the clip growing smaller, what dmd can do without given up, the base coarser, then on the
    host, which is slowest."""
    own = (config.num_frames, config.height, config.width)
    clips = [own, *(c for c in CLIPS if c[0] * c[1] * c[2] < own[0] * own[1] * own[2])]
    lighter = [{}, {"score_draws": 1}, {"score_draws": 1, "diversity_weight": 0.0}]
    lighter = lighter if config.method == "dmd" else [{}]
    bases = [dict(base_precision=kind, offload=False) for kind in ("bf16", "fp8", "nf4")]
    on_host = [dict(base_precision="bf16", offload=True)]
    if config.student_layers is not None:  # there is no frozen base
        bases, on_host = [{}], []
    for frames, height, width in clips:
        for less, base in [*itertools.product(lighter, bases), *itertools.product(lighter, on_host)]:
            yield dataclasses.replace(config, num_frames=frames, height=height, width=width,
                                      gradient_checkpointing=True, **base, **less)


def disk_needs(config: Config, info, cost) -> dict[str, float]:
    """Bytes that this run writes below --output_dir, by kind."""
    from wan_distill import memory

    latent = memory.FP32 * memory.shape_of(config, info).latent_values
    roles = len(config.roles)
    kept = 1 + (config.checkpoints_total_limit or config.max_train_steps // config.checkpointing_steps)
    tensors = roles * (1 + memory.ADAM_MOMENTS) + (config.ema_decay > 0)
    needs = {"for checkpoints": kept * len(config.experts) * tensors * memory.FP32 * cost.adapter,
             "for the exported LoRA files": len(config.experts) * memory.FP32 * cost.adapter}
    if config.method != "dmd" or "real_score" in config.roles:
        solved = config.grid_steps * (1 - memory.solved_before(config, info))
    else:
        solved = 1  # anchors
    solved += len(config.sampling_steps) * (config.method == "dmd")  # hand-overs
    needs["for solved samples"] = config.num_trajectories * solved * latent
    if config.save_merged:
        needs["for the merged pipeline"] = len(info.experts) * cost.base_bytes
    return needs


def _count(number: float) -> str:
    return _scaled(number, {1e9: "B", 1e6: "M", 1e3: "K"})


def _size(number: float) -> str:
    return _scaled(number, {1e9: " GB", 1e6: " MB", 1e3: " KB"})


def _flops(number: float) -> str:
    return _scaled(number, {1e18: " EFLOP", 1e15: " PFLOP", 1e12: " TFLOP", 1e9: " GFLOP", 1e6: " MFLOP"})


def _scaled(number: float, units: dict[float, str]) -> str:
    unit = next((u for u in units if number >= u), min(units))
    return f"{number / unit:.3g}{units[unit]}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"


# ----------------------------------------------------------------------------------------------------------- checks


def check_surroundings(config: Config, info) -> list[str]:
    """Versions, files, free disk and RAM. Returns what was found; raises UsageError on what must stop a run."""
    from wan_distill import memory
    from wan_distill.metrics import check_tracker

    check_tracker(config)
    check_processes(config, info)
    check_optional(config)
    if config.init_student_from and not config.evaluate_only:
        from wan_distill.export import check_init

        check_init(config)
    if config.push_to_hub:
        from wan_distill.hub import check_hub

        check_hub(config)
    found = [f"Versions  {check_versions()}", f"Files     {check_files(info)}"]
    cost = memory.trace(memory.shape_of(config, info))
    needed = sum(disk_needs(config, info, cost).values())
    place = next(p for p in (Path(config.output_dir).resolve(), *Path(config.output_dir).resolve().parents)
                 if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(f"--output_dir {config.output_dir}: {_size(free)} free on its disk, this run writes up to "
                         f"{_size(needed)}; free some, choose another, or lower --num_trajectories")
    found.append(f"Disk      {_size(free)} free at {place}")
    found.append(f"RAM       {_size(check_memory(config, info, cost))} available")
    return found


def check_processes(config: Config, info) -> None:
    """Raises UsageError where `--shard` or `--context_parallel` does not go together with the rest."""
    from wan_distill import memory

    asked = [name for name in ("shard", "context_parallel") if getattr(config, name)]
    if not asked:
        return
    flag = f"--{asked[0]}"
    if "WORLD_SIZE" not in os.environ and not config.dry_run:
        raise UsageError(f"{flag}: there is one process only; start several, with torchrun or accelerate launch")
    if config.evaluate or config.evaluate_only:
        raise UsageError(f"{flag}: the evaluation runs in one process; give --no-evaluate, and measure afterwards with "
                         f"--evaluate_only and without {flag}")
    if config.shard and config.base_precision != "bf16":
        raise UsageError(f"--base_precision {config.base_precision}: a quantised base is not sharded; leave one out")
    for name in ("compile", *(["context_parallel", "offload"] if config.shard else [])):
        if getattr(config, name):
            raise UsageError(f"--{name}: does not go together with {flag}; leave one out")
    if config.context_parallel:
        import torch

        if not torch.accelerator.device_count() and not config.dry_run:
            raise UsageError("--context_parallel: diffusers' needs an accelerator, and there is none; leave it out")
        processes = int(os.environ.get("WORLD_SIZE", 1))
        counts = dict(tokens=memory.shape_of(config, info).tokens, heads=info.transformer["num_attention_heads"])
        for name, count in counts.items():
            if count % processes:
                raise UsageError(f"--context_parallel: {count} {name} are not shared evenly by {processes} processes; "
                                 "start another number of them")


def check_optional(config: Config) -> None:
    """Raises UsageError where what `--use_8bit_adam` or `--compile` needs is not here."""
    if config.use_8bit_adam:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise UsageError(f"--use_8bit_adam: needs bitsandbytes ({one_line(error)}); pip install bitsandbytes, or "
                             "leave the flag out") from error
    if config.compile:
        import torch

        from wan_distill.runtime import process_state

        try:
            torch.compile(torch.cos)(torch.zeros(2, device=process_state().device))
        except Exception as error:  # a missing compiler shows in any way
            raise UsageError(f"--compile: torch cannot compile here ({one_line(error)[:200]}); install a C++ compiler "
                             "(on CUDA: triton), or leave the flag out") from error


def check_memory(config: Config, info, cost) -> float:
    """Available bytes of host memory. Raises UsageError where loading, or training on a CPU, cannot fit."""
    import psutil

    from wan_distill import memory
    from wan_distill.runtime import process_state

    available = psutil.virtual_memory().available
    on_cpu = process_state().device.type == "cpu"
    kept = memory.BASE_BYTES.get(config.base_precision, memory.DTYPES[config.mixed_precision].itemsize) * cost.matrices
    needed = kept if config.offload else 0.1 * cost.base_bytes
    if on_cpu:  # there, offloading keeps the base in the same memory
        needed = memory.estimate(dataclasses.replace(config, offload=False), info, config.base_precision).peak
    if needed > available:
        raise UsageError(
            f"--teacher_path {info.source}: needs {_size(needed)} of host memory, {_size(available)} are available; "
            + ("use a CUDA device" if on_cpu else "close other programs"))
    return available


PACKAGE = "wan-distill"


def check_versions() -> str:
    """Installed versions of what requirements.txt names. Raises UsageError where one is missing or too old."""
    from packaging.requirements import Requirement

    found = []
    file = REPOSITORY / "requirements.txt"  # of a checkout; installed by pip, its lines are the package's metadata
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else importlib.metadata.requires(PACKAGE)
    for line in filter(None, (line.split("#")[0].strip() for line in lines)):
        wanted = Requirement(line)
        try:
            installed = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UsageError(f"{wanted.name}: not installed; pip install -r requirements.txt") from error
        if not wanted.specifier.contains(installed, prereleases=True):
            raise UsageError(f"{wanted.name} {installed}: need {wanted.specifier}; pip install -r requirements.txt")
        found.append(f"{wanted.name} {installed}")
    return ", ".join(found)


def check_files(info) -> str:
    """Every weight file that is here is whole, by its header. Raises UsageError naming a damaged or missing one."""
    from wan_distill.umt5 import TextEncoderError, check_class, inspect_text_encoder, read_header, weight_files

    if not Path(info.source).is_dir():
        return "on the hub; downloaded when needed"
    for file in sorted(info.folder.glob("*/*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--teacher_path {info.source}: {file.parent.name}/{file.name} cannot be read "
                             f"({one_line(error)}); download it again") from error
    try:
        check_class(inspect_text_encoder(info.folder / "text_encoder"), "UMT5EncoderModel")
    except TextEncoderError as error:
        raise UsageError(f"--teacher_path {info.source}: {error}") from error
    tensors: dict[str, dict] = {}
    for part in ("text_encoder", "vae", *(SUBFOLDER[e] for e in info.experts)):
        try:
            files = weight_files(info.folder / part)
            headers = [read_header(file)[0] for file in files if file.suffix == ".safetensors"]
        except TextEncoderError as error:
            raise UsageError(f"--teacher_path {info.source}: {error}") from error
        tensors[part] = {name: t for header in headers for name, t in header.items() if name != "__metadata__"}
        if headers:
            _check_shapes(info, part, tensors[part])
    dtypes = {part: "/".join(sorted({t["dtype"] for t in held.values()})) for part, held in tensors.items()}
    return "whole by their headers; " + ", ".join(f"{part} {dtype}" for part, dtype in dtypes.items())


def _check_shapes(info, part: str, stored: dict[str, dict]) -> None:
    """Raises UsageError where a part's files lack or misshape a tensor that its configuration asks for."""
    import torch

    try:
        with torch.device("meta"):
            wanted = {name: list(t.shape) for name, t in _build(info.folder / part).state_dict().items()}
    except Exception as error:  # a wrong value makes constructors fail in any way
        raise UsageError(f"--teacher_path {info.source}: {part}/config.json describes no model that can be built "
                         f"({one_line(error)}); download it again") from error
    found = {name: t["shape"] for name, t in stored.items()}
    if part == "text_encoder":  # its table goes by two names: umt5.py looks into that
        wanted = {name: shape for name, shape in wanted.items() if name not in (SHARED, EMBED)}
        found = {name: shape for name, shape in found.items() if name in wanted}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UsageError(f"--teacher_path {info.source}: {part} stores {name} as {found.get(name, 'nothing')}, its "
                             f"configuration asks for {wanted.get(name, 'nothing')}; download it again")


def _build(folder: Path):
    """The model that a part's config.json describes."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if folder.name == "text_encoder":
        return UMT5EncoderModel(UMT5Config.from_dict(settings))
    kind = AutoencoderKLWan if folder.name == "vae" else WanTransformer3DModel
    return kind(**{name: value for name, value in settings.items() if not name.startswith("_")})
