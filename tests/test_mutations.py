"""The list of wrong changes does not rot: each one's text is there once, and so is its test."""

from __future__ import annotations

import ast
import functools
from collections import Counter

import pytest
from conftest import REPOSITORY
from mutations import MUTATIONS

LEAST = 120
FOLDERS = ("maths", "settings", "system", "umt5", "model", "data", "methods", "training")


def test_there_are_enough_changes_in_every_folder():
    assert len(MUTATIONS) >= LEAST
    touched = {m.file for m in MUTATIONS}
    for folder in (*FOLDERS, "planning", "results"):
        assert any(file.startswith(f"wan_distill/{folder}/") for file in touched), folder
    assert {"train_distillation.py", "sample.py"} <= touched
    twice = Counter((m.file, m.before, m.after) for m in MUTATIONS)
    assert set(twice.values()) == {1}


@pytest.mark.parametrize("file", sorted({m.file for m in MUTATIONS}))
def test_a_changes_text_occurs_once_and_its_test_exists(file):
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    for mutation in MUTATIONS:
        if mutation.file == file:
            assert text.count(mutation.before) == 1, f"correct it in mutations.py: {mutation}"
            assert mutation.after != mutation.before
            ast.parse(text.replace(mutation.before, mutation.after))
            name, _, function = mutation.test.partition("::")
            assert function in functions_of(name), f"name the test that took its place: {mutation}"


@functools.cache
def functions_of(file: str) -> set[str]:
    """The names of the test functions in a file."""
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
