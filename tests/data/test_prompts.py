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
        ("P.JSONL", '{"Caption": "a cat jumps"}\r\n"a dog, running"\r\n'),
        ("p.ndjson", '"a cat jumps"\n"a dog, running"'),
        ("p.jsonlines", json.dumps(TWO, indent=1)),  # one value, not one per line
        ("lines.json", '{"text": "a cat jumps"}\n{"text": "a dog, running"}\n'),
        ("P.CSV", "sep=;\r\nfile;Caption \r\n1.mp4;a cat jumps\r\n2.mp4;a dog, running\r\n"),
        ("semicolons.csv", '"file";"caption"\n1;a cat jumps\n2;"a dog, running"\n'),
        ("p.tsv", "file\ttext\n1.mp4\ta cat jumps\n2.mp4\ta dog, running\n"),
        ("one.csv", "caption\na cat jumps\na dog, running\n"),
        ("two.csv", 'caption,prompt\n,a cat jumps\n"a dog, running",\n'),
        ("prompts", "a cat jumps\na dog, running"),
        ("mac.TXT", "a cat jumps\ra dog, running\r"),
    ],
)
def test_every_layout_gives_the_same_prompts(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == TWO


def test_a_folder_holds_one_prompt_per_file(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\njumps\n")
    (tmp_path / "b.txt").write_text("a dog, running")
    assert read_prompts(tmp_path) == TWO


def test_a_folder_is_read_whatever_else_lies_in_it(tmp_path):
    said = []
    (tmp_path / "a.TXT").write_text("#1 fan --w 832 stays as it is")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("a cat\njumps")
    (tmp_path / "._a.txt").write_bytes(b"\0\5\26\7")  # what macOS leaves
    (tmp_path / "a.mp4").write_bytes(b"\0")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text("a dog")
    assert read_prompts(tmp_path, said.append) == ["#1 fan --w 832 stays as it is", "a cat jumps"]
    assert sorted(line.split(": ", 1)[1].split(" (")[0] for line in said) == [
        "1 empty captions left out",
        "1 files in subfolders left out",
        "1 files of several lines, each one prompt",
    ]


def test_comments_and_options_belong_to_text_files_alone(tmp_path):
    said = []
    prompts = ["#1 fan", "a cat --w 832", "a\u2028b\x0cc\x85d\x1ce"]
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    assert read_prompts(tmp_path / "p.json", said.append) == prompts and not said
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt", said.append) == ["a cat", prompts[2]]
    assert [line.split(": ", 1)[1].split(" (")[0] for line in said] == [
        "1 comment lines left out",
        "1 prompts cut where musubi-tuner's options begin",
    ]


@pytest.mark.parametrize(
    "option",
    [
        *("w 832", "h 480", "f 81", "d 1", "s 20", "g 5.0", "fs -5.0", "l 6", "n ugly", "i a.jpg"),
        *("ei b.jpg", "cn c.mp4", "ci d.jpg", "of target_index=1", "W 832", "FS 3"),
    ],
)
def test_each_option_of_musubi_ends_a_prompt(tmp_path, option):
    (tmp_path / "p.txt").write_text(f"a cat jumps --{option} --other\na dog --width of a hand")
    assert read_prompts(tmp_path / "p.txt") == ["a cat jumps", "a dog --width of a hand"]


def test_of_many_remarks_some_are_made_and_all_counted(tmp_path):
    said = []
    file = tmp_path / "p.txt"
    file.write_text("a cat\n" * 1000)
    assert read_prompts(file, said.append) == ["a cat"]
    assert len(said) == 21
    assert said[-1] == f"--prompts {file}: 999 duplicates, of which 20 are named"


def test_a_caption_of_any_length_is_read(tmp_path):
    long = "word " * 100_000
    (tmp_path / "p.csv").write_text(f"caption\n{long}\na cat\n")
    assert read_prompts(tmp_path / "p.csv") == [long.strip(), "a cat"]


def test_characters_that_another_program_lost_are_counted(tmp_path):
    said = []
    (tmp_path / "p.txt").write_text("a caf\ufffd\na cat", encoding="utf-8")
    assert len(read_prompts(tmp_path / "p.txt", said.append)) == 2
    assert "1 prompts with \ufffd" in said[0] and "p.txt:1" in said[0]


def test_a_dash_inside_a_prompt_is_kept(tmp_path):
    (tmp_path / "p.txt").write_text("a cat -- and then --wonder-- a dog")
    assert read_prompts(tmp_path / "p.txt") == ["a cat -- and then --wonder-- a dog"]


def test_duplicates_and_long_prompts_are_named_by_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat\n\na cat\n" + "word " * 400)
    said = []

    def too_long(prompt: str) -> str:
        return "400 words" if len(prompt) > 20 else ""

    assert len(read_prompts(file, said.append, too_long)) == 2
    assert said[0].startswith(f"--prompts {file}:3: the same prompt as {file}:1")
    assert said[1].startswith(f"--prompts {file}:4: 400 words") and len(said) == 2


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("p.json", b"{", "p.json:1: malformed"),
        ("p.json", b'[\n"a",\n"b"\n', "p.json:4: malformed"),
        ("p.json", b'{"rows": 1}', "must be a list"),
        ("p.json", b'["a", {"caption": 1}]', "record 2: none of"),
        ("p.json", b"[" * 100_000, "nested too deeply"),
        ("p.jsonl", b'{"a": 1}\n{"a": 1}', "p.jsonl:1: none of"),
        ("p.jsonl", b'{"a": 1}', "record 1: none of"),
        ("p.jsonl", b'"a"\n\n{"caption": "b', "p.jsonl:3: malformed"),
        ("p.jsonl", b'"a"\n{"caption": "a cat smiles \\ud83d"}', r"p.jsonl:2: holds '.ud83d'"),
        ("p.jsonl", b'"a"\n"b\\u0000"', "p.jsonl:2: holds"),
        ("p.csv", b"file\nx\n", "p.csv:1: the header names none of"),
        ("p.csv", b"file,caption\n1,a cat\n2,a dog, running\n", "p.csv:3: 3 fields"),
        ("p.csv", b"file,caption\n1\n", "p.csv:2: 1 fields"),
        ("p.csv", b'caption\na cat\n"a dog\nan owl\n', "p.csv:3: malformed"),
        ("p.tsv", b'caption\n"a" cat\n', "p.tsv:2: malformed"),
        ("p.txt", b"a cat\n\xe9t\xe9", "p.txt:2: not UTF-8"),
        ("p.txt", "a cat\n\n".encode("utf-16") + b"\0\xd8a\0", "p.txt:3: not UTF-16"),
        ("p.txt", b"a\0b", "binary"),
        ("p.txt", "a cat".encode("utf-16-le"), "binary"),
        ("p.txt", rb"{\rtf1\ansi a cat}", "binary"),
        ("p.txt", b"# only a comment", "no prompt"),
        ("p.txt", b"\xff\xfe", "no prompt"),
        ("p.txt", b'{"caption": "a cat"}\n{"caption": "a dog"}\n', "rename it to p.jsonl"),
        ("p.txt", b'[\n"a cat"\n]', "rename it to p.json"),
        ("p.txt", b"file,caption\n1.mp4,a cat", "rename it to p.csv"),
        ("p.txt", b"file\tcaption\n1.mp4\ta cat", "rename it to p.tsv"),
        ("p.yaml", b"- a cat jumps\n", ".yaml is no format that is read"),
        ("p.txt.bak", b"a cat\n", ".bak is no format that is read"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=reason) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["p.txt", "p.parquet", "p.yaml", "a/b/p", "p"])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"no such file|cannot be read \(No such file"):
        read_prompts(tmp_path / name)


