"""Runs of one config and several lengths share the steps in which they are the same (2405.18392).

- Images, draws and, until the decay, learning rate of a step do not depend on a run's length. So the longest
  run of such a group, the trunk, does the stable phase of all, and leaves a checkpoint where each other one,
  a branch, begins its decay.
- A branch is no other kind of run: it has the id, the records and the weights that it would have alone, and
  trains alone when the checkpoint of the trunk is not there or damaged. Its first lines of metrics are the
  trunk's; they travel within the checkpoint, since the trunk's own file is cut back when it resumes.
- ``shared.json`` says which part of it another run did, so that what a sweep has spent can be added up.
- The checkpoints lie in the trunk's ``branches/`` and are not rotated; who starts the runs removes them
  (``sweeps.trunks``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from scaling.checkpoint import Checkpoint, load_checkpoint
from scaling.config import RunConfig
from scaling.records import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharing:
    """What a run takes from another one, and what it leaves for others."""

    trunk: RunFolder | None = None
    """A longer run of the same config."""
    leave: frozenset[int] = frozenset()
    """Steps after which shorter ones begin their decay."""


ALONE = Sharing()


def branch_start(trunk: RunFolder, config: RunConfig) -> Checkpoint | None:
    """The newest sound checkpoint of a trunk that the run of ``config`` can start from; None without one.

    Any before its decay will do; what the trunk did not do for it, it does itself.
    """
    found = load_checkpoint(trunk.branches, upto=config.stable_steps)
    if found is None:
        log.warning("nothing to start from in %s; training from the first step on", trunk.branches)
    return found


def has_left(folder: RunFolder, step: int) -> bool:
    """Whether a sound checkpoint of ``step`` is there already: a branch may be reading it now."""
    found = load_checkpoint(folder.branches, upto=step) if folder.branch(step).exists() else None
    return found is not None and found.step == step


def lines_to_share(folder: RunFolder) -> list[dict[str, Any]]:
    """All lines of metrics so far that every run of the config has."""
    return [line for line in folder.metrics() if line.get("kind") in ("train", "eval")]
