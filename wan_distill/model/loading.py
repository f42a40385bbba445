"""The teacher's parts, loaded one at a time and frozen."""

from __future__ import annotations

from pathlib import Path

from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, download
from wan_distill.system.weight_files import variant_or_none, weight_files


class Teacher:
    """Loads the teacher's parts on request. Whoever asks holds the only reference, so letting go
    frees the memory.
    """

    def __init__(self, info: TeacherInfo, config: Config, runtime):
        self.info = info
        self.config = config
        self.runtime = runtime

    def fetch(self, part: str) -> Path:
        """The local folder, with the files of `part` in it: of the commit that was described,
        whatever came since.
        """
        if Path(self.info.source).is_dir():
            return self.info.folder
        return download(self.info.source, self.info.commit, self.config.cache_dir, [f"{part}/*"])

    def load_expert(self, expert: Expert, exact: bool = False):
        """A frozen transformer in the run's dtype, on its device; shards stream straight there.

        With `--base_precision` other than bf16 its matrices are quantised on the way, with
        `--offload` they stay in host memory, and with `--shard` each process keeps its part only,
        unless `exact`: then it is whole, as the file says, and in host memory wherever the device
        may be too small for it.
        """
        from diffusers import ContextParallelConfig, WanTransformer3DModel

        part, device, config = SUBFOLDER[expert], self.runtime.device, self.config
        stored = config.base_precision != "bf16" or config.offload
        if stored and not exact:
            from wan_distill.model.quantise import load_stored
            folder = self.fetch(part) / part
            transformer = load_stored(
                folder,
                weight_files(folder, config.variant),
                config.base_precision,
                self.runtime.dtype,
                device,
                config.offload,
            )
        else:
            on_host = device.type == "cpu" or stored or self.runtime.sharded
            transformer = (
                WanTransformer3DModel.from_pretrained(
                    self.fetch(part),
                    subfolder=part,
                    dtype=self.runtime.dtype,
                    variant=config.variant,
                    use_safetensors=None if config.allow_pickle else True,
                    **({} if on_host else {"device_map": {"": str(device)}}),
                )
                .requires_grad_(False)
                .eval()
            )
            if self.runtime.sharded and not exact:
                shard_base(transformer, device)
        if exact:
            return transformer
        if self.runtime.together:
            transformer.enable_parallelism(
                config=ContextParallelConfig(ulysses_degree=self.runtime.processes)
            )
        if config.compile:
            transformer.compile_repeated_blocks()
        return transformer

    def load_vae(self):
        """The frozen VAE, in float32: it is small, and bf16 shows as banding."""
        import torch
        from diffusers import AutoencoderKLWan

        folder = self.fetch("vae")
        vae = AutoencoderKLWan.from_pretrained(
            folder,
            subfolder="vae",
            dtype=torch.float32,
            variant=variant_or_none(folder / "vae", self.config.variant),
        )
        return vae.requires_grad_(False).eval().to(self.runtime.device)


def shard_base(transformer, device) -> None:
    """Spreads a frozen transformer over all processes by FSDP2; whole blocks exist only while they
    work.

    Adapters that are added afterwards are not FSDP's: each process has them whole, and the run
    averages their gradients as it always does. Checkpoints are therefore the same files as without
    sharding.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    main = next(transformer.blocks[0].attn1.to_q.parameters()).dtype
    # Wan keeps norms and tables in float32 within bf16 blocks; FSDP gathers one dtype a group, and
    # they are small.
    small = {p for p in transformer.parameters() if p.dtype != main}
    for p in small:
        p.data = p.data.to(device)
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True, ignored_params=small)


def quiet_loading() -> None:
    """Hides the loaders' progress bars; their messages stay."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def decode(vae, latents, batch_size: int = 16):
    """Normalised latents [B, C, f, h, w] -> frames [B, F, H, W, 3] in [0, 1], float32 on the CPU."""
    import torch

    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    clips = []
    with torch.no_grad():
        for part in latents.split(batch_size):
            frames = vae.decode(
                (part.float() * std.to(part.device) + mean.to(part.device)).to(vae.device)
            ).sample
            clips.append((frames.float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 4, 1).cpu())
    return torch.cat(clips)
