"""Plans and states as tables in the terminal, in units that a person reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.records import RecordsError, RunFolder, read_json

if TYPE_CHECKING:
    from rich.table import Table

    from sweeps.plan import Plan

STALE_SECONDS = 30.0
"""A running job writes its heartbeat every few seconds; after this silence it is taken for dead."""
WIDE = 140
"""Columns that the whole plan needs."""
DERIVED = ("depth", "width", "total", "batch", "steps", "epochs")


def number(value: float) -> str:
    """Three digits and a metric letter: 1230000 → 1.23M; whole numbers below 1000 stay as they are."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def size(value: float) -> str:
    """Bytes in binary units."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{value / 2**power:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def plan_table(plan: Plan, width: int = WIDE) -> Table:
    """One row per job, totals below; on a narrow terminal without what follows from the rest."""
    from rich.table import Table

    table = Table(title=f"sweep '{plan.recipe.name}' in {plan.folders.sweep}", title_justify="left", box=None)
    left = [r for r in plan.runs if r.state != "done"]
    cache = {"disk": size(plan.cache_bytes)}
    rows = [
        {"run": job.name, "time": _time(job.seconds), "state": _to_do(job.state)}
        | (cache if job.kind == "tokens" else {})
        for job in plan.jobs[:2]
    ]
    rows += [
        {
            "run": run.run if width >= WIDE else run.run.rpartition("-")[0],
            "depth": str(run.depth),
            "width": str(run.width),
            "N": number(run.params),
            "total": number(run.params_total),
            "batch": str(run.batch),
            "steps": str(run.steps),
            "tokens": number(run.tokens),
            "epochs": f"{run.epochs:.3g}",
            "FLOPs": f"{run.flops:.3g}",
            "memory": size(run.memory),
            "disk": size(run.disk),
            "time": _time(run.seconds),
            "state": _to_do(run.state),
        }
        for run in plan.runs
    ]
    totals = {
        "run": f"to do: {len(left)} of {len(plan.runs)}",
        "tokens": number(sum(r.tokens for r in left)),
        "FLOPs": f"{sum(r.flops for r in left):.3g}",
        "memory": size(plan.peak_memory),
        "disk": size(plan.disk),
        "time": _time(plan.seconds),
    }
    headings = [h for h in rows[-1] if width >= WIDE or h not in DERIVED]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(heading, "") for heading in headings))
    table.add_section()
    table.add_row(*(totals.get(heading, "") for heading in headings), style="bold")
    places, threads = len(plan.allotment.slots), plan.allotment.threads
    table.caption_justify = "left"
    table.caption = f"{plan.machine.name}: {places} at once, {threads} CPU threads per process" + (
        "" if plan.seconds is not None else "; time is told once this machine has finished a sweep like this"
    )
    return table


def status_table(sweep: Path) -> Table:
    """State, step, loss, speed, heartbeat and error of every job of a started sweep.

    Raises:
        RecordsError: the sweep was not started yet, or a file is damaged.
    """
    from rich.table import Table

    table = Table(title=f"sweep '{sweep.name}' in {sweep}", title_justify="left", box=None)
    table.add_column("job", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("step", "train loss", "images/s", "heartbeat"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("error", overflow="fold")
    for name, folder in sweep_folders(sweep):
        status = folder.status()
        age = time.time() - status["heartbeat"] if "heartbeat" in status else None
        state = str(status["state"])
        if state == "running" and (age is None or age > STALE_SECONDS):
            state = "running? (no heartbeat)"
        loss, speed = status.get("loss"), status.get("images_per_second")
        table.add_row(
            name,
            state,
            f"{status['step']}/{status.get('total_steps', '-')}" if "step" in status else "",
            f"{loss:.3f}" if isinstance(loss, float) else "",
            number(speed) if speed else "",
            f"{duration(age)} ago" if age is not None else "",
            str(status.get("error", "")),
        )
    return table


def read_sweep(sweep: Path) -> dict[str, str | list[str]]:
    """The sweep's ``sweep.json``.

    Raises:
        RecordsError: not started yet, or damaged.
    """
    file = sweep / "sweep.json"
    if not file.exists():
        raise RecordsError(f"{sweep}: no such sweep yet; 'run' with the same recipe and --root starts it")
    value = read_json(file)
    if not isinstance(value, dict) or not {"runs", "tokenizer", "tokens"} <= value.keys():
        raise RecordsError(f"{file}: expected an object with runs, tokenizer and tokens")
    return value


def sweep_folders(sweep: Path) -> Sequence[tuple[str, RunFolder]]:
    """Name and folder of every job of a started sweep: tokenizer, tokens, runs."""
    value = read_sweep(sweep)
    first = [(name, RunFolder((sweep / str(value[name])).resolve())) for name in ("tokenizer", "tokens")]
    return [*first, *((str(run), RunFolder(sweep / str(run))) for run in value["runs"])]


def _time(seconds: float | None) -> str:
    return duration(seconds) if seconds is not None else "-"


def _to_do(state: str) -> str:
    return "to do" if state == "waiting" else state
