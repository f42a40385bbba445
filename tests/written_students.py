"""Students that were never trained: LoRAs with an effect, written as training would leave them."""

from __future__ import annotations

import torch

from wan_distill.data.run import Run
from wan_distill.maths.sigmas import Expert
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.student_files import save_lora
from wan_distill.settings.lora_names import is_in_block


def write_student(run: Run, *experts: Expert, size: float = 0.2, seed: int = 0) -> None:
    """Writes the LoRA of each of `experts`, drawn from `seed`, into the run's folder."""
    config = run.config
    run.folder.path.mkdir(parents=True, exist_ok=True)
    for number, expert in enumerate(experts, start=seed):
        transformer = run.teacher.load_expert(expert)
        add_adapter(
            transformer,
            "student",
            rank=config.rank,
            alpha=config.lora_alpha,
            layers=config.lora_layers,
            seed=number,
        )
        rng = torch.Generator().manual_seed(number)
        adapter = {
            # The noise level's layers move all that a block does.
            name: (size if is_in_block(name) else 0.1 * size) * torch.randn(p.shape, generator=rng)
            for name, p in adapter_parameters(transformer, "student").items()
        }
        save_lora(run.folder.lora(expert), adapter, config, run.info, expert)
