"""Applies each change of `mutations.py` to a copy of the product, and runs its test.

    python tests/run_mutations.py              all of them: half an hour on one core
    python tests/run_mutations.py --only dmd   those whose file or test has `dmd` in its name

Prints what was not noticed, and a tally. Ends with exit code 1 unless 95 % are noticed. Runs are
forks of a process that has imported everything, so a change costs seconds; not on Windows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mutations import MUTATIONS, Mutation

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("wan_distill", "tests", "scripts", "assets", "docs", "benchmarks")
SECONDS = 300  # a test that takes longer has noticed the change: it hangs
ENOUGH = 0.95
# Exit codes of pytest.
PASSED, FAILED = 0, 1


@dataclass
class Outcome:
    """What became of one change: "noticed", "not noticed", or what went wrong."""

    mutation: Mutation
    verdict: str
    output: str


def copy_repository(folder: Path) -> Path:
    """A copy of everything that tests read."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for file in REPOSITORY.iterdir():
        if file.is_file() and not file.name.startswith(".git"):
            shutil.copyfile(file, folder / file.name)
    return folder


def import_everything() -> None:
    """Imports what the product and the tests import, and forgets the product's own modules."""
    sys.path.insert(0, str(REPOSITORY))
    import pytest  # noqa: F401
    import torch

    import wan_distill

    torch.set_num_threads(1)  # forked processes may not share a thread pool
    with contextlib.redirect_stderr(io.StringIO()):
        for module in pkgutil.walk_packages(wan_distill.__path__, "wan_distill."):
            importlib.import_module(module.name)
        for name in ("train_distillation", "sample", "hypothesis", "imageio_ffmpeg"):
            importlib.import_module(name)
        from diffusers import WanPipeline  # noqa: F401
        from transformers import T5TokenizerFast  # noqa: F401
    sys.path.remove(str(REPOSITORY))
    for name in list(sys.modules):
        if name.split(".")[0] in ("wan_distill", "train_distillation", "sample"):
            del sys.modules[name]


def start(folder: Path, tests: Sequence[str], log: Path, more: Sequence[str] = ("-x",)) -> int:
    """Runs `tests` of the copy in `folder` in a fork, which it returns; output goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.setsid()
        os.chdir(folder)
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        import pytest
        import torch

        # Its pool is made anew in a fork, which two threads may not do at once.
        torch.set_num_threads(1)
        plain = ["-o", "addopts=", "-q", *more, "-p", "no:cacheprovider", "-n0"]
        temporary = f"--basetemp={log.with_suffix('.files')}"
        code = int(pytest.main([*plain, "-m", "journey or not journey", temporary, *tests]))
    finally:
        os._exit(code)


def wait(pid: int, seconds: float = SECONDS) -> int | None:
    """The exit code of a fork; None where it took longer than `seconds`, and was ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def try_out(mutation: Mutation, folder: Path) -> Outcome:
    """Applies one change to the copy in `folder`, runs its test, and takes the change back."""
    file = folder / mutation.file
    original = file.read_text(encoding="utf-8")
    if original.count(mutation.before) != 1:
        return Outcome(mutation, f"the text is {original.count(mutation.before)} times there", "")
    log = folder.parent / f"{folder.name}.log"
    file.write_text(original.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        code = wait(start(folder, [mutation.test], log))
    finally:
        file.write_text(original, encoding="utf-8")
    verdicts = {PASSED: "not noticed", FAILED: "noticed", None: "noticed"}
    return Outcome(
        mutation, verdicts.get(code, f"pytest ended with {code}"), log.read_text(errors="replace")
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a file's or a test's name")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.only in m.file or args.only in m.test]
    import_everything()
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_repository(Path(temporary) / "copy")
        log = Path(temporary) / "unchanged.log"
        wait(start(folder, sorted({m.test for m in chosen}), log, []), 3600)
        text = log.read_text(errors="replace")
        failing = set(re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+)", text, re.MULTILINE))
        for test in sorted(failing):
            print(f"fails without any change: {test}", flush=True)
        outcomes = []
        for mutation in chosen:
            if mutation.test in failing:
                outcomes.append(Outcome(mutation, "its test fails without it", ""))
            else:
                outcomes.append(try_out(mutation, folder))
            if outcomes[-1].verdict != "noticed":
                print(f"{outcomes[-1].verdict}: {mutation}", flush=True)
    noticed = sum(outcome.verdict == "noticed" for outcome in outcomes)
    files = len({m.file for m in chosen})
    print(
        f"{noticed} of {len(chosen)} changes in {files} files noticed ({noticed / len(chosen):.1%})"
    )
    return int(noticed < ENOUGH * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
