"""What a run will need, before it needs it."""

from wan_distill.planning.budget import Choice, remember, within_budget
from wan_distill.planning.dry_run import print_plan
from wan_distill.planning.hardware import hardware_of
from wan_distill.planning.headline import headline
from wan_distill.planning.levers import explain_out_of_memory
from wan_distill.planning.plan import describe_plan
from wan_distill.planning.preflight import check_surroundings
from wan_distill.planning.timeline import stage_name, timeline

__all__ = [
    "Choice",
    "check_surroundings",
    "describe_plan",
    "explain_out_of_memory",
    "hardware_of",
    "headline",
    "print_plan",
    "remember",
    "stage_name",
    "timeline",
    "within_budget",
]
