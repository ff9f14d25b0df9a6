"""What the places of a launch were used for: the share of device time that went into training.

Every run keeps in its status what its seconds went to, over all its attempts (``scaling.clock``); the
difference between the end and the start of a launch is this launch's. A tokenizer and a token cache are
counted from start to end, since they keep no such account; on a CPU they have every core, so all places
count as used by them, on GPUs one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaling.records import finite
from sweeps.jobs import Job
from sweeps.scheduler import JobState
from sweeps.tables import duration

Seconds = Mapping[str, Mapping[str, float]]
"""By job and by what they went to."""


def time_spent(jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    """What the runs among the jobs have spent so far, over all attempts."""
    found = {}
    for job in jobs:
        recorded = job.folder.status().get("seconds") if job.kind == "run" else None
        if isinstance(recorded, dict):
            found[job.name] = {str(part): float(s) for part, s in recorded.items() if finite(s)}
    return found


@dataclass(frozen=True)
class TimeSpent:
    """One launch's use of its places."""

    places: int
    wall: float
    """Seconds from its first start to its last end."""
    before: Seconds
    after: Seconds
    """Of the runs that this launch has started."""

    @classmethod
    def by(cls, states: Sequence[JobState], places: int, wall: float, before: Seconds) -> TimeSpent:
        """What a launch has spent; what another one trained meanwhile is not its own."""
        return cls(places, wall, before, time_spent([s.job for s in states if s.started is not None]))

    def of(self, part: str) -> float:
        """Seconds of its runs that went to one of ``scaling.clock.PARTS``, in this launch."""
        return sum(
            max(0.0, spent.get(part, 0.0) - self.before.get(run, {}).get(part, 0.0))
            for run, spent in self.after.items()
        )

    def share(self, states: Sequence[JobState], whole_machine: bool) -> float:
        """Training time of transformers and tokenizers over places × wall time.

        Args:
            whole_machine: a tokenizer uses every place, not one.
        """
        width = self.places if whole_machine else 1
        stages = sum(s.seconds for s in states if s.job.kind in ("tokenizer", "tokens") and s.started)
        return (self.of("train") + width * stages) / (self.places * self.wall)

    def told(self, states: Sequence[JobState], whole_machine: bool) -> str:
        """One line for the end of a launch."""
        runs = f"training {duration(self.of('train'))}"
        for part in ("evaluation", "checkpoints", "samples"):
            if self.of(part) >= 0.5:
                runs += f", {part} {duration(self.of(part))}"
        where = "1 place" if self.places == 1 else f"{self.places} places"
        return (
            f"device time: {self.share(states, whole_machine):.0%} of {where} x {duration(self.wall)} spent "
            f"training, tokenizer and tokens included; of the runs: {runs}; the rest: starting, and places "
            "without a run"
        )
