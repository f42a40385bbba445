"""argparse that refuses bad input in one line: value, reason, remedy."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from wan_distill.errors import UsageError, one_line
from wan_distill.settings.other_names import unknown_flag


class OneLineParser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and exit. Flags are not abbreviated.

    Args:
        other_names: other programs' names of flags -> what to write here.
    """

    def __init__(self, other_names: Mapping[str, str] | None = None, **options: Any):
        super().__init__(**options, allow_abbrev=False, exit_on_error=False)
        self.other_names = other_names or {}

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's, with a hint where a flag does not exist."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UsageError(unknown_flag(unknown[0], flags, self.other_names))
        return known

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = sys.argv[1:] if args is None else list(args)
        for one in given:
            if one.startswith("--") and one.endswith("=--"):  # argparse makes an empty list of it
                raise UsageError(f"{one}: '--' is no value; give one, or leave the flag out")
        try:
            return super().parse_known_args(given, namespace)
        except argparse.ArgumentError as error:
            raise UsageError(self._miscounted(error, given)) from error

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Of a flag, from its text."""
        kind: Any = action.type or str
        try:
            return kind(arg_string)
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            reason = _no_value_of(kind, arg_string, error)
            raise UsageError(f"{_with_value(action, arg_string)}: {reason}") from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = list(map(str, action.choices))
        close = difflib.get_close_matches(str(value), choices, n=1)
        remedy = f"did you mean {close[0]}?" if close else "give one of them"
        words = f"is none of {', '.join(choices)}; {remedy}"
        raise UsageError(f"{_with_value(action, str(value))}: {words}")

    def _miscounted(self, error: argparse.ArgumentError, given: Sequence[str]) -> str:
        """The line about a flag with too few values, or with one where it takes none."""
        action = next((a for a in self._actions if _name(a) == error.argument_name), None)
        if action is None:
            return one_line(error)
        if action.nargs == 0:
            own = [one for one in given if one.partition("=")[0] in action.option_strings]
            typed = next((one for one in own if "=" in one), _name(action))
            return f"{_shown(typed)}: takes no value; write {typed.partition('=')[0]} alone"
        if isinstance(action.nargs, int):
            return f"{_name(action)}: needs {action.nargs} values: {' '.join(action.metavar or ())}"
        places = [i for i, one in enumerate(given) if one in action.option_strings]
        after = next((given[i + 1] for i in places if i + 1 < len(given)), "")
        dashed = len(after) > 1 and after.partition("=")[0] not in self._option_string_actions
        hint = f" (one that begins with a dash as {action.option_strings[0]}={_shown(after)})"
        what = f"one of {', '.join(map(str, action.choices))}" if action.choices else "one"
        return f"{_name(action)}: has no value; give {what}{hint if dashed else ''}"


def _name(action: argparse.Action) -> str:
    """A flag with its other names."""
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


def _with_value(action: argparse.Action, value: str) -> str:
    """A flag and its value, as it was typed."""
    return f"{_name(action)} {_shown(value)}" if value.strip() else _name(action)


def _shown(text: str) -> str:
    """A text that is printed in one line."""
    return text if text.isprintable() else ascii(text)


def _no_value_of(kind: Any, given: str, error: Exception) -> str:
    """Why a text is no value, and what would be."""
    if isinstance(error, argparse.ArgumentTypeError):
        return str(error)
    number = next(filter(None, map(_number, (given, given.replace(",", ".", 1)))), None)
    if kind is int:
        if number is not None and number.is_integer() and abs(number) < 1e15:
            return f"is no whole number as it stands; write {number:.0f}"
        return "is no whole number; write one in digits"
    if kind is float:
        return f"is no number; write {number:g}" if number else "is no number; give one such as 0.5"
    return one_line(error)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
