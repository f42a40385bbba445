"""One object that hides parameterisation, experts and roles from objectives and samplers.

Teacher, student and scores share one frozen base per expert: the teacher is the base with its
adapters off, the others are LoRA adapters (arXiv 2106.09685) on it. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_distill.maths import flow
from wan_distill.maths.sigmas import NUM_TRAIN_TIMESTEPS, Expert, expert_of
from wan_distill.model.adapters import adapter_layers
from wan_distill.model.condition import Condition
from wan_distill.settings.recipes import Role


class Denoiser:
    """velocity(x, sigma, condition, role) over the experts that are loaded.

    Args:
        experts: loaded transformers by name; one is enough as long as every sigma is its own.
        boundary: sigma at and above which `high` works; None for single-transformer models.
        expand_timesteps: Wan2.2 TI2V-5B wants one timestep per token.
        whole: the experts are students with weights of their own, without a teacher beneath
            (--student_layers).
        autocast: the context of each forward, such as `Runtime.autocast`: low-precision arithmetic
            stays inside the transformer, and backward outside of it.
    """

    def __init__(
        self,
        experts: dict[Expert, WanTransformer3DModel],
        boundary: float | None,
        expand_timesteps: bool = False,
        whole: bool = False,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ):
        self.experts = experts
        self.boundary = boundary
        self.expand_timesteps = expand_timesteps
        self.whole = whole
        self.autocast = autocast
        # Asked once: diffusers finds it by walking through all modules.
        self.dtype = next(iter(experts.values())).dtype
        self._adapters = {name: adapter_layers(model) for name, model in experts.items()}
        self._trained: Role | None = None
        self._active: Role | None = None
        self._activate("teacher")

    # ----------------------------------------------------------------------------------- velocities

    def velocity(self, x: Tensor, sigma: Tensor, condition: Condition, *, role: Role) -> Tensor:
        """Predicted noise - x0 [B, C, F, H, W], in float32.

        Args:
            x: noisy latents [B, C, F, H, W].
            sigma: noise levels [B] in (0, 1], on the CPU (routing must not wait for a device), all
                on one side of the boundary.
            condition: what the B clips are to show.
            role: whose prediction. Roles other than the one in training run without gradient.

        Raises:
            ValueError: the sigmas belong to two experts, or to one that is not loaded.
            RuntimeError: a gradient is asked of a role that is not in training, or anything of the
                teacher or a score of a whole student.
        """
        expert = self.expert_at(sigma)
        if self.whole and role != "student":
            raise RuntimeError(
                f"{role} asked for: a student with --student_layers has no teacher beneath"
            )
        if torch.is_grad_enabled() and self._trained is not None and role != self._trained:
            raise RuntimeError(
                f"{role} asked for with gradients while {self._trained} is in training: use no_grad"
            )
        with self.acting_as(role):
            return self._forward(self.experts[expert], x, sigma, condition)

    def guided_velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Tensor,
        guidance_scale: float,
    ) -> Tensor:
        """The teacher's velocity under classifier-free guidance; both halves in one forward.

        Shapes are those of `velocity`. Scale 1 costs a single evaluation.

        Args:
            negative: the negative prompt's embedding [1 or B, L, D].
        """
        if guidance_scale == 1:
            return self.velocity(x, sigma, condition, role="teacher")
        both = self.velocity(
            torch.cat([x, x]),
            torch.cat([sigma, sigma]),
            condition.and_negative(negative),
            role="teacher",
        )
        conditional, unconditional = both.chunk(2)
        return flow.guide(conditional, unconditional, guidance_scale)

    def expert_at(self, sigma: Tensor) -> Expert:
        """The one loaded expert that owns all of `sigma` [B].

        Raises:
            ValueError: they belong to two experts, or to one that is not loaded.
        """
        owners = {expert_of(float(s), self.boundary) for s in (sigma.min(), sigma.max())}
        if len(owners) > 1:
            raise ValueError(
                f"sigmas {sigma.tolist()} lie on both sides of the boundary {self.boundary}"
            )
        owner = owners.pop()
        if owner not in self.experts:
            raise ValueError(
                f"sigma {float(sigma[0]):.4f} belongs to the {owner} expert, which is not loaded"
            )
        return owner

    def _forward(
        self, transformer: WanTransformer3DModel, x: Tensor, sigma: Tensor, condition: Condition
    ) -> Tensor:
        # In float32 whatever the base's dtype: bf16 has no numbers between 832 and 836.
        timestep = (NUM_TRAIN_TIMESTEPS * sigma.double()).float().to(x.device, non_blocking=True)
        if self.expand_timesteps:
            patch = transformer.config["patch_size"]
            frames, rows, columns = (n // p for n, p in zip(x.shape[2:], patch, strict=True))
            timestep = timestep[:, None].expand(-1, frames * rows * columns)
        with self.autocast():
            (velocity,) = transformer(
                condition.beside(x).to(self.dtype),
                timestep,
                condition.prompt.to(self.dtype),
                return_dict=False,
            )
        return velocity.float()

    # ---------------------------------------------------------------------------------------- roles

    @contextmanager
    def training(self, role: Role) -> Iterator[None]:
        """Inside, `role` is in training: its adapter alone has gradients, and is active again by
        `backward`.

        Call backward inside too: gradient checkpointing recomputes with the adapter that is active
        *then*, and with the wrong one the student's gradients are zero without any error (measured,
        peft 0.21).
        """
        before = self._trained
        self._trained = role
        try:
            with self.acting_as(role):
                yield
        finally:
            self._trained = before

    @contextmanager
    def acting_as(self, role: Role) -> Iterator[None]:
        """Inside, forward passes are `role`'s. Afterwards, also after an error, the role from
        before is active again.
        """
        before = self._active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, role: Role | None) -> None:
        """Makes `role`'s adapter the active one; for the teacher, none.

        peft's switches also set `requires_grad`: afterwards only this role's adapter has it.
        """
        if role is None or role == self._active:
            return
        for layers in self._adapters.values():
            for layer in layers:
                layer.enable_adapters(role != "teacher")
                if role != "teacher":
                    layer.set_adapter(role)
        self._active = role


def nonfinite_weight(module: torch.nn.Module) -> str | None:
    """The name of the first weight of `module` that is not finite everywhere, if there is one."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter.detach().float()).all():
            return name
    return None
