"""What a run leaves behind, and how good it is."""

from wan_distill.results.closing import closing
from wan_distill.results.evaluated import check_evaluated
from wan_distill.results.evaluation import Evaluation
from wan_distill.results.export import export_student, write_first_frame
from wan_distill.results.hub import check_hub, push
from wan_distill.results.merged import check_output
from wan_distill.results.paired import PairedEvaluation
from wan_distill.results.readme import describe_results
from wan_distill.results.recorded import read_evaluation
from wan_distill.results.reporting import Reporting
from wan_distill.results.table import as_markdown

__all__ = [
    "Evaluation",
    "PairedEvaluation",
    "Reporting",
    "as_markdown",
    "check_evaluated",
    "check_hub",
    "check_output",
    "closing",
    "describe_results",
    "export_student",
    "push",
    "read_evaluation",
    "write_first_frame",
]
