"""The command line and `--config` files, derived from the fields of `Config`."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

from wan_distill.errors import UsageError
from wan_distill.settings.config import Config
from wan_distill.settings.flags import START, path, paths, text
from wan_distill.settings.job import STAGES
from wan_distill.settings.one_line_parser import OneLineParser
from wan_distill.settings.other_names import TRAINING, command_name
from wan_distill.settings.recipes import RECIPES
from wan_distill.settings.yaml_file import YES, as_arguments, load_yaml

DESCRIPTION = (
    "Distil a Wan teacher, text to video or image to video, into a student that samples in a few "
    "steps without guidance."
)
A14B = "--teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers"
I2V_A14B = A14B.replace("T2V", "I2V")
EXAMPLES = f"""\
examples:
  {{0}}                        distil the embedded tiny teacher
  {{0}} --sampling_steps 2     the same, into a 2-step student
  {{0}} {A14B} --dry_run
  {{0}} {A14B} --prompts prompts.txt
  {{0}} {I2V_A14B} --images pictures

exit codes:
  0   done
  1   anything else
  2   bad input: one line says what to change
  75  stopped by a signal, everything saved: run the same command to go on
  130 stopped by Ctrl-C before anything was begun
"""


def _scalar_type(annotation: Any) -> type:
    """The type without None in an annotation such as `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


TYPES = {name: _scalar_type(hint) for name, hint in typing.get_type_hints(Config).items()}
SWITCHES = {name for name, kind in TYPES.items() if kind is bool}
REPEATED = {f.name for f in dataclasses.fields(Config) if f.metadata["repeated"]}
MAY_BE_EMPTY = ("negative_prompt",)
WORDS_FOR_NO = {
    item.name for item in dataclasses.fields(Config) if "no" in (item.metadata["choices"] or ())
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all flags. Settings that are not given are left out of its result."""
    name = command_name("train_distillation.py", "wan-distill")
    parser = OneLineParser(
        prog=name,
        other_names=TRAINING,
        usage="%(prog)s [flags]",
        epilog=EXAMPLES.format(f"python {name}" if name.endswith(".py") else name),
        description=DESCRIPTION,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=110
        ),
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(Config):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options = _options(field, TYPES[field.name])
        groups[title].add_argument(f"--{field.name}", *field.metadata["alias"], **options)
    groups[START].add_argument(
        "--config",
        metavar="FILE.yaml",
        action="append",
        default=[],
        help="read settings from a file; flags on the command line win, and of several files the "
        "last",
    )
    return parser


def _options(field: dataclasses.Field, kind: type) -> dict[str, Any]:
    """The arguments of `add_argument` for one setting, whose values are of type `kind`."""
    about = field.metadata["help"]
    options: dict[str, Any] = dict(dest=field.name, default=argparse.SUPPRESS)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        parse = field.metadata["parse"]
        choices = (*RECIPES, *STAGES) if field.name == "method" else field.metadata["choices"]
        plain = text if kind is str and not choices and field.name not in MAY_BE_EMPTY else kind
        options |= dict(type=parse or plain, choices=choices)
        if not options["choices"]:
            options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        if parse in (None, path, paths) and field.default not in (None, False, ()):
            about += f" (default {field.default})"
    if field.metadata["repeated"]:
        options["action"] = "append"
    if field.metadata["optional"] is not None:
        options |= dict(nargs="?", const=field.metadata["optional"], metavar="PORT")
    return options | dict(help=about.replace("%", "%%"))


def parse_args(argv: list[str]) -> Config:
    """Command line -> Config. Raises UsageError that names the flag, the value and the remedy."""
    settings = _parse(argv)
    found: dict[str, Any] = {}
    for file in settings.pop("config"):
        found |= _read_config_file(file)
    return Config(**found | settings)


def debug_asked(argv: list[str]) -> bool:
    """Whether tracebacks are wanted: `--debug`, or `debug: true` in the `--config` file.

    Never raises, so that it can be asked after `parse_args` has failed. As there, the last flag
    wins, and flags win over the file.
    """
    parser = OneLineParser(add_help=False)
    parser.add_argument("--debug", action=argparse.BooleanOptionalAction)
    parser.add_argument("--config", action="append", default=[])
    try:
        asked, _ = parser.parse_known_args(argv)
        if asked.debug is not None:
            return bool(asked.debug)
        said = [load_yaml(file).get("debug") for file in asked.config]
        return str(next((s for s in reversed(said) if s is not None), None)).lower() in YES
    except UsageError:
        return "--debug" in argv


def _parse(argv: list[str]) -> dict[str, Any]:
    """The settings that `argv` gives, and `config`, the files. Raises UsageError."""
    known = build_parser().parse_args(argv)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(known).items()}


def _read_config_file(file: str) -> dict[str, Any]:
    """Settings of a YAML file, checked by the same parser as the flags. Raises UsageError."""
    content = load_yaml(file)
    try:
        settings = _parse(as_arguments(content, SWITCHES, WORDS_FOR_NO, REPEATED))
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from error
    if settings.pop("config"):
        raise UsageError(f"--config {file}: names a further --config; put all settings in one file")
    return settings
