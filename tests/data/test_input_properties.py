"""What must hold for any prompt file and any prompt, not just for the examples."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.prompt_text import is_blank
from wan_distill.data.prompts import read_prompts
from wan_distill.errors import UsageError

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
lines = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40)
# What one line of a text file can hold; and what a record can: line ends, quotes, marks, too.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=40)
captions = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
JSON_WRITERS = {
    "p.json": lambda rows, ascii: json.dumps(rows, ensure_ascii=ascii),
    "indented.json": lambda rows, ascii: json.dumps(rows, ensure_ascii=ascii, indent=2),
    "data.JSON": lambda rows, ascii: json.dumps({"data": rows}, ensure_ascii=ascii),
    "lines.json": lambda rows, ascii: json_lines(rows, ascii, "\n"),
    "p.jsonl": lambda rows, ascii: json_lines(rows, ascii, "\n"),
    "P.NDJSON": lambda rows, ascii: json_lines(rows, ascii, "\r\n"),
}


def json_lines(rows, ascii: bool, end: str) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii) + end for row in rows)


def check_prompts(file: Path, written: list[str]) -> None:
    """Fails unless `file` gives each of `written` that is not blank, once each and in order."""
    expected = list(dict.fromkeys(text.strip() for text in written if not is_blank(text)))
    if expected:
        assert read_prompts(file) == expected
    else:
        with pytest.raises(UsageError, match="holds no prompt"):
            read_prompts(file)


@quick
@given(
    st.lists(captions, min_size=1, max_size=12),
    st.sampled_from(sorted(JSON_WRITERS)),
    st.sampled_from(ENCODINGS),
    st.sampled_from(["caption", "Text", " prompt", ""]),
    st.booleans(),
)
def test_what_json_writes_comes_back(tmp_path, written, name, encoding, key, ascii):
    rows = [{"path": "1.mp4", key: text} if key else text for text in written]
    (tmp_path / name).write_bytes(JSON_WRITERS[name](rows, ascii).encode(encoding))
    check_prompts(tmp_path / name, written)


@quick
@given(
    st.lists(captions, max_size=12),
    st.sampled_from(["excel", "excel-tab", "unix"]),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(ENCODINGS),
    st.booleans(),
)
def test_what_csv_writes_comes_back(tmp_path, written, dialect, delimiter, encoding, alone):
    text = io.StringIO(newline="")
    tabs = dialect == "excel-tab"
    writer = csv.writer(text, dialect, **({} if tabs else {"delimiter": delimiter}))
    rows = [["caption"], *([text] for text in written)]
    writer.writerows(rows if alone else [["1.mp4", *row, 7] for row in [["caption"], *rows[1:]]])
    lines = text.getvalue()
    if not alone:
        lines = lines.replace("1.mp4", "file", 1).replace("7", "n", 1)
    file = tmp_path / ("p.tsv" if tabs else "p.csv")
    file.write_bytes(lines.encode(encoding))
    check_prompts(file, written)


@quick
@given(
    st.lists(texts, max_size=12),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(ENCODINGS),
    st.booleans(),
)
def test_what_an_editor_writes_comes_back(tmp_path, written, end, encoding, ended):
    written = [text.lstrip("\ufeff") for text in written]
    written = [text for text in written if not text.lstrip().startswith(("#", "{", "["))]
    written = [text for text in written if "--" not in text and "," not in text]
    file = tmp_path / "p.txt"
    file.write_bytes((end.join(written) + end * ended).encode(encoding))
    check_prompts(file, written)


@quick
@given(st.binary(max_size=200), st.sampled_from([".txt", ".json", ".jsonl", ".csv", ".tsv"]))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, data, suffix):
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(data)
    try:
        prompts = read_prompts(file)
    except UsageError as refused:
        assert "\n" not in str(refused) and str(file) in str(refused)
    else:
        assert (
            prompts
            and len(set(prompts)) == len(prompts)
            and all(p == p.strip() != "" for p in prompts)
        )


@quick
@given(st.tuples(lines, st.integers(2, 512), lines), st.tuples(lines, st.integers(2, 512), lines))
def test_an_embeddings_file_depends_on_encoder_length_and_prompt(tmp_path, a, b):
    def file(encoder, length, prompt):
        return PromptEmbeddings(
            tmp_path, dict(encoder=encoder, length=length), length, torch.device("cpu")
        ).file(prompt)

    assert file(*a) == file(*a) and file(*a).parent == tmp_path
    assume(a != b)
    assert file(*a) != file(*b)
