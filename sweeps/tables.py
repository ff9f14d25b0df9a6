"""Plans and states as tables in the terminal, in units that a person reads."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.records import ListedRun, RecordsError, RunFolder, read_sweep
from sweeps.jobs import stage_name
from sweeps.plan import cache_bytes, stage_of
from sweeps.slurm_queue import standing

if TYPE_CHECKING:
    from rich.table import Table

    from sweeps.calibration import Estimate
    from sweeps.plan import Plan, PlannedRun
    from sweeps.slurm_queue import Seen

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
    """One row per job, the families one below the other, totals below; on a narrow terminal without what
    follows from the rest.

    ``plan_notes`` says what its columns of memory and time mean.
    """
    from rich.table import Table

    table = Table(title=f"sweep '{plan.recipe.name}' in {plan.folders.sweep}", title_justify="left", box=None)
    left = [r for r in plan.runs if r.state != "done"]
    places = len(plan.allotment.slots)
    shared = any(run.start for run in plan.runs)
    rows = [
        {"run": job.name, "time": _time(found), "state": _to_do(job.state)}
        | ({"disk": size(cache_bytes(job))} if job.kind == "tokens" else {})
        for job, found in zip(plan.stage_jobs, plan.estimates, strict=False)
    ]
    rows += [
        {
            "run": run.run if width >= WIDE else run.run.rpartition("-")[0],
            **({"setting": run.setting} if any(r.setting for r in plan.runs) else {}),
            "depth": str(run.depth),
            "width": str(run.width),
            "N": number(run.params),
            "total": number(run.params_total),
            "batch": str(run.batch),
            "steps": str(run.steps),
            "tokens": number(run.tokens),
            "epochs": f"{run.epochs:.3g}",
            "FLOPs": f"{run.flops:.3g}",
            **({"spent": f"{run.flops_spent:.3g}"} if shared else {}),
            "memory/process": size(run.memory_per_process),
            "memory/run": size(run.memory),
            "disk": size(run.disk),
            "time": _time(found),
            "state": _to_do(run.state),
        }
        for run, found in _with_estimates(plan)
    ]
    totals = {
        "run": f"to do: {len(left)} of {len(plan.runs)} runs",
        "tokens": number(sum(r.tokens for r in left)),
        "FLOPs": f"{sum(r.flops for r in left):.3g}",
        "spent": f"{sum(r.flops_spent for r in left):.3g}",
        "disk": size(plan.disk),
        "time": _seconds(plan.seconds_sum),
    }
    together = {"memory/run": size(plan.peak_memory), "time": _seconds(plan.seconds)}
    if places == 1:
        totals |= together
    hidden = () if plan.recipe.launch.processes > 1 else ("memory/process",)
    headings = [h for h in rows[-1] if (width >= WIDE or h not in DERIVED) and h not in hidden]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
    families = [""] * len(plan.stage_jobs) + [run.family for run in plan.runs]
    for i, row in enumerate(rows):
        if len(plan.recipe.families) > 1 and i > 0 and families[i] != families[i - 1]:
            table.add_row()
        table.add_row(*(row.get(heading, "") for heading in headings))
    table.add_section()
    table.add_row(*(totals.get(heading, "") for heading in headings), style="bold")
    if places > 1:
        together["run"] = f"wall time, {places} at once"
        table.add_row(*(together.get(heading, "") for heading in headings), style="bold")
    return table


def plan_notes(plan: Plan) -> list[str]:
    """What stands below the table: the data, the machine, and how memory and time were told."""
    notes = [_data_note(plan), _machine_note(plan), _memory_note(plan), _time_note(plan), *_design_note(plan)]
    tokens = [job for job in plan.stage_jobs if job.kind == "tokens"]
    if len(tokens) > 1:
        uses = [f"{job.folder.name} for {', '.join(plan.families_of(stage_of(job)))}" for job in tokens]
        notes.insert(1, f"tokenizers: {'; '.join(uses)}")
    return notes


def _design_note(plan: Plan) -> list[str]:
    """What sharing stable phases saves; none where no run starts from another's checkpoint."""
    branches = [run for run in plan.runs if run.start]
    if not branches:
        return []
    alone, together = (sum(getattr(r, name) for r in plan.runs) for name in ("flops", "flops_spent"))
    return [
        f"design: trunks and branches {together:.3g} FLOPs, as independent runs {alone:.3g} "
        f"({together / alone:.2f}): {len(branches)} of {len(plan.runs)} runs start where their decay begins, "
        "from a checkpoint of the longest; FLOPs are what the records hold, spent is what a run does itself"
    ]


