"""The page that explains a run. In a real browser: tests/browser/check_report.py."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from conftest import SMALL

import train_distillation
from wan_distill.layout import RunFolder
from wan_distill.model.student_files import read_metadata
from wan_distill.results.page import Page
from wan_distill.results.recorded import student_hashes
from wan_distill.settings.description import read_teacher

HOSTILE = '"><script>alert(1)'
ROW = dict(
    evaluations=4,
    frechet=1.0,
    paired_distance=0.1,
    motion=1.0,
    diversity=1.0,
    luminance_drift=0.0,
    seconds_per_sample=1.0,
)


def write_metrics(folder: RunFolder, *lines: dict) -> None:
    folder.metrics.parent.mkdir(parents=True, exist_ok=True)
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_clips(folder: RunFolder, prompts: list[str]) -> None:
    folder.previews.mkdir()
    folder.preview_prompts.write_text(json.dumps(prompts))
    for expert in ("high", "low"):
        for who in ("teacher", "000000", "000200", "000400"):
            for index in range(len(prompts)):
                folder.preview(expert, who, index).write_bytes(b"clip")


@pytest.fixture
def make_page(small_config, tmp_path):
    """Writes the page of the folder as it is, of a teacher called `name`; returns its text."""
    config = small_config(output_dir=str(tmp_path))

    def make(name: str = "teacher") -> str:
        info = dataclasses.replace(read_teacher(config), source=name, name=name)
        Page((config,), info).write()
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return make


def digests(page: str) -> dict[str, str]:
    """Section -> what tells the page in the browser whether it changed."""
    return dict(re.findall(r'<section id="(\w+)" data-digest="(\w+)"', page))


# ----------------------------------------------------------------------------------- a finished run


@pytest.fixture(scope="module")
def run(random_teacher, tmp_path_factory):
    """The output folder of a short run with previews and evaluation, on the random teacher."""
    out = tmp_path_factory.mktemp("report") / "out"
    prompts = out.with_name("prompts.txt")
    prompts.write_text("a red ball\na blue ball\na green box\n", encoding="utf-8")
    flags = SMALL | dict(
        teacher_path=random_teacher,
        prompts=prompts,
        output_dir=out,
        method="trajectory",
        max_train_steps=4,
        logging_steps=1,
        validation_steps=4,
        validation_prompt="a <b>cat</b> | a dog",
        monitor_steps=2,
        monitor_samples=4,
        # Every update makes it worse: the weights before training are exported.
        learning_rate=0.3,
        hub_token="hf_secret",
    )
    assert train_distillation.main([f"--{k}={v}" for k, v in flags.items()] + ["--evaluate"]) == 0
    return out


@pytest.mark.journey  # as long as a whole run
def test_a_finished_run_has_every_section(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert list(digests(page)) == [
        "top",
        "clips",
        "tiles",
        "links",
        "time",
        "measured",
        "worst",
        "curves",
        "use",
        "needs",
        "settings",
    ]
    assert (
        page.count("a &lt;b&gt;cat&lt;/b&gt;") == 2 + 1 and "<b>cat" not in page
    )  # experts; setting
    assert page.count("<polyline") >= 4 and "data-live" not in page
    assert re.search(r"Planned at \S+ TFLOP/s per device: \d+% of the matrix rate measured", page)
    # sides: of the first clips; of the worst, with the teacher's few steps; over training time
    assert page.count("<video") == 4 * 2 + 4 * 3 + 2 * 2 * (1 + 2)


@pytest.mark.journey  # as long as a whole run
def test_the_page_needs_nothing_but_itself(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "http://" not in page
    assert len(page) < 2_000_000


@pytest.mark.journey  # as long as a whole run
def test_what_is_shown_is_what_is_exported(run):
    """In previews, health and curves; here the weights before the first update."""
    page = (run / "report.html").read_text(encoding="utf-8")
    folder = RunFolder(run)
    for expert in ("high", "low"):
        assert read_metadata(folder.lora(expert))["updates"] == 0
        assert folder.preview(expert, "000000", 0).exists()
        assert f"{expert} expert: update 0, exported" in page
        assert f"{expert} expert, student update 0: these weights are exported" in page
    assert "Training brought it no nearer to the teacher than it began: high expert" in page


@pytest.mark.journey  # as long as a whole run
def test_previews_show_the_same_prompts_of_both_sides(run):
    names = {file.name for file in (run / "previews").glob("*.mp4")}
    for expert in ("high", "low"):
        for who in ("teacher", "000000", "000004"):
            assert {f"{expert}-{who}-0.mp4", f"{expert}-{who}-1.mp4"} <= names
    assert not any(name.endswith("-2.mp4") for name in names), "two prompts were given"


@pytest.mark.journey  # as long as a whole run
def test_the_token_is_written_nowhere(run):
    assert not [f for f in run.rglob("*") if f.is_file() and b"hf_secret" in f.read_bytes()]


@pytest.mark.journey  # as long as a whole run
def test_no_path_of_the_machine_is_in_the_page(run, random_teacher):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert str(run.parent) not in page and str(random_teacher.parent) not in page
    assert "--prompts" in page and "load_lora_weights(&#34;out&#34;" in page


# ------------------------------------------------------------------------------- what the page says


def test_a_run_that_just_began_has_a_page(make_page, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(dict(expert="high", step=1, student_updates=1, student_loss=1.0)) + '\n{"expert"'
    )
    page = make_page()
    assert page.count("<polyline") == 1 and "high expert, 1 of 2 updates" in page
    assert "data-live" in page and "The student has not been checked yet" in page
    assert set(digests(page)) == {"top", "tiles", "links", "curves", "settings"}, (
        "no code without files"
    )


def test_hostile_words_are_shown_as_words(make_page, tmp_path):
    folder = RunFolder(tmp_path)
    write_metrics(folder, dict(expert="high", step=1, **{HOSTILE: 1.0}))
    write_clips(folder, [HOSTILE])
    for who in ("teacher", "few", "student"):
        folder.clips.mkdir(exist_ok=True)
        folder.clip(who, 0).write_bytes(b"clip")
    rows = [ROW | dict(sampler=name) for name in (HOSTILE, "few", "student 4")]
    evaluation = dict(
        kind="pairs",
        rows=rows,
        sentence=HOSTILE,
        nearer=0.5,
        nearer_interval=[0.4, 0.6],
        samples=1,
        prompts=1,
        eval_seed=1,
        student=student_hashes(folder),
        clips=[dict(prompt=HOSTILE, paired_distance=1.0, few_paired_distance=1.0)],
    )
    folder.evaluation.write_text(json.dumps(evaluation))
    page = make_page(HOSTILE)
    assert page.count("<script") == 1 and "<script>alert" not in page
    # title, heading; first clip, worst clip, and each expert's; table and its sentence; chart and
    # its label
    assert page.count("&lt;script&gt;alert(1)") == 2 + 4 + 2 + 2


def test_only_an_evaluation_of_this_student_is_shown(make_page, tmp_path):
    folder = RunFolder(tmp_path)
    rows = [ROW | dict(sampler=name) for name in ("teacher 6", "few", "student 4")]
    values = dict(rows=rows, kind="pairs", nearer=0.9, nearer_interval=[0.8, 1.0], samples=2)
    values |= dict(prompts=1, eval_seed=1, sentence="", clips=[])
    folder.evaluation.write_text(json.dumps(values | dict(student={})))
    assert "90 %" in make_page()
    folder.evaluation.write_text(json.dumps(values | dict(student={"high": "another"})))
    assert "90 %" not in make_page() and "Measured at the end" in make_page()


def test_only_what_changed_has_another_digest(make_page, tmp_path):
    folder = RunFolder(tmp_path)
    line = dict(expert="high", step=1, student_updates=1, student_loss=1.0)
    write_metrics(folder, line)
    before = digests(make_page())
    write_metrics(folder, line, line | dict(step=2, student_updates=2))
    after = digests(make_page())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"top", "curves"}


def test_both_stages_are_one_job(small_config, tmp_path):
    """Their curves one after the other; clips of both on one slider."""
    second = small_config(output_dir=str(tmp_path))
    first = dataclasses.replace(
        second, method="trajectory", output_dir=str(tmp_path / "trajectory")
    )
    for stage in (first, second):
        folder = RunFolder(tmp_path) if stage is second else RunFolder(tmp_path / "trajectory")
        write_metrics(folder, dict(expert="high", step=10, student_updates=5, student_loss=0.1))
        write_clips(folder, ["a cat"])
    Page((first, second), read_teacher(second)).write()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "high expert, trajectory: update 400" in page
    assert "high expert, dmd: update 0" in page
    assert page.count("<polyline") == 2
