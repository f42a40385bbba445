"""What a run will need, before it needs it."""

from wan_distill.planning.levers import explain_out_of_memory
from wan_distill.planning.plan import describe_needs, describe_plan, plan_numbers
from wan_distill.planning.preflight import check_surroundings, examine_surroundings

__all__ = [
    "check_surroundings",
    "describe_needs",
    "describe_plan",
    "examine_surroundings",
    "explain_out_of_memory",
    "plan_numbers",
]
