"""Shared by all tests: small configs, and one thread per process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings

# No deadline: these machines are noisy, and a slow example says nothing about a law.
settings.register_profile("laws", deadline=None)
settings.load_profile("laws")
