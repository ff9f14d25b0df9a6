"""A sweep under Slurm, as a person commands it: planned with what each job asks for, handed over, ended.

Nothing here decides what a run is: where it is trained is no part of a recipe.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from scaling.config import ConfigError, RunConfig
from scaling.flops import checkpoint_bytes
from scaling.records import RecordsError
from sweeps import commands, slurm, speed_store
from sweeps.calibration import Calibration, closed_memory, micro_batch
from sweeps.commands import CheckData, Resolve, recheck_tokens
from sweeps.jobs import Job
from sweeps.machine import PROCESS_BYTES, Machine
from sweeps.plan import Plan, make_plan, stage_of
from sweeps.progress import Progress
from sweeps.recipe import Recipe
from sweeps.scheduler import JobState, Phase, Result
from sweeps.slurm_options import MARGIN, Resources, SlurmOptions
from sweeps.slurm_queue import standing
from sweeps.stage_memory import encoding_memory, kept_originals, training_memory
from sweeps.trunks import after_trunks, clear

FIRST_LOOK_SECONDS, LOOK_SECONDS = 1.0, 30.0
"""Between two questions to Slurm, which many people ask."""
CUDA_BYTES = 4 * 2**30
"""Main memory that a process with a GPU takes: its libraries, pinned buffers and the device's context."""
PHASES: dict[str, Phase] = {
    "queued": "waiting", "starting": "running", "running": "running", "waiting": "blocked",
    "done": "done", "failed": "failed", "blocked": "blocked",
    "interrupted": "interrupted", "cancelled": "interrupted",
}  # fmt: skip
"""Of the display, for where a job stands with Slurm."""


def plan(recipe: Recipe, root: Path, resolve: Resolve, options: SlurmOptions) -> Plan:
    """The plan of a sweep that Slurm places: its nodes are not this machine.

    Raises:
        ConfigError: as ``commands.plan``; the recipe says which machines share its runs; options that do not
            fit.
    """
    launch, data = recipe.launch, resolve(recipe.data)
    if launch.machines > 1:
        raise ConfigError(
            f"launch.machines is {launch.machines}; with --executor slurm it is --nodes-per-run that says "
            "how many nodes share a run"
        )
    asked = options.resources(launch, None)
    count = min(len(recipe.runs(data)), options.array_limit or sys.maxsize)
    recipe = replace(recipe, launch=replace(launch, processes=asked.processes, runs_at_once=count))
    partition = f", partition {options.partition}" if options.partition else ""
    gpus = tuple(str(number) for number in range(asked.gpus or 0))
    # A core for each process, as is asked for without launch.threads.
    machine = Machine(f"Slurm{partition}", asked.processes, sys.maxsize, gpus)
    return make_plan(recipe, data, root, machine)


def requests(made: Plan, options: SlurmOptions) -> dict[Path, Resources]:
    """What each job asks for, by its folder: memory, and a time limit where the plan knows a time."""
    launch, known = made.recipe.launch, speed_store.load()
    found = {}
    for job in made.jobs:
        if isinstance(job.config, RunConfig):
            asked = options.resources(launch, job.config.model.depth)
            memory = _run_memory(made, asked, job.config, known)
        else:
            asked = options.resources(launch, None)
            memory = _stage_memory(made, asked, job, known)
        seconds = job.seconds
        if seconds is not None:
            seconds *= launch.processes / asked.all_processes
        found[job.folder.path] = options.sized(asked, asked.processes * memory, seconds)
    return found


def _run_memory(made: Plan, asked: Resources, config: RunConfig, known: Calibration) -> int:
    """Bytes of main memory that each process of a run is expected to need.

    On GPUs the tensors are theirs, and a checkpoint passes through main memory on its way to the disk.
    """
    if asked.gpus is not None:
        return CUDA_BYTES + checkpoint_bytes(config.model)
    machine = replace(made.machine, gpus=())
    launch = replace(
        made.recipe.launch,
        processes=asked.processes,
        machines=asked.nodes,
        main_address="other",
        runs_at_once=None,
    )
    closed = closed_memory(config, machine, launch)
    return known.memory(config, closed, machine, made.allotment.threads, launch) or closed + PROCESS_BYTES


def _stage_memory(made: Plan, asked: Resources, job: Job, known: Calibration) -> int:
    """Bytes of main memory that each process of a tokenizer or token job is expected to need."""
    launch, stage = made.recipe.launch, stage_of(job)
    measured = known.image_memory(job.kind, stage, made.machine, launch)
    if measured is not None:
        return measured
    if asked.gpus is not None:
        return CUDA_BYTES + kept_originals(stage.data)
    if job.kind == "tokens":
        return encoding_memory(stage) + PROCESS_BYTES
    return training_memory(stage, micro_batch(stage.train.batch, launch.processes, launch)) + PROCESS_BYTES


