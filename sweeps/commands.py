"""What ``plan``, ``run``, ``tokenize`` and ``status`` do, apart from parsing the command line.

The data is resolved by a function that the caller brings, because a sweep starts training as processes and
imports none of it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from scaling.config import ConfigError, DataConfig, RunConfig, require
from scaling.records import RecordsError, RunFolder
from sweeps import calibration, slurm, speed_store
from sweeps.attempts import FULL
from sweeps.costs import Pricing, Rates, rates
from sweeps.forecasts import Forecasts, MakeForecasts, point_of, surprises
from sweeps.jobs import Job
from sweeps.machine import allot, this_machine
from sweeps.meeting import Follower, Leader
from sweeps.patience import Patience
from sweeps.plan import Plan, Stated, chosen_per_gpu, make_plan, stage_of, stage_threads
from sweeps.presence import present
from sweeps.probes import probe_machine
from sweeps.progress import Progress
from sweeps.recipe import Recipe
from sweeps.scheduler import JobState, Result, Scheduler
from sweeps.share import TimeSpent, time_spent
from sweeps.slurm_queue import Seen, standing
from sweeps.status import beats, read_status, watch
from sweeps.tables import plan_notes, plan_table, size, sweep_folders
from sweeps.trunks import clear

Resolve = Callable[[DataConfig], DataConfig]
CheckData = Callable[[DataConfig], str]
"""The images' fingerprint; raises ``ConfigError`` when they are not there."""
WIDEST = 200


def console() -> Console:
    """Standard output; wide enough for a whole table when it is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDEST)


def plan(recipe: Recipe, root: Path, resolve: Resolve, stated: Stated | None = None) -> Plan:
    """The plan of a sweep on this machine.

    Args:
        resolve: fills in the counts that the recipe leaves to the data.
        stated: a device in place of this machine's.

    Raises:
        ConfigError: the data is needed for that and is not there; the recipe does not fit it or the machine.
    """
    device = recipe.launch.device if stated is None else "cpu"
    return make_plan(recipe, resolve(recipe.data), root, this_machine(device), stated)


def calibrate(made: Plan, check_data: CheckData, as_json: bool) -> int:
    """Time this machine for a plan's runs in a minute of short real training; the exit code.

    Args:
        as_json: standard output is for the plan alone.

    Raises:
        ConfigError: several machines share the runs, or no run fits into this machine.
    """
    out, launch = Console(stderr=True) if as_json else console(), made.recipe.launch
    configs, stages = made.configs, [stage_of(j) for j in made.stage_jobs if j.kind == "tokenizer"]
    alone = allot(
        made.machine,
        launch,
        [calibration.closed_memory(c, made.machine, launch) for c in configs],
        launch.runs_per_gpu or 1,
    )
    if (missing := _missing_data(made, check_data)) is not None:
        say(out, f"note: the images are not there ({missing}); reading them is not timed")
    say(out, f"timing {made.machine.name}, about a minute:")

    def better(speeds: Sequence[calibration.RunSpeed], number: int) -> bool:
        return chosen_per_gpu(configs, calibration.Calibration(tuple(speeds)), made.machine, launch) == number

    display = Progress(out, len(alone.slots), quiet=True)
    with display:
        found = probe_machine(
            made.folders.root, made.machine, launch, configs, stages, alone,
            stage_threads(launch, made.machine), better, display.update,
        )  # fmt: skip
    for note in found.notes:
        say(out, f"note: {note}")
    if found.interrupted:
        say(out, "stopped; nothing is remembered of this calibration")
        return 130
    if not found.speeds:
        say(out, "nothing could be timed; times stay as they were")
        return 1
    speed_store.replace_all(found.speeds)
    return 0


def show_plan(
    made: Plan,
    as_json: bool,
    check_data: CheckData,
    pricing: Pricing | None = None,
    make_forecasts: MakeForecasts | None = None,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Print the plan. A recipe that states its counts can be planned before its data is at hand.

    Data that is plainly not there is told in the words with which ``run`` will refuse.

    Args:
        more: for the JSON alone.

    Raises:
        ConfigError: a price or energy that does not apply.
    """
    pricing = pricing or Pricing()
    costs = rates(made, pricing.price, pricing.energy, pricing.pue)
    forecasts = _forecasts(made, make_forecasts)
    missing = _missing_data(made, check_data)
    if as_json:
        told = {
            "missing_data": missing,
            "costs": costs.to_json(made),
            "forecasts": _forecasts_json(forecasts),
        }
        print(json.dumps(made.to_json() | told | dict(more or {}), indent=1))
        return 0
    out = console()
    if missing is not None:
        say(out, f"MISSING DATA: {missing}", "bold red")
        notes(
            out,
            "'run' and 'tokenize' will stop with this error. --data.path says where the data is; the plan "
            "below has the recipe's own counts of images and classes.\n",
        )
    print_plan(made, out, costs, forecasts)
    if missing is not None:
        say(out, "the data is not there: see the top", "bold red")
    return 0


