"""Flags and configuration files: what they set, what is refused, and who asks for tracebacks."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import sample
from wan_distill.errors import UsageError
from wan_distill.settings.command_line import (
    SWITCHES,
    TYPES,
    build_parser,
    debug_asked,
    parse_args,
)
from wan_distill.settings.config import Config
from wan_distill.settings.other_names import SAMPLING, TRAINING
from wan_distill.settings.recipes import RECIPES


@pytest.fixture
def config_file(tmp_path):
    """Writes a file and gives the flag that names it."""

    def write(text: str) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return f"--config={file}"

    return write


def test_nothing_given_is_the_default_of_every_setting():
    assert parse_args([]) == Config()


def test_every_setting_is_a_flag_and_has_help():
    for field in dataclasses.fields(Config):
        assert field.metadata["help"], field.name
        if field.name in SWITCHES:
            assert getattr(parse_args([f"--{field.name}"]), field.name) is True
            assert getattr(parse_args([f"--no-{field.name}"]), field.name) is False
            continue
        choices = tuple(RECIPES) if field.name == "method" else field.metadata["choices"]
        for value in choices or ("1",):
            given = getattr(parse_args([f"--{field.name}", value]), field.name)
            lists = dict.fromkeys(("lora_layers", "teacher_lora", "export"), ("1",))
            many = (lists | {"sampling_steps": (1,)}).get(field.name)
            assert given == (many or (value if isinstance(given, str) else 1)), field.name
        if choices:
            with pytest.raises(UsageError, match=f"--{field.name} x: is none of {choices[0]}"):
                parse_args([f"--{field.name}", "x"])


def test_the_help_names_defaults():
    text = " ".join(build_parser().format_help().split())
    assert "--rank N, --lora_rank N rank of the LoRA adapters (default 64)" in text
    assert "--huber_c X" in text and "(default 0.001)" in text
    assert "(default None)" not in text and "(default False)" not in text


def test_the_other_names_of_a_flag():
    config = parse_args(
        ["--pretrained_teacher_model=x", "--lora_rank=8", "--lora_target_modules=to_q,to_k"]
    )
    assert (config.teacher_path, config.rank, config.lora_layers) == ("x", 8, ("to_q", "to_k"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--hieght", "64"], "--hieght: there is no such flag; did you mean --height?"),
        (["--dry-run"], "--dry-run: there is no such flag; did you mean --dry_run?"),
        (["--lr=1e-4"], "--lr: there is no such flag; did you mean --learning_rate?"),
        (["--steps", "4"], "did you mean --sampling_steps (of a clip) or --max_train_steps"),
        (["--num_inference_steps=4"], "did you mean --sampling_steps?"),
        (["--network-dim", "64"], "--network-dim: there is no such flag; did you mean --rank?"),
        (["--zzz=1"], "--zzz: there is no such flag; see --help"),
        (["--heigh", "64"], "--heigh: there is no such flag"),  # no abbreviations
        (["--prompts=--"], "'--' is no value"),
        (["--height", "tall"], "--height tall: is no whole number; write one in digits"),
        (["--sampling_steps", "2,0"], "--sampling_steps 2,0: is not a step count"),
        (["--config"], "--config: has no value; give one"),
        (["--config=/no/such.yaml"], "--config /no/such.yaml: cannot be read"),
    ],
)
def test_what_is_mistyped_is_named(argv, words):
    with pytest.raises(UsageError, match=re.escape(words)) as error:
        parse_args(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "parser"), [(TRAINING, build_parser()), (SAMPLING, sample.build_parser())]
)
def test_other_programs_names_lead_to_flags_that_exist(names, parser):
    flags = {option for action in parser._actions for option in action.option_strings}
    for name, hint in names.items():
        assert f"--{name}" not in flags
        assert set(re.findall(r"--\w+", hint)) <= flags and "--" in hint, name


@pytest.mark.parametrize("called", ["/usr/bin/wan-distill", "wan-distill.exe", "x/pytest"])
def test_the_usage_names_the_command_that_was_called(called, monkeypatch):
    monkeypatch.setattr("sys.argv", [called])
    text = build_parser().format_help()
    installed = "wan-distill" in called
    assert ("usage: wan-distill [flags]" in text) == installed
    assert ("python train_distillation.py --sampling_steps 2" in text) == (not installed)


PATHS = (
    "teacher_path",
    "prompts",
    "images",
    "image_source",
    "output_dir",
    "init_student_from",
    "cache_dir",
    "plan_json",
    "resume_from_checkpoint",
)


@pytest.mark.parametrize("name", PATHS)
def test_the_home_folder_is_found_in_every_path(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    for flags in ([f"--{name}=~/some where"], [f"--{name}", "~/some where"]):
        assert Path(getattr(parse_args(flags), name)) == tmp_path / "some where"
    assert getattr(parse_args([f"--{name}=a/~/b"]), name) == "a/~/b"


def test_each_of_two_loras_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    high, low = parse_args(["--init_student_from=~/h,~/l"]).init_student_from.split(",")
    assert (Path(high), Path(low)) == (tmp_path / "h", tmp_path / "l")


def test_a_variable_without_a_value_is_no_text():
    """`--teacher_path "$TEACHER"` would distil the embedded teacher."""
    texts = [name for name, kind in TYPES.items() if kind is str]
    assert set(PATHS) < set(texts) and len(texts) > 15
    for name in texts:
        for empty in ("", " "):
            if name == "negative_prompt":
                assert parse_args([f"--{name}={empty}"]).negative_prompt == empty
                continue
            with pytest.raises(UsageError, match=rf"--{name}\b.*: (is empty|is none of)"):
                parse_args([f"--{name}={empty}"])


# ------------------------------------------------------------------------------ configuration files


def test_a_config_file_is_read_and_flags_win(config_file):
    file = config_file(
        "height: 32\nwidth: 48\nevaluate: false\ndebug: true\nsampling_steps: [2, 4]\n"
        "learning_rate: 1e-4\nlora_rank: 8\nprompts:\nnegative_prompt: 'none, at all'\n"
    )
    config = parse_args([file, "--width", "64"])
    assert config == Config(
        height=32,
        width=64,
        evaluate=False,
        debug=True,
        sampling_steps=(2, 4),
        learning_rate=1e-4,
        rank=8,
        negative_prompt="none, at all",
    )


def test_of_several_config_files_the_last_wins(tmp_path):
    for name, text in (("a", "rank: 8\nseed: 3\ndebug: true\n"), ("b", "seed: 4\n")):
        (tmp_path / name).write_text(text)
    flags = [f"--config={tmp_path / name}" for name in "ab"]
    assert parse_args(flags) == Config(rank=8, seed=4, debug=True)
    assert parse_args(flags[::-1]).seed == 3 and parse_args(["--seed=5", *flags]).seed == 5
    assert debug_asked(flags) and not debug_asked(flags[1:])


def test_an_empty_config_file_says_nothing(config_file):
    assert parse_args([config_file("# nothing yet\n")]) == Config()


def test_no_is_a_word_where_a_flag_takes_words(config_file):
    assert parse_args([config_file("mixed_precision: no\n")]).mixed_precision == "no"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("heigth: 32\n", "--heigth: there is no such flag; did you mean --height"),
        ("height: tall\n", "--height tall: is no whole number"),
        ("height: true\n", "--height true: is no whole number"),
        ("prompts: '--'\n", "'--' is no value"),
        ("debug: 1\n", "--debug"),
        ("config: other.yaml\n", "a further --config"),
        ("- height\n", "must hold 'flag: value' lines"),
        ("height: [\n", "cannot be read"),
        ("height: 2001-99-99\n", "--height 2001-99-99: is no whole number"),
    ],
)
def test_what_a_config_file_mistypes_is_named_with_the_file(text, words, config_file):
    flag = config_file(text)
    file = flag.removeprefix("--config=")
    with pytest.raises(UsageError, match=f"--config {file}: .*{words}") as error:
        parse_args([flag])
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- tracebacks


@pytest.mark.parametrize("text", ["debug: true\n", "debug: yes\nheigth: 1\n"])
def test_a_config_file_asks_for_tracebacks(text, config_file):
    assert debug_asked([config_file(text)])
    assert debug_asked(["--hieght", "64", *config_file(text).split("=")])
    assert not debug_asked([config_file(text), "--no-debug"])


@pytest.mark.parametrize("text", ["debug: false\n", "debug: 1\n", "- debug\n", "debug: [\n", ""])
def test_a_config_file_that_does_not_ask_for_them(text, config_file):
    assert not debug_asked([config_file(text)])
    assert debug_asked([config_file(text), "--debug"])


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        ([], False),
        (["--debug"], True),
        (["--no-debug", "--debug"], True),
        (["--debug", "--no-debug"], False),
        (["--height", "tall", "--debug"], True),
        (["--debug", "--config"], True),
        (["--config"], False),
        (["--config", "/no/such.yaml"], False),
        (["--debug", "--config", "/no/such.yaml"], True),
        (["--prompts=--debug"], False),
        (["--debugger"], False),
    ],
)
def test_the_command_line_asks_for_tracebacks(argv, asked):
    assert debug_asked(argv) is asked
