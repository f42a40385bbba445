"""What a run writes down for its next start and for its page: JSON that notices its own damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from wan_distill.errors import UsageError, one_line
from wan_distill.settings.reading import parse_json
from wan_distill.system.files import write_atomically

CHECKSUM = "checksum"  # of all the rest; records of older versions have none


def write_record(file: Path, content: dict[str, Any]) -> None:
    """Writes `content` and its checksum to `file`, all or nothing. Raises OSError."""
    text = json.dumps(content | {CHECKSUM: _checksum(content)}, indent=1, ensure_ascii=False)
    write_atomically(file, text.encode())


def read_record(file: Path, remedy: str) -> dict[str, Any]:
    """What `write_record` wrote; nothing where there is no such file.

    Raises UsageError where it says something else now.

    Args:
        remedy: what the user can do then, and what follows from that.
    """
    if not file.exists():
        return {}
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        checksum = content.pop(CHECKSUM, None)
        if checksum not in (None, _checksum(content)):
            raise ValueError("it is not what was written")
    except ValueError as error:
        raise UsageError(f"{file}: is damaged ({one_line(error)}); {remedy}") from error
    return content


def _checksum(content: dict[str, Any]) -> str:
    """32 hexadecimal digits of what a reader of `content` as JSON would get."""
    as_read = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()[:32]
