"""One job by itself, under a sweep's own scheduler and display."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from scaling.config import LaunchConfig
from scaling.records import RecordsError
from sweeps.attempts import REFUSED
from sweeps.commands import console, tell
from sweeps.jobs import Job, process_environment
from sweeps.machine import allot, this_machine
from sweeps.plan import stage_threads
from sweeps.progress import Progress
from sweeps.scheduler import Scheduler


def run_alone(job: Job, launch: LaunchConfig, display_on: Console | None = None) -> int:
    """Run one job, with the machine to itself; the exit code.

    Args:
        display_on: where to show how it goes on, if that is a terminal, and nothing after it has ended; by
            default on standard output, with its end.

    Raises:
        ConfigError: fewer GPUs than asked for.
        RecordsError: it refused; its own words.
    """
    machine = this_machine(launch.device)
    job = replace(job, environment=process_environment(launch, stage_threads(launch, machine)))
    display = Progress(display_on or console(), 1, quiet=display_on is not None)
    shown = display_on is None or display_on.is_terminal
    scheduler = Scheduler([job], allot(machine, launch, [0]).slots)
    if shown:
        scheduler.on_tick = display.update
        with display:
            result = scheduler.run()
    else:
        result = scheduler.run()
    (state,) = result.states
    if state.phase == "failed" and state.code == REFUSED:
        raise RecordsError(state.reason)
    tell(result, display_on or console())
    return result.exit_code
