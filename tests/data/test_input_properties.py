"""What must hold for any prompt file and any prompt, not just for the examples."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.prompts import MUSUBI_OPTION, read_prompts
from wan_distill.errors import UsageError

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
lines = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40)


@quick
@given(st.lists(lines, max_size=12), st.sampled_from([".txt", ".json", ".jsonl"]))
def test_prompts_come_back_once_each_and_in_order(tmp_path, written, suffix):
    file = tmp_path / f"prompts{suffix}"
    text = {
        ".txt": "\n".join(written),
        ".json": json.dumps(written),
        ".jsonl": "\n".join(json.dumps({"text": line}) for line in written),
    }[suffix]
    file.write_bytes(text.encode())
    cleaned = [
        MUSUBI_OPTION.split(
            line.strip().lstrip("\ufeff") if i == 0 and suffix == ".txt" else line.strip(),
            maxsplit=1,
        )[0].strip()
        for i, line in enumerate(written)
    ]
    expected = list(dict.fromkeys(line for line in cleaned if line and not line.startswith("#")))
    if not expected:
        with pytest.raises(UsageError, match="holds no prompt"):
            read_prompts(file)
    else:
        assert read_prompts(file) == expected


@quick
@given(st.binary(max_size=200), st.sampled_from([".txt", ".json", ".jsonl", ".csv"]))
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
