"""Plans and states as tables in the terminal, in units that a person reads."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.records import ListedRun, RecordsError, RunFolder, read_sweep
from sweeps.costs import Rates
from sweeps.fold import Line, folded
from sweeps.jobs import stage_name
from sweeps.plan import cache_bytes, stage_of

if TYPE_CHECKING:
    from rich.console import Group

    from sweeps.calibration import Estimate
    from sweeps.forecasts import Forecast
    from sweeps.plan import Plan, PlannedRun

BUSY = 0.1
"""Share of a calibration's time without a core from which that is told; plans are to be right within 25 %."""
WIDE = 140
"""Columns from which run ids are shown with their hashes."""


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


PLAN_HEADINGS = (
    *(
        "run",
        "setting",
        "depth",
        "width",
        "N",
        "total",
        "batch",
        "steps",
        "tokens",
        "epochs",
        "FLOPs",
        "spent",
    ),
    *("memory/process", "memory/run", "disk", "time", "GPU-hours", "kWh", "cost", "forecast", "state"),
)
PLAN_RANK = (
    *("state", "setting", "time", "FLOPs", "spent", "N", "tokens", "memory/run", "GPU-hours", "cost"),
    *("forecast", "epochs", "disk", "kWh", "memory/process", "depth", "width", "total", "batch", "steps"),
)


def plan_table(
    plan: Plan, width: int = WIDE, rates: Rates | None = None, forecasts: Mapping[str, Forecast] | None = None
) -> Group:
    """One row per job, the families one below the other, totals below; on a narrow terminal in several
    tables one below the other.

    ``plan_notes`` says what its columns of memory and time mean.
    """
    rates, forecasts = rates or Rates(), forecasts or {}
    left = [r for r in plan.runs if r.state != "done"]
    places = len(plan.allotment.slots)
    shared = any(run.start for run in plan.runs)
    lines = [
        Line(
            {"run": job.name, "time": _time(found), "state": _to_do(job.state)}
            | ({"disk": size(cache_bytes(job))} if job.kind == "tokens" else {})
        )
        for job, found in zip(plan.stage_jobs, plan.estimates, strict=False)
    ]
    names = short_names([run.run for run in plan.runs], width)
    several = len(plan.recipe.families) > 1
    before = ""
    for (run, found), name in zip(_with_estimates(plan), names, strict=True):
        hours = rates.hours(plan, run)
        cells = {
            "run": name,
            "setting": run.setting,
            "depth": str(run.depth),
            "width": str(run.width),
            "N": number(run.params),
            "total": number(run.params_total),
            "batch": str(run.batch),
            "steps": str(run.steps),
            "tokens": number(run.tokens),
            "epochs": f"{run.epochs:.3g}",
            "FLOPs": f"{run.flops:.3g}",
            "spent": f"{run.flops_spent:.3g}" if shared else "",
            "memory/process": size(run.memory_per_process) if plan.recipe.launch.processes > 1 else "",
            "memory/run": size(run.memory),
            "disk": size(run.disk),
            "time": _time(found),
            "forecast": forecast_text(forecasts.get(run.run)),
            "state": _to_do(run.state),
        }
        lines.append(Line(cells | _costs(rates, hours), space=several and run.family != before))
        before = run.family
    total = plan.device_seconds
    totals = {
        "run": f"to do: {len(left)} of {len(plan.runs)} runs",
        "tokens": number(sum(r.tokens for r in left)),
        "FLOPs": f"{sum(r.flops for r in left):.3g}",
        "spent": f"{sum(r.flops_to_do for r in left):.3g}" if shared else "",
        "disk": size(plan.disk),
        "time": _seconds(plan.seconds_sum),
    } | _costs(rates, None if total is None else total / 3600)
    together = {"memory/run": size(plan.peak_memory), "time": _seconds(plan.seconds)}
    if places == 1:
        totals |= together
    lines.append(Line(totals, bold=True, space=True))
    if places > 1:
        lines.append(Line(together | {"run": f"wall time, {places} at once"}, bold=True))
    title = f"sweep '{plan.recipe.name}' in {plan.folders.sweep}"
    return folded(title, lines, PLAN_HEADINGS, PLAN_RANK, width)


