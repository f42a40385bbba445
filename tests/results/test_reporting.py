"""What a run shows while it works: what is planned and spent, and the live page."""

from __future__ import annotations

import dataclasses
import json
import re
import urllib.request

import pytest
from written_students import write_student

from wan_distill.errors import UsageError
from wan_distill.results import Reporting
from wan_distill.system import spent
from wan_distill.system.console import progress_bar, show_job
from wan_distill.system.job_clock import Leg
from wan_distill.system.spent import read_spent
from wan_distill.training.metrics import Metrics


def reporting_of(run, **changes) -> Reporting:
    config = dataclasses.replace(run.config, **changes)
    return Reporting((config,), run.info, run.runtime)


def test_the_live_page_follows_the_run(make_run, capsys):
    run = make_run(method="trajectory")
    reporting = reporting_of(run, serve=0)
    reporting.begin(prompts=3)
    address = re.search(r"Live page: (http://127\.0\.0\.1:\d+/)", capsys.readouterr().out)[1]

    def ask():
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.headers["ETag"], answer.read().decode()

    with reporting.part("solving samples"):
        tag, page = ask()
        assert "The run is at work: solving samples." in page and "data-live" in page
    with reporting.training(run.config, "high"):
        line = Metrics(run.folder.metrics, run.runtime).write(
            expert="high", step=1, student_updates=1, student_loss=1.0
        )
        reporting.line(line, run.config)
        later, page = ask()
        assert later != tag and "In training: high expert, 1 of 2 updates" in page
    reporting.finish(None)
    assert "data-live" not in ask()[1] and not run.folder.page.read_text().count("data-live")
    assert read_spent(run.folder.spent)["finished"] is not None


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(make_run, capsys):
    run = make_run(method="trajectory")
    first = reporting_of(run, serve=0)
    first.begin(prompts=3)
    port = int(re.search(r"127\.0\.0\.1:(\d+)/", capsys.readouterr().out)[1])
    with pytest.raises(UsageError, match=f"--serve {port}: cannot listen there"):
        reporting_of(run, serve=port).begin(prompts=3)


@pytest.mark.parametrize("name", ["evaluation.json", "previews/prompts.json"])
def test_damaged_records_are_refused_before_anything_is_loaded(make_run, name):
    run = make_run(method="trajectory")
    write_student(run, "high", "low")
    file = run.folder.path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b'{"samples": 5')
    if file.parent == run.folder.previews:  # whose clips they belong to
        run.folder.metrics.write_text('{"expert": "high", "step": 1, "student_updates": 1}\n')
        run.folder.preview("high", "000001", 0).write_bytes(b"clip")
    with pytest.raises(UsageError, match=f"{name}: is damaged"):
        reporting_of(run).begin(prompts=3)


def test_the_plan_is_kept_as_numbers_and_an_evaluation_does_not_change_it(make_run):
    run = make_run(method="trajectory")
    reporting_of(run).begin(prompts=3)
    numbers = json.loads(run.folder.plan_numbers.read_text(encoding="utf-8"))
    assert numbers["stages"][0]["rank"] == run.config.rank and numbers["cards"] == {}
    assert "high expert" in numbers["seconds_by_stage"] and numbers["peak_bytes"] > 0
    reporting_of(run, rank=32, evaluate_only=True).begin(prompts=3)
    assert json.loads(run.folder.plan_numbers.read_text(encoding="utf-8")) == numbers


def test_time_is_counted_while_samples_are_solved(make_run, monkeypatch):
    """Of large teachers that takes many hours, which a kill must not lose."""
    monkeypatch.setattr(spent, "SAVED_EVERY", 0.0)
    run = make_run(method="trajectory")
    with show_job([Leg("solve", 60.0)]):
        reporting = reporting_of(run)
        with reporting.part("solving samples"):
            with progress_bar(4, "sample", "sample", shown=False) as bar:
                bar.update()
            assert read_spent(run.folder.spent)["seconds"]["solving samples"] > 0


def test_time_is_counted_under_the_names_of_the_plan(make_run):
    run = make_run()
    first = dataclasses.replace(run.config, method="trajectory")
    reporting = Reporting((first, run.config), run.info, run.runtime)
    with reporting.training(first, "high"), reporting.checks():
        pass
    seconds = read_spent(run.folder.spent)["seconds"]
    assert set(seconds) == {"high expert, trajectory", "checks and previews"}
