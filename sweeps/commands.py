"""What ``plan``, ``run``, ``tokenize`` and ``status`` do, apart from parsing the command line.

The data is resolved by a function that the caller brings, because a sweep starts training as processes and
imports none of it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from scaling.config import ConfigError, DataConfig, RunConfig
from scaling.records import RecordsError, RunFolder
from sweeps import calibration, slurm
from sweeps.jobs import Job
from sweeps.machine import Machine, this_machine
from sweeps.meeting import Follower, Leader
from sweeps.plan import Plan, make_plan, stage_of, stage_threads
from sweeps.progress import Progress
from sweeps.recipe import Recipe
from sweeps.scheduler import JobState, Phase, Result, Scheduler
from sweeps.slurm_options import SlurmOptions
from sweeps.slurm_queue import Seen, standing
from sweeps.tables import plan_notes, plan_table, size, status_table, sweep_folders

Resolve = Callable[[DataConfig], DataConfig]
CheckData = Callable[[DataConfig], str]
"""The images' fingerprint; raises ``ConfigError`` when they are not there."""
WIDEST = 200
FIRST_LOOK_SECONDS, LOOK_SECONDS = 1.0, 30.0
"""Between two questions to Slurm, which many people ask."""
PHASES: dict[str, Phase] = {
    "queued": "waiting", "starting": "running", "running": "running", "waiting": "blocked",
    "done": "done", "failed": "failed", "blocked": "blocked",
    "interrupted": "interrupted", "cancelled": "interrupted",
}  # fmt: skip
"""Of the display, for where a job stands with Slurm."""


def console() -> Console:
    """Standard output; wide enough for a whole table when it is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDEST)


def plan(recipe: Recipe, root: Path, resolve: Resolve) -> Plan:
    """The plan of a sweep on this machine.

    Args:
        resolve: fills in the counts that the recipe leaves to the data.

    Raises:
        ConfigError: the data is needed for that and is not there; the recipe does not fit it or the machine.
    """
    return make_plan(recipe, resolve(recipe.data), root, this_machine(recipe.launch.device))


def show_plan(made: Plan, as_json: bool, check_data: CheckData) -> int:
    """Print the plan. A recipe that states its counts can be planned before its data is at hand.

    Data that is plainly not there is told in the words with which ``run`` will refuse.
    """
    missing = _missing_data(made, check_data)
    if as_json:
        print(json.dumps(made.to_json() | {"missing_data": missing}, indent=1))
        return 0
    out = console()
    _print_plan(made, out)
    if missing is not None:
        data = made.data
        _say(out, f"\nMISSING DATA: {missing}", "bold red")
        _say(
            out,
            f"'run' and 'tokenize' will stop with this error. Planned with the recipe's own counts "
            f"({data.train_images} training and {data.val_images} validation images, "
            f"{data.num_classes} classes); --data.path says where the data is.",
        )
    return 0


def launch(made: Plan, jobs: Sequence[Job], check_data: CheckData) -> Result:
    """Print the plan, then do what is missing of ``jobs``, under one display.

    Args:
        check_data: asked for the images; they may be gone once the tokens are there.

    Raises:
        ConfigError: no data.
        RecordsError: a folder holds another config, or is made from other images. Nothing has been
            started or written then.
    """
    out = console()
    _print_plan(made, out)
    _check_images(made, check_data)
    made.write()
    jobs = recheck_tokens(jobs)
    display = Progress(out, len(made.allotment.slots))
    scheduler = Scheduler(
        jobs, made.allotment.slots, on_tick=display.update, on_done=lambda state: _calibrate(made, state, out)
    )
    if all(state.phase == "done" for state in scheduler.states):
        out.print("everything is done already; nothing to train")
        return Result(tuple(scheduler.states), interrupted=False)
    with display:
        result = _lead(made, scheduler, out)
    tell(result, out)
    _tell_unreadable(made, out)
    return result


def follow(made: Plan) -> int:
    """Do this machine's share of every run that machine 0 calls; the exit code.

    Raises:
        RecordsError: machine 0 runs another recipe.
    """
    out, launch = console(), made.recipe.launch
    _print_plan(made, out)
    return Follower(
        made.folders.sweep,
        launch.machine_rank,
        made.run_jobs,
        made.allotment.slots[0],
        lambda text: _say(out, text),
    ).run()


def _lead(made: Plan, scheduler: Scheduler, out: Console) -> Result:
    """Run the scheduler, and lead the other machines that share its runs meanwhile, if there are any."""
    machines = made.recipe.launch.machines
    if machines == 1 or not any(state.job.kind == "run" for state in scheduler.states):
        return scheduler.run()
    leader = Leader(made.folders.sweep, machines, lambda text: _say(out, text))
    show, code = scheduler.on_tick, 1

    def tick(states: Sequence[JobState]) -> None:
        leader.tick(running=any(s.process is not None and s.job.kind == "run" for s in states))
        show(states)

    scheduler.on_tick, scheduler.ready = tick, leader.ready
    try:
        result = scheduler.run()
        code = result.exit_code
        return result
    finally:
        leader.end(code)


def recheck_tokens(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, a token cache looked through byte by byte when anything is to be trained from it.

    A damaged shard is found by its checksum and encoded again, a cache of another tokenizer refused. So is
    a finished cache when it is asked for alone.
    """

    def wanted(tokens: Job) -> bool:
        users = [job for job in jobs if tokens.folder.path in job.needs]
        return not users or any(job.state != "done" for job in users)

    return [replace(job, recheck=job.kind == "tokens" and wanted(job)) for job in jobs]


