"""`--config` files: YAML as people write it, as arguments of the command line.

Values keep the letters they are written in, so that a flag reads the same from a file as from the
command line: plain YAML makes 8 of 010, 90 of 1:30, and False of `no`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from wan_distill.errors import UsageError, one_line
from wan_distill.settings.config import Config

YES = ("true", "yes", "on", "y")
NO = ("false", "no", "off", "n")
ALIASES = {
    alias.removeprefix("--"): item.name
    for item in dataclasses.fields(Config)
    for alias in item.metadata["alias"]
}
KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """Everything is text but null; a name that stands twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own name)
        first: [(tag, pattern) for tag, pattern in resolvers if tag in KEPT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            name = ALIASES.get(name, name)
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"{name} stands in lines {lines[name]} and {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


def load_yaml(file: str) -> dict[Any, Any]:
    """What a YAML file says, unchecked. Raises UsageError where it is no mapping."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
        settings = yaml.load(text, _Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        remedy = "give a YAML file" if isinstance(error, OSError) else "correct it there"
        if isinstance(error, UnicodeDecodeError):
            remedy = "save it as UTF-8"
        raise UsageError(f"--config {file}: cannot be read ({reason}); {remedy}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"--config {file}: must hold 'flag: value' lines of YAML")
    return settings


def as_arguments(
    settings: dict[Any, Any],
    switches: Collection[str],
    words_for_no: Collection[str],
    repeated: Collection[str] = (),
) -> list[str]:
    """The content of a file as it would stand on the command line; nothing for an empty value.

    Args:
        switches: settings that are on or off.
        words_for_no: settings of which `no` is a value.
        repeated: flags that may be given several times: once for each value of a list.

    Raises UsageError where a value is none.
    """
    arguments = []
    for key, value in settings.items():
        name = re.sub("^--", "", str(key))
        each = value if name in repeated and isinstance(value, list) else [value]
        for one in each:
            if one is not None:
                arguments.append(_argument(name, one, switches, words_for_no))
    return arguments


def _argument(
    name: str, value: Any, switches: Collection[str], words_for_no: Collection[str]
) -> str:
    if isinstance(value, list):
        if any(isinstance(item, (list, dict)) or item is None for item in value):
            raise UsageError(f"--{name}: holds more than a list of values; write them in one line")
        value = ("|" if name == "validation_prompt" else ",").join(value)
    if not isinstance(value, str):
        raise UsageError(f"--{name}: holds further names; all settings stand at the left margin")
    word = value.lower()
    if name in switches:
        if word not in YES + NO:
            raise UsageError(f"--{name}: {value!r} is neither true nor false; write one of them")
        return f"--{name}" if word in YES else f"--no-{name}"
    positive = re.sub("^no[-_]", "", name)
    if positive in switches and word in YES + NO:
        raise UsageError(f"--{name}: there is no such flag; write {positive}: false")
    if name in words_for_no and word in NO:
        value = "no"
    return f"--{name}={value}"