def show_plan(made: Plan, as_json: bool, check_data: CheckData, options: SlurmOptions) -> int:
    """Print the plan and every call of sbatch that ``run`` would make for it; nothing is handed over.

    What is in Slurm's hands already is not asked for: ``run`` would leave it out.
    """
    sweep, asked = made.folders.sweep, requests(made, options)
    jobs = slurm.missing(after_trunks(recheck_tokens(made.jobs)), set(), made.recipe.launch)
    ids: dict[Path, str] = {}
    calls: list[dict[str, Any]] = []
    for number, group in enumerate(slurm.groups(jobs, asked, options.array_limit), 1):
        needs = sorted({ids[path] for job in group.jobs for path in job.needs if path in ids})
        ids |= {job.folder.path: f"JOB{number}" for job in group.jobs}
        words = ["sbatch", *slurm.arguments(sweep, group, needs, options)]
        calls.append({"job": f"JOB{number}", "sbatch": words, "names": [job.name for job in group.jobs]})
    code = commands.show_plan(made, as_json, check_data, more={"slurm": calls})
    if as_json or not calls:
        return code
    out = commands.console()
    for note in _notes(asked, options):
        commands.say(out, note)
    for call in calls:
        commands.say(out, f"\n{call['job']}: {', '.join(call['names'])}\n    {shlex.join(call['sbatch'])}")
    lines = slurm.script(sweep / slurm.FOLDER / "SUBMISSION.json").splitlines()
    commands.say(
        out, "\n".join(["\neach with this on its standard input:", *(f"    {line}" for line in lines)])
    )
    return code


def _notes(asked: Mapping[Path, Resources], options: SlurmOptions) -> list[str]:
    """How memory and time were told."""
    found = asked.values()
    own = f"{MARGIN:g} times what the plan expects, rounded up"
    memory = own if any(r.memory for r in found) else "as --sbatch says"
    if options.time:
        limit = "as --time says"
    elif any(r.time for r in found):
        limit = f"{own}, at most a day; the cluster's default where the plan knows none"
    else:
        limit = "the cluster's default, since the plan knows none; --time gives one"
    return [f"asked of Slurm: memory {memory}; time {limit}"]


def submit(made: Plan, check_data: CheckData, options: SlurmOptions, wait: bool) -> Result:
    """Look for the data, print the plan, hand what is missing to Slurm; with ``wait`` stay until the end.

    Raises:
        ConfigError: no data; no Slurm, or it refuses.
        RecordsError: as ``commands.launch``; Slurm does not answer.
    """
    out = commands.console()
    commands.check_images(made, check_data)
    commands.print_plan(made, out)
    made.write()
    clear(made.run_jobs)  # what branches that are done have left
    jobs, sweep = after_trunks(recheck_tokens(made.jobs)), made.folders.sweep
    if all(job.state == "done" and not job.recheck for job in jobs):
        out.print("everything is done already; nothing to train")
        return Result(tuple(JobState(job, "done") for job in jobs), interrupted=False)
    states = [JobState(job) for job in jobs]
    planned = slurm.PlannedOn(made.machine.name, len(made.allotment.slots), made.allotment.threads)
    asked, launch = requests(made, options), made.recipe.launch
    has = slurm.submit(sweep, jobs, asked, launch, planned, options, lambda text: commands.say(out, text))
    if wait:
        return _wait(made, states, out)
    commands.say(
        out,
        "Slurm has it: 'status' shows how it goes on, 'cancel' ends it, and the same command hands over "
        "again what has failed, and writes the report when all is done"
        if has
        else "nothing was queued: what is missing has diverged, or starts from a run that has",
    )
    return Result(tuple(states), interrupted=False)


def _wait(made: Plan, states: list[JobState], out: Console) -> Result:
    """Watch Slurm's jobs until none is active any more; they do not need this process."""
    pause, display = FIRST_LOOK_SECONDS, Progress(out, len(made.allotment.slots))
    try:
        with display:
            active = True
            while active:
                time.sleep(pause)
                pause = min(1.5 * pause, LOOK_SECONDS)
                try:
                    active = _look(made.folders.root, states)
                except RecordsError as error:  # a controller may be started again; the jobs go on meanwhile
                    commands.say(out, f"note: {error}; asking again")
                display.update(states)
    except KeyboardInterrupt:
        commands.say(out, "no longer watching; the jobs stay in Slurm's hands ('cancel' ends them)")
        return Result(tuple(states), interrupted=True)
    clear(made.run_jobs)
    result = Result(tuple(states), interrupted=False)
    commands.tell(result, out)
    commands.tell_unreadable(made, out)
    return result


def _look(root: Path, states: Sequence[JobState]) -> bool:
    """Bring the states up to date; whether a job is still in Slurm's hands."""
    seen = slurm.look(root, {state.job.folder.path for state in states})
    for state in states:
        folder = state.job.folder
        found, recorded = seen.get(folder.path), state.job.state
        standing_now, why = standing(recorded, found)
        state.phase = PHASES[standing_now]
        if state.phase in ("failed", "interrupted", "blocked"):
            state.reason = str(folder.status().get("error", why))
            state.code = folder.status().get("exit_code")
    return any(seen[s.job.folder.path].active for s in states if s.job.folder.path in seen)


def cancel(sweep: Path) -> int:
    """End what Slurm has of a sweep, running or waiting; the exit code."""
    ended = slurm.cancel(sweep.parent, sweep.name)
    for seen in ended:
        print(f"cancelled: {seen}")
    if not ended:
        print("nothing of this sweep runs or waits under Slurm")
    return 0
