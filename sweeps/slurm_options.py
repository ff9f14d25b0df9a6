"""What a person says about Slurm on the command line, and what each job asks Slurm for.

These are options of ``plan`` and ``run`` and no part of a recipe: where a sweep is trained says nothing about
what it is, and the same recipe runs on a laptop. No run's id depends on them.

    --nodes-per-run 1 24=2          one node; two for runs of depth 24
    --time 4:00:00 24=2-00:00:00    likewise, in Slurm's own notation

What is asked for beside that follows from the plan: memory from what a run is expected to need, and a time
limit where none is given and the plan knows a time. Both have a margin and are rounded up to few sizes (1,
1.5, 2, 3, 4, 6, 8, ...), so that runs that differ little are one array. ``--sbatch=--mem=...`` says memory
itself.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scaling.config import ConfigError, LaunchConfig

OURS = {
    "--array": "--array-limit limits it",
    "--comment": "a submission is found again by it",
    "--dependency": "runs wait for their tokens by it",
    "--job-name": "it is the sweep's",
    "--nodes": "use --nodes-per-run",
    "--ntasks": "there is one task per node, which starts launch.processes",
    "--ntasks-per-node": "there is one task per node, which starts launch.processes",
    "--cpus-per-task": "use --launch.threads",
    "--gpus": "use --gpus-per-run",
    "--gpus-per-node": "use --gpus-per-run",
    "--time": "use --time of this command",
    "--output": "it is the log.txt of each run's folder",
    "--error": "it is the log.txt of each run's folder",
    "--open-mode": "a log is appended to",
    "--no-requeue": "a run that has to leave goes on later",
    "--wait": "use --wait of this command",
    "--test-only": "use 'plan' with the same options",
    "--wrap": "what runs is the sweep",
}
"""Options of sbatch that cannot be given, and why or what to do instead."""
SHORT = {
    "-a": "--array", "-d": "--dependency", "-J": "--job-name", "-N": "--nodes", "-n": "--ntasks",
    "-c": "--cpus-per-task", "-G": "--gpus", "-t": "--time", "-o": "--output", "-e": "--error",
    "-W": "--wait",
}  # fmt: skip
MARGIN = 1.5
"""Of what the plan tells of memory and time to what is asked for."""
LEAST_MEMORY = 2**30
LEAST_SECONDS, MOST_SECONDS = 1800.0, 86400.0
"""Of a time limit that follows from the plan. A run that needs longer than the most goes on after it."""


@dataclass(frozen=True)
class SlurmOptions:
    """Options of ``plan`` and ``run`` that only ``--executor slurm`` uses."""

    executor: Literal["local", "slurm"] = "local"
    """Train on this machine, or hand one job per run to Slurm."""
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
    words DEPTH=TIME for single depths. Without it 1.5 times what the plan expects, if it knows."""
    leave_seconds: int = 120
    """Slurm: how long before its time limit a job is told to checkpoint and leave."""
    array_limit: int | None = None
    """Slurm: most runs at once."""
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
        for word in self._further():
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            name = SHORT.get(name, name)
            if name in OURS:
                raise ConfigError(f"--sbatch: {name} cannot be set here: {OURS[name]}")

    def resources(self, launch: LaunchConfig, depth: int | None) -> Resources:
        """What a run of this depth asks for; None: a tokenizer's job, which is on one node.

        Raises:
            ConfigError: a number that is none; GPUs that cannot be shared evenly by the nodes, or that the
                recipe does not use; no GPUs for a recipe that needs them; a time limit that is none.
        """
        if self.gpus_per_run and launch.device == "cpu":
            raise ConfigError(
                "--gpus-per-run asks for GPUs, but launch.device is 'cpu'; leave one of them out, or give "
                "--launch.device auto"
            )
        if not self.gpus_per_run and launch.device == "cuda":
            raise ConfigError("launch.device is 'cuda'; --gpus-per-run says how many GPUs a run asks for")
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
        limit = limit_seconds(time) if time is not None else math.inf
        if limit <= self.leave_seconds:
            raise ConfigError(
                f"--time {time} is no longer than the {self.leave_seconds} seconds before its end at which a "
                "job is told to leave; give it more, or a smaller --leave-seconds"
            )
        return Resources(
            nodes if depth is not None else 1, processes, gpus, processes * (launch.threads or 1), time=time
        )

    def sized(self, asked: Resources, memory: int | None, seconds: float | None) -> Resources:
        """With memory, and a time limit if none was given, for what the plan expects.

        Args:
            memory: bytes on each node; None when unknown, and then the cluster's default holds.
            seconds: expected time; likewise.
        """
        if memory is not None and not any(word.startswith("--mem") for word in self._further()):
            asked = dataclasses.replace(asked, memory=rounded_up(MARGIN * memory, LEAST_MEMORY))
        if seconds is not None and asked.time is None:
            wanted = max(MARGIN * seconds, LEAST_SECONDS) + self.leave_seconds
            minutes = rounded_up(min(wanted, MOST_SECONDS) / 60, 1)
            asked = dataclasses.replace(asked, time=str(min(minutes, int(MOST_SECONDS) // 60)))
        return asked

    def arguments(self) -> list[str]:
        """The options of sbatch that are the same for all jobs."""
        named = [
            f"--{name}={value}"
            for name in ("partition", "account", "qos", "constraint")
            if (value := getattr(self, name)) is not None
        ]
        return [*named, *self._further()]

    def _further(self) -> list[str]:
        try:
            return shlex.split(self.sbatch or "")
        except ValueError as error:
            raise ConfigError(f"--sbatch {self.sbatch}: {error}") from None


@dataclass(frozen=True)
class Resources:
    """What one job asks for; runs that ask for the same are one array."""

    nodes: int
    processes: int
    """On each node."""
    gpus: int | None
    """On each node."""
    cores: int
    """On each node."""
    memory: int | None = None
    """Bytes on each node; None for the cluster's default."""
    time: str | None = None
    """Likewise."""

    @property
    def all_processes(self) -> int:
        """On all nodes."""
        return self.nodes * self.processes

    def arguments(self) -> list[str]:
        """As options of sbatch; one task per node, which starts the processes."""
        wanted = [f"--nodes={self.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={self.cores}"]
        if self.gpus is not None:
            wanted.append(f"--gpus-per-node={self.gpus}")
        if self.memory is not None:
            wanted.append(f"--mem={-(-self.memory // 2**20)}M")
        if self.time is not None:
            wanted.append(f"--time={self.time}")
        return wanted


def rounded_up(value: float, least: int) -> int:
    """The next of ``least`` times 1, 1.5, 2, 3, 4, 6, 8, ..., in whole numbers."""
    size = least
    while size < value:
        size *= 2
    between = size * 3 // 4
    return between if max(value, least) <= between else size


def limit_seconds(text: str) -> float:
    """A time limit in Slurm's notation: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; infinite for UNLIMITED.

    Raises:
        ConfigError: none of these.
    """
    if text.lower() in ("unlimited", "infinite"):
        return math.inf
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise ConfigError(f"--time {text}: expected minutes, H:M:S, D-H or D-H:M:S")
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


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
