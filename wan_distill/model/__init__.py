"""The teacher's networks, the adapters on them, and the files they come from and go to."""

from wan_distill.model.adapters import make_roles
from wan_distill.model.checkpointing import recompute_blocks
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import Teacher, hide_loading_bars
from wan_distill.model.student_files import save_student, scheduler_for
from wan_distill.model.warm_start import begin_as, carry_over, warm_start_files

__all__ = [
    "Denoiser",
    "Teacher",
    "begin_as",
    "carry_over",
    "hide_loading_bars",
    "make_roles",
    "recompute_blocks",
    "save_student",
    "scheduler_for",
    "warm_start_files",
]
