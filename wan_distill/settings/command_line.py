"""The command line and `--config` files, derived from the fields of `Config`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from pathlib import Path

from wan_distill.errors import UsageError, one_line
from wan_distill.settings.config import START, Config

EXAMPLES = """\
examples:
  python train_distillation.py                                  the whole job on the embedded tiny teacher
  python train_distillation.py --sampling_steps 2               the same, for a 2-step student
  python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --dry_run
  python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompts prompts.txt

exit codes: 0 done, 2 bad input (one line says what to change), 75 stopped by a signal, all saved (run again to go on),
1 anything else
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def _kind(annotation) -> type:
    """The scalar type of an annotation such as `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train_distillation.py",
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        epilog=EXAMPLES,
        description="Distil a Wan text-to-video teacher into a student that samples in a few steps without guidance.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=110
        ),
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = typing.get_type_hints(Config)
    for item in dataclasses.fields(Config):
        meta = item.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        kind, text = _kind(hints[item.name]), meta["help"]
        if item.default not in (None, False, ()) and kind is not bool and not meta["parse"]:
            text += f" (default {item.default})"
        options = dict(dest=item.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= dict(type=meta["parse"] or kind, choices=meta["choices"])
            if not meta["choices"]:
                options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        group.add_argument(f"--{item.name}", *meta["alias"], **options)
    groups[START].add_argument(
        "--config",
        metavar="FILE.yaml",
        default=None,
        help="read settings from a file; flags on the command line win",
    )
    return parser


def parse_args(argv: list[str]) -> Config:
    """Command line -> Config. Raises UsageError naming the flag, the value and the remedy."""
    parser = build_parser()
    if empty := [
        given for given in argv if given.endswith("=--")
    ]:  # argparse would take it for a list
        raise UsageError(f"{empty[0]}: '--' is no value; leave the flag out")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(
            _unknown(unknown[0], [o for a in parser._actions for o in a.option_strings])
        )
    settings = vars(known)
    file = settings.pop("config", None)
    return Config(**{**(_read_yaml(file) if file else {}), **settings})


def _unknown(given: str, flags: list[str]) -> str:
    name = given.split("=")[0]
    close = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), flags, n=1)
    hint = f"did you mean {close[0]}?" if close else "see --help"
    return f"{name}: there is no such flag; {hint}"


def _read_yaml(file: str) -> dict:
    """Settings of a flat YAML file, checked by the same parser as the flags."""
    import yaml

    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"--config {file}: cannot be read ({one_line(error)}); give a YAML file"
        ) from error
    if not isinstance(settings, dict):
        raise UsageError(f"--config {file}: must hold 'flag: value' lines")
    argv = []
    for name, value in settings.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            argv.append(f"--{name}={text}")
    known, unknown = build_parser().parse_known_args(argv)
    if unknown:
        flags = [f"--{item.name}" for item in dataclasses.fields(Config)]
        raise UsageError(f"--config {file}: {_unknown(unknown[0], flags)}")
    return {k: v for k, v in vars(known).items() if k != "config"}
