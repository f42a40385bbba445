"""What tests share: tiny teachers with random weights, runs of them, the flags of a tiny run."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
# Tensors are tiny: several threads would only wait for each other. For subprocesses too.
os.environ["OMP_NUM_THREADS"] = "1"
# No test depends on the network; one that asks the hub is told at once that there is none.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"

from wan_distill.layout import RunFolder
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve

if TYPE_CHECKING:  # the process that deals out the tests needs no torch
    from wan_distill.data import Run

PROMPTS = ("a red circle", "a blue square", "a green dot")
PICTURES = ("first picture", "second picture", "third picture")  # in place of digests
JOURNEYS = Path(__file__).parent / "journeys"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole runs of the command line carry a mark: `-m "not journey"` leaves them out. Those of
    minutes are left out wherever `-m` does not name them.
    """
    for item in items:
        if JOURNEYS in item.path.parents:
            item.add_marker("journey")
    if "long" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it again and again takes 3 % of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes run the tests. Files that are named run in this one: a process of its own
    takes seconds to import torch. Four at most: each needs about a gigabyte.
    """
    named = any(
        not argument.startswith("-") and Path(argument.split("::")[0]).exists()
        for argument in config.invocation_params.args
    )
    return 0 if named else min(4, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def signals_of_the_tests() -> Iterator[None]:
    """A Runtime takes over the signals of the process; afterwards Ctrl+C ends the tests again."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def compare_recorded(name: str, value: Any) -> None:
    """Fails unless `value` equals tests/recorded/<name>; writes that file where there is none.

    To record anew after a wanted change: delete the file, run the test twice, and look at the
    difference.
    """
    file = Path(__file__).parent / "recorded" / name
    text = json.dumps(value, indent=1) + "\n"
    if not file.exists():
        file.write_text(text, encoding="utf-8")
        pytest.fail(f"recorded {name}: look at it, run again, and commit it")
    assert json.loads(text) == json.loads(file.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------- teachers


@pytest.fixture(scope="session")
def random_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-expert pipeline folder. Do not write to it."""
    from random_teachers import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("teachers") / "random")


@pytest.fixture(scope="session")
def random_picture_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-expert image-to-video pipeline folder. Do not write to it."""
    from random_teachers import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("teachers") / "random-i2v", picture=True)


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Receives the frames of each video of sample.py instead of a file."""
    from wan_distill.system import pictures

    frames_of: list[Any] = []

    def receive(file: Path, frames: Any, fps: int) -> Path:
        frames_of.append(frames)
        return file

    monkeypatch.setattr(pictures, "write_video", receive)
    return frames_of


# ------------------------------------------------------------------------------------------- runs


SMALL = dict(
    height=32,
    width=32,
    num_frames=5,
    max_train_steps=2,
    train_batch_size=2,
    sample_batch_size=8,
    num_trajectories=4,
    teacher_steps=6,
    rank=4,
    max_sequence_length=12,
    negative_prompt="",
    mixed_precision="no",
    checkpointing_steps=10,
    eval_samples=8,
    validation_steps=0,
    evaluation="sets",
    # One stage, with the published form of its losses: a test that is about another says so.
    method="dmd",
    real_score="guided",
    diversity_weight=0.05,
    critic_updates=5,
    teacher_solver="euler",
)


def tiny_flags(teacher: Path | str, out: Path, **changes: Any) -> list[str]:
    """The flags of a whole run of a second or two.

    Args:
        changes: settings by name: True and False become switches, None leaves a flag out.
    """
    settings: dict[str, Any] = SMALL | dict(
        teacher_path=teacher,
        output_dir=out,
        prompts=Path(__file__).with_name("prompts.txt"),
        critic_warmup_steps=1,
        critic_updates=1,
        monitor_steps=0,
        evaluate=False,
        save_merged=False,
    )
    flags = []
    for name, value in (settings | changes).items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def stop_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """SIGTERM arrives during the given update of the first run."""
    from wan_distill.training.learner import Learner

    real, done = Learner.update, []

    def stopping(self, *given):
        done.append(1)
        if len(done) == update:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *given)

    monkeypatch.setattr(Learner, "update", stopping)


@pytest.fixture
def small_config(random_teacher: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a resolved Config for the random teacher, a second or two of work."""

    def make(**changes: Any) -> Config:
        paths = dict(teacher_path=str(random_teacher), output_dir=str(tmp_path / "out"))
        config = Config(**(SMALL | paths | changes))
        return resolve(config, read_teacher(config))

    return make


@pytest.fixture
def make_run(small_config: Callable[..., Config]) -> Callable[..., Run]:
    """Makes a Run of `PROMPTS`, whose embeddings are drawn, not encoded; of an image-to-video
    teacher each prompt has a picture, whose latents are drawn too.
    """
    import torch
    from random_teachers import TEXT_DIM

    from wan_distill.data import FirstFrames, PicturedPrompt, PromptEmbeddings, Run
    from wan_distill.model import Teacher
    from wan_distill.system.runtime import Runtime

    def make(**changes: Any) -> Run:
        config = small_config(**(dict(monitor_samples=4) | changes))
        runtime = Runtime(config)
        folder = RunFolder(Path(config.output_dir)).prompts
        length = config.max_sequence_length
        embeddings = PromptEmbeddings(folder, {"encoder": "drawn"}, length, runtime.device)
        for i, prompt in enumerate([*PROMPTS, config.negative_prompt]):
            rng = torch.Generator().manual_seed(i)
            embeddings.store(prompt, torch.randn(4, TEXT_DIM, generator=rng))
        info = read_teacher(config)
        teacher = Teacher(info, config, runtime)
        if not info.takes_picture:
            return Run(config, teacher, embeddings, PROMPTS, runtime)
        pictures = {name: partial(drawn, name, 3, config.height, config.width) for name in PICTURES}
        cache = RunFolder(Path(config.output_dir)).pictures
        first_frames = FirstFrames(cache, {"vae": "drawn"}, info.mask_channels, runtime.device)
        latents = iter([drawn(name, *info.latent_shape(config)) for name in PICTURES])
        first_frames.fill(pictures, lambda pixels: next(latents), shown=False)
        prompts = tuple(map(PicturedPrompt, PROMPTS, PICTURES))
        return Run(config, teacher, embeddings, prompts, runtime, first_frames)

    def drawn(name: str, *shape: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(PICTURES.index(name))
        return torch.randn(shape, generator=rng).clamp(-1, 1)

    return make


@pytest.fixture
def picture_run(make_run: Callable[..., Run], random_picture_teacher: Path) -> Callable[..., Run]:
    """Makes a Run of an image-to-video teacher."""
    return partial(make_run, teacher_path=str(random_picture_teacher))
