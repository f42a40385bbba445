"""The page that explains a run, and the clips on it. In a real browser:
tests/browser/check_report.py.
"""

from __future__ import annotations

import json
import re

import pytest
from conftest import REPOSITORY

import train_distillation
from wan_distill.results.page import write_page
from wan_distill.settings.description import read_teacher
from wan_distill.system.runtime import Runtime
from wan_distill.training import previews


@pytest.fixture(scope="module")
def run(random_teacher, tmp_path_factory):
    """A short run with previews and evaluation, on the random teacher."""
    out = tmp_path_factory.mktemp("report") / "out"
    assert (
        train_distillation.main(
            [
                "--teacher_path",
                str(random_teacher),
                "--output_dir",
                str(out),
                "--height",
                "32",
                "--width",
                "32",
                "--num_frames",
                "5",
                "--max_train_steps",
                "4",
                "--num_trajectories",
                "4",
                "--teacher_steps",
                "6",
                "--rank",
                "4",
                "--max_sequence_length",
                "12",
                "--negative_prompt",
                "",
                "--mixed_precision",
                "no",
                "--method",
                "trajectory",
                "--eval_samples",
                "8",
                "--evaluate",
                "--validation_steps",
                "2",
                "--logging_steps",
                "2",
                "--monitor_steps",
                "2",
                "--monitor_samples",
                "4",
                "--validation_prompt",
                "a <b>cat</b> | a dog",
                "--hub_token",
                "hf_secret",
            ]
        )
        == 0
    )
    return out


def test_previews_show_the_same_prompts_of_both_sides(run):
    names = {file.name for file in (run / "previews").glob("*.mp4")}
    for expert in ("high", "low"):
        assert {
            f"{expert}-{who}-{p}.mp4" for who in ("teacher", "000000", "000004") for p in (0, 1)
        } <= names
    assert not any(name.endswith("-2.mp4") for name in names), "two prompts were given"


def test_the_page_needs_nothing_but_itself(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page) and "http://" not in page
    assert page.count("<video") == 2 * 2 * 3  # experts, prompts; teacher, first, last
    for title in ("Teacher beside student", "Measured", "Curves", "Use it", "Plan", "Versions"):
        assert f"<h2>{title}</h2>" in page
    assert (
        page.count("a &lt;b&gt;cat&lt;/b&gt;</p>") == 2 and "<b>cat" not in page
    )  # prompts, escaped
    assert page.count("<polyline") >= 4 and "after 4 updates" in page
    assert "times</b> as fast" in page and "Health:" in page


def test_the_token_is_written_nowhere(run):
    assert not [f for f in run.rglob("*") if f.is_file() and b"hf_secret" in f.read_bytes()]


def test_a_page_of_a_run_that_just_began_and_of_hostile_words(small_config, tmp_path):
    config = small_config(output_dir=str(tmp_path))
    (tmp_path / "plan.txt").write_text("<script>alert(1)</script>")
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(dict(expert="high", step=1, student_loss=1.0)) + '\n{"expert"'
    )
    write_page(tmp_path, config, read_teacher(config))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and page.count("<polyline") == 1


def test_previews_keep_to_their_share_of_the_run(small_config, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(previews.time, "perf_counter", lambda: clock[0])
    show = previews.Previews.__new__(previews.Previews)
    show.config = small_config(validation_steps=10)
    show.clips = type("Clips", (), dict(on=True))
    show.runtime = Runtime(show.config)
    show.began, show.spent, show.skipped = 0.0, 5.0, False
    clock[0] = 99.0
    assert not show.due(10, 100) and show.due(0, 100) and show.due(100, 100)
    clock[0] = 101.0
    assert show.due(10, 100) and not show.due(11, 100)


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