def short_names(runs: Sequence[str], width: int) -> list[str]:
    """Run ids without their hashes on a narrow terminal, as long as each names one run."""
    short = [run.rpartition("-")[0] for run in runs]
    return short if width < WIDE and len(set(short)) == len(runs) else list(runs)


def forecast_text(found: Forecast | None) -> str:
    """A loss to come with its interval; of a finished run whether it was to be expected."""
    if found is None:
        return ""
    interval = f"[{found.low:.3f}, {found.high:.3f}]"
    if found.reached is None:
        return f"{found.value:.3f} {interval}"
    return f"outside {interval}" if found.outside else "as expected"


def _costs(rates: Rates, hours: float | None) -> dict[str, str]:
    energy, cost = rates.kilowatt_hours(hours), rates.cost(hours)
    return {
        "GPU-hours": "" if hours is None else f"{hours:.3g}",
        "kWh": "" if energy is None else f"{energy:.3g}",
        "cost": "" if cost is None else f"{cost:,.2f}",
    }


def plan_notes(plan: Plan) -> list[str]:
    """What stands below the table: the data, the machine, and how memory and time were told."""
    time_note = _time_note(plan) if plan.stated is None else _stated_note(plan)
    notes = [_data_note(plan), _machine_note(plan), _memory_note(plan), time_note]
    notes += [*_begun_note(plan), *_design_note(plan)]
    if plan.seconds:
        at = time.localtime(time.time() + plan.seconds)
        end = time.strftime("%H:%M" if plan.seconds < 12 * 3600 else "%A %d %B, %H:%M", at)
        notes.append(f"expected end: {end}, {duration(plan.seconds)} after a start now")
    tokens = [job for job in plan.stage_jobs if job.kind == "tokens"]
    if len(tokens) > 1:
        uses = [f"{job.folder.name} for {', '.join(plan.families_of(stage_of(job)))}" for job in tokens]
        notes.insert(1, f"tokenizers: {'; '.join(uses)}")
    return notes


def _begun_note(plan: Plan) -> list[str]:
    """What is counted how, where runs go on from a checkpoint of their own."""
    left = [run for run in plan.runs if run.state != "done"]
    own, to_do = (sum(getattr(run, name) for run in left) for name in ("flops_spent", "flops_to_do"))
    if to_do >= own:
        return []
    return [
        f"begun: {to_do:.3g} of {own:.3g} FLOPs are left; times and what follows from them are of these, "
        "tokens, FLOPs and disk of whole runs"
    ]


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
    if plan.stated is not None:
        count = len(plan.machine.gpus) * launch.machines
        return f"machine: {_several(count, plan.stated.device.name, plan.stated.device.name)}, as stated"
    note = (
        f"machine: {plan.machine.name}: {_several(len(plan.allotment.slots), 'run')} at once, "
        f"{_several(launch.processes, 'process', 'processes')} of {_several(threads, 'CPU thread')} per run"
    )
    if plan.allotment.per_gpu > 1:
        even = plan.allotment.places_per_gpu == plan.allotment.per_gpu
        note += f", {'' if even else 'up to '}{plan.allotment.per_gpu} runs on each GPU"
    return note + (f", on each of {launch.machines} machines" if launch.machines > 1 else "")


