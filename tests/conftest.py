"""Settings for every test: one thread per process, and properties that a slow or busy machine cannot fail."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Read when numpy, torch and numba are first imported, which only test modules do.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

settings.register_profile("local", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
