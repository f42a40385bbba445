"""Are the installed packages those that requirements.txt asks for?"""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement

from wan_distill.errors import UsageError
from wan_distill.settings.assets import REPOSITORY

PACKAGE = "wan-distill"


def check_versions() -> str:
    """Installed versions of what requirements.txt names. Raises UsageError where one is missing or
    too old.
    """
    versions = []
    for line in _required():
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
        versions.append(f"{wanted.name} {installed}")
    return ", ".join(versions)


def _required() -> list[str]:
    """The lines of requirements.txt; of an installed package they are its metadata."""
    file = REPOSITORY / "requirements.txt"
    if not file.exists():
        return importlib.metadata.requires(PACKAGE) or []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [text for text in (line.split("#")[0].strip() for line in lines) if text]
