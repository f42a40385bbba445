"""Where the files that come with the package lie: the embedded teacher and the built-in prompts."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Beside the package in a checkout; installed by pip, a package of data.
ASSETS = next(
    (p for p in (REPOSITORY / "assets", REPOSITORY / "wan_distill_assets") if p.is_dir()),
    REPOSITORY,
)
EMBEDDED_TEACHER = ASSETS / "tiny_wan22"
