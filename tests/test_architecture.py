"""The tree is as docs/architecture.md draws it."""

from __future__ import annotations

import re

from conftest import REPOSITORY


def test_the_map_names_every_file():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = text.split("```")[1]
    listed = set(re.findall(r"[\w./]+\.py", drawn))
    present = {
        p.relative_to(REPOSITORY / "wan_distill").as_posix()
        for p in (REPOSITORY / "wan_distill").rglob("*.py")
    }
    present |= {p.name for p in REPOSITORY.glob("*.py")}
    assert present - listed == set(), "not on the map of docs/architecture.md"
    assert listed - present == set(), "on the map of docs/architecture.md, but not in the tree"
