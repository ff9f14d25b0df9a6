"""What ``plan``, ``run``, ``tokenize``, ``status`` and ``sample`` do, apart from parsing the command line.

The data is resolved by a function that the caller brings, because a sweep starts training as processes and
imports none of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from scaling.config import DataConfig
from scaling.records import RecordsError, RunFolder
from sweeps import calibration
from sweeps.jobs import Job
from sweeps.machine import this_machine
from sweeps.plan import Plan, make_plan
from sweeps.progress import Progress
from sweeps.recipe import Recipe
from sweeps.scheduler import JobState, Result, Scheduler
from sweeps.tables import plan_table, read_sweep, size, status_table, sweep_folders

Resolve = Callable[[DataConfig], DataConfig]
WIDEST = 200


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
    return make_plan(recipe, resolve(recipe.data), root, this_machine())


def show_plan(made: Plan, as_json: bool) -> int:
    """Print the plan. A recipe that states its counts can be planned before its data is at hand."""
    if as_json:
        print(json.dumps(made.to_json(), indent=1))
        return 0
    _print_plan(made, console())
    return 0


def launch(made: Plan, jobs: Sequence[Job], check_data: Callable[[DataConfig], object]) -> Result:
    """Print the plan, then do what is missing of ``jobs``, under one display.

    Args:
        check_data: raises ``ConfigError`` when the data is not there; asked while images are still needed.

    Raises:
        ConfigError: no data.
        RecordsError: a folder holds another config. Nothing has been started then.
    """
    out = console()
    _print_plan(made, out)
    if any(job.state != "done" for job in made.jobs[:2]):
        check_data(made.data)
    made.write()
    jobs = recheck_tokens(jobs)
    display = Progress(out, len(made.allotment.slots))
    scheduler = Scheduler(
        jobs, made.allotment.slots, on_tick=display.update, on_done=lambda state: _calibrate(made, state)
    )
    if all(state.phase == "done" for state in scheduler.states):
        out.print("everything is done already; nothing to train")
        return Result(tuple(scheduler.states), interrupted=False)
    with display:
        result = scheduler.run()
    _tell(result, out)
    return result


def recheck_tokens(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, the token cache looked through byte by byte when anything is to be trained from it.

    A damaged shard is found by its checksum and encoded again, a cache of another tokenizer refused. So is
    a finished cache when it is asked for alone.
    """
    runs = [job for job in jobs if job.kind == "run"]
    if runs and all(job.state == "done" for job in runs):
        return list(jobs)
    return [replace(job, recheck=job.kind == "tokens") for job in jobs]


def show_status(sweep: Path, as_json: bool) -> int:
    """Print every job's state; nothing is imported, resolved or locked for it."""
    if as_json:
        print(json.dumps({name: folder.status() for name, folder in sweep_folders(sweep)}, indent=1))
    else:
        console().print(status_table(sweep))
    return 0


def finished_run(sweep: Path, depth: int) -> tuple[RunFolder, Path]:
    """The first finished run of a depth and the folder of its tokenizer's run.

    Raises:
        RecordsError: the sweep has no finished run of that depth.
    """
    value = read_sweep(sweep)
    depths = set()
    for name in value["runs"]:
        folder = RunFolder(sweep / name)
        model = folder.config()["model"]
        if folder.status()["state"] == "done":
            depths.add(model["depth"])
            if model["depth"] == depth:
                return folder, (sweep / str(value["tokenizer"])).resolve()
    known = ", ".join(map(str, sorted(depths))) or "none yet"
    raise RecordsError(f"{sweep}: no finished run of depth {depth}; finished depths: {known}")


def _calibrate(made: Plan, state: JobState) -> None:
    """Remember the speed of a job that ran from start to end in one go."""
    job, launch_config = state.job, made.recipe.launch
    if not state.from_scratch or state.seconds <= 0:
        return
    speed: calibration.RunSpeed | calibration.ImageSpeed | None
    if job.kind == "run":
        assert job.config is not None
        speed = calibration.measure_run(
            job.folder, job.config, made.machine, made.allotment, launch_config.processes, state.seconds
        )
    else:
        stage = made.tokenizer_run
        images = calibration.job_images(job.kind, stage)
        speed = calibration.ImageSpeed(
            job.kind,
            made.machine.name,
            made.machine.cores,
            calibration.image_shape(stage),
            images / state.seconds,
        )
    if speed is not None:
        calibration.add(made.folders.root, speed)


def _print_plan(made: Plan, out: Console) -> None:
    out.print(plan_table(made, out.width))
    for warning in _warnings(made):
        out.print(warning, highlight=False, markup=False, soft_wrap=True)


def _warnings(made: Plan) -> list[str]:
    found = []
    path = made.data.path
    if path is not None and not Path(path).exists() and made.jobs[1].state != "done":
        found.append(f"note: no data at {path} (set --data.path); planned with the counts of the recipe")
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


def _tell(result: Result, out: Console) -> None:
    """What did not work, why, and where to read more; what to do next."""

    def say(text: str) -> None:
        out.print(text, highlight=False, markup=False, soft_wrap=True)

    if result.interrupted:
        say("stopped; the same command goes on from the last checkpoints")
        return
    for state in result.failed:
        say(f"\n{state.job.name}: {state.phase}: {state.reason}")
        if state.code not in (None, 2):
            for text in state.log_tail():
                say(f"    {text}")
        say(f"    log: {state.log}")
    if result.missing:
        names = ", ".join(state.job.name for state in result.missing)
        say(f"\nmissing: {names}; the same command tries again and goes on from what is there")


def runs_done(result: Result) -> bool:
    """Whether at least one run is there to report."""
    return any(state.job.kind == "run" and state.phase == "done" for state in result.states)
