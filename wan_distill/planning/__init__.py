"""What a run will need, before it needs it."""

from wan_distill.planning.dry_run import print_plan
from wan_distill.planning.levers import explain_out_of_memory
from wan_distill.planning.plan import describe_plan
from wan_distill.planning.preflight import check_surroundings

__all__ = ["check_surroundings", "describe_plan", "explain_out_of_memory", "print_plan"]
