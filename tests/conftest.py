"""What tests share: tiny teachers with random weights, runs of them, the flags of a tiny run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
# Tensors are tiny: several threads would only wait for each other. For subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.run import Run
from wan_distill.layout import RunFolder
from wan_distill.model.loading import Teacher
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve
from wan_distill.system.runtime import Runtime

TEXT_DIM = 16
PROMPTS = ("a red circle", "a blue square", "a green dot")
JOURNEYS = Path(__file__).parent / "journeys"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs of the command line carry a mark: `-m "not journey"` leaves them out."""
    for item in items:
        if JOURNEYS in item.path.parents:
            item.add_marker("journey")


@pytest.fixture(autouse=True)
def signals_of_the_tests() -> Iterator[None]:
    """A Runtime takes over the signals of the process; afterwards Ctrl+C ends the tests again."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------- teachers


def random_transformer(seed: int, channels: int = 16, layers: int = 1) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    return model.eval()


def write_pipeline(
    folder: Path,
    *,
    two_experts: bool = True,
    expand_timesteps: bool = False,
    channels: int = 16,
    layers: int = 1,
) -> Path:
    """A `WanPipeline` folder laid out like the hosted ones, with random weights."""
    tokenizer = EMBEDDED_TEACHER / "tokenizer"
    shutil.copytree(tokenizer, folder / "tokenizer")
    torch.manual_seed(0)
    vocabulary = json.loads((EMBEDDED_TEACHER / "text_encoder" / "config.json").read_text())[
        "vocab_size"
    ]
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    weights = {
        k: v.clone() for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"
    }
    (folder / "text_encoder").mkdir()
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    config = encoder.config.to_dict() | {
        "tie_word_embeddings": False,
        "architectures": ["UMT5EncoderModel"],
    }
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    random_transformer(1, channels, layers).save_pretrained(folder / "transformer")
    if two_experts:
        random_transformer(2, channels, layers).save_pretrained(folder / "transformer_2")
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    vae.save_pretrained(folder / "vae")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "expand_timesteps": expand_timesteps,
        "boundary_ratio": 0.875 if two_experts else None,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if two_experts else [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


@pytest.fixture(scope="session")
def random_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-expert pipeline folder. Do not write to it."""
    return write_pipeline(tmp_path_factory.mktemp("teachers") / "random")


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
)


def tiny_flags(teacher: Path, out: Path, **changes: Any) -> list[str]:
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
    )
    flags = []
    for name, value in (settings | changes).items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


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
    """Makes a Run of `PROMPTS`, whose embeddings are drawn, not encoded."""

    def make(**changes: Any) -> Run:
        config = small_config(**(dict(monitor_samples=4) | changes))
        runtime = Runtime(config)
        folder = RunFolder(Path(config.output_dir)).prompts
        length = config.max_sequence_length
        embeddings = PromptEmbeddings(folder, {"encoder": "drawn"}, length, runtime.device)
        for i, prompt in enumerate([*PROMPTS, config.negative_prompt]):
            rng = torch.Generator().manual_seed(i)
            embeddings.store(prompt, torch.randn(4, TEXT_DIM, generator=rng))
        teacher = Teacher(read_teacher(config), config, runtime)
        return Run(config, teacher, embeddings, PROMPTS, runtime)

    return make
