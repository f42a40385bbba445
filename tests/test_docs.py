"""The documents say what the code says: messages, flags, files and the first two commands."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache

import pytest
import yaml
from conftest import REPOSITORY

import convert_lora
import sample
import test_umt5_weights
from wan_distill.settings.command_line import build_parser

SCRIPTS = ("train_distillation.py", "sample.py", "test_umt5_weights.py", "convert_lora.py")
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
# Flags of pip, ruff, torchrun, accelerate, Slurm, tests/compat/run_matrix.py and
# scripts/make_tiny_teacher.py.
OTHER_PROGRAMS = {
    "--member",
    "--check",
    "--check_frames",
    "--write_docs",
    "--strict",
    "--build-arg",
    "--rm",
    "--gpus",
    "--index-url",
    "--nproc_per_node",
    "--nnodes",
    "--rdzv_backend",
    "--rdzv_id",
    "--rdzv_endpoint",
    "--multi_gpu",
    "--num_processes",
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--signal",
    "--requeue",
}
PLACEHOLDER = "\0"  # where an f-string inserts a value
OMITTED = "\1"  # where a document leaves something out


# --------------------------------------------------------------------------------- quoted messages


def messages_in(source: str) -> Iterator[str]:
    """The string literals of a module but for its docstrings, with PLACEHOLDER for each value."""
    tree = ast.parse(source)
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            parts = [p.value if isinstance(p, ast.Constant) else PLACEHOLDER for p in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [] if id(node) in skipped else [node.value]


@cache
def messages() -> list[str]:
    """Those of everything that a user runs."""
    files = [*sorted((REPOSITORY / "wan_distill").rglob("*.py"))]
    files += [REPOSITORY / name for name in SCRIPTS]
    return [m for file in files for m in messages_in(file.read_text(encoding="utf-8"))]


def is_part_of(quoted: str, message: str) -> bool:
    """Whether `quoted` may stand in `message`, in which a value is any text without a space.

    Follows both at once: `ends` are the places in `message` that what was read so far may end at.
    """
    everywhere = set(range(len(message)))
    ends = everywhere
    for character in quoted:
        if character == OMITTED:
            ends = {end for end in everywhere if end >= min(ends)}
            continue
        reached = set()
        for start in ends:
            end = start
            while end < len(message) and message[end] == PLACEHOLDER:  # a value may be over here
                if not character.isspace():
                    reached.add(end)  # or go on
                end += 1
            if end < len(message) and message[end] == character:
                reached.add(end + 1)
        ends = reached
        if not ends:
            return False
    return True


def is_said(quoted: str) -> bool:
    """Whether the code says `quoted`, in which `...` stands for anything."""
    text = quoted.replace("...", OMITTED)
    longest = max(re.findall(r"[A-Za-z_]+", text), key=len)  # must not come from a value alone
    return any(longest in message and is_part_of(text, message) for message in messages())


def quoted_messages() -> list[str]:
    """The messages in the first column of docs/troubleshooting.md."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (.*?) \|.*\|$", page, re.MULTILINE)[1:]
    assert len(cells) > 20 and all("`" in cell for cell in cells)
    return [message for cell in cells for message in re.findall(r"`(.*?)`", cell)]


@pytest.mark.parametrize("quoted", quoted_messages())
def test_a_message_of_the_troubleshooting_page_is_the_codes(quoted):
    assert is_said(quoted), f"no message says {quoted!r}"


@pytest.mark.parametrize(
    ("quoted", "message", "expected"),
    [
        ("--width 8: is odd", "--{} {}: is odd; use {}", True),
        ("width 8: is odd; use 16 or", "--{} {}: is odd; use {} or {}", True),
        ("is odd; use ... or", "--{} {}: is odd; use {} or {}", True),
        ("--width ...: is odd", "--{} {}: is odd", True),
        ("step 3 of 4", "step {}{} of 4", True),
        ("--width 8: is even", "--{} {}: is odd; use {}", False),
        ("--width 8 9: is odd", "--width {}: is odd", False),  # a value has no space
        ("is odd ... width", "--width {}: is odd", False),  # the order matters
    ],
)
def test_the_comparison_of_messages(quoted, message, expected):
    text = quoted.replace("...", OMITTED)
    assert is_part_of(text, message.replace("{}", PLACEHOLDER)) is expected


