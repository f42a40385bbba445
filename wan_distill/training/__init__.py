"""One expert's training: who learns, what is stored, what is checked."""

from wan_distill.training.belonging import check_belonging
from wan_distill.training.learner import Learner, make_learners
from wan_distill.training.metrics import Metrics, Tracker
from wan_distill.training.monitor import Exported, Monitor
from wan_distill.training.previews import Previews, validation_prompts
from wan_distill.training.prompts_read import prompts_read
from wan_distill.training.rehearsal import rehearse
from wan_distill.training.resume import Progress
from wan_distill.training.stages import is_done

__all__ = [
    "Exported",
    "Learner",
    "Metrics",
    "Monitor",
    "Previews",
    "Progress",
    "Tracker",
    "check_belonging",
    "is_done",
    "make_learners",
    "prompts_read",
    "rehearse",
    "validation_prompts",
]