def _data_note(plan: Plan) -> str:
    data = plan.data
    counts = f"{data.train_images} training and {data.val_images} validation"
    if data.source == "photos":
        # The stereo pair shows one scene and is one class (scaling.data.photos).
        return (
            f"data: {data.num_classes} photographs that ship with scikit-image and scikit-learn, "
            f"class = photograph; {counts} crops of them, {data.resolution} px"
        )
    place = data.name if data.source == "hf" else data.path
    return f"data: {data.source} {place}: {counts} images, {data.num_classes} classes, {data.resolution} px"


def _machine_note(plan: Plan) -> str:
    launch, threads = plan.recipe.launch, plan.allotment.threads
    note = (
        f"machine: {plan.machine.name}: {_several(len(plan.allotment.slots), 'run')} at once, "
        f"{_several(launch.processes, 'process', 'processes')} of {_several(threads, 'CPU thread')} per run"
    )
    return note + (f", on each of {launch.machines} machines" if launch.machines > 1 else "")


def _memory_note(plan: Plan) -> str:
    launch = plan.recipe.launch
    here = " on each machine" if launch.machines > 1 else ""
    if launch.processes > 1:
        parts = f"a run is {launch.processes} processes{here}, each with its own copy"
    else:
        parts = f"a run is one process{here}"
    return f"memory: estimated, with libraries; {parts}"


def _time_note(plan: Plan) -> str:
    """Which rows were measured, which are told by their FLOPs and from what, and which are unknown."""
    pairs = _with_estimates(plan)
    stages = list(zip(plan.stage_jobs, plan.estimates, strict=False))
    several = len(plan.recipe.families) > 1
    measured = [run for run, found in pairs if found and found.measured]
    parts = []
    if measured:
        parts.append(
            f"{_depths(measured, several)} at the speed of the last run of that depth finished on this "
            "machine"
        )
    for family in plan.recipe.families:
        near = [(r, found) for r, found in pairs if found and not found.measured and r.family == family]
        if near:
            used = sorted({depth for _, found in near for depth in found.depths})
            parts.append(
                f"~ {_depths([run for run, _ in near], several)} by FLOPs, from the speed of "
                f"{_several(len(used), 'finished run')} ({_listed(used)})"
            )
    others = [r for r, found in pairs if found and not found.measured and not found.same_settings]
    if others:
        parts.append(
            f"{_depths(others, several)} from runs with another batch, micro-batch, attention or number of "
            "runs at once, or compiled otherwise"
        )
    changed = [job.name for job, found in stages if found and not found.measured]
    if changed:
        parts.append(
            f"~ {' and '.join(changed)} from one with another batch or other losses, or of an unknown batch"
        )
    missing = [job.name for job, found in stages if found is None]
    if missing:
        parts.append(f"unknown for {' and '.join(missing)}: none of this shape has finished on this machine")
    unknown = [run for run, found in pairs if found is None]
    if unknown:
        launch = plan.recipe.launch
        precisions = sorted(
            {c.train.precision for c, (_, found) in zip(plan.configs, pairs, strict=True) if not found}
        )
        parts.append(
            f"unknown for {_depths(unknown, several)}: no run{' of the family' if several else ''} has "
            f"finished on this machine with {_several(launch.processes, 'process', 'processes')} of "
            f"{_several(plan.allotment.threads, 'thread')} in {' or '.join(precisions)}"
            + (f" on {launch.machines} machines" if launch.machines > 1 else "")
        )
    return "time: of each row by itself; " + "; ".join(parts)