def launch(made: Plan, jobs: Sequence[Job], check_data: CheckData) -> Result:
    """Look for the data, print the plan, then do what is missing of ``jobs``, under one display.

    Args:
        check_data: asked for the images; they may be gone once the tokens are there.

    Raises:
        ConfigError: no data.
        RecordsError: a folder holds another config, or is made from other images. Nothing has been
            started or written then.
    """
    out = console()
    check_images(made, check_data)
    print_plan(made, out)
    made.write()
    jobs = recheck_tokens(jobs)
    display = Progress(out, len(made.allotment.slots))
    before, started = time_spent(jobs), time.monotonic()

    def on_done(state: JobState) -> None:
        _calibrate(made, state, out)
        clear(made.run_jobs)

    clear(made.run_jobs)  # what a launcher that was killed had no time for
    scheduler = Scheduler(
        jobs,
        made.allotment.slots,
        on_tick=display.update,
        on_done=on_done,
        patience=Patience.of(made.recipe.launch),
    )
    if all(state.phase == "done" for state in scheduler.states):
        out.print("everything is done already; nothing to train")
        return Result(tuple(scheduler.states), interrupted=False)
    with present(made.folders.sweep), display:
        result = _lead(made, scheduler, out)
    wall = time.monotonic() - started
    with contextlib.suppress(OSError):  # a folder that cannot be read now; the report is still to come
        spent = TimeSpent.by(result.states, len(made.allotment.slots), wall, before)
        say(out, spent.told(result.states, whole_machine=not any(made.allotment.slots)))
    tell(result, out)
    tell_unreadable(made, out)
    return result


def follow(made: Plan) -> int:
    """Do this machine's share of every run that machine 0 calls; the exit code.

    Raises:
        RecordsError: machine 0 runs another recipe.
    """
    out, launch = console(), made.recipe.launch
    print_plan(made, out)
    return Follower(
        made.folders.sweep,
        launch.machine_rank,
        made.run_jobs,
        made.allotment.slots[0],
        lambda text: say(out, text),
    ).run()


def _lead(made: Plan, scheduler: Scheduler, out: Console) -> Result:
    """Run the scheduler, and lead the other machines that share its runs meanwhile, if there are any."""
    machines = made.recipe.launch.machines
    if machines == 1 or not any(state.job.kind == "run" for state in scheduler.states):
        return scheduler.run()
    leader = Leader(made.folders.sweep, machines, lambda text: say(out, text))
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


def show_status(sweep: Path, as_json: bool, live: bool, make_forecasts: MakeForecasts) -> int:
    """Print every job's state, once or until nothing is left; nothing is resolved or locked for it.

    Raises:
        ConfigError: to be watched, but not on a terminal.
    """
    if as_json:
        require(not live, "--watch is for a terminal; --json is read once")
        seen = _seen(sweep) or {}
        print(json.dumps({name: _status(folder, seen) for name, folder in sweep_folders(sweep)}, indent=1))
        return 0
    out = console()
    if live:
        require(out.is_terminal, "--watch is for a terminal; without it 'status' prints once")
        with contextlib.suppress(KeyboardInterrupt):  # how a person leaves
            watch(sweep, make_forecasts, out, _seen)
        return 0
    found = read_status(sweep, make_forecasts, _seen(sweep))
    out.print(found.table(out.width))
    for text in found.words():
        say(out, text)
    return 0


def _seen(sweep: Path) -> dict[Path, Seen] | None:
    """What Slurm says of the sweep's jobs; nothing where none was handed to it, None without an answer."""
    folders = {folder.path for _, folder in sweep_folders(sweep)}
    try:
        return slurm.look(sweep.parent, folders)
    except RecordsError as error:  # what the folders say is worth showing all the same
        print(f"note: {error}", file=sys.stderr)
        return None


def _status(folder: RunFolder, seen: Mapping[Path, Seen]) -> dict[str, Any]:
    """A job's status; with what Slurm says of it, where it was handed to Slurm."""
    status, found = folder.status(), seen.get(folder.path)
    if found is None:
        return status
    state, _ = standing(status["state"], found, beats(status))
    return status | {"state": state, "slurm": {"id": found.id, "state": found.state, "reason": found.reason}}


