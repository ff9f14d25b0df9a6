"""Time and memory of one run on this machine: speed without pauses, and when a checkpoint is due."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

PARTS = ("train", "evaluation", "checkpoints", "samples")
"""What a run's time goes to once it has started."""


class Clock:
    """Counts training time between log points, leaving out evaluations and checkpoints.

    Args:
        checkpoint_seconds: longest time between checkpoints.
        before: ``seconds`` of earlier attempts, to be added to.
    """

    def __init__(self, checkpoint_seconds: float, before: Mapping[str, float] | None = None) -> None:
        self._checkpoint_seconds = checkpoint_seconds
        self.seconds = dict.fromkeys(PARTS, 0.0) | dict(before or {})
        """What the time went to, of all attempts: ``PARTS``. Starting is in none of them."""
        self._last_checkpoint = self._mark = time.monotonic()
        self._steps = 0
        self._laps: list[tuple[int, float]] = []

    def lap(self, steps: int) -> float:
        """Steps per second since the last lap.

        Args:
            steps: steps done since the start of this process; the device must be idle (synchronised).
        """
        now = time.monotonic()
        self._laps.append((steps - self._steps, now - self._mark))
        self.seconds["train"] += now - self._mark
        self._steps, self._mark = steps, now
        return self._laps[-1][0] / self._laps[-1][1]

    @contextlib.contextmanager
    def paused(self, part: str) -> Iterator[None]:
        """Time inside counts as this part of ``PARTS`` and not as training."""
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        self._mark += took
        self.seconds[part] += took

    @property
    def steps_per_second(self) -> float | None:
        """Over all laps but the first, which holds the warm-up; None before there is another."""
        laps = self._laps[1:] or self._laps
        return sum(n for n, _ in laps) / sum(t for _, t in laps) if laps else None

    def checkpoint_due(self) -> bool:
        """Whether the last checkpoint is longer ago than asked for."""
        return time.monotonic() - self._last_checkpoint > self._checkpoint_seconds

    def checkpointed(self) -> None:
        """A checkpoint was just written."""
        self._last_checkpoint = time.monotonic()


def host_memory() -> int:
    """Peak bytes of this process in the machine's main memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host_memory()