def test_messages_are_joined_and_docstrings_are_none():
    source = '"Not a message."\ndef f(x):\n    "Nor this."\n    return f"one {x} " "two", "three"'
    assert sorted(messages_in(source)) == [f"one {PLACEHOLDER} two", "three"]


# ------------------------------------------------------------------------------- flags and files


def test_every_flag_that_a_document_names_exists():
    parsers = (
        build_parser(),
        sample.build_parser(),
        test_umt5_weights.make_parser(),
        convert_lora.build_parser(),
    )
    known = {option for parser in parsers for a in parser._actions for option in a.option_strings}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            assert flag in known or flag in OTHER_PROGRAMS, f"{document.name}: {flag}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_file_that_a_document_names_exists(document):
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    for link in links:
        assert (document.parent / link).exists(), link
        # The site is made of docs/ alone: a link out of it leads nowhere there.
        assert document.parent.name != "docs" or not link.startswith(".."), link
    for path in re.findall(r"`((?:docs|tests|benchmarks|scripts|wan_distill)/[\w./-]+)`", text):
        assert (REPOSITORY / path).exists(), path


# ----------------------------------------------------------------------------------------- the site

# One line for each file of the code.
MAY_BE_LONGER = ("architecture.md",)


def pages_of(navigation: object) -> Iterator[str]:
    """The files that the site's navigation names."""
    if isinstance(navigation, str):
        yield navigation
    elif isinstance(navigation, list):
        for entry in navigation:
            yield from pages_of(entry)
    else:
        for entry in navigation.values():
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation_and_no_longer_than_a_reader_wants():
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(pages_of(settings["nav"]))
    assert len(listed) == len(set(listed))
    pages = {file.name for file in (REPOSITORY / "docs").glob("*.md")}
    assert {name for name in listed if name.endswith(".md")} == pages
    assert all((REPOSITORY / "docs" / name).is_file() for name in listed)
    for name in pages - set(MAY_BE_LONGER):
        text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
        assert text.count("\n") <= 150, f"{name}: split it"


def test_the_figures_are_drawn_from_the_data():
    spec = importlib.util.spec_from_file_location(
        "draw_figures", REPOSITORY / "scripts" / "draw_figures.py"
    )
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    for name, draw in figures.FIGURES.items():
        drawn = (REPOSITORY / "docs" / "figures" / name).read_text(encoding="utf-8")
        assert drawn == draw(), "python scripts/draw_figures.py"


def test_the_image_is_made_of_files_that_exist_and_reach_the_builder():
    """.dockerignore keeps everything out but what it names."""
    recipe = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    copied = [f for line in re.findall(r"^COPY (.*) \S+$", recipe, re.M) for f in line.split()]
    kept = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in copied:
        assert (REPOSITORY / name).exists(), name
        assert f"!{name}" in kept or (name.endswith(".py") and "!*.py" in kept), name
    assert set(SCRIPTS) <= set(copied)


# ------------------------------------------------------------------------------- the first commands


def test_the_readme_begins_with_two_commands_that_set_up_everything_themselves():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    first = re.search(r"```\w*\n(.*?)```", readme, re.DOTALL)
    assert first and first.group(1).splitlines() == [
        "pip install -r requirements.txt && python train_distillation.py",
        "pip install -r requirements-dev.txt && python -m pytest",
    ]
    before = readme[: first.start()]
    assert "https://download.pytorch.org/whl/cpu" in before  # else gigabytes of CUDA come first
    assert "Python 3.10" in before
    for file in ("requirements.txt", "requirements-dev.txt"):
        assert (REPOSITORY / file).is_file()
