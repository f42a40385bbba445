"""Whole runs of a few updates in bf16, as users make them, on the packages that are installed here.

Run by run_versions.py. Warnings that the tool's own calls are deprecated are errors.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from conftest import tiny_flags
from random_teachers import write_pipeline

import train_distillation

DEFAULTS = dict(mixed_precision="bf16", negative_prompt=None, train_batch_size=None)
METHODS = ("dmd", "trajectory")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def main() -> None:
    for module in ("wan_distill", "train_distillation"):
        warnings.filterwarnings("error", category=DeprecationWarning, module=module)
        warnings.filterwarnings("error", category=FutureWarning, module=module)
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_pipeline(Path(folder) / "Stranger-T2V")
        for method in METHODS:
            flags = tiny_flags(teacher, Path(folder) / method, method=method, **DEFAULTS)
            code = train_distillation.main(flags)
            if code:
                raise SystemExit(f"{method}: exit code {code}")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))


if __name__ == "__main__":
    main()
