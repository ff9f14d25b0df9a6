"""A trunk's job under Slurm sets its branches free, since Slurm knows jobs and no checkpoints.

- A branch is handed over with a dependency on the whole job of its trunk (``afterok``). As soon as the trunk
  has left the checkpoint that a branch starts from, the trunk's job takes this dependency away: from then on
  the branch is a job like others, and starts beside its trunk.
- No result hangs on that. Where it does not come about (the trunk's job was killed, Slurm was silent), a
  branch starts when its trunk has ended well, and if that has not, Slurm cancels the branch and the next
  ``run`` hands it over again.
- What a branch waits for besides, its tokens, its trunk has waited for too; only its turn in a lane stays.
- A trunk that was queued again does so again. Slurm is asked first, so that nothing is done to a job that has
  started, or has got the id of a branch of long ago.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scaling.records import RecordsError, RunFolder
from sweeps import slurm, slurm_queue

LOOK_SECONDS = 5.0
"""Between two looks for a checkpoint."""


@dataclass
class Branches:
    """Of one trunk, seen from its job."""

    trunk: RunFolder
    say: Callable[[str], None]
    _over: set[Path] = field(default_factory=set)
    """Branches that wait no more."""
    _next: float = 0.0

    def set_free(self, now: bool = False) -> None:
        """Those whose checkpoint is there.

        Args:
            now: however short the last look is ago.
        """
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        try:
            for folder, left in self._ready().items():
                self._set_free(folder, left)
        except (RecordsError, OSError) as error:  # it is looked again, and the trunk trains on
            self.say(f"note: its branches still wait: {error}")

    def _ready(self) -> dict[Path, str]:
        """Folders of the branches that can start, and what they are to wait for all the same."""
        sweep, real = self.trunk.path.parent, Path(os.path.realpath(self.trunk.path))
        found = {}
        for made in slurm.submissions(sweep.parent, sweep.name):
            for folder, start in zip(made.jobs, made.starts, strict=True):
                if start is not None and start.trunk == real and folder not in self._over:
                    found[folder] = (start.step, made.turn)
        return {folder: turn for folder, (step, turn) in found.items() if self.trunk.branch(step).exists()}

    def _set_free(self, folder: Path, left: str) -> None:
        sweep = self.trunk.path.parent
        seen = slurm.look(sweep.parent, [folder]).get(folder)
        if seen is None:  # it is being handed over at this moment
            return
        if not seen.queued:
            self._over.add(folder)
        elif slurm_queue.wait_for(seen.id, left):
            self.say(f"{folder.name} can start")
            self._over.add(folder)
