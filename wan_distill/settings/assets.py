"""Where the teacher's files are: those that come with the package, and those of the hub."""

from __future__ import annotations

from pathlib import Path

from wan_distill.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
# Beside the package in a checkout; a package of its own where pip installed this one.
ASSETS = next(
    (p for p in (REPOSITORY / "assets", REPOSITORY / "wan_distill_assets") if p.is_dir()),
    REPOSITORY,
)
EMBEDDED_TEACHER = ASSETS / "tiny_wan22"


def download(source: str, revision: str | None, cache_dir: str | None, patterns: list[str]) -> Path:
    """Downloads the files of a hub repository that match `patterns` into the hub's cache.

    Returns their folder. Raises UsageError where the repository does not exist or is not reachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            source, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"--teacher_path {source}: neither a folder here nor reachable on the hub "
            f"({lines[0]}); check the spelling, the network and, for gated models, `hf auth login`"
        ) from error
    return Path(folder)
