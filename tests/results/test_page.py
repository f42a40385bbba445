"""The page that explains a run. In a real browser: tests/browser/check_report.py."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from conftest import SMALL

import train_distillation
from wan_distill.layout import RunFolder
from wan_distill.results.charts import HEIGHT, WIDTH, chart
from wan_distill.results.page import health, lines_of_job, write_page
from wan_distill.settings.description import read_teacher

HOSTILE = '"><script>alert(1)'
CHARACTER = 7  # pixels: no letter or digit of a 10-pixel font is wider, on average
ROW = dict(
    evaluations=4,
    frechet=1.0,
    paired_distance=0.1,
    motion=1.0,
    diversity=1.0,
    luminance_drift=0.0,
)


def metrics(expert: str, *steps: int, **values: float) -> list[dict]:
    return [dict(expert=expert, step=step, seconds=1.0) | values for step in steps]


def write_metrics(folder: RunFolder, lines: list[dict]) -> None:
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_clips(folder: RunFolder, prompts: list[str]) -> None:
    folder.previews.mkdir()
    folder.preview_prompts.write_text(json.dumps(prompts))
    for expert in ("high", "low"):
        for who in ("teacher", "000000", "000200", "000400"):
            for index in range(len(prompts)):
                folder.preview(expert, who, index).write_bytes(b"clip")


class Texts(HTMLParser):
    """Every SVG text of a page with the attributes of its element."""

    def __init__(self, page: str):
        super().__init__()
        self.inside: dict[str, str] | None = None
        self.texts: list[tuple[dict[str, str], str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = dict(attributes) if tag == "text" else None

    def handle_data(self, data):
        if self.inside is not None:
            self.texts.append((self.inside, data))

    def handle_endtag(self, tag):
        self.inside = None


@pytest.fixture
def make_page(small_config, tmp_path):
    """Writes the page of the folder as it is, of a teacher called `name`; returns its text."""
    config = small_config(output_dir=str(tmp_path))

    def make(name: str = "teacher") -> str:
        info = dataclasses.replace(read_teacher(config), source=name, name=name)
        write_page(tmp_path, config, info)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return make


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
        logging_steps=2,
        validation_steps=2,
        validation_prompt="a <b>cat</b> | a dog",
        monitor_steps=2,
        monitor_samples=4,
        hub_token="hf_secret",
    )
    assert train_distillation.main([f"--{k}={v}" for k, v in flags.items()] + ["--evaluate"]) == 0
    return out


def test_a_finished_run_has_every_section_and_all_its_clips(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    for title in ("Teacher beside student", "Comparison", "Measured", "Curves", "Use it", "Plan"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<video") == 2 * 2 * 3  # experts, prompts; teacher, first, last
    assert page.count("<p>a &lt;b&gt;cat&lt;/b&gt;</p>") == 2 and "<b>cat" not in page
    assert "student after 4 updates" in page and page.count("<polyline") >= 4
    assert re.search(r"It closed <b>-?\d+%</b>", page) and "times</b> as fast" in page


def test_the_page_needs_nothing_but_itself(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page) and "http://" not in page


def test_previews_show_the_same_prompts_of_both_sides(run):
    names = {file.name for file in (run / "previews").glob("*.mp4")}
    for expert in ("high", "low"):
        for who in ("teacher", "000000", "000004"):
            assert {f"{expert}-{who}-0.mp4", f"{expert}-{who}-1.mp4"} <= names
    assert not any(name.endswith("-2.mp4") for name in names), "two prompts were given"


def test_the_token_is_written_nowhere(run):
    assert not [f for f in run.rglob("*") if f.is_file() and b"hf_secret" in f.read_bytes()]


# ------------------------------------------------------------------------------- what the page says


def test_a_run_that_just_began_has_a_page(make_page, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(dict(expert="high", step=1, student_loss=1.0)) + '\n{"expert"'
    )
    page = make_page()
    assert page.count("<polyline") == 1 and "high expert 1 updates." in page
    assert "the student has not been checked yet" in page
    for title in ("Teacher beside student", "Comparison", "Measured", "Plan"):
        assert f"<h2>{title}</h2>" not in page


def test_hostile_words_are_shown_as_words(make_page, tmp_path):
    folder = RunFolder(tmp_path)
    folder.plan.write_text(HOSTILE)
    write_metrics(folder, metrics("high", 1, **{HOSTILE: 1.0}))
    write_clips(folder, [HOSTILE])
    rows = [ROW | dict(sampler=name, seconds_per_sample=1.0) for name in (HOSTILE, "student 4")]
    evaluation = dict(rows=rows, gap_closed=0.5, samples=8, sentence=HOSTILE)
    folder.evaluation.write_text(json.dumps(evaluation))
    page = make_page(HOSTILE)
    assert page.count("<script") == 1 and "<script>alert" not in page
    # title, heading, summary, sentence; a prompt per expert; table; chart, its label; code; plan
    assert page.count("&lt;script&gt;alert(1)") == 4 + 2 + 1 + 2 + 1 + 1


def test_finished_clips_come_before_blurred_ones(make_page, tmp_path):
    write_clips(RunFolder(tmp_path), ["a cat", "a dog"])
    page = make_page()
    assert page.index("low-noise expert: finished") < page.index("high-noise expert: what")
    labels = re.findall(r"<figcaption>(.*)</figcaption>", page)
    first, last = "student after 0 updates", "student after 400 updates"
    assert labels == ["teacher", first, last] * 4
    assert page.count("<p>a cat</p>") == 2


def test_the_speed_up_compares_the_finest_student_with_the_teacher(make_page, tmp_path):
    seconds = {"teacher 6 guided": 3.0, "student 4": 1.5, "student 2": 0.1}
    rows = [ROW | dict(sampler=name, seconds_per_sample=s) for name, s in seconds.items()]
    values = dict(rows=rows, gap_closed=0.9, samples=8)
    RunFolder(tmp_path).evaluation.write_text(json.dumps(values))
    page = " ".join(make_page().split())
    assert "<b>90%</b> of the gap" in page and "<b>2.0 times</b> as fast" in page
    assert "(1.5 s instead of 3 s per clip)" in page
    assert page.count("<tr>") == 1 + 3 and "8 samples on each side" in page


def test_health_is_that_of_the_last_check():
    good = dict(monitor_luminance=0.0, monitor_motion=1.0, monitor_diversity=1.0)
    bad = good | dict(monitor_motion=0.1)
    assert health(metrics("high", 1, student_loss=1.0)).mark == "unknown"
    assert health([*metrics("high", 1, **bad), *metrics("high", 2, **good)]).mark == "good"
    last = health([*metrics("high", 1, **good), *metrics("high", 2, **bad)])
    assert last.mark == "bad" and "freezes" in last.words


# ------------------------------------------------------------------------------------------- charts


def test_a_chart_draws_one_expert_after_the_other():
    lines = metrics("high", 50, 100, loss=2.0) + metrics("low", 100, loss=1.0)
    high, low = chart("loss", lines).curves
    left, right = (44.0, WIDTH - 6.0)
    middle = (left + right) / 2
    assert high.start == left and low.start == middle
    assert high.points == f"{(left + middle) / 2},8.0 {middle},8.0"
    assert low.points == f"{right},{HEIGHT - 18.0}"


def test_a_chart_of_a_constant_lies_within_the_picture():
    (curve,) = chart("loss", metrics("high", 1, 2, loss=3.0)).curves
    assert [point.split(",")[1] for point in curve.points.split()] == [f"{HEIGHT - 18.0}"] * 2


@pytest.mark.parametrize("high, low", [(600, 600), (12000, 5)])
def test_no_word_of_a_chart_is_cut(make_page, tmp_path, high, low):
    lines = metrics("high", high, loss=-1.234e-05) + metrics("low", low, loss=1.0)
    write_metrics(RunFolder(tmp_path), lines)
    texts = Texts(make_page()).texts
    assert {words for _, words in texts} >= {f"{high + low} updates", "high", "low", "-1.23e-05"}
    for attributes, words in texts:
        x, width = float(attributes["x"]), CHARACTER * len(words)
        begin = x - width if attributes.get("text-anchor") == "end" else x
        assert begin >= 0 and begin + width <= WIDTH, words


def test_the_curves_of_a_second_stage_go_on_where_the_first_ended(tmp_path):
    folder = RunFolder(tmp_path)
    for place, steps in ((folder.stage("trajectory"), (10, 20)), (folder, (7, 14))):
        place.path.mkdir(exist_ok=True)
        lines = [
            dict(expert="high", step=n, student_updates=n // 2, student_loss=0.1) for n in steps
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        place.metrics.write_text(text, encoding="utf-8")
    found = lines_of_job(folder)
    assert [line["step"] for line in found] == [10, 20, 27, 34]
    assert [line["student_updates"] for line in found] == [5, 10, 13, 17]
