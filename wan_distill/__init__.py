"""Few-step distillation of Wan text-to-video models: both experts, one frozen base each."""

import os

# Threads that spin while they wait for each other make a run ten times slower as soon as anything
# else wants a core.
# Read by GNU's OpenMP (torch on Linux) when torch loads; alone on the machine it costs nothing
# measurable.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
