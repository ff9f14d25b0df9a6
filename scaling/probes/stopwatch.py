"""The clock of a probe: seconds by what they went to, and how long it waited for a core meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast

from scaling.process import Interrupted, JobProcess

SCHEDSTAT = Path("/proc/self/schedstat")
"""Of the main thread: nanoseconds on a core, nanoseconds ready to run and without one, turns."""


@dataclass
class Stopwatch:
    """Seconds by what they went to, by the first process's clock."""

    processes: Accelerator | PartialState
    job: JobProcess
    seconds: dict[str, float] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)
    """Of these, the seconds in which this process was ready to run and had no core."""

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """What happens inside, with the device done with it."""
        start, waited = self.now(), core_wait()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start
        if waited is not None:
            self.waits[part] = self.waits.get(part, 0.0) + (core_wait() or 0.0) - waited
        self.job.beat(step=len(self.seconds))
        if self.agreed(float(self.job.should_stop())):
            raise Interrupted

    def now(self) -> float:
        """Seconds, once the device is idle."""
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)
        return time.monotonic()

    def agreed(self, value: float) -> float:
        """The first process's value."""
        if self.processes.num_processes == 1:
            return value
        sent = torch.tensor([value], dtype=torch.float64, device=self.processes.device)
        return float(broadcast(sent).item())

    def waited(self, parts: Sequence[str]) -> float | None:
        """Share of these parts' time in which there was no core for this process; None where none tells."""
        if not any(part in self.waits for part in parts):
            return None
        return sum(self.waits[part] for part in parts) / sum(self.seconds[part] for part in parts)

    def __getitem__(self, part: str) -> float:
        return self.agreed(self.seconds[part])


def core_wait() -> float | None:
    """Seconds since its start in which the main thread was ready to run while others had the cores.

    Not the difference between clock and processor time: that grows too while a thread waits for a disk, a GPU
    or its peers, which is no disturbance. Linux alone tells; elsewhere it is None.
    """
    try:
        return int(SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None
