"""Which weight files the loaders read from a folder, and what a file's header says; no torch.

transformers and diffusers choose files by their names, and each in its own order: beside an index
of shards a single file wins in transformers and loses in diffusers. `weight_files` follows the
loader that the folder's config.json is for, and refuses a folder that holds both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError
from wan_distill.settings.reading import AGAIN, read_json

TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
ORIGINAL_CLASS = "WanModel"  # of Wan's own code, in whose repositories files have diffusers' names
_VARIANT_NAME = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model\."
    r"(?:(?P<file>[^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    r"|(?:safetensors|bin)\.(?:index\.(?P<index>[^.]+)|(?P<old_index>[^.]+)\.index)\.json)"
)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that `from_pretrained(folder, variant=variant)` reads, in the order of their names.

    Safetensors come before pickles (.bin). Files of other names, and the files of other variants,
    are ignored. `variant` is not replaced by the plain files where it is absent: see
    `variant_or_none`.

    Raises FileError where the loader would find nothing, where a shard is missing or the
    index is damaged, and where a single file and a complete set of shards lie side by side.
    """
    config = read_json(folder / "config.json")
    for_transformers = _is_for_transformers(folder, config)
    named = config.get("transformers_weights") if for_transformers else None
    if named:
        return _named_by_config(folder, str(named))
    names = TRANSFORMERS_FILES if for_transformers else DIFFUSERS_FILES
    for name in names:
        files = _checkpoint(folder, name, variant, index_first=not for_transformers)
        if files:
            return files
    raise _nothing(folder, names, variant)


def refuse_pickles(files: Iterable[Path]) -> None:
    """Raises FileError where weight files are pickles."""
    for file in files:
        if file.suffix == ".bin":
            raise FileError(
                f"{file.parent}: holds only .bin weights, and to unpickle them can run code",
                "convert them to safetensors, or pass --allow_pickle if you trust them",
            )


def variant_or_none(folder: Path, variant: str | None) -> str | None:
    """`variant` where `folder` has weight files of it, else None. `WanPipeline.from_pretrained`
    loads each part by this rule.
    """
    return variant if variant in _variants(folder) else None


def _is_for_transformers(folder: Path, config: dict[str, Any]) -> bool:
    """Whether transformers loads `folder`; diffusers, or Wan's own code, does otherwise."""
    if config.get("_class_name") == ORIGINAL_CLASS:  # its model_type is t2v
        return False
    if "model_type" in config or "_class_name" in config:  # each library writes one of them
        return "model_type" in config
    return not any(folder.glob("diffusion_pytorch_model*"))


def _checkpoint(folder: Path, name: str, variant: str | None, index_first: bool) -> list[Path]:
    """The single file `name` or the shards of its index; empty where neither exists."""
    single = folder / _with_variant(name, variant)
    indices = [folder / _with_variant(f"{name}.index.json", variant)]
    if variant and index_first:  # diffusers also reads the older form of the name
        indices.append(folder / f"{name}.{variant}.index.json")
    index = next((file for file in indices if file.is_file()), None)
    if index is None:
        return [single] if single.is_file() else []
    if not single.is_file():
        return _shards(index)
    try:
        shards = _shards(index)
    except FileError as error:
        if not index_first:
            return [single]  # transformers does not open the index then
        raise FileError(
            f"{error.reason}; {single.name} is there too, but with an index it is not read",
            f"remove {index.name} if the single file is whole",
        ) from error
    if shards == [single]:
        return shards
    raise FileError(
        f"{folder}: holds two checkpoints, {single.name} and the shards of {index.name}, and it "
        "is not known which is right",
        "move one of them to another folder",
    )


def _named_by_config(folder: Path, name: str) -> list[Path]:
    """The file or index that `transformers_weights` in config.json names."""
    file = folder / name
    if Path(name).name != name or not file.is_file():
        raise FileError(
            f"{folder}: config.json gives {name} as transformers_weights, which is no file here",
            AGAIN,
        )
    return _shards(file) if name.endswith(".index.json") else [file]


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not (
        weight_map and isinstance(weight_map, dict) and isinstance(content.get("metadata"), dict)
    ):
        raise FileError(
            f"{index}: is no index of weights (it needs weight_map and metadata)", AGAIN
        )
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise FileError(f"{index}: names {name}, which is outside its folder", AGAIN)
        if not (index.parent / name).is_file():
            what = "a link to nothing" if (index.parent / name).is_symlink() else "missing"
            raise FileError(f"{index.parent}: {name} is named by {index.name} but {what}", AGAIN)
    return [index.parent / name for name in names]


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def _variants(folder: Path) -> list[str]:
    """Variants of which `folder` holds a file, a shard or an index."""
    matches = (_VARIANT_NAME.fullmatch(file.name) for file in folder.glob("*"))
    return sorted({next(filter(None, match.groups())) for match in matches if match})


def _nothing(folder: Path, names: tuple[str, str], variant: str | None) -> FileError:
    """Why no loader finds weights in `folder`, and what to do."""
    wanted = _with_variant(names[0], variant)
    index = _with_variant(f"{names[0]}.index.json", variant)
    for link in (folder / wanted, folder / index):
        if link.is_symlink():
            return FileError(
                f"{folder}: no weight file here, {link.name} is a link to nothing",
                "download it again, or copy the files that links lead to (cp -rL)",
            )
    ways = [f"with --variant {other}" for other in _variants(folder) if other != variant]
    plain = [*names, *(f"{name}.index.json" for name in names)]
    if variant and any((folder / name).is_file() for name in plain):
        ways.insert(0, "without --variant")
    if ways:
        remedy = f"this folder loads {' or '.join(ways)}"
        return FileError(f"{folder}: no weight file {wanted} here", remedy)
    strays = sorted(
        file.name
        for file in folder.glob("[!.]*")
        if file.suffix.lower() in FORMATS and file.name not in names
    )
    if not strays:
        return FileError(
            f"{folder}: no weight file ({wanted}, or {index} and its shards) here", AGAIN
        )
    if len(strays) > 1 or "-of-" in strays[0]:
        return FileError(
            f"{folder}: no weight file {wanted} and no {index} here, only {strays[0]}", AGAIN
        )
    reason = f"{folder}: no weight file of a name that is loaded, only {strays[0]}"
    for name in names:
        if name.endswith(Path(strays[0]).suffix.lower()):
            return FileError(reason, f"rename it to {name}")
    return FileError(reason, "give the folder of the same model in diffusers' layout")
