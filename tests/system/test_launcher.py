"""Half of a launcher's environment ends the run before it waits for processes that never come."""

from __future__ import annotations

import pytest

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.system.launcher import ALL, PLACE, check_launcher, describe_rank

WHOLE = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize(
    "environment",
    [{}, WHOLE, WHOLE | dict(WORLD_SIZE="16", RANK="9"), dict(MASTER_ADDR="node1", PATH="/bin")],
)
def test_a_whole_environment_or_none_is_right(environment):
    check_launcher(environment)


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpirun_are_not_waited_for(name):
    check_launcher({name: "1"})
    check_launcher(WHOLE | {name: "2"})
    with pytest.raises(UsageError, match=f"{name}=2: is of mpirun, .*unset it"):
        check_launcher({name: "2"})


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_engines_that_are_not_used_are_not_left_out_silently(name):
    check_launcher(WHOLE | {name: "false"})
    with pytest.raises(UsageError, match=f"{name}=true: this tool does not train with .*--shard"):
        check_launcher(WHOLE | {name: "true"})


@pytest.mark.parametrize("lacking", ALL)
def test_what_is_missing_is_named(lacking):
    for empty in (
        {name: value for name, value in WHOLE.items() if name != lacking},
        WHOLE | {lacking: ""},
    ):
        with pytest.raises(UsageError, match=f"without {lacking}; start with torchrun"):
            check_launcher(empty)


@pytest.mark.parametrize("alone", PLACE)
def test_one_variable_alone_is_named_with_what_to_unset(alone):
    others = [name for name in ALL if name != alone]
    with pytest.raises(UsageError, match=f"{alone}=1: .*without {', '.join(others)}; .*{alone}$"):
        check_launcher({alone: "1"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(RANK="2"), "RANK=2, LOCAL_RANK=1: there is no such process, WORLD_SIZE is 2"),
        (dict(LOCAL_RANK="5"), "LOCAL_RANK=5"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE=two: is no number"),
        (dict(RANK="-1"), "RANK=-1: is no number"),
        (dict(WORLD_SIZE="0", RANK="0"), "WORLD_SIZE is 0"),
        (dict(MASTER_PORT="http"), "MASTER_PORT=http: is no number"),
        (dict(MASTER_PORT="99999"), "MASTER_PORT=99999: is no port"),
    ],
)
def test_what_cannot_be_is_named(changes, says):
    with pytest.raises(UsageError, match=says):
        check_launcher(WHOLE | changes)


def test_the_training_script_asks_first(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_distillation.main(["--dry_run"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: WORLD_SIZE=2: ") and not said.out


def test_a_rank_is_described():
    assert describe_rank({}) == ""
    assert describe_rank(WHOLE) == "rank 1 of 2"
    assert describe_rank(dict(WORLD_SIZE="2")) == "rank ? of 2"
