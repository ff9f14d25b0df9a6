"""A plan: what a recipe comes to on this machine, in numbers, before anything runs. No torch.

Costs are exact where there is a closed form (parameters, FLOPs, tokens) and estimates where the machine
decides (memory, disk, time). The plan is a pure function of the recipe, the machine and what is on disk,
always in the same order: tokenizers, then the runs by family, depth and seed.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.config import DataConfig, LaunchConfig, RunConfig, TokenizerRunConfig, to_dict
from scaling.flops import checkpoint_bytes, params, params_total, spent, token_bytes
from scaling.records import ListedRun, RunFolder, write_json
from sweeps import speed_store
from sweeps.calibration import Calibration, Estimate, cached_images, closed_memory, training_flops
from sweeps.devices import Device
from sweeps.jobs import PACKAGE_ROOT, Folders, Job, prepare, run_job, tokenizer_jobs
from sweeps.machine import PROCESS_BYTES, Allotment, Machine, allot, gpu_groups
from sweeps.packing import makespan, runs_per_gpu
from sweeps.recipe import Recipe, tokenizer_runs
from sweeps.trunks import own_part, shares, start_of

CHECKPOINTS = 3
"""Two are kept, a third is being written."""


@dataclass(frozen=True)
class PlannedRun:
    """One run in DESIGN's words and units."""

    run: str
    family: str
    depth: int
    seed: int
    width: int
    params: int
    params_total: int
    batch: int
    steps: int
    tokens: int
    epochs: float
    flops: int
    """Of the whole run, as it is recorded and as laws need it."""
    start: int
    """Steps that its trunk does for it."""
    flops_spent: int
    """Of the steps that it does itself."""
    setting: str
    """What ``grid`` and ``zip`` set for it."""
    memory: int
    """Bytes of all its processes on one machine, at their peak."""
    memory_per_process: int
    memory_measured: bool
    """Whether that was told from what was measured on this machine, not from the closed form alone."""
    disk: int
    """Bytes at their most: checkpoints, those for branches too, and final weights."""
    seconds: float | None
    """Expected, of this run by itself."""
    state: str


@dataclass(frozen=True)
class Stated:
    """A device that a person states in place of the one at hand, and how well it will be used."""

    device: Device
    mfu: float
    """Share of the device's peak at which the exact FLOPs are done."""

    def seconds(self, config: RunConfig, launch: LaunchConfig, start: int = 0) -> float:
        """FLOPs from step ``start`` on / (mfu · peak), over all processes of the run."""
        rate = self.mfu * self.device.peak(config.train.precision)
        return training_flops(config, start) / (rate * launch.processes * launch.machines)

    def machine(self, here: Machine, launch: LaunchConfig) -> Machine:
        """A machine with as many of the devices as the recipe's runs at once take."""
        count = launch.processes * (launch.runs_at_once or 1)
        return Machine(
            self.device.name, here.cores, here.memory, tuple(map(str, range(count))), self.device.memory
        )