def show_status(sweep: Path, as_json: bool) -> int:
    """Print every job's state; nothing is imported, resolved or locked for it."""
    folders, out = sweep_folders(sweep), console()
    try:
        seen = slurm.look(sweep.parent, {folder.path for _, folder in folders})
    except RecordsError as error:  # what the folders say is worth showing all the same
        seen = {}
        if not as_json:
            _say(out, f"note: {error}")
    if as_json:
        print(json.dumps({name: _status(folder, seen) for name, folder in folders}, indent=1))
    else:
        out.print(status_table(sweep, seen))
    return 0


def _status(folder: RunFolder, seen: Mapping[Path, Seen]) -> dict[str, Any]:
    """A job's status; with what Slurm says of it, where it was handed to Slurm."""
    status, found = folder.status(), seen.get(folder.path)
    if found is None:
        return status
    state, _ = standing(status["state"], found)
    return status | {"state": state, "slurm": {"id": found.id, "state": found.state, "reason": found.reason}}


def plan_for_slurm(recipe: Recipe, root: Path, resolve: Resolve, options: SlurmOptions) -> Plan:
    """The plan of a sweep that Slurm places: its nodes are not this machine.

    Raises:
        ConfigError: as ``plan``; the recipe says which machines share its runs; options that do not fit.
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
    gpus = tuple(str(number) for number in range(asked.processes if launch.device != "cpu" else 0))
    machine = Machine(f"Slurm{partition}", count * asked.processes, sys.maxsize, gpus)
    return make_plan(recipe, data, root, machine)


def submit(made: Plan, check_data: CheckData, options: SlurmOptions) -> Result:
    """Print the plan, then hand what is missing to Slurm; with ``options.wait`` stay until all has ended.

    Raises:
        ConfigError: no data; no Slurm, or it refuses.
        RecordsError: as ``launch``; Slurm does not answer.
    """
    out = console()
    _print_plan(made, out)
    _check_images(made, check_data)
    made.write()
    jobs, sweep = recheck_tokens(made.jobs), made.folders.sweep
    states = [JobState(job) for job in jobs]
    if all(job.state == "done" and not job.recheck for job in jobs):
        out.print("everything is done already; nothing to train")
        states = [JobState(job, "done") for job in jobs]
        return Result(tuple(states), interrupted=False)
    slurm.submit(sweep, jobs, made.recipe.launch, options, lambda text: _say(out, text))
    if options.wait:
        return _wait(made, states, out)
    _say(
        out,
        "Slurm has it: 'status' shows how it goes on, 'cancel' ends it, and the same command hands over "
        "again what has failed, and writes the report when all is done",
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
                    _say(out, f"note: {error}; asking again")
                display.update(states)
    except KeyboardInterrupt:
        _say(out, "no longer watching; the jobs stay in Slurm's hands ('cancel' ends them)")
        return Result(tuple(states), interrupted=True)
    result = Result(tuple(states), interrupted=False)
    tell(result, out)
    _tell_unreadable(made, out)
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


def _calibrate(made: Plan, state: JobState, out: Console) -> None:
    """Remember the speed of a job that ran from start to end in one go."""
    job, launch_config, machine = state.job, made.recipe.launch, made.machine
    if not state.from_scratch or state.seconds <= 0:
        return
    speed: calibration.RunSpeed | calibration.ImageSpeed | None
    try:
        if isinstance(job.config, RunConfig):
            speed = calibration.measure_run(
                job.folder, job.config, machine, made.allotment, launch_config, state.seconds
            )
        else:
            assert job.kind in ("tokenizer", "tokens")
            threads = stage_threads(launch_config, machine)
            speed = calibration.measure_images(
                job.kind, job.folder, stage_of(job), machine, threads, launch_config, state.seconds
            )
        if speed is not None:
            calibration.add(speed)
    except (OSError, RecordsError) as error:  # records that cannot be read, a home that cannot be written
        _say(out, f"note: this speed is not remembered: {error}")


def _check_images(made: Plan, check_data: CheckData) -> None:
    stages = made.stage_jobs
    needed = any(job.state != "done" for job in stages)
    if not needed and made.data.source == "hf":
        return  # its fingerprint is the name and the counts, which the config has
    try:
        fingerprint = check_data(made.data)
    except ConfigError:
        if needed:
            raise
        return
    for job in stages:
        job.folder.check_data(fingerprint)


def _missing_data(made: Plan, check_data: CheckData) -> str | None:
    """Why the images that are still needed are not there; None when they seem to be.

    Only a folder with nothing for training in it is looked at closer: a plan should not list a million files.
    """
    if made.data.path is None or all(j.state == "done" for j in made.stage_jobs if j.kind == "tokens"):
        return None
    path = Path(made.data.path)
    if any(any(folder.glob("train*")) for folder in (path, path / "data")):
        return None
    try:
        check_data(made.data)
    except ConfigError as error:
        return str(error)
    return None


def _print_plan(made: Plan, out: Console) -> None:
    out.print(plan_table(made, out.width))
    for warning in (*plan_notes(made), *_warnings(made)):
        _say(out, warning)


def _warnings(made: Plan) -> list[str]:
    found = []
    if made.peak_memory > made.machine.memory and not made.allotment.slots[0]:
        found.append(
            f"warning: the largest runs need about {size(made.peak_memory)} of memory, this machine has "
            f"{size(made.machine.memory)}; a smaller --launch.micro-batch changes no result"
        )
    place = next(p for p in (made.folders.root, *made.folders.root.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if made.disk > free:
        found.append(f"warning: the sweep may take {size(made.disk)} on {place}, which has {size(free)} free")
    return found


def tell(result: Result, out: Console) -> None:
    """What did not work, why, and where to read more; what to do next."""
    if result.interrupted:
        _say(out, "stopped; the same command goes on from what is there")
        return
    for state in result.failed:
        _say(out, f"\n{state.job.name}: {state.phase}: {state.reason}")
        if state.code not in (None, 2):
            for text in state.log_tail():
                _say(out, f"    {text}")
        _say(out, f"    log: {state.log}")
    if result.missing:
        names = ", ".join(state.job.name for state in result.missing)
        _say(out, f"\nmissing: {names}; the same command tries again and goes on from what is there")


def _tell_unreadable(made: Plan, out: Console) -> None:
    for tokens in (job.folder for job in made.stage_jobs if job.kind == "tokens"):
        for split, count in tokens.unreadable().items():
            _say(
                out,
                f"note: {count} unreadable {split} images were skipped; {tokens.path / 'log.txt'} names them",
            )


def _say(out: Console, text: str, style: str = "") -> None:
    out.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def runs_done(result: Result) -> bool:
    """Whether at least one run is there to report."""
    return any(state.job.kind == "run" and state.phase == "done" for state in result.states)
