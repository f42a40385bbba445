"""Whole runs in bf16 on the oldest versions that requirements.txt allows, and on those installed
here.

    python tests/compat/run_versions.py                    both
    python tests/compat/run_versions.py --versions oldest  one of them
    python tests/compat/run_versions.py --install_only     gigabytes, and nothing is run

The oldest: of every package the lower bound itself, installed once into .cache/compat, alone on the
path. Exit code 0 where default `dmd` and `trajectory` end well on both.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
REQUIREMENTS = REPOSITORY / "requirements.txt"
CACHE = Path(os.environ.get("WAN_DISTILL_COMPAT_CACHE", REPOSITORY / ".cache" / "compat"))


def lower_bounds() -> list[str]:
    """Each requirement pinned to its lower bound. Raises where one has none, or more than that."""
    pins = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if wanted := line.split("#")[0].strip():
            requirement = Requirement(wanted)
            (bound,) = requirement.specifier
            assert bound.operator == ">=", wanted
            pins.append(f"{requirement.name}=={bound.version}")
    return pins


def install_oldest() -> Path:
    """A folder that holds them and all that they need, installed once."""
    pins = "\n".join(lower_bounds())
    folder = CACHE / f"oldest-{hashlib.sha256(pins.encode()).hexdigest()[:8]}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(pins)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(folder)]
        what = ["-r", str(REQUIREMENTS), "-c", str(constraints), "pytest>=8"]
        subprocess.run([*pip, *what], check=True)
        (folder / "done").write_text("")
    return folder


def run(version: str) -> str:
    """What updates.py says it ran on. Raises SystemExit where it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    alone = []
    if version == "oldest":  # -S: without this environment's own packages
        environment["PYTHONPATH"] = str(install_oldest())
        alone = ["-S"]
    command = [sys.executable, *alone, str(HERE / "updates.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{version}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    versions = ("oldest", "installed")
    parser.add_argument("--versions", nargs="+", choices=versions, default=versions)
    parser.add_argument("--install_only", action="store_true", help="install the oldest")
    args = parser.parse_args()
    if args.install_only:
        install_oldest()
        return
    for version in args.versions:
        print(f"{version}: {run(version)}", flush=True)


if __name__ == "__main__":
    main()
