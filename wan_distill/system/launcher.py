"""What a launcher (torchrun, accelerate launch) says in the environment; no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from wan_distill.errors import UsageError

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # which of how many processes this is
NUMBERS = (*PLACE, "MASTER_PORT")
ALL = (*NUMBERS, "MASTER_ADDR")
# What MPI says instead: accelerate would wait for processes that it names.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
HIGHEST_PORT = 65535
ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "accelerate's FSDP"}
REMEDY = "start with torchrun or accelerate launch, or unset"


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageError where the environment says that this is one process of several, and not
    what it takes to find the others, or asks for an engine that would be left out.

    Left over from another job, or made by hand, half of it would let a process wait for ever.
    """
    for name, engine in ENGINES.items():
        if environment.get(name, "").lower() in ("1", "true", "yes"):
            raise UsageError(
                f"{name}={environment[name]}: this tool does not train with {engine}; --shard "
                "spreads the teacher; choose `no` for it in `accelerate config`, or unset it"
            )
    given = [name for name in PLACE if name in environment]
    if not given:
        _check_mpi(environment)
        return
    absent = [name for name in ALL if not environment.get(name)]
    if absent:
        raise UsageError(
            f"{given[0]}={environment[given[0]]}: the environment of a launcher without "
            f"{', '.join(absent)}; {REMEDY} {', '.join(given)}"
        )
    for name in NUMBERS:
        if not environment[name].strip().isdecimal():
            raise UsageError(f"{name}={environment[name]}: is no number; {REMEDY} it")
    if not 0 < int(environment["MASTER_PORT"]) <= HIGHEST_PORT:
        raise UsageError(f"MASTER_PORT={environment['MASTER_PORT']}: is no port; {REMEDY} it")
    world, rank, local = (int(environment[n]) for n in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if not (rank < world and local < world):
        raise UsageError(
            f"RANK={rank}, LOCAL_RANK={local}: there is no such process, WORLD_SIZE is {world}; "
            f"{REMEDY} {', '.join(PLACE)}"
        )


def _check_mpi(environment: Mapping[str, str]) -> None:
    """Raises UsageError where mpirun, or what is left of it, announces other processes."""
    for name in MPI_SIZES:
        if environment.get(name, "1").strip() != "1":
            raise UsageError(
                f"{name}={environment[name]}: is of mpirun, which this tool does not read; "
                f"{REMEDY} it"
            )


def describe_rank(environment: Mapping[str, str] = os.environ) -> str:
    """`rank 1 of 4`; empty where there is one process only."""
    if "WORLD_SIZE" not in environment:
        return ""
    return f"rank {environment.get('RANK', '?')} of {environment['WORLD_SIZE']}"
