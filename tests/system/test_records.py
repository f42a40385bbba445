"""What a run writes down for its next start."""

from __future__ import annotations

import random

import pytest

from wan_distill.errors import UsageError
from wan_distill.system.records import read_record, write_record

CONTENT = {"by_steps": {2: 0.5, 10: 1.5}, "words": ["é", None], "seconds": {"high": 0.25}}
REMEDY = "delete it, and all is well"


def test_what_is_written_comes_back(tmp_path):
    file = tmp_path / "record.json"
    assert read_record(file, REMEDY) == {}
    write_record(file, CONTENT)
    read = read_record(file, REMEDY)
    assert read == CONTENT | {"by_steps": {"2": 0.5, "10": 1.5}}
    file.write_text('{"seconds": {}}')  # of a version without checksums
    assert read_record(file, REMEDY) == {"seconds": {}}


@pytest.mark.parametrize("seed", range(20))
def test_damage_is_named(tmp_path, seed):
    """A byte that is another one, doubled or missing; the whole file, or its form."""
    file, rng = tmp_path / "record.json", random.Random(seed)
    write_record(file, CONTENT)
    whole = file.read_bytes()
    end = whole.rindex(b'"checksum"')
    place = rng.choice([i for i in range(end) if not whole[i : i + 1].isspace()])
    before, byte, after = whole[:place], whole[place], whole[place + 1 :]
    changed = [before + bytes(new) + after for new in ([byte ^ 1], [byte, byte], [])]
    for damaged in (*changed, before, b"[1, 2]", b"[" * 100_000):
        file.write_bytes(damaged)
        with pytest.raises(UsageError) as raised:
            read_record(file, REMEDY)
        assert str(file) in str(raised.value) and f"; {REMEDY}" in str(raised.value)