def test_the_built_in_prompts_are_many_and_distinct():
    said = []
    prompts = read_prompts(BUILT_IN_PROMPTS, said.append)
    assert len(prompts) >= 500
    (line,) = said
    assert "comment lines left out" in line
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


def test_columns_and_saved_data_sets_are_read_by_the_package(monkeypatch, tmp_path):
    class Rows(list):
        column_names = ("video", "Caption")

        def select_columns(self, names):  # videos are not decoded
            return [{name: row[name] for name in names} for row in self]

    rows = Rows([{"video": object(), "Caption": "a red ball"}, {"video": 1, "Caption": None}])

    def load_dataset(kind, data_files, split):
        assert (kind, data_files, split) == ("parquet", str(tmp_path / "p.PARQUET"), "train")
        return rows

    package = types.SimpleNamespace(
        load_dataset=load_dataset, load_from_disk=lambda folder: {"train": rows, "test": []}
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    said = []
    (tmp_path / "p.PARQUET").write_bytes(b"PAR1")
    assert read_prompts(tmp_path / "p.PARQUET", said.append) == ["a red ball"]
    assert "1 empty captions left out" in said[0] and "[1]" in said[0]
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert read_prompts(tmp_path) == ["a red ball"]


@pytest.mark.parametrize("name", ["p.txt", "p.json", "p.jsonl", "p.csv", "p.parquet", "p"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "is a pointer of Git LFS"),
        (b"\n<!DOCTYPE html>\n<html>401</html>\n", "is a web page and not the file"),
        (b"<HTML><body></body></HTML>", "is a web page and not the file"),
    ],
)
def test_what_only_has_the_name_of_a_prompt_file_is_refused(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        read_prompts(tmp_path / name)


def test_nothing_of_a_folder_or_a_line_is_lost_without_a_word(tmp_path):
    said = []
    file = tmp_path / "p.txt"
    file.write_text(
        "a <b>cat</b>\n\u200b\n\ufeff\u2060\na dog --w=832\na fox -- running\n", "utf-8"
    )
    assert read_prompts(file, said.append) == ["a <b>cat</b>", "a dog --w=832", "a fox -- running"]
    assert f"2 empty captions left out (the first: {file}:2)" in said[0]
    assert (
        f"1 prompts with what looks like an option, kept in the text (the first: {file}:4)"
        in (said[1])
    )
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"gone\.txt: cannot be read"):
        read_prompts(tmp_path)
    with pytest.raises(UsageError, match="check the name; prompts stand in a file"):
        read_prompts("a red ball rolling")
    for name in ("a" * 300, "a" * 300 + ".parquet"):
        with pytest.raises(UsageError, match=r"cannot be read|there is no such file"):
            read_prompts(name)


