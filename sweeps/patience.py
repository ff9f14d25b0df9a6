"""How long a silent job is waited for, and whether a failed one is started again, and when.

- A job's status says when its work last went on (``progress_at``); its heartbeat alone would go on while the
  work stands still. Only a change of it is looked for, by this process's own monotonic clock: a computer that
  slept, or a clock that was set, ends no job. Nor does time in which nobody looked, since what stopped this
  process may have stopped the job too (Slurm suspends whole allocations).
- Another try can mend a crash, a kill, a hang, an error of the file system. It cannot mend a refusal, a full
  disk or a loss that diverged, except that a diverged run may be given one more on request.
- Tries count only as long as a job gets no further: a run of weeks may be hit by any number of accidents.
- Out of memory is no failure of this kind: each try has half the micro-batch, and there is an end to that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scaling.config import LaunchConfig

LOOK_SECONDS = 2.0
"""Between two looks at a running job's status."""
UNWATCHED_SECONDS = 60.0
"""A longer time between two looks is no silence."""
LONGEST_PAUSE = 600.0


@dataclass(frozen=True)
class Patience:
    """The settings of ``launch`` that it is made of; by default none at all."""

    retries: int = 0
    retry_seconds: float = 0.0
    retry_diverged: bool = False
    hang_seconds: float = math.inf

    @classmethod
    def of(cls, launch: LaunchConfig) -> Patience:
        """That of a recipe."""
        return cls(launch.retries, launch.retry_seconds, launch.retry_diverged, launch.hang_seconds)

    def given_up(self, status: Mapping[str, Any]) -> bool:
        """Whether a job diverged as often as it may."""
        if status["state"] != "failed" or status.get("cause") != "diverged":
            return False
        return int(status.get("divergences", 0)) >= int(self.retry_diverged)


@dataclass
class Pulse:
    """When a running job was last seen to get on."""

    _sign: object = None
    _changed: float = field(default_factory=time.monotonic)
    _looked: float = field(default_factory=time.monotonic)

    def due(self, limit: float) -> bool:
        """Whether it is time to look again."""
        now = time.monotonic()
        if limit == math.inf or now - self._looked < min(LOOK_SECONDS, limit / 4):
            return False
        if now - self._looked > UNWATCHED_SECONDS:
            self._changed += now - self._looked
        self._looked = now
        return True

    def silent(self, status: Mapping[str, Any]) -> float:
        """Seconds since the last change, this status considered."""
        sign = status.get("progress_at", status.get("heartbeat"))
        if sign != self._sign:
            self._sign, self._changed = sign, time.monotonic()
        return time.monotonic() - self._changed


@dataclass
class Tries:
    """The failures of one job under this launcher."""

    count: int = 0
    """In a row, without getting further."""
    _reached: int = -1

    def pause(
        self, cause: str | None, refused: bool, status: Mapping[str, Any], patience: Patience
    ) -> float | None:
        """Seconds until the next try after a failure; None when there is to be none.

        Args:
            cause: as recorded; None when nothing was.
            refused: it ended with the exit code of a refusal.
            status: recorded by the job.
        """
        if cause == "memory":
            return 0.0
        if cause == "diverged":
            return None if patience.given_up(status) else 0.0
        if refused:
            return None
        if (step := int(status.get("step", -1))) > self._reached:
            self.count, self._reached = 0, step
        self.count += 1
        if self.count > patience.retries:
            return None
        return min(LONGEST_PAUSE, patience.retry_seconds * 2 ** (self.count - 1))
