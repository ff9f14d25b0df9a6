"""What a person says about Slurm on the command line, and what each job asks Slurm for.

These are options of ``run`` and no part of a recipe: where a sweep is trained says nothing about what it is,
and the same recipe runs on a laptop. No run's id depends on them.

    --nodes-per-run 1 24=2          one node; two for runs of depth 24
    --time 4:00:00 24=2-00:00:00    likewise, in Slurm's own notation
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scaling.config import ConfigError, LaunchConfig


@dataclass(frozen=True)
class SlurmOptions:
    """Options of ``run`` that only ``--executor slurm`` uses."""

    executor: Literal["local", "slurm"] = "local"
    """Train on this machine, or hand one job per run to Slurm."""
    wait: bool = False
    """Slurm: stay until all jobs have ended, then write the report; else return once they are queued."""
    partition: str | None = None
    """Slurm: the partition; by default the cluster's own default, as for account, qos and constraint."""
    account: str | None = None
    """Slurm: the account that pays."""
    qos: str | None = None
    """Slurm: the quality of service."""
    constraint: str | None = None
    """Slurm: features that the nodes must have."""
    gpus_per_run: tuple[str, ...] = ()
    """Slurm: GPUs per run over all its nodes, one process each; more words DEPTH=N for single depths. Without
    it no GPU is asked for, and launch.processes are started on each node."""
    nodes_per_run: tuple[str, ...] = ("1",)
    """Slurm: nodes per run; more words DEPTH=N for single depths."""
    time: tuple[str, ...] = ()
    """Slurm: time limit of a job (minutes, H:M:S, D-H), after which it is queued again and goes on; more
    words DEPTH=TIME for single depths."""
    leave_seconds: int = 120
    """Slurm: how long before its time limit a job is told to checkpoint and leave."""
    array_limit: int | None = None
    """Slurm: most runs at once among those that ask for the same resources."""
    sbatch: str | None = None
    """Slurm: further options of sbatch, as one text: --sbatch="--mem=64G --exclude=n7"."""

    def check(self) -> None:
        """Refuse what is not used, or is no number of anything.

        Raises:
            ConfigError: of one line.
        """
        for field in dataclasses.fields(SlurmOptions):
            if self.executor == "local" and getattr(self, field.name) != field.default:
                raise ConfigError(f"--{field.name.replace('_', '-')} is for --executor slurm only")
        for name in ("array_limit", "leave_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")

    def resources(self, launch: LaunchConfig, depth: int | None) -> Resources:
        """What a run of this depth asks for; None: a tokenizer's job, which is on one node.

        Raises:
            ConfigError: a number that is none, or GPUs that cannot be shared evenly by the nodes.
        """
        nodes = _count("--nodes-per-run", self.nodes_per_run, depth)
        processes, gpus = launch.processes, None
        if self.gpus_per_run:
            total = _count("--gpus-per-run", self.gpus_per_run, depth)
            if total % nodes:
                of = f" (of depth {depth})" if depth is not None else ""
                raise ConfigError(
                    f"--gpus-per-run {total} cannot be shared evenly by --nodes-per-run {nodes}{of}"
                )
            processes = gpus = total // nodes
        time = _chosen("--time", self.time, depth) if self.time else None
        return Resources(nodes if depth is not None else 1, processes, gpus, time)

    def arguments(self) -> list[str]:
        """The options of sbatch that are the same for all jobs."""
        named = [
            f"--{name}={value}"
            for name in ("partition", "account", "qos", "constraint")
            if (value := getattr(self, name)) is not None
        ]
        return [*named, *shlex.split(self.sbatch or "")]


@dataclass(frozen=True)
class Resources:
    """What one job asks for; runs that ask for the same are one array."""

    nodes: int
    processes: int
    """On each node."""
    gpus: int | None
    """On each node."""
    time: str | None

    def arguments(self, threads: int | None) -> list[str]:
        """As options of sbatch; one task per node, which starts the processes."""
        wanted = [f"--nodes={self.nodes}", "--ntasks-per-node=1"]
        if threads is not None:
            wanted.append(f"--cpus-per-task={self.processes * threads}")
        if self.gpus is not None:
            wanted.append(f"--gpus-per-node={self.gpus}")
        if self.time is not None:
            wanted.append(f"--time={self.time}")
        return wanted


def _chosen(flag: str, words: Sequence[str], depth: int | None) -> str:
    """The word for this depth: DEPTH=VALUE if there is one, else the plain VALUE."""
    plain = [word for word in words if "=" not in word]
    if len(plain) != 1:
        raise ConfigError(
            f"{flag} takes one value, then DEPTH=VALUE for single depths; got {' '.join(words)}"
        )
    by_depth = dict(word.split("=", 1) for word in words if "=" in word)
    for key in by_depth:
        if not key.isdigit():
            raise ConfigError(f"{flag}: {key}={by_depth[key]}: {key!r} is no depth")
    return by_depth.get(str(depth), plain[0])


def _count(flag: str, words: Sequence[str], depth: int | None) -> int:
    word = _chosen(flag, words, depth)
    if not word.isdigit() or int(word) < 1:
        raise ConfigError(f"{flag} must be a number from 1 on, got {word!r}")
    return int(word)
