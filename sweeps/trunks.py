"""Which runs of a sweep share their stable phase, what that saves, and what is cleared away afterwards.

- Runs that are the same but for length and decay (``train.schedule: wsd``) are a group; the one that is
  stable for longest is its trunk, each other one a branch, which starts from the trunk's checkpoint
  (``scaling.branches``). It changes no run's id, result or recorded C; ``shared.json``, and ``flops_spent``
  of the plan, say what it cost.
- A run that keeps weights along the way (``evaluation.snapshots``) before its decay trains alone, since the
  trunk keeps none for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from scaling.config import ConfigError, RunConfig, from_dict, identity
from scaling.flops import Spent, spent
from scaling.records import RecordsError, RunFolder
from sweeps.designs import LENGTHS
from sweeps.jobs import Job

OWN = (*LENGTHS, "decay", "decay_shape")
"""What runs of one group may differ in: it changes nothing before the decay."""


@dataclass(frozen=True)
class Share:
    """A run's part in its group."""

    trunk: str | None = None
    """The run that it starts from; None for one that trains alone or is a trunk."""
    start: int = 0
    """Steps that its trunk does for it."""
    leave: tuple[int, ...] = ()
    """A trunk's: after these steps it leaves a checkpoint."""


def shares(configs: Sequence[RunConfig]) -> list[Share]:
    """The part of every run, in their order."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        if config.train.schedule == "wsd":
            groups.setdefault(_group(config), []).append(config)
    found: dict[str, Share] = {}
    for group in groups.values():
        trunk = max(group, key=lambda c: (c.stable_steps, c.total_steps))
        branches = [c for c in group if c is not trunk and _can_branch(c)]
        found |= {c.run_id: Share(trunk.run_id, c.stable_steps) for c in branches}
        found[trunk.run_id] = Share(leave=tuple(sorted({c.stable_steps for c in branches})))
    return [found.get(config.run_id, Share()) for config in configs]


def own_part(config: RunConfig, start: int) -> Spent:
    """What a run that starts after ``start`` steps costs itself."""
    whole, before = spent(config, config.total_steps), spent(config, start)
    return Spent(whole.tokens - before.tokens, whole.flops - before.flops)


def start_of(folder: RunFolder, share: Share, trunk: Job | None) -> int:
    """The steps that are, or will be, done for a run by its trunk, as far as the disk knows.

    Args:
        folder: of the run.
        trunk: the job of its trunk.
    """
    if trunk is None:
        return 0
    if any(folder.checkpoints.glob("step-*")):
        return int(folder.shared()["step"])
    if trunk.state != "done" or folder.status()["state"] == "done":
        return share.start
    # A trunk that was done before this run was asked for has left what its branches of then needed.
    left = [int(path.name.removeprefix("step-")) for path in trunk.folder.branches.glob("step-*")]
    return max((step for step in left if step <= share.start), default=0)


def after_trunks(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, where none can wait for a file: a branch needs all of its trunk until its step is there."""
    return [
        job if job.lacks is None else dataclasses.replace(job, needs=(*job.needs, job.lacks.path))
        for job in jobs
    ]


def clear(jobs: Sequence[Job]) -> None:
    """Remove the checkpoints of every trunk that no branch needs any more; not now, where a folder cannot be
    read now."""
    for trunk in jobs:
        branches = [job for job in jobs if job.trunk is not None and job.trunk.path == trunk.folder.path]
        with contextlib.suppress(OSError):
            if (
                trunk.folder.branches.exists()
                and all(job.state == "done" for job in (trunk, *branches))
                and not _wanted(trunk)
            ):
                shutil.rmtree(trunk.folder.branches, ignore_errors=True)


def _wanted(trunk: Job) -> bool:
    """Whether a run of its group is not done that lies in the sweep's folder, though these jobs lack it: the
    same sweep may have been asked for with other lengths, before or by another launcher."""
    assert isinstance(trunk.config, RunConfig)
    group = _group(trunk.config)
    for file in trunk.folder.path.parent.glob("*/config.json"):
        folder = RunFolder(file.parent)
        with contextlib.suppress(RecordsError, ConfigError):  # of an older form, which nobody can train
            config = from_dict(RunConfig, folder.config())
            if config.train.schedule != "wsd" or _group(config) != group:
                continue
            if folder.status()["state"] != "done" or not folder.weights.exists():
                return True
    return False


def _group(config: RunConfig) -> str:
    value = identity(config)
    value["train"] = {key: v for key, v in value["train"].items() if key not in OWN}
    return json.dumps(value, sort_keys=True)


def _can_branch(config: RunConfig) -> bool:
    steps = config.snapshot_steps.values()
    return config.stable_steps > 0 and all(step > config.stable_steps for step in steps)
