"""The teacher's networks, the adapters on them, and the files they come from and go to."""

from wan_distill.model.adapters import make_roles
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import Teacher, hide_loading_bars
from wan_distill.model.student_files import init_student, save_student, scheduler_for

__all__ = [
    "Denoiser",
    "Teacher",
    "hide_loading_bars",
    "init_student",
    "make_roles",
    "save_student",
    "scheduler_for",
]
