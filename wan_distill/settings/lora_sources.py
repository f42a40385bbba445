"""Which file is which expert's: by what it says, by its name, or by the order it was given in."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from wan_distill.errors import UsageError
from wan_distill.layout import LORA_FILE
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.settings.assets import HUB_ERRORS
from wan_distill.settings.lora_headers import LoraHeader

WORDS: dict[Expert, frozenset[str]] = {
    "high": frozenset({"high", "highnoise", "hn", "h"}),
    "low": frozenset({"low", "lownoise", "ln", "l"}),
}
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<inside>.+?)/?)?")


def find_loras(
    source: str, flag: str, experts: Sequence[Expert], cache_dir: str | None
) -> dict[Expert, LoraHeader]:
    """The LoRA of each expert that `source` has one for.

    Args:
        source: FILE, or HIGH,LOW, or a folder; or HUB_ID[/FOLDER or /FILE in it].
        flag: that `source` was given with, for messages.
        experts: those of the teacher.

    Raises UsageError where there is none, or where it cannot be known which is whose.
    """
    names = [source] if os.path.exists(source) else source.split(",")
    files = [local(name.strip(), flag, cache_dir) for name in names if name.strip()]
    if len(files) > len(experts):
        raise UsageError(
            f"{flag} {source}: {len(files)} files for {len(experts)} experts; give one for each"
        )
    if len(files) > 1:
        return in_order(files, flag, experts)
    if not files:
        raise UsageError(f"{flag} {source!r}: names no file; give FILE or HIGH,LOW")
    if files[0].is_file():
        return of_one_file(files[0], flag, experts)
    return in_folder(files[0], flag, experts)


def in_order(files: list[Path], flag: str, experts: Sequence[Expert]) -> dict[Expert, LoraHeader]:
    """The first file is the high expert's. Raises UsageError where the files say otherwise."""
    found: dict[Expert, LoraHeader] = {}
    for expert, path in zip(experts, files, strict=True):
        if not path.is_file():
            raise UsageError(f"{flag} {path}: is no file; give HIGH,LOW as files")
        file = LoraHeader(path, flag, SUBFOLDER[expert] if files[0] == files[1] else None)
        said = expert_of_file(file)
        if said not in (None, expert):
            raise UsageError(
                f"{flag} {path}: given for the {expert} expert, but it says that it is for the "
                f"{said} one; give HIGH,LOW in this order"
            )
        found[expert] = file
    return found


def of_one_file(path: Path, flag: str, experts: Sequence[Expert]) -> dict[Expert, LoraHeader]:
    """One file for one expert or, of diffusers' layout, for both."""
    file = LoraHeader(path, flag)
    if len(experts) == 1:
        return {experts[0]: file}
    if file.transformers == set(SUBFOLDER.values()):
        return {expert: LoraHeader(path, flag, SUBFOLDER[expert]) for expert in experts}
    expert = expert_of_file(file)
    if expert is None:
        raise UsageError(
            f"{flag} {path}: does not say which expert it is for; give HIGH,LOW (the same file "
            "twice, if it is for both)"
        )
    return {expert: file}


def in_folder(folder: Path, flag: str, experts: Sequence[Expert]) -> dict[Expert, LoraHeader]:
    """The LoRAs in a folder: under this tool's names or, without any, those that say whose they
    are.
    """
    ours = {expert: folder / LORA_FILE[expert] for expert in experts}
    found = {e: LoraHeader(file, flag) for e, file in ours.items() if file.is_file()}
    if found:
        return found
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return of_one_file(others[0], flag, experts)
    for path in others:
        file = LoraHeader(path, flag)
        expert = expert_of_file(file)
        if expert is None or expert not in experts:
            continue
        if expert in found:
            raise UsageError(
                f"{flag} {folder}: {found[expert].path.name} and {path.name} are both for the "
                f"{expert} expert; name the files: HIGH,LOW"
            )
        found[expert] = file
    if not found:
        raise UsageError(
            f"{flag} {folder}: holds no {LORA_FILE['high']}, and no other file whose name says for "
            "which expert it is; give the output folder of a run, or the files: HIGH,LOW"
        )
    return found


def expert_of_file(file: LoraHeader) -> Expert | None:
    """Whose LoRA a file is, by its metadata, the names of its tensors, or its own name."""
    if file.schedule is not None:
        return file.schedule.get("expert")
    if file.transformers == {SUBFOLDER["low"]}:
        return "low"
    return expert_in_name(file.path.stem)


def expert_in_name(stem: str) -> Expert | None:
    """`high_noise_model`, `Wan22-HighNoise`, `style_HN`, `lora-h` -> high; None where neither or
    both are named.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", " ", stem)
    words = {word for word in re.split(r"[^a-z]+", spaced.lower()) if word}
    named: list[Expert] = [expert for expert, own in WORDS.items() if words & own]
    return named[0] if len(named) == 1 else None


def local(source: str, flag: str, cache_dir: str | None) -> Path:
    """The file or folder on this machine, downloaded where `source` is on the hub."""
    path = Path(source).expanduser()
    if os.path.exists(path):  # False, not an error, where the name is too long
        return path
    match = HUB_ID.fullmatch(source)
    if match is None or path.is_absolute() or source.startswith("."):
        raise UsageError(f"{flag} {source}: there is no such file or folder; check the spelling")
    if len(path.parts) > 2 and path.parent.is_dir():  # a hub id alone has two parts
        beside = sorted(file.name for file in path.parent.glob("*.safetensors"))
        raise UsageError(
            f"{flag} {source}: {path.parent} is here and holds no {path.name} "
            f"({', '.join(beside[:4]) or 'nor any .safetensors'}); check the spelling"
        )
    return _download(match["repository"], match["inside"], flag, cache_dir)


def _download(repository: str, inside: str | None, flag: str, cache_dir: str | None) -> Path:
    """The file or folder `inside` of a hub repository, or what lies at its top.

    Only what was asked for: repositories of LoRAs may hold hundreds of gigabytes.
    """
    try:
        if inside is None:
            files = HfApi().model_info(repository).siblings or ()  # a network's no comes at once
            top = [file.rfilename for file in files if "/" not in file.rfilename]
            patterns = [name for name in top if expert_in_name(Path(name).stem)]
            patterns = patterns or [name for name in top if name.endswith(".safetensors")][:1]
        else:
            patterns = [inside if inside.endswith(".safetensors") else f"{inside}/*.safetensors"]
        folder = snapshot_download(repository, cache_dir=cache_dir, allow_patterns=patterns)
    except HUB_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"{flag} {repository}: neither a file or folder here nor reachable on the hub "
            f"({reason}); check the spelling and the network"
        ) from error
    path = Path(folder) / (inside or ".")
    if not path.exists():
        raise UsageError(f"{flag} {repository}/{inside}: the hub has no such file; check the name")
    return path