# ------------------------------------------------------------------------------------------- split

HELD_OUT = ["prompt 10", "prompt 12"]  # their hashes are multiples of ten


def split(teacher, file, prompts: list[str] | None = None) -> tuple[list[str], list[str]]:
    """The split of `prompts`, written to `file`; without them, of the package's own."""
    if prompts is not None:
        file.write_text("\n".join(prompts), encoding="utf-8")
    prompts_file = str(file) if prompts is not None else None
    config = Config(teacher_path=str(teacher), prompts=prompts_file, max_sequence_length=512)
    training, evaluation = split_prompts(config, read_teacher(config))
    assert training and evaluation and not set(training) & set(evaluation)
    return training, evaluation


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("left " * 15, ""),  # 15 tokens and the end mark
        ("left " * 16, "17 tokens; Wan sees the first 16 (--max_sequence_length)"),
        ("镜头缓缓推进，" * 3, "tokens; Wan sees the first 16"),  # no spaces
        ("กล้องเคลื่อนที่ช้าๆ", "tokens; Wan sees the first 16"),
    ],
)
def test_prompts_are_counted_in_tokens_whatever_their_script(prompt, says, capsys, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text(f"red\nblue\n{prompt}\ngreen\n", encoding="utf-8")
    config = Config(prompts=str(file), max_sequence_length=16)
    split_prompts(config, read_teacher(config))
    said = capsys.readouterr().err
    assert said.startswith(f"--prompts {file}:3: ") and says in said if says else not said


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


@pytest.mark.parametrize(("count", "said"), [(2, True), (3, True), (4, False)])
def test_where_there_are_hardly_any_it_is_said_that_one_is_held_out(
    count, said, random_teacher, tmp_path, capsys
):
    split(random_teacher, tmp_path / "p.txt", ["a cat", "a dog", "a fox", "a hen"][:count])
    words = f"{count} prompts only, and 1 kept to measure the student; give more"
    assert (words in capsys.readouterr().err) == said


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
