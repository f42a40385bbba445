"""Prompts of every usual layout, and their split into training and evaluation."""

from __future__ import annotations

import hashlib
import json
import sys
import types

import pytest

from wan_distill.data.prompts import BUILT_IN_PROMPTS, read_prompts, split_prompts
from wan_distill.errors import UsageError
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher

TWO = ["a cat jumps", "a dog, running"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "# animals\na cat jumps\n\na dog, running\n"),
        ("musubi.txt", "a cat jumps --w 832 --h 480 --f 81\r\n# note\r\na dog, running --d 1\r\n"),
        ("bom.txt", "\ufeffa cat jumps\na dog, running"),
        ("p.jsonl", '{"caption": "a cat jumps"}\n\n{"text": "a dog, running"}\n'),
        ("list.json", json.dumps(TWO)),
        ("texts.json", json.dumps([{"text": p} for p in TWO])),
        ("data.json", json.dumps({"data": [{"caption": p, "path": "x.mp4"} for p in TWO]})),
        ("p.csv", 'file,prompt\n1.mp4,a cat jumps\n2.mp4,"a dog, running"\n'),
    ],
)
def test_every_layout_gives_the_same_prompts(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == TWO


def test_a_folder_holds_one_prompt_per_file(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\njumps\n")
    (tmp_path / "b.txt").write_text("a dog, running")
    assert read_prompts(tmp_path) == TWO


def test_a_dash_inside_a_prompt_is_kept(tmp_path):
    (tmp_path / "p.txt").write_text("a cat -- and then --wonder-- a dog")
    assert read_prompts(tmp_path / "p.txt") == ["a cat -- and then --wonder-- a dog"]


def test_duplicates_and_long_prompts_are_named_by_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat\n\na cat\n" + "word " * 400)
    said = []
    assert len(read_prompts(file, said.append)) == 2
    assert said[0].startswith(f"--prompts {file}:3: the same prompt as {file}:1")
    assert said[1].startswith(f"--prompts {file}:4: 400 words") and len(said) == 2


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("p.json", b"{", "malformed"),
        ("p.json", b'{"rows": 1}', "must be a list"),
        ("p.jsonl", b'{"a": 1}', "p.jsonl:1"),
        ("p.csv", b"file\nx\n", "p.csv:2"),
        ("p.txt", b"\xff\xfe", "UTF-8"),
        ("p.txt", b"a\0b", "binary"),
        ("p.txt", b"# only a comment", "no prompt"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=reason) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_built_in_prompts_are_many_and_distinct():
    said = []
    prompts = read_prompts(BUILT_IN_PROMPTS, said.append)
    assert len(prompts) >= 500 and not said
    assert all(8 <= len(p.split()) <= 60 for p in prompts)
    assert len({p.split(" ", 3)[-1] for p in prompts}) == len(prompts)


def test_a_dataset_of_the_hub_where_the_package_is_present_and_where_it_is_not(monkeypatch):
    def load_dataset(name, split):
        if name != "some/captions":
            raise FileNotFoundError(f"no dataset {name}")
        return [{"image": 1, "text": "a red ball"}, {"image": 2, "text": "a blue box"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("some/captions") == ["a red ball", "a blue box"]
    with pytest.raises(UsageError, match="neither a file nor a dataset"):
        read_prompts("other/captions")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        read_prompts("some/captions")


# ------------------------------------------------------------------------------------------- split

HELD_OUT = ["prompt 10", "prompt 12"]  # their hashes are multiples of ten


def split(teacher, file, prompts: list[str] | None = None) -> tuple[list[str], list[str]]:
    """The split of `prompts`, written to `file`; without them, of the package's own."""
    if prompts is not None:
        file.write_text("\n".join(prompts), encoding="utf-8")
    config = Config(teacher_path=str(teacher), prompts=str(file) if prompts is not None else None)
    training, evaluation = split_prompts(config, read_teacher(config))
    assert training and evaluation and not set(training) & set(evaluation)
    return training, evaluation


def test_the_embedded_teacher_brings_both_sides():
    training, evaluation = split(EMBEDDED_TEACHER, None)
    assert training == read_prompts(EMBEDDED_TEACHER / "prompts.txt")
    assert evaluation == read_prompts(EMBEDDED_TEACHER / "heldout_prompts.txt")


def test_a_tenth_of_the_built_in_prompts_is_held_out(random_teacher):
    training, evaluation = split(random_teacher, None)
    assert sorted(training + evaluation) == sorted(read_prompts(BUILT_IN_PROMPTS))
    assert 0.07 < len(evaluation) / len(training + evaluation) < 0.13


@pytest.mark.parametrize("count", [2, 3, 10, 100])
def test_a_list_is_split_and_keeps_its_order(count, random_teacher, tmp_path):
    prompts = [f"prompt {i}" for i in range(count)]
    training, evaluation = split(random_teacher, tmp_path / "p.txt", prompts)
    assert [p for p in prompts if p in training] == training
    assert sorted(training + evaluation) == sorted(prompts)
    backwards = split(random_teacher, tmp_path / "p.txt", prompts[::-1])
    assert (set(training), set(evaluation)) == tuple(map(set, backwards))


def test_a_prompt_stays_on_its_side_when_others_are_added(random_teacher, tmp_path):
    prompts = [f"prompt {i}" for i in range(200)]
    few = split(random_teacher, tmp_path / "p.txt", prompts[:100])
    many = split(random_teacher, tmp_path / "p.txt", prompts)
    assert set(few[0]) <= set(many[0]) and set(few[1]) <= set(many[1])


def test_where_the_hashes_put_all_on_one_side_one_is_moved(random_teacher, tmp_path):
    training, evaluation = split(random_teacher, tmp_path / "p.txt", ["prompt 0", "prompt 1"])
    assert len(training) == len(evaluation) == 1
    for prompt in HELD_OUT:
        assert int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10 == 0
    training, evaluation = split(random_teacher, tmp_path / "p.txt", HELD_OUT)
    assert sorted(training + evaluation) == HELD_OUT and len(training) == 1


@pytest.mark.parametrize("embedded", [True, False])
def test_a_lone_prompt_is_trained_on_and_others_are_evaluated(
    embedded, random_teacher, tmp_path, capsys
):
    teacher = EMBEDDED_TEACHER if embedded else random_teacher
    file = EMBEDDED_TEACHER / "heldout_prompts.txt" if embedded else BUILT_IN_PROMPTS
    training, evaluation = split(teacher, tmp_path / "p.txt", ["a cat"])
    assert training == ["a cat"] and len(evaluation) >= 20
    assert set(evaluation) <= set(read_prompts(file))
    assert "one prompt only" in capsys.readouterr().err
    # Nor is it evaluated where it is one of those itself.
    assert split(teacher, tmp_path / "p.txt", evaluation[:1]) == (evaluation[:1], evaluation[1:])
