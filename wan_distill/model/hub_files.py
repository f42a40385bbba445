"""Which files of a hub repository a teacher is loaded from, known before anything is downloaded."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi

from wan_distill.errors import UsageError
from wan_distill.model.part_files import files_of, parts_of
from wan_distill.settings.assets import is_offline
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo

WEIGHTS = (".safetensors", ".bin")


@lru_cache(maxsize=4)
def listed(source: str, commit: str) -> tuple[str, ...]:
    """The names of all files of a hub repository; none where the hub does not tell them."""
    if is_offline():
        return ()
    try:
        return tuple(HfApi().list_repo_files(source, revision=commit))
    except Exception:  # libraries differ in what a failing network raises; downloads will name it
        return ()


@contextmanager
def outline(info: TeacherInfo) -> Iterator[TeacherInfo | None]:
    """The teacher with a folder of empty files under the names of its repository's, and the JSON
    files that are on this machine: who chooses files by their names chooses as among real ones.

    None where the names are not known. A UsageError names the repository, not that folder.
    """
    names = listed(info.source, info.commit)
    if info.is_local or not names:
        yield None
        return
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            file = Path(place, name)
            if file.suffix in (".json", *WEIGHTS) and len(Path(name).parts) == 2:
                file.parent.mkdir(exist_ok=True)
                if (info.folder / name).is_file():
                    shutil.copyfile(info.folder / name, file)
                elif file.suffix != ".json":
                    file.touch()
        try:
            yield dataclasses.replace(info, folder=Path(place))
        except UsageError as error:
            raise UsageError(str(error).replace(f"{place}/", "")) from error


def patterns_of(info: TeacherInfo, config: Config, part: str) -> list[str]:
    """What to download of a part: the files it is loaded from and its JSON files; everything where
    it has no weights, or the names of its files are not known.

    Raises UsageError where none can be loaded.
    """
    with outline(info) as shown:
        if shown is None or part not in parts_of(info):
            return [f"{part}/*"]
        files = files_of(shown, config, part)
    return [f"{part}/*.json", *(f"{part}/{file.name}" for file in files)]
