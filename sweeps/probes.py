"""Calibration before anything has run: a minute of short real training on the device at hand.

- Each tokenizer is timed by itself, as it will be trained, and then the encoding of its tokens: the start of
  each is measured too. Two or three depths of every family follow (the smallest, the largest, and one between
  where there is one family), with every place of the machine taken by the same depth, as the runs will share
  it. Other depths follow from these as from finished runs.
- On GPUs whose sharing is not set, the depths are timed again with 2, 4, … runs on each, for as long as the
  sweep would end sooner (``sweeps.packing``).
- What the probes leave takes the form of a finished job's entry, so that a plan is told in one way only.
- The probes work below the root, on the disk that the sweep will use, and are removed afterwards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scaling.config import ConfigError, LaunchConfig, RunConfig, TokenizerRunConfig, to_dict
from scaling.flops import spent
from scaling.records import RunFolder, read_json
from sweeps import calibration, speed_store
from sweeps.calibration import ImageSpeed, RunSpeed
from sweeps.jobs import PRODUCTS, Job, command, prepare, process_environment
from sweeps.machine import MEMORY_SHARE, PROCESS_BYTES, Allotment, Machine, allot, gpu_groups
from sweeps.packing import MEMORY_SHARE as GPU_SHARE
from sweeps.scheduler import JobState, Result, Scheduler

SECONDS = 5.0
"""Of measured training per probe; its start, evaluation, checkpoint and pictures come to about as much."""
TOKENS_SHARE = 0.5
"""Of that for the encoding of tokens, every batch of which is like the others."""
Stage = Literal["tokenizer", "tokens"]
STAGES: tuple[Stage, ...] = ("tokenizer", "tokens")


@dataclass(frozen=True)
class Probed:
    """What came of a calibration."""

    speeds: tuple[RunSpeed | ImageSpeed, ...]
    notes: tuple[str, ...]
    """What could not be measured."""
    interrupted: bool = False


def probe_machine(
    root: Path,
    machine: Machine,
    launch: LaunchConfig,
    runs: Sequence[RunConfig],
    stages: Sequence[TokenizerRunConfig],
    allotment: Allotment,
    stage_threads: int,
    better: Callable[[Sequence[RunSpeed], int], bool],
    on_tick: Callable[[Sequence[JobState]], None] = lambda states: None,
    seconds: float = SECONDS,
) -> Probed:
    """Time the machine for these runs and tokenizers.

    Args:
        root: the folder of all sweeps.
        allotment: with one run per GPU, or as many as the recipe says.
        better: whether a sweep would end soonest with so many runs on a GPU, by the speeds so far.

    Raises:
        ConfigError: several machines share the recipe's runs, or no depth fits into this one's memory.
    """
    if launch.machines > 1:
        raise ConfigError(
            "--calibrate times one machine, and here several share each run: plan with --launch.machines 1, "
            "or take the times from the first finished runs"
        )
    folder = root / f".calibration-{os.getpid()}"
    chosen, notes = _chosen(runs, machine, launch, allotment)
    speeds: list[RunSpeed | ImageSpeed] = []
    try:
        parts = [(kind, stage) for stage in stages for kind in STAGES]
        jobs = [
            _stage_job(kind, folder / f"{kind}-{i}", stage, launch, stage_threads, seconds)
            for i, (kind, stage) in enumerate(parts)
        ]
        result = _launch(jobs, allotment, on_tick)
        for state, (kind, stage) in zip(result.states, parts, strict=True):
            if state.phase == "done":
                speeds.append(_stage_speed(kind, _read(state), stage, machine, launch, stage_threads))
        number, divided = allotment.per_gpu, allotment
        while not result.interrupted:
            part = folder / f"runs-{number}"
            result, found, words = _probe_runs(part, chosen, launch, machine, divided, seconds, on_tick)
            speeds += found
            notes += [word for word in words if word not in notes]
            number *= 2
            if not _may_share(number, machine, launch, chosen, found, len(runs)):
                break
            if number > 2 and not better([s for s in speeds if isinstance(s, RunSpeed)], number // 2):
                break
            divided = allot(machine, launch, [0] * len(runs), number)
        failed = [f"{s.job.name} could not be timed: {s.reason}" for s in result.failed]
        return Probed(tuple(speeds), tuple(dict.fromkeys(notes + failed)), result.interrupted)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe_depths(depths: Sequence[int], most: int) -> list[int]:
    """The smallest, the largest, and with ``most`` 3 the one nearest to their geometric mean."""
    known = sorted(set(depths))
    if len(known) <= most:
        return known
    middle = (known[0] * known[-1]) ** 0.5
    between = [min(known[1:-1], key=lambda d: abs(d / middle - middle / d))] if most > 2 else []
    return sorted({known[0], *between, known[-1]})


def _chosen(
    runs: Sequence[RunConfig], machine: Machine, launch: LaunchConfig, allotment: Allotment
) -> tuple[list[RunConfig], list[str]]:
    """A run of each depth to be timed, and what is left out for want of memory."""
    families = list(dict.fromkeys(run.model.family for run in runs))
    if allotment.slots[0]:
        room = GPU_SHARE * machine.gpu_memory / allotment.per_gpu if machine.gpu_memory else float("inf")
    else:
        room = MEMORY_SHARE * machine.memory / (len(allotment.slots) * launch.processes)
    chosen: list[RunConfig] = []
    notes: list[str] = []
    for family in families:
        own = {run.model.depth: run for run in reversed(runs) if run.model.family == family}
        fits = [
            d for d, r in own.items() if calibration.closed_memory(r, machine, launch) + PROCESS_BYTES <= room
        ]
        if len(fits) < len(own):
            large = ", ".join(str(d) for d in sorted(set(own) - set(fits)))
            notes.append(f"{family} depth {large}: not timed, it does not fit into this machine's memory")
        chosen += [own[d] for d in probe_depths(fits, 3 if len(families) == 1 else 2)] if fits else []
    if not chosen:
        raise ConfigError(
            "--calibrate: no depth of the recipe fits into this machine's memory; a smaller "
            "--launch.micro-batch changes no result"
        )
    return chosen, notes


def _may_share(
    number: int,
    machine: Machine,
    launch: LaunchConfig,
    chosen: Sequence[RunConfig],
    speeds: Sequence[RunSpeed],
    runs: int,
) -> bool:
    """Whether so many runs on each GPU are worth timing: GPUs, not set by hand, room, and enough runs."""
    groups = len(gpu_groups(machine, launch))
    if not groups or launch.runs_per_gpu or launch.runs_at_once or not speeds or not machine.gpu_memory:
        return False
    smallest = min(s.peak_memory or 0 for s in speeds) + PROCESS_BYTES
    return (number - 1) * groups < runs and number * smallest <= GPU_SHARE * machine.gpu_memory


def _launch(
    jobs: Sequence[Job], allotment: Allotment, on_tick: Callable[[Sequence[JobState]], None]
) -> Result:
    for job in jobs:
        prepare(job.folder, job.config)
    return Scheduler(jobs, allotment.slots, on_tick=on_tick).run()


def _probe_runs(
    folder: Path,
    chosen: Sequence[RunConfig],
    launch: LaunchConfig,
    machine: Machine,
    allotment: Allotment,
    seconds: float,
    on_tick: Callable[[Sequence[JobState]], None],
) -> tuple[Result, list[RunSpeed], list[str]]:
    """Time each run with every place taken by one like it."""
    places, speeds, notes = len(allotment.slots), list[RunSpeed](), list[str]()
    result = Result((), interrupted=False)
    for index, run in enumerate(chosen):
        jobs = [
            _run_job(folder / f"{index}-{place}", run, launch, allotment.threads, seconds)
            for place in range(places)
        ]
        result = _launch(jobs, allotment, on_tick)
        if result.interrupted:
            break
        found = [_read(state) for state in result.states if state.phase == "done"]
        if len(found) < places:
            reason = result.failed[0].reason if result.failed else "no result"
            name = f"{run.model.family} depth {run.model.depth}"
            notes.append(f"{name}, {places} at once: not timed: {reason}")
            continue
        speeds.append(_run_speed(run, machine, allotment, launch, found))
    return result, speeds, notes


def _run_job(folder: Path, run: RunConfig, launch: LaunchConfig, threads: int, seconds: float) -> Job:
    name = f"timing {run.model.family} depth {run.model.depth}"
    weight = float(spent(run, run.total_steps).flops)
    return _job("run", name, folder, run, launch, threads, seconds, weight)


def _stage_job(
    kind: Stage, folder: Path, stage: TokenizerRunConfig, launch: LaunchConfig, threads: int, seconds: float
) -> Job:
    if kind == "tokens":
        seconds *= TOKENS_SHARE
    job = _job(kind, f"timing {kind} {stage.run_id}", folder, stage, launch, threads, seconds, 0.0)
    return replace(job, alone=True)


def _job(
    what: Literal["run", "tokenizer", "tokens"],
    name: str,
    folder: Path,
    config: RunConfig | TokenizerRunConfig,
    launch: LaunchConfig,
    threads: int,
    seconds: float,
    weight: float,
) -> Job:
    return Job(
        name,
        "probe",
        RunFolder(folder),
        command("probe", [what, str(folder), "--seconds", str(seconds)], launch),
        PRODUCTS["probe"],
        environment=process_environment(launch, threads),
        launch=to_dict(replace(launch, threads=threads)),
        weight=weight,
        config=config,
    )


def _read(state: JobState) -> dict[str, Any]:
    """What a probe has measured, and the seconds that it took beside that."""
    found: dict[str, Any] = read_json(state.job.folder.path / state.job.product)
    return found | {"beside": max(0.0, state.seconds - found["inside_seconds"])}


def _run_speed(
    run: RunConfig,
    machine: Machine,
    allotment: Allotment,
    launch: LaunchConfig,
    found: Sequence[dict[str, Any]],
) -> RunSpeed:
    """The mean over the places that were timed side by side."""

    def mean(key: str) -> float:
        return sum(float(f[key]) for f in found) / len(found)

    return calibration.run_speed(
        run, machine, allotment, launch,
        flops_per_second=mean("flops_per_second"),
        evaluation_flops_per_second=mean("evaluation_flops_per_second"),
        other_seconds=mean("beside"),
        checkpoint_seconds=mean("checkpoint_seconds"),
        points=max(speed_store.LOG_POINTS, int(mean("steps"))),
        peak_memory=max(int(f["peak_memory"]) for f in found),
        waited=max((f["waited"] for f in found if f["waited"] is not None), default=None),
    )  # fmt: skip


def _stage_speed(
    kind: Stage,
    found: dict[str, Any],
    stage: TokenizerRunConfig,
    machine: Machine,
    launch: LaunchConfig,
    threads: int,
) -> ImageSpeed:
    """Of a tokenizer's training or of its tokens."""
    train = stage.train
    if kind == "tokenizer":
        evaluations = 1 + sum(
            train.autoencode_steps < step < train.steps
            for step in range(train.checkpoint_every, train.steps, train.checkpoint_every)
        )
        checkpoints = -(-train.steps // train.checkpoint_every)
        speed, points = found["images_per_second"], max(speed_store.LOG_POINTS, found["steps"])
        other = (
            found["beside"]
            + found["once_seconds"]
            + evaluations * found["evaluation_seconds"]
            + checkpoints * found["checkpoint_seconds"]
        )
    else:
        # A token job that has run tells its speed once: it is better than this one, and must replace it.
        speed, points, other = found["sequences_per_second"], 0, found["beside"]
    return ImageSpeed(
        kind, machine.name, threads, launch.processes, calibration.image_precision(kind, stage),
        calibration.image_shape(stage), speed, other, points,
        calibration.image_settings(kind, stage, launch), stage.tokenizer.quantizer, found.get("waited"),
    )  # fmt: skip
