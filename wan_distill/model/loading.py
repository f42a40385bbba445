"""The teacher's parts, loaded one at a time and frozen."""

from __future__ import annotations

import gc
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKLWan, ContextParallelConfig, WanTransformer3DModel
from torch import Tensor, nn

from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.expert_weights import ExpertWeights
from wan_distill.model.hub_files import patterns_of
from wan_distill.model.part_files import check_part, expert_files, loader_options, parts_of
from wan_distill.model.quantise import load_streamed
from wan_distill.model.sharding import load_sharded, shard_base
from wan_distill.model.vae import decodes_in_tiles, put_channels_last
from wan_distill.settings.assets import download
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.runtime import Runtime

# Each role needs graphs of its own, with and without gradients: three adapters make 11 per block.
# Beyond torch's limit of 8, blocks run uncompiled, and only a warning says so.
GRAPHS_PER_BLOCK = 32


class Teacher:
    """Loads the teacher's parts on request. The caller holds the only reference to a part, and
    frees its memory by dropping it: at once or, of a part in reference cycles, as `--compile`,
    `--shard` and `--context_parallel` make them, when the next part is loaded.
    """

    def __init__(self, info: TeacherInfo, config: Config, runtime: Runtime):
        self.info = info
        self.config = config
        self.runtime = runtime

    def fetch(self, part: str) -> Path:
        """The local folder, with the files of `part` (a subfolder's name) in it.

        A hub teacher's files are those of the commit that was described at the start of the run.
        """
        if self.info.is_local:
            return self.info.folder
        patterns = patterns_of(self.info, self.config, part)
        folder = download(self.info.source, self.info.commit, self.config.cache_dir, patterns)
        if part in parts_of(self.info):  # files of a folder were checked before the run
            check_part(self.info, self.config, part)
        return folder

    def load_expert(self, expert: Expert, exact: bool = False) -> WanTransformer3DModel:
        """A frozen transformer in the run's dtype, on its device; weights go straight there.

        With `--base_precision` other than bf16 its matrices are quantised on the way, with
        `--offload` they stay in host memory, and with `--shard` each process keeps its part only.

        Args:
            exact: load it whole instead, with the weights of the file, and into host memory
                wherever the device may be too small for that.
        """
        gc.collect()
        config, runtime = self.config, self.runtime
        if expert not in self.info.changes.experts:
            self.fetch(SUBFOLDER[expert])
        stored = config.base_precision != "bf16" or config.offload
        if exact or not (stored or runtime.sharded):
            on_host = stored or runtime.sharded or runtime.device.type == "cpu"
            transformer = self._load_plain(expert, on_host)
        elif runtime.sharded:
            transformer = self._load_sharded(expert)
        else:
            transformer = self._load_stored(expert)
        if not exact:
            make_ready(transformer, config, runtime)
        return transformer

    def _load_plain(self, expert: Expert, on_host: bool) -> WanTransformer3DModel:
        device = torch.device("cpu") if on_host else self.runtime.device
        return load_transformer(self.info, self.config, expert, self.runtime.dtype, device)

    def _load_sharded(self, expert: Expert) -> WanTransformer3DModel:
        folder, files = expert_files(self.info, self.config, expert)
        if files[0].suffix != ".safetensors":  # a pickle is read whole
            transformer = self._load_plain(expert, on_host=True)
            shard_base(transformer, self.runtime.device)
            return transformer
        weights = None
        if self.runtime.is_main:
            weights = ExpertWeights(files, self.info.changes.of(expert), self.runtime.device)
        return load_sharded(folder, weights, self.runtime.dtype, self.runtime.device)

    def _load_stored(self, expert: Expert) -> WanTransformer3DModel:
        folder, files = expert_files(self.info, self.config, expert)
        return load_streamed(
            folder,
            ExpertWeights(files, self.info.changes.of(expert), self.runtime.device),
            self.config.base_precision,
            self.runtime.dtype,
            self.runtime.device,
            self.config.offload,
            fetch_ahead=self.config.gradient_checkpointing,
        )

    def load_vae(self) -> AutoencoderKLWan:
        """The frozen VAE, in float32: it is small, and bf16 shows as banding."""
        gc.collect()
        self.fetch("vae")
        vae = load_vae(self.info, self.config).to(self.runtime.device)
        if decodes_in_tiles(self.runtime.device):
            vae.enable_tiling()
        if self.runtime.device.type == "cpu":
            put_channels_last(vae.decoder)
        return vae


def load_transformer(
    info: TeacherInfo, config: Config, expert: Expert, dtype: torch.dtype, device: torch.device
) -> WanTransformer3DModel:
    """A frozen transformer from the files on this machine that `--variant` and `--allow_pickle`
    choose, with the teacher's changes. Raises UsageError.
    """
    if info.changes.touches(expert):
        folder, files = expert_files(info, config, expert)
        weights = ExpertWeights(files, info.changes.of(expert), device)
        return load_streamed(folder, weights, None, dtype, device)
    options = loader_options(info, config, SUBFOLDER[expert])
    if device.type != "cpu":
        options["device_map"] = {"": str(device)}
    transformer = WanTransformer3DModel.from_pretrained(**options, dtype=dtype)
    return transformer.requires_grad_(False).eval()


def load_vae(info: TeacherInfo, config: Config) -> AutoencoderKLWan:
    """The frozen VAE in float32, as `load_transformer` finds its part."""
    options = loader_options(info, config, "vae")
    vae = AutoencoderKLWan.from_pretrained(**options, dtype=torch.float32)
    return vae.requires_grad_(False).eval()


def make_ready(transformer: WanTransformer3DModel, config: Config, runtime: Runtime) -> None:
    """What a loaded transformer needs to work as the flags say."""
    if runtime.dtype != torch.float32:
        keep_dtype_in_norms(transformer)
    if config.compile:
        torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK
        transformer.compile_repeated_blocks()


def share_tokens(transformer: WanTransformer3DModel, runtime: Runtime) -> None:
    """With `--context_parallel`, lets each process work on a part of the tokens. Call it once the
    adapters are there: what the last layer's gives is gathered too.
    """
    if runtime.context_parallel:
        ulysses = ContextParallelConfig(ulysses_degree=runtime.processes)
        transformer.enable_parallelism(config=ulysses)


def keep_dtype_in_norms(transformer: WanTransformer3DModel) -> None:
    """Makes RMS norms return their input's dtype.

    CUDA's autocast computes them in float32 and returns that (the CPU's does not). Queries and keys
    are normalised, values are not, and attention between processes refuses to mix dtypes.
    """

    def restore(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.to(inputs[0].dtype)

    for module in transformer.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(restore)


def hide_loading_bars() -> None:
    """Hides the loaders' progress bars; their messages stay."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