@dataclass(frozen=True)
class Plan:
    """Every job of a sweep with what it costs."""

    recipe: Recipe
    data: DataConfig
    folders: Folders
    machine: Machine
    allotment: Allotment
    configs: tuple[RunConfig, ...]
    runs: tuple[PlannedRun, ...]
    jobs: tuple[Job, ...]
    """Each tokenizer and its token cache, then the runs in the order of ``runs``."""
    estimates: tuple[Estimate | None, ...]
    """The time of each job and what it was learnt from; None where nothing like it was measured."""
    stated: Stated | None = None
    """The device that the times are of; None for the one at hand."""

    @property
    def stage_jobs(self) -> tuple[Job, ...]:
        """Tokenizers and token caches."""
        return self.jobs[: -len(self.runs)]

    @property
    def run_jobs(self) -> tuple[Job, ...]:
        """The jobs of ``runs``."""
        return self.jobs[-len(self.runs) :]

    def families_of(self, stage: TokenizerRunConfig) -> list[str]:
        """The families that are trained on a tokenizer's tokens."""
        ids = [(c.model.family, c.tokenizer_run.run_id) for c in self.configs]
        return list(dict.fromkeys(family for family, run_id in ids if run_id == stage.run_id))

    @property
    def disk(self) -> int:
        """Bytes that the jobs still to do may take."""
        runs = sum(r.disk for r in self.runs if r.state != "done")
        return runs + sum(cache_bytes(job) for job in self.stage_jobs if job.state != "done")

    @property
    def peak_memory(self) -> int:
        """Bytes of the largest runs that train side by side."""
        return sum(sorted((r.memory for r in self.runs), reverse=True)[: len(self.allotment.slots)])

    @property
    def seconds_sum(self) -> float | None:
        """The times of all jobs still to do, added; None when one is unknown."""
        counted = self.jobs if self.stated is None else self.run_jobs
        left = [j.seconds for j in counted if j.state != "done"]
        return None if None in left else sum(s or 0.0 for s in left)

    @property
    def device_seconds(self) -> float | None:
        """Seconds of all GPUs that the runs still to do take, added; None without GPUs, or where a run's time
        is unknown. Tokenizers and token caches count where their times are known."""
        launch = self.recipe.launch
        runs = [r.seconds for r in self.runs if r.state != "done"]
        if not any(self.allotment.slots) or None in runs:
            return None
        shared = self.allotment.per_gpu
        stages = sum(j.seconds or 0.0 for j in self.stage_jobs if j.state != "done")
        per_run = launch.processes * launch.machines / shared
        return sum(s or 0.0 for s in runs) * per_run + stages * launch.processes

    @property
    def seconds(self) -> float | None:
        """Expected time on the clock until everything is done, with as many runs at once as there are
        places; None when a job's time is unknown. On a stated device it is of the runs alone: a tokenizer's
        FLOPs have no closed form."""
        counted = self.jobs if self.stated is None else self.run_jobs
        left = [(j.kind, j.seconds, j.weight + j.behind) for j in counted if j.state != "done"]
        if any(seconds is None for _, seconds, _ in left):
            return None
        first = sum(s or 0.0 for kind, s, _ in left if kind != "run")
        runs = [s or 0.0 for kind, s, _ in sorted(left, key=lambda j: -j[2]) if kind == "run"]
        return first + makespan(runs, len(self.allotment.slots))

    def to_json(self) -> dict[str, Any]:
        """The plan for other programs."""
        return {
            "name": self.recipe.name,
            "machine": to_dict(self.machine),
            "runs_at_once": len(self.allotment.slots),
            "threads": self.allotment.threads,
            "jobs": [
                {"job": j.kind, "folder": str(j.folder.path), "state": j.state, "seconds": j.seconds}
                | {"families": self.families_of(stage_of(j))}
                for j in self.stage_jobs
            ],
            "runs": [
                dataclasses.asdict(run) | {"seconds_from": None if found is None else to_dict(found)}
                for run, found in zip(self.runs, self.estimates[-len(self.runs) :], strict=True)
            ],
            "total": {
                "flops": sum(r.flops for r in self.runs),
                "flops_spent": sum(r.flops_spent for r in self.runs),
                "flops_to_do": sum(r.flops_spent for r in self.runs if r.state != "done"),
                "peak_memory": self.peak_memory,
                "disk_to_do": self.disk,
                "seconds_to_do_sum": self.seconds_sum,
                "seconds_to_do": self.seconds,
            },
        }

    def write(self) -> None:
        """Make every folder with its config, and ``sweep.json``, before anything starts.

        Raises:
            RecordsError: a folder holds another config.
        """
        for job in self.jobs:
            assert job.config is not None  # make_plan gives every job one
            prepare(job.folder, job.config)
        value = {
            "name": self.recipe.name,
            "recipe": to_dict(dataclasses.replace(self.recipe, data=self.data)),
            "runs": [dataclasses.asdict(self._listed(config)) for config in self.configs],
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": code_commit(),
        }
        write_json(self.folders.sweep / "sweep.json", value)

    def _listed(self, config: RunConfig) -> ListedRun:
        stage = config.tokenizer_run
        tokenizer, tokens = (
            f"../{folder.relative_to(self.folders.root)}"
            for folder in (self.folders.tokenizer(stage), self.folders.tokens(stage))
        )
        return ListedRun(config.run_id, config.model.family, tokenizer, tokens)


def make_plan(
    recipe: Recipe, data: DataConfig, root: Path, machine: Machine, stated: Stated | None = None
) -> Plan:
    """Plan a sweep.

    Args:
        data: the recipe's data with all counts known.
        root: the folder of all sweeps.
        stated: a device to plan for in place of the machine's own.

    Raises:
        ConfigError: the recipe does not fit the data or the machine.
        RecordsError: a status file is damaged.
    """
    root = root.absolute()
    if data.path is not None:
        data = dataclasses.replace(data, path=str(Path(data.path).expanduser().absolute()))
    runs = recipe.runs(data)
    resolved = {train: train.resolved() for train in {c.tokenizer_train for c in runs}}
    configs = tuple(dataclasses.replace(c, tokenizer_train=resolved[c.tokenizer_train]) for c in runs)
    stages = tokenizer_runs(configs)
    launch, folders = recipe.launch, Folders(root, root / recipe.name)
    if stated is not None:
        machine, launch = stated.machine(machine, launch), dataclasses.replace(launch, device="cuda")
    calibration = Calibration() if stated is not None else speed_store.load()
    memories = [closed_memory(c, machine, launch) for c in configs]
    allotment = allot(machine, launch, memories, chosen_per_gpu(configs, calibration, machine, launch))

    threads = stage_threads(launch, machine)
    jobs, estimates = tokenizer_jobs(folders, stages, launch, threads), list[Estimate | None]()
    for index, job in enumerate(jobs):
        found = calibration.image_job(job.kind, stage_of(job), machine, threads, launch)
        estimates.append(found)
        jobs[index] = dataclasses.replace(job, seconds=found.seconds if found else None)
    planned = []
    for config, (job, start), closed, place in zip(
        configs,
        _run_jobs(configs, folders, launch, allotment.threads),
        memories,
        recipe.places(),
        strict=True,
    ):
        if stated is None:
            found = calibration.run(config, machine, allotment, launch, start)
        else:
            found = Estimate(stated.seconds(config, launch, start), measured=False)
        memory = calibration.memory(config, closed, machine, allotment.threads, launch)
        estimates.append(found)
        jobs.append(dataclasses.replace(job, seconds=found.seconds if found else None))
        planned.append(_planned(config, jobs[-1], start, closed, memory, launch.processes, place.label))
    return Plan(
        *(recipe, data, folders, machine, allotment, configs),
        *(tuple(planned), tuple(jobs), tuple(estimates), stated),
    )


