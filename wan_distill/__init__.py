"""Few-step distillation of Wan text-to-video models: both experts, one frozen base each.

Importing this package sets environment variables that torch reads when it loads; what the user has
set stays.
"""

import os
import sys

# Threads that spin while they wait for each other make a run ten times slower as soon as anything
# else wants a core. GNU's OpenMP (torch on Linux) reads this; alone on a machine it costs nothing
# measurable.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Updates of different roles need tensors of different sizes. With fixed segments, memory between
# them is lost to fragmentation; segments that grow exist on Linux only. Of this variable's two
# names, every torch since 2.6 obeys the one with CUDA in it; 2.9.1 ignores the other.
if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