def _forecasts(made: Plan, make_forecasts: MakeForecasts | None) -> Forecasts | None:
    """What the finished runs say of the others; None before any is finished."""
    if make_forecasts is None or not any(run.state == "done" for run in made.runs):
        return None
    varied = (*made.recipe.grid, *made.recipe.zip)
    return make_forecasts(made.folders.sweep, {c.run_id: point_of(c, varied) for c in made.configs})


def _forecasts_json(forecasts: Forecasts | None) -> dict[str, dict[str, float | bool | None]]:
    return {
        run: {
            "loss_last": f.value, "low": f.low, "high": f.high, "level": f.level,
            "reached": f.reached, "outside": f.outside,
        }
        for run, f in (forecasts.runs.items() if forecasts else ())
    }  # fmt: skip


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
            speed_store.add(speed)
    except (OSError, RecordsError) as error:  # records that cannot be read, a home that cannot be written
        say(out, f"note: this speed is not remembered: {error}")


def check_images(made: Plan, check_data: CheckData) -> None:
    stages, needed = made.stage_jobs, _needs_images(made)
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


def _needs_images(made: Plan) -> bool:
    """Whether there is something to be made from them; a check of a finished cache that was broken off asks
    for them itself, should it find damage."""
    return any(
        job.state != "done" and not (job.kind == "tokens" and job.folder.encoded()) for job in made.stage_jobs
    )


def _missing_data(made: Plan, check_data: CheckData) -> str | None:
    """Why the images that are still needed are not there; None when they seem to be.

    Only a folder with nothing for training in it is looked at closer: a plan should not list a million files.
    """
    if made.data.path is None or not _needs_images(made):
        return None
    path = Path(made.data.path)
    if any(any(folder.glob("train*")) for folder in (path, path / "data")):
        return None
    try:
        check_data(made.data)
    except ConfigError as error:
        return str(error)
    return None


def print_plan(
    made: Plan, out: Console, costs: Rates | None = None, forecasts: Forecasts | None = None
) -> None:
    out.print(plan_table(made, out.width, costs, forecasts.runs if forecasts else None))
    told = [*plan_notes(made), *(costs.notes(made) if costs else [])]
    if forecasts is not None:
        if any(found.reached is None for found in forecasts.runs.values()):
            told.append("forecast: loss_last of a new run at 95 %, by the law fitted to the finished runs")
        told += [*surprises(forecasts), *([forecasts.note] if forecasts.note else [])]
    notes(out, *told, *_warnings(made))


def _warnings(made: Plan) -> list[str]:
    found = []
    if made.machine.gpu_memory and (
        large := [r for r in made.runs if r.memory_per_process > made.machine.gpu_memory]
    ):
        found.append(
            f"warning: {large[0].run} needs about {size(large[0].memory_per_process)} of a GPU's "
            f"{size(made.machine.gpu_memory)}; a smaller --launch.micro-batch changes no result"
        )
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
        say(out, "stopped; the same command goes on from what is there")
        return
    for state in result.failed:
        say(out, f"\n{state.job.name}: {state.phase}: {state.reason}")
        if state.code not in (None, 2):
            for text in state.log_tail():
                say(out, f"    {text}")
        say(out, f"    log: {state.log}")
    for state in result.missing:
        if state.phase == "blocked" and state.reason:
            say(out, f"{state.job.name}: blocked: {state.reason}")
    if result.missing:
        names = ", ".join(state.job.name for state in result.missing)
        say(out, f"\nmissing: {names}; the same command tries again and goes on from what is there")


def tell_unreadable(made: Plan, out: Console) -> None:
    for tokens in (job.folder for job in made.stage_jobs if job.kind == "tokens"):
        for split, count in tokens.unreadable().items():
            say(
                out,
                f"note: {count} unreadable {split} images were skipped; {tokens.path / 'log.txt'} names them",
            )


def notes(out: Console, *texts: str) -> None:
    """Notes of one or more lines, each wrapped between words and indented where it goes on."""
    for text in texts:
        for line in text.split("\n"):
            indent = " " * (2 + len(line) - len(line.lstrip()))
            for part in textwrap.wrap(
                line, out.width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
            ) or [""]:
                say(out, part)


def say(out: Console, text: str, style: str = "") -> None:
    """Print a line, unless the output is a file on a disk that is full: that ends no sweep."""
    try:
        out.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
    except OSError as error:
        if error.errno not in FULL:
            raise


def runs_done(result: Result) -> bool:
    """Whether at least one run is there to report."""
    return any(state.job.kind == "run" and state.phase == "done" for state in result.states)