def chosen_per_gpu(
    configs: Sequence[RunConfig], calibration: Calibration, machine: Machine, launch: LaunchConfig
) -> int:
    """How many runs share a GPU: what the recipe says, else what was measured to end the sweep soonest."""
    groups = len(gpu_groups(machine, launch))
    if launch.runs_per_gpu is not None or launch.machines > 1 or not groups:
        return launch.runs_per_gpu or 1
    heaviest_first = sorted(configs, key=lambda c: -spent(c, c.total_steps).flops)
    seconds: dict[int, list[float | None]] = {}
    memories: list[int] = []
    for number in sorted({speed.runs_per_gpu for speed in calibration.runs} | {1}):
        divided = allot(machine, launch, [0] * len(configs), number)
        found = [calibration.run(c, machine, divided, launch) for c in heaviest_first]
        seconds[number] = [f.seconds if f else None for f in found]
        if number == 1:
            for config in configs:
                closed = closed_memory(config, machine, launch)
                known = calibration.memory(config, closed, machine, divided.threads, launch)
                memories.append((known or closed) + PROCESS_BYTES)
    return runs_per_gpu(seconds, memories, machine.gpu_memory, groups)


def stage_of(job: Job) -> TokenizerRunConfig:
    """The config of a tokenizer or token job."""
    assert isinstance(job.config, TokenizerRunConfig)
    return job.config


def cache_bytes(job: Job) -> int:
    """Disk that a token job's cache takes; 0 for another job."""
    if job.kind != "tokens":
        return 0
    stage = stage_of(job)
    return token_bytes(stage.tokenizer, cached_images(stage.data))


def stage_threads(launch: LaunchConfig, machine: Machine) -> int:
    """CPU threads per process of the tokenizer and token jobs, which have the machine to themselves."""
    return launch.threads or max(1, machine.cores // launch.processes)


def code_commit() -> str | None:
    """The commit of the code that runs, marked when it was changed since; None outside a checkout."""
    git = ["git", "-C", str(PACKAGE_ROOT)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False
        ).returncode
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + (" (changed)" if changed else "")


def _run_jobs(
    configs: Sequence[RunConfig], folders: Folders, launch: LaunchConfig, threads: int
) -> list[tuple[Job, int]]:
    """A job for every run, and the steps that its trunk does for it; trunks weigh with their branches."""
    found: dict[str, tuple[Job, int]] = {}
    parts = zip(configs, shares(configs), strict=True)
    for config, share in sorted(parts, key=lambda part: part[1].trunk is not None):  # trunks first
        trunk = None if share.trunk is None else found[share.trunk][0]
        start = start_of(RunFolder(folders.sweep / config.run_id), share, trunk)
        weight = own_part(config, start).flops
        job = run_job(folders, config, launch, threads, weight, share.trunk, share.start, share.leave)
        found[config.run_id] = job, start
        if trunk is not None and start:
            found[trunk.name] = dataclasses.replace(trunk, behind=trunk.behind + weight), 0
    return [found[config.run_id] for config in configs]


def _planned(
    config: RunConfig, job: Job, start: int, closed: int, measured: int | None, processes: int, setting: str
) -> PlannedRun:
    model, train, steps = config.model, config.train, config.total_steps
    process_memory = closed + PROCESS_BYTES if measured is None else measured
    total, images = spent(config, steps), config.data.train_images
    assert images is not None  # RunConfig has checked it
    checkpoints = CHECKPOINTS + len(job.leave)
    return PlannedRun(
        run=config.run_id,
        family=model.family,
        depth=model.depth,
        seed=config.seed,
        width=model.width,
        params=params(model),
        params_total=params_total(model),
        batch=train.batch,
        steps=steps,
        tokens=total.tokens,
        epochs=steps * train.batch / images,
        flops=total.flops,
        start=start,
        flops_spent=own_part(config, start).flops,
        setting=setting,
        memory=processes * process_memory,
        memory_per_process=process_memory,
        memory_measured=measured is not None,
        disk=checkpoints * checkpoint_bytes(model) + 4 * params_total(model),
        seconds=job.seconds,
        state=job.state,
    )
