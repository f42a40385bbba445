"""Where the teacher's files are: those that come with the package, and those of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from wan_distill.errors import UsageError

NETWORK_ERRORS: tuple[type[Exception], ...] = ()
try:
    from huggingface_hub.utils import httpx

    NETWORK_ERRORS = (httpx.HTTPError,)
except ImportError:  # huggingface_hub < 1 asks with requests, whose errors are OSErrors
    pass
# What asking the hub raises: a name that is none, its own no, the network, the disk, no token.
HUB_ERRORS: tuple[type[Exception], ...] = (
    HFValidationError,
    HfHubHTTPError,
    *NETWORK_ERRORS,
    OSError,
)
REPOSITORY = Path(__file__).resolve().parents[2]
# Beside the package in a checkout; a package of its own where pip installed this one.
ASSETS = next(
    (p for p in (REPOSITORY / "assets", REPOSITORY / "wan_distill_assets") if p.is_dir()),
    REPOSITORY,
)
# As a browser shows a repository.
ADDRESS = re.compile(
    r"(?:https?://[^/]+/|(?=[^/]+/[^/]+/tree/))(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/.*)?)?/?"
)
CAPTIONS = "prompts.txt"  # in the folders of tiny teachers: what they were trained on
EMBEDDED_TEACHER = ASSETS / "tiny_wan22"
EMBEDDED = {
    "tiny-t2v": EMBEDDED_TEACHER,
    "tiny-i2v": ASSETS / "tiny_i2v",
    "tiny-pairs": ASSETS / "tiny_pairs",
}
"""Short names of the teachers that come with the package"""


def short_name(folder: Path) -> str | None:
    """Of the embedded teacher in `folder`; None for any other."""
    names = (name for name, own in EMBEDDED.items() if own.resolve() == folder.resolve())
    return next(names, None)


def download(source: str, revision: str | None, cache_dir: str | None, patterns: list[str]) -> Path:
    """Downloads the files of a hub repository that match `patterns` into the hub's cache.

    Returns their folder. Raises UsageError where `source` is a file, or no repository that can be
    reached, and where the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    if address := ADDRESS.fullmatch(source):
        revision_too = f" and --revision {address['revision']}" if address["revision"] else ""
        raise UsageError(
            f"--teacher_path {source}: is an address of the hub; give {address['id']}{revision_too}"
        )
    is_path = os.path.isabs(source) or source.startswith(".") or source.count("/") > 1
    if is_path and not os.path.isfile(source):
        raise UsageError(f"--teacher_path {source}: there is no such folder; check the spelling")
    if os.path.isfile(source):
        raise UsageError(
            f"--teacher_path {source}: is one file; give the folder of a WanPipeline in diffusers' "
            "layout, or its hub id, and one expert's file as --teacher_transformer beside it"
        )
    try:
        folder = snapshot_download(
            source, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
        )
    except HUB_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise UsageError(
                f"--cache_dir {cache_dir or constants.HF_HUB_CACHE}: {error.strerror} at "
                f"{error.filename}; make room, or choose a folder that can be written"
            ) from error
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        which = f"{source} at {revision}" if revision else source
        if is_offline():
            raise UsageError(
                f"--teacher_path {which}: neither a folder here nor in the hub's cache, and "
                f"HF_HUB_OFFLINE is set ({line}); check the spelling and --cache_dir, or unset it"
            ) from error
        raise UsageError(
            f"--teacher_path {which}: neither a folder here nor reachable on the hub ({line}); "
            "check the spelling, the network and, for gated models, `hf auth login`"
        ) from error
    return Path(folder)


def is_offline() -> bool:
    """Whether the user forbids the network (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)
