"""Several processes agree on where to go on from, when to checkpoint and when to leave, at little cost.

- A signal reaches the processes at different steps, and clocks differ. All must leave after the same
  step, or one waits for the others for ever: so they ask each other, and an answer is everybody's.
- Asking synchronises the device with the host, which a fast step would feel; not asking leaves a launcher
  waiting, which kills what has not left in 30 seconds. So they ask about every two seconds: the main
  process measures how long a step takes, and what it found travels with the answer. Every process
  then computes the same step to ask at next.
- Each process reads the checkpoint for itself, and a file system may show an older state of the folder to one
  machine than to another. Processes that go on from different steps would train on without a word, so they
  compare first.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from scaling.records import RecordsError

AGREE_SECONDS = 2.0
MOST_STEPS = 100
"""Steps may slow down while nobody asks: never more than this many without."""


def steps_until_next(seconds_per_step: float) -> int:
    """Steps until the processes ask again: two seconds' worth, from 1 to ``MOST_STEPS``."""
    return max(1, int(min(MOST_STEPS, AGREE_SECONDS / max(seconds_per_step, 1e-9))))


def same_start(accelerator: Accelerator, checkpoints: Path, step: int) -> None:
    """Every process calls it with the step of the checkpoint that it has found (0: none), before it goes on.

    Raises:
        RecordsError: (in all of them) they have found different ones; another try may end otherwise.
    """
    mine = torch.tensor([step], device=accelerator.device)
    found = accelerator.gather(mine).tolist()
    if len(set(found)) > 1:
        late = OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # mostly: it counts as one
        raise RecordsError(
            f"{checkpoints}: the processes go on from different checkpoints (steps "
            f"{', '.join(map(str, found))} by process): not all see the folder alike, or one is damaged; "
            "start again, or remove the newest checkpoint"
        ) from late


class Agreement:
    """One answer for all processes to "leave?" and "checkpoint now?".

    Args:
        accelerator: the processes; alone, one asks itself after every step.
        start: steps done before.
    """

    def __init__(self, accelerator: Accelerator, start: int) -> None:
        self._accelerator = accelerator
        self._asked, self._next = start, start + 1
        self._answered = time.monotonic()
        self._pace = AGREE_SECONDS  # unknown yet: ask after the next step

    def ask(self, done: int, leave: bool, due: bool) -> tuple[bool, bool]:
        """Whether all processes leave, and whether all checkpoint, after step ``done``.

        Every process calls it after every step. Whoever wants something goes on wanting it until the next
        time they ask.
        """
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return leave, due
        if done < self._next:
            return False, False
        pace = self._pace if accelerator.is_main_process else 0.0
        mine = torch.tensor([leave, due, pace], dtype=torch.float32, device=accelerator.device)
        wish_leave, wish_checkpoint, pace = accelerator.reduce(mine, reduction="sum").tolist()
        # From answer to answer, when the device has caught up with the host; told when they ask next.
        now = time.monotonic()
        self._pace = (now - self._answered) / (done - self._asked)
        self._answered, self._asked, self._next = now, done, done + steps_until_next(pace)
        return wish_leave > 0, wish_checkpoint > 0