def _with_estimates(plan: Plan) -> list[tuple[PlannedRun, Estimate | None]]:
    return list(zip(plan.runs, plan.estimates[-len(plan.runs) :], strict=True))


def _depths(runs: Sequence[PlannedRun], several: bool) -> str:
    """Their depths, by family where the plan has several."""
    by_family: dict[str, set[int]] = {}
    for run in runs:
        by_family.setdefault(run.family, set()).add(run.depth)
    return ", ".join(
        (f"{family} " if several else "") + _listed(sorted(depths)) for family, depths in by_family.items()
    )


def _listed(depths: Sequence[int]) -> str:
    return ("depths " if len(depths) > 1 else "depth ") + ", ".join(map(str, depths))


def _several(count: int, noun: str, plural: str = "") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def status_table(sweep: Path, seen: Mapping[Path, Seen] | None = None) -> Table:
    """State, step, loss, speed, heartbeat and error of every job of a started sweep.

    Args:
        seen: what Slurm says of a job, by its folder, if any was handed to it.

    Raises:
        RecordsError: the sweep was not started yet, or a file is damaged.
    """
    from rich.table import Table

    seen = seen or {}
    table = Table(title=f"sweep '{sweep.name}' in {sweep}", title_justify="left", box=None)
    table.add_column("job", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("step", "train loss", "images/s", "heartbeat"):
        table.add_column(heading, justify="right", no_wrap=True)
    if seen:
        table.add_column("Slurm", no_wrap=True)
    table.add_column("reason" if seen else "error", overflow="fold")
    for name, folder in sweep_folders(sweep):
        status = folder.status()
        age = time.time() - status["heartbeat"] if "heartbeat" in status else None
        state, why = shown_state(folder, seen)
        if state == "running" and not beats(status):
            state = "running? (no heartbeat)"
        loss, speed = status.get("loss"), status.get("images_per_second")
        table.add_row(
            name,
            state,
            f"{status['step']}/{status.get('total_steps', '-')}" if "step" in status else "",
            f"{loss:.3f}" if isinstance(loss, float) else "",
            number(speed) if speed else "",
            f"{duration(age)} ago" if age is not None else "",
            *([seen[folder.path].id if folder.path in seen else ""] if seen else []),
            str(status.get("error", why)),
        )
    return table


def shown_state(folder: RunFolder, seen: Mapping[Path, Seen]) -> tuple[str, str]:
    """A job's state for a person, and why it waits: what Slurm says of it too; a loss that diverged is told
    apart from other failures."""
    status = folder.status()
    state, why = standing(str(status["state"]), seen.get(folder.path), beats(status))
    return ("diverged" if state == "failed" and status.get("cause") == "diverged" else state), why


def beats(status: Mapping[str, Any]) -> bool:
    """Whether a job's last sign of life is fresh."""
    return "heartbeat" in status and time.time() - status["heartbeat"] <= STALE_SECONDS


def started_sweep(sweep: Path) -> tuple[ListedRun, ...]:
    """The runs that the sweep's ``sweep.json`` lists.

    Raises:
        RecordsError: not started yet, or damaged.
    """
    if not (sweep / "sweep.json").exists():
        raise RecordsError(f"{sweep}: no such sweep yet; 'run' with the same recipe and --root starts it")
    return read_sweep(sweep).runs


def sweep_folders(sweep: Path) -> Sequence[tuple[str, RunFolder]]:
    """Name and folder of every job of a started sweep: each tokenizer and its tokens, then the runs."""
    listed = started_sweep(sweep)
    stages = dict.fromkeys((run.tokenizer, run.tokens) for run in listed)
    first = [
        (stage_name(kind, Path(link).name, len(stages)), RunFolder((sweep / link).resolve()))
        for stage in stages
        for kind, link in zip(("tokenizer", "tokens"), stage, strict=True)
    ]
    return [*first, *((run.run, RunFolder(sweep / run.run)) for run in listed)]


def _time(found: Estimate | None) -> str:
    return "-" if found is None else ("" if found.measured else "~") + duration(found.seconds)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _to_do(state: str) -> str:
    return "to do" if state == "waiting" else state
