"""Samples that an earlier run has solved, and that a new one takes over."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from wan_distill.errors import FileError
from wan_distill.layout import RunFolder
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.reading import read_json
from wan_distill.settings.sample_specs import SampleSpec, sampling_key


def solved_before(
    stages: Sequence[Config], info: TeacherInfo, spec: SampleSpec, rows: Collection[int]
) -> int:
    """How many of the teacher's samples `rows` of a set are there: with all that is known before
    prompts are encoded, so that other prompts pass for the same.
    """
    notes = list(_notes(stages, spec))
    if not notes:  # the teacher's weights may not be there yet
        return 0
    config, found = stages[0], 0
    known = spec.key() | dict(seed=config.seed)
    known |= sampling_key(config, info, spec.sigmas, guided=True)
    known = json.loads(json.dumps(known))
    for note in notes:
        try:
            key = read_json(note)
        except FileError:  # it is not taken over, then
            continue
        if all(key.get(name) == value for name, value in known.items()):
            there = [row for row in rows if (note.parent / f"{row:06d}.safetensors").exists()]
            found = max(found, len(there))
    return found


def _notes(stages: Sequence[Config], spec: SampleSpec) -> Iterator[Path]:
    """key.json of every set of its kind in the folders that are looked at. A job that goes on is
    planned as it was: what lies in `--samples_dir` may be its own.
    """
    first, last = stages[0], stages[-1]
    folders = [first.init_student_from]
    own = Path(last.output_dir)
    if not any(RunFolder(job).plan_numbers.exists() for job in (own, own.parent)):
        folders.append(last.samples_dir)
    for folder in filter(None, folders):
        yield from RunFolder(Path(folder)).samples(spec.kind).glob("*/key.json")
