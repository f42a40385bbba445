"""What argparse would say in its own words: one line with value, reason and remedy."""

from __future__ import annotations

import re

import pytest

import convert_lora
import sample
import test_umt5_weights
import train_distillation
from wan_distill.errors import UsageError
from wan_distill.settings.one_line_parser import OneLineParser


def parser() -> OneLineParser:
    """One flag of each kind."""
    made = OneLineParser(prog="program", other_names={"lr": "--rate"})
    made.add_argument("--count", "--number", type=int)
    made.add_argument("--rate", type=float)
    made.add_argument("--kind", choices=("fine", "coarse"))
    made.add_argument("--pair", nargs=2, metavar=("BASE", "TUNED"))
    made.add_argument("--fast", action="store_true")
    return made


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--count 1e3", "--count/--number 1e3: is no whole number as it stands; write 1000"),
        ("--number 2.5", "--count/--number 2.5: is no whole number; write one in digits"),
        ("--count=", "--count/--number: is no whole number; write one in digits"),
        ("--count a\tb", "--count/--number 'a\\tb': is no whole number; write one in digits"),
        ("--count 1e30", "--count/--number 1e30: is no whole number; write one in digits"),
        ("--count inf", "--count/--number inf: is no whole number; write one in digits"),
        ("--rate fast", "--rate fast: is no number; give one such as 0.5"),
        ("--rate 1,5", "--rate 1,5: is no number; write 1.5"),
        ("--kind corse", "--kind corse: is none of fine, coarse; did you mean coarse?"),
        ("--kind 7", "--kind 7: is none of fine, coarse; give one of them"),
        ("--kind", "--kind: has no value; give one of fine, coarse"),
        ("--rate --fast", "--rate: has no value; give one"),
        ("--rate -x", "--rate: has no value; give one (one that begins with a dash as --rate=-x)"),
        ("--pair a", "--pair: needs 2 values: BASE TUNED"),
        ("--fast=yes", "--fast=yes: takes no value; write --fast alone"),
        ("--rate=--", "--rate=--: '--' is no value; give one, or leave the flag out"),
        ("--fas", "--fas: there is no such flag; did you mean --fast?"),
        ("--lr 1", "--lr: there is no such flag; did you mean --rate?"),
        ("fast", "fast: belongs to no flag; put quotation marks around a value with spaces"),
    ],
)
def test_it_says_value_reason_and_remedy(argv, line):
    with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
        parser().parse_args(argv.split(" "))


def test_what_is_right_is_taken():
    given = "--number -3 --rate 1e-4 --kind fine --pair a b --fast"
    args = parser().parse_args(given.split(" "))
    assert vars(args) == dict(count=-3, rate=1e-4, kind="fine", pair=["a", "b"], fast=True)


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        (train_distillation, ["--max_train_steps", "1e3"], "--max_train_steps 1e3: is no whole"),
        (train_distillation, ["--dry_run=yes"], "takes no value; write --dry_run alone"),
        (sample, [], "--student: give one: the output folder of a run"),
        (sample, ["--student=x", "--prompt", "a", "fox"], "fox: belongs to no flag; put quotation"),
        (sample, ["--student=x", "--fps", "fast"], "--fps fast: is no whole number"),
        (convert_lora, ["--ran", "4"], "--ran: there is no such flag; did you mean --rank?"),
        (convert_lora, ["a", "b", "--rank", "four"], "--rank four: is no whole number"),
        (test_umt5_weights, ["--repair"], "--repair: has no value; give one"),
    ],
)
def test_every_program_speaks_like_this(script, argv, words, capsys):
    assert script.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
