"""`--config` files as people write them mean what they say, or one line names what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_distill.errors import UsageError
from wan_distill.settings.command_line import SWITCHES, parse_args
from wan_distill.settings.config import Config


@pytest.fixture
def config_of(tmp_path):
    """The settings that a file's text gives."""

    def read(text: str | bytes) -> Config:
        file = tmp_path / "run.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse_args([f"--config={file}"])

    return read


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("sampling_steps: [2, 4]", dict(sampling_steps=(2, 4))),
        ("sampling_steps:\n  - 2\n  - 4\n", dict(sampling_steps=(2, 4))),
        ("sampling_steps: 2,4", dict(sampling_steps=(2, 4))),
        ("lora_layers: [to_q, to_k]", dict(lora_layers=("to_q", "to_k"))),
        ("height: [32]", dict(height=32)),
        ("validation_prompt: [a cat, 'two dogs, running']", "a cat|two dogs, running"),
        ("mixed_precision: no", dict(mixed_precision="no")),
        ("mixed_precision: No", dict(mixed_precision="no")),
        ("mixed_precision: 'no'", dict(mixed_precision="no")),
        ("mixed_precision: false", dict(mixed_precision="no")),
        ("negative_prompt: no", dict(negative_prompt="no")),
        ("negative_prompt: ''", dict(negative_prompt="")),
        ("negative_prompt: 'a: b # c'", dict(negative_prompt="a: b # c")),
        ("negative_prompt: >\n  no text\n  at all\n", dict(negative_prompt="no text at all\n")),
        ("evaluate: no", dict(evaluate=False)),
        ("evaluate: 'false'", dict(evaluate=False)),
        ("evaluate: Off", dict(evaluate=False)),
        ("evaluate: TRUE", dict(evaluate=True)),
        ("evaluate: y", dict(evaluate=True)),
        ("evaluate:", {}),
        ("evaluate: ~", {}),
        ("output_dir: ~", {}),  # null, as YAML has it
        ("output_dir: null", {}),
        ("seed: 010", dict(seed=10)),  # not octal
        ("learning_rate: 1e-4", dict(learning_rate=1e-4)),
        ("learning_rate: .5", dict(learning_rate=0.5)),
        ("output_dir: 2026-11-26", dict(output_dir="2026-11-26")),
        ("output_dir: 1.10", dict(output_dir="1.10")),
        ("gpu: 1:30", dict(gpu="1:30")),  # not 90
        ("--height: 32", dict(height=32)),
        ("{height: 32, width: 48}", dict(height=32, width=48)),
        ("\ufeffheight: 32", dict(height=32)),
        ("height: 32\r\nwidth: 48\r\n", dict(height=32, width=48)),
        ("---\nheight: 32\n...\n", dict(height=32)),
        ("", {}),
        ("---\n", {}),
    ],
)
def test_a_file_says_what_it_means(text, changes, config_of):
    if isinstance(changes, str):
        changes = dict(validation_prompt=changes)
    assert config_of(text) == Config(**changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("height: 32\nwidth: 48\nheight: 64\n", "height stands in lines 1 and 3"),
        ("rank: 8\nlora_rank: 4\n", "rank stands in lines 1 and 2"),
        ("training:\n  height: 32\n", "--training: holds further names"),
        ("height: {value: 32}", "--height: holds further names"),
        ("sampling_steps: [[2], 4]", "--sampling_steps: holds more than a list of values"),
        ("sampling_steps: [2,, 4]", "cannot be read"),
        ("evaluate: maybe", "'maybe' is neither true nor false"),
        ("evaluate: 1", "'1' is neither true nor false"),
        ("evaluate: [yes, no]", "'yes,no' is neither true nor false"),
        ("no_evaluate: true", "there is no such flag; write evaluate: false"),
        ("no-evaluate: true", "there is no such flag; write evaluate: false"),
        ("max-train-steps: 3", "did you mean --max_train_steps?"),
        ("variant: ''", "--variant: is empty"),
        ("height: 48 832", "--height 48 832: is no whole number"),
        ("height: 32\n---\nwidth: 48\n", "cannot be read"),
        ("\theight: 32", "cannot be read"),
        ("height 32", "must hold 'flag: value' lines"),
        ("42", "must hold 'flag: value' lines"),
        ("0", "must hold 'flag: value' lines"),
        ("no: 3", "--no: there is no such flag"),
        ("? [a, b]\n: 3", "cannot be read"),
        ("height: !!python/object/apply:os.system [ls]", "cannot be read"),
        ("caf\xe9: 1".encode("latin-1"), "cannot be read"),
        ("lora_layers: " + "[" * 5000 + "]" * 5000, "cannot be read"),
    ],
)
def test_what_it_does_not_mean_is_named(text, reason, config_of, tmp_path):
    with pytest.raises(UsageError) as error:
        config_of(text)
    said = str(error.value)
    assert said.startswith(f"--config {tmp_path / 'run.yaml'}: ") and reason in said
    assert "\n" not in said


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["height", "seed", "learning_rate", "negative_prompt", *sorted(SWITCHES)]),
        st.integers(0, 10**9) | st.booleans(),
        max_size=6,
    )
)
def test_a_json_file_is_read_as_the_flags_are(tmp_path_factory, wanted):
    fitting = {
        name: value
        for name, value in wanted.items()
        if (name in SWITCHES) is (value is True or value is False)
    }
    file = tmp_path_factory.getbasetemp() / "run.json"
    file.write_text(json.dumps(fitting), encoding="utf-8")
    flags = [
        (f"--{name}" if value else f"--no-{name}") if name in SWITCHES else f"--{name}={value}"
        for name, value in fitting.items()
    ]
    assert parse_args([f"--config={file}"]) == parse_args(flags)


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output_dir: ~/out\ncache_dir: ~/cache\n")
    config = parse_args(["--config=~/run.yaml"])
    assert Path(config.output_dir) == tmp_path / "out"
    assert Path(config.cache_dir) == tmp_path / "cache"