def _memory_note(plan: Plan) -> str:
    launch = plan.recipe.launch
    here = " on each machine" if launch.machines > 1 else ""
    if launch.processes > 1:
        copy = "its part of the model" if launch.shard else "its own copy"
        parts = f"a run is {launch.processes} processes{here}, each with {copy}"
    else:
        parts = f"a run is one process{here}"
    measured = [run for run in plan.runs if run.memory_measured]
    if len(measured) == len(plan.runs):
        how = "closed form, with what it lacked at the nearest depths measured on this machine"
    elif any(plan.allotment.slots):
        how = "closed form, not compared with any GPU yet, and as much for libraries as on a CPU"
    else:
        how = "closed form, with libraries"
    return f"memory: at its peak; {how}; {parts}"


def _stated_note(plan: Plan) -> str:
    """How times of a stated device were told, and what they lack."""
    stated = plan.stated
    assert stated is not None
    rates = {c.train.precision: stated.device.peak(c.train.precision) for c in plan.configs}
    peaks = " and ".join(f"{number(peak)}FLOP/s in {name}" for name, peak in rates.items())
    return (
        f"time: exact FLOPs at {stated.mfu:.3g} of {stated.device.name}'s dense peak ({peaks}); without "
        "starting, evaluating, saving, tokenizers and token caches"
    )


def _time_note(plan: Plan) -> str:
    """Which rows were measured, which are told by their FLOPs and from what, and which are unknown."""
    pairs = _with_estimates(plan)
    stages = list(zip(plan.stage_jobs, plan.estimates, strict=False))
    several = len(plan.recipe.families) > 1
    lines = ["time: of each row by itself; ~ where it was not measured"]
    measured = [run for run, found in pairs if found and found.measured]
    if measured:
        lines.append(f"{_depths(measured, several)}: as last measured on this machine")
    for family in plan.recipe.families:
        near = [(r, found) for r, found in pairs if found and not found.measured and r.family == family]
        if near:
            used = sorted({depth for _, found in near for depth in found.depths})
            lines.append(
                f"~ {_depths([run for run, _ in near], several)}: by FLOPs, at the speed of {_listed(used)}"
            )
    others = [r for r, found in pairs if found and not found.measured and not found.same_settings]
    if others:
        lines.append(
            f"~ {_depths(others, several)}: from runs with another batch, micro-batch, attention, compiling "
            "or number of runs at once"
        )
    changed = [job.name for job, found in stages if found and not found.measured]
    if changed:
        lines.append(f"~ {', '.join(changed)}: from one with another batch or other losses")
    missing = [job.name for job, found in stages if found is None]
    if missing:
        lines.append(f"- {', '.join(missing)}: nothing of this shape was measured on this machine")
    unknown = [run for run, found in pairs if found is None]
    if unknown:
        launch = plan.recipe.launch
        precisions = sorted(
            {c.train.precision for c, (_, found) in zip(plan.configs, pairs, strict=True) if not found}
        )
        lines.append(
            f"- {_depths(unknown, several)}: no run{' of the family' if several else ''} was measured with "
            f"{_several(launch.processes, 'process', 'processes')} of "
            f"{_several(plan.allotment.threads, 'thread')} in {' or '.join(precisions)}"
            + (f" on {launch.machines} machines" if launch.machines > 1 else "")
        )
    waited = max((found.waited for found in plan.estimates if found), default=0.0)
    if waited > BUSY:
        lines.append(
            f"calibrated while the machine was busy: other programs had its cores {waited:.0%} of the time; "
            "times are of such a machine: --calibrate again when it is quiet"
        )
    return "\n  ".join(lines)


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


def started_sweep(sweep: Path) -> tuple[ListedRun, ...]:
    """The runs that the sweep's ``sweep.json`` lists.

    Raises:
        RecordsError: not started yet, or damaged.
    """
    if not (sweep / "sweep.json").exists():
        there = sorted(file.parent.name for file in sweep.parent.glob("*/sweep.json"))
        others = f"; sweeps in {sweep.parent}: {', '.join(there)}" if there else ""
        raise RecordsError(
            f"{sweep}: no such sweep yet; 'run' with the same recipe and --root starts it{others}"
        )
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
