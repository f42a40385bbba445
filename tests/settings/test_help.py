"""The help that the documentation shows is the one that the program prints."""

from __future__ import annotations

from conftest import REPOSITORY

from wan_distill.settings.command_line import build_parser


def test_help_is_the_one_in_the_docs():
    file = REPOSITORY / "docs" / "help.txt"
    assert build_parser().format_help() == file.read_text(encoding="utf-8"), (
        "python train_distillation.py --help > docs/help.txt"
    )
