"""Previews are written when they are due, and take a small share of a run's time."""

from __future__ import annotations

import pytest

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.first_frames import PicturedPrompt
from wan_distill.data.run import Run
from wan_distill.model.loading import Teacher
from wan_distill.settings.description import read_teacher
from wan_distill.system.runtime import Runtime
from wan_distill.training import previews


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Its only entry is the time in seconds."""
    time = [0.0]
    monkeypatch.setattr(previews.time, "perf_counter", lambda: time[0])
    return time


@pytest.fixture
def make_previews(small_config, tmp_path):
    def make(**changes) -> previews.Previews:
        config = small_config(**changes)
        runtime = Runtime(config)
        teacher = Teacher(read_teacher(config), config, runtime)
        length = config.max_sequence_length
        embeddings = PromptEmbeddings(tmp_path / "prompts", {}, length, runtime.device)
        return previews.Previews(
            Run(config, teacher, embeddings, ("a cat",), runtime), "high", ["a dog"]
        )

    return make


def test_previews_are_due_at_the_start_in_between_and_at_the_end(make_previews, clock):
    shown = make_previews(validation_steps=10)
    clock[0] = 1.0
    assert [n for n in range(26) if shown.due(n, last=n == 25)] == [0, 10, 20, 25]
    assert not make_previews(validation_steps=0).due(0)


def test_previews_keep_to_their_share_of_the_run(make_previews, clock, capsys):
    shown = make_previews(validation_steps=10)
    shown.spent = 5.0
    clock[0] = 99.0
    assert not shown.due(10) and shown.due(0) and shown.due(100, last=True)
    assert not shown.due(20) and capsys.readouterr().out.count("was left out") == 1
    clock[0] = 101.0
    assert shown.due(10) and not shown.due(11)


def test_prompts_that_are_asked_for_are_given_pictures_where_a_teacher_takes_them(small_config):
    held_out = [PicturedPrompt("a", "first"), PicturedPrompt("b", "second")]
    asked = small_config(validation_prompt="one|two|three")
    expected = list(map(PicturedPrompt, ("one", "two", "three"), ("first", "second", "first")))
    assert previews.validation_prompts(asked, held_out) == expected
    assert previews.validation_prompts(small_config(), held_out) == held_out


def test_the_prompts_of_previews_are_those_asked_for(small_config):
    held_out = ["a", "b", "c", "d"]
    asked = small_config(validation_prompt=" a cat | a dog |")
    assert previews.validation_prompts(asked, held_out) == ["a cat", "a dog"]
    assert previews.validation_prompts(small_config(), held_out) == ["a", "b", "c"]


def test_clips_of_other_prompts_go(make_previews):
    """They would stand under the new prompts' texts, or under none."""
    shown = make_previews(validation_steps=10)
    folder = shown.run.folder
    folder.previews.mkdir(parents=True)
    files = [folder.preview(e, who, 1) for e in ("high", "low") for who in ("000000", "teacher")]
    for text, stay in (('["a dog"]', True), ('["a dog", "a cat"]', False)):
        for file in files:
            file.touch()
        folder.preview_prompts.write_text(text)
        shown.shown = set()
        shown.resume(0)
        assert [file.exists() for file in files] == [stay] * 4
        assert shown.shown == ({0} if stay else set())
    assert not folder.preview_prompts.exists()


@pytest.mark.parametrize("updates, left", [(200, {0, 200}), (0, {0}), (-1, set())])
def test_clips_of_updates_that_are_made_anew_go(make_previews, updates, left):
    """-1: a run from the start. The teacher's clips and other experts' stay."""
    shown = make_previews(validation_steps=10)
    folder = shown.run.folder
    folder.previews.mkdir(parents=True)
    files = [folder.preview("high", f"{n:06d}", 0) for n in (0, 200, 400)]
    others = [folder.preview("low", "000400", 0), folder.preview("high", "teacher", 0)]
    for file in [*files, *others]:
        file.touch()
    shown.resume(updates)
    assert shown.shown == left and all(file.exists() for file in others)
    assert {n for n, file in zip((0, 200, 400), files, strict=True) if file.exists()} == left
