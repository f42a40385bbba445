"""Malformed flags, prompts, configurations, headers and checkpoints; used by chaos.py."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked_runs import CRASH, flags, run, run_undisturbed

import sample
import train_distillation
from wan_distill.settings.config import Config

KINDS = (
    *("flags", "prompts", "json", "header", "checkpoint", "stored", "tokenizer", "yaml"),
    *("student", "sample flags"),
)
# fmt: off
FLAG_VALUES = [
    "-1", "0", "nan", "inf", "1e400", "", " ", "x", "None", "9" * 30, "../..", "\u0000", "1,2",
    "[]", "--", "a" * 5000,
]
# fmt: on
JSON_VALUES: list[Any] = [
    None,
    -1,
    0,
    10**9,
    1.5,
    "",
    "nonsense",
    [],
    {},
    True,
    [1, "a"],
    float("nan"),
]
PROMPT_FILES = [
    b'[{"caption": "a red ball"}, {"caption": "a blue box"}]\n"caption"\n',
    b'{"caption": "a red \\ud83d\\ude00 ball"}\n{"caption": "a blue box"}\n',
    b"a red ball\na blue box --w 832 --fs 5\n# a comment\n",
    b"caption\na\n",
    b'file,caption\n1.mp4,"a red ball, rolling"\n2.mp4,"a ""blue"" box"\n',
    b"file\tcaption\n1.mp4\ta red ball\n",
    "a red ball\na blue box\n".encode("utf-16"),
    "file;caption\n1;a caf\u00e9\n".encode("utf-8-sig"),
]
PROMPT_SUFFIXES = [".txt", ".json", ".jsonl", ".csv", ".tsv", ".NDJSON", "", ".yaml"]
CONFIG_FILES = [
    b"method: trajectory\nmixed_precision: no\nsampling_steps: [2, 4]\nrank: 4\n",
    b"lora_layers:\n  - to_q\n  - to_k\nevaluate: false\n",
]
SAMPLE_FLAGS = ("steps", "height", "width", "num_frames", "seed", "fps", "samples", "teacher_path")
SHORT: dict[str, Any] = dict(method="trajectory", max_train_steps=3, num_trajectories=4)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` cut off, emptied, overwritten in places, lengthened, or replaced."""
    offset = rng.randrange(max(1, len(data)))
    damages: list[Callable[[], bytes]] = [
        lambda: data[:offset],
        lambda: b"",
        lambda: data[:offset] + rng.randbytes(8) + data[offset + 8 :],
        lambda: data + rng.randbytes(16),
        lambda: data[:offset] + data[offset + 1 :],
        lambda: rng.randbytes(64),
    ]
    return rng.choice(damages)()


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON object in which one value is removed, or replaced by one of another type."""
    content = json.loads(data)
    key = rng.choice(list(content))
    if rng.random() < 0.2:
        del content[key]
    else:
        content[key] = rng.choice(JSON_VALUES)
    return json.dumps(content).encode()


def bad_flags(rng: random.Random) -> list[str]:
    """One flag, sometimes misspelt, with one or two nonsense values."""
    name = rng.choice([f"--{field.name}" for field in dataclasses.fields(Config)])
    if rng.random() < 0.2:
        name = name[:-1] + rng.choice("qxz")
    return ["--dry_run", *(f"{name}={rng.choice(FLAG_VALUES)}" for _ in range(rng.randrange(1, 3)))]


def malformed_case(kind: str, case: Path, teacher: Path, rng: random.Random) -> list[str]:
    """Damages one input of the finished run in `case`/out. Returns the command line that meets it.

    Args:
        kind: one of KINDS.
    """
    out = case / "out"
    argv = flags(teacher, out, **SHORT)
    if kind == "flags":
        return [*argv, *bad_flags(rng)]
    if kind == "prompts":
        file = case / f"prompts{rng.choice(PROMPT_SUFFIXES)}"
        file.write_bytes(damaged(rng.choice(PROMPT_FILES), rng))
        return [*argv, f"--prompts={file}"]
    if kind == "yaml":
        file = case / "settings.yaml"
        file.write_bytes(damaged(rng.choice(CONFIG_FILES), rng))
        return [*argv, "--dry_run", f"--config={file}"]
    if kind in ("checkpoint", "stored"):
        stored = [f for f in out.rglob("*") if f.is_file() and f.suffix not in (".mp4", ".png")]
        files = [f for f in stored if ("checkpoint-" in str(f)) == (kind == "checkpoint")]
        file = rng.choice(sorted(files))
        file.write_bytes(damaged(file.read_bytes(), rng))
        return [*argv, "--max_train_steps=4"]
    if kind in ("student", "sample flags"):
        flag = f"--{rng.choice(SAMPLE_FLAGS)}={rng.choice(FLAG_VALUES)}"
        if kind == "student":
            file = rng.choice(sorted(out.glob("*.safetensors")))
            file.write_bytes(damaged(file.read_bytes()[:3000], rng) + file.read_bytes()[3000:])
            flag = "--steps=4"
        return [f"--student={out}", "--prompt=a ball", f"--out={case / 'a.mp4'}", flag]
    if kind == "tokenizer":
        copy = Path(shutil.copytree(teacher, case / "teacher"))
        file = rng.choice(sorted(f for f in (copy / "tokenizer").iterdir() if f.is_file()))
        file.write_bytes(damaged(file.read_bytes(), rng))
        return flags(copy, case / "new", **SHORT)
    copy = Path(shutil.copytree(teacher, case / "teacher"))
    ending = ".json" if kind == "json" else ".safetensors"
    file = rng.choice([f for f in copy.rglob(f"*{ending}") if "tokenizer" not in str(f)])
    content = file.read_bytes()
    if kind == "json" and rng.random() < 0.7:
        file.write_bytes(damaged_json(content, rng))
    else:
        file.write_bytes(damaged(content[:2000], rng) + content[2000:])
    return flags(copy, out, **SHORT)


def malformed(
    count: int, teacher: Path, root: Path, rng: random.Random, tally: Counter[str]
) -> None:
    """Runs on `count` malformed inputs: each must be refused in one line, or do no harm.

    A run that is refused must leave every file of its output folder as it was.
    """
    finished = root / "finished"
    evaluated = dict(evaluate=True, eval_samples=4, validation_steps=2, **SHORT)
    run_undisturbed(flags(teacher, finished, **evaluated), root / "log.txt")
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        case = root / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        shutil.copytree(finished, case / "out")
        argv = malformed_case(kind, case, teacher, rng)
        before = {f: f.read_bytes() for f in (case / "out").rglob("*") if f.is_file()}
        main = sample.main if kind in ("student", "sample flags") else train_distillation.main
        code = run(argv, case / "log.txt", main=main)
        output = (case / "log.txt").read_text(errors="replace")
        no_reason = code in (1, 2) and "error: " not in output
        if code == CRASH or code < 0 or "Traceback" in output or no_reason:
            copy = shutil.copytree(case, root / f"lost-{number}")
            tally[f"LOST: a traceback, {kind}, {copy / 'log.txt'}"] += 1
            continue
        # What a run writes before it reads, and refuses, a stored file: for the low expert's, the
        # high one's further update.
        written = ["plan.txt", "plan.json", "spent.json", "metrics.jsonl", "encoder.json"]
        written.append("high_noise_lora.safetensors")
        records = written if kind == "stored" else []
        changed = [
            f
            for f, data in before.items()
            if f.name not in records
            and not (kind == "stored" and f.parent.name == "high")
            and (not f.exists() or f.read_bytes() != data)
        ]
        if code == 2 and changed:
            copy = shutil.copytree(case, root / f"lost-{number}")
            tally[f"LOST: {kind} changed {changed[0].relative_to(case)}, {copy}"] += 1
        result = "refused in one line" if code else "harmless or ignored"
        tally[f"malformed {kind}: {result}"] += 1
