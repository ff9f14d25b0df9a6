"""Sweeps of made-up records, and what the trackers' own readers find in their copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaling.config import LaunchConfig
from scaling.launch import Tracker
from scaling.records import RunFolder, write_json
from scaling.trackers.copies import trackio_project
from scaling.trackers.points import point_of
from tests.scaling import tiny

TRACKERS: tuple[Tracker, ...] = ("wandb", "trackio", "tensorboard")
LAUNCH = LaunchConfig(trackers=TRACKERS, wandb_mode="offline")


def make_run(path: Path, launch: LaunchConfig = LAUNCH) -> RunFolder:
    """A run folder as the launcher leaves it, with no records yet."""
    return tiny.make_run(path, tiny.run_config(), launch)


def records(steps: range) -> list[dict[str, Any]]:
    """Lines as of the trainer: training at every step, an evaluation at every third."""
    found: list[dict[str, Any]] = []
    for step in steps:
        spent = {"step": step, "tokens": 40 * step, "epochs": step / 7, "flops": 10**12 * step}
        found.append({"kind": "train", **spent, "loss_avg": 5 / step, "lr": 1e-3, "images_per_second": 3.25})
        if step % 3 == 0:
            measured = {
                "params": 73728,
                "loss_avg": 6 / step,
                "loss_avg_se": None,
                "loss_scales": [1.5, 2.5 / step],
            }
            found.append({"kind": "eval", **spent, **measured})
    return found


def make_sweep(sweep: Path, runs: int = 2) -> list[RunFolder]:
    """Finished runs with records and pictures."""
    found = []
    for number in range(runs):
        folder = make_run(sweep / f"run-{number}")
        for record in records(range(1, 10 + number)):
            folder.append(record)
        folder.close()
        folder.set_status("done", step=9)
        picture(folder.path / "samples.png")
        found.append(folder)
    return found


def picture(file: Path) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file)


def make_report(sweep: Path) -> None:
    """What of a report the copies look at."""
    picture(sweep / "report" / "figures" / "loss_avg_vs_compute.png")
    (sweep / "report" / "report.md").write_text("# A <b>report</b>\n")
    head = {"quantity": "loss_avg", "x": "params", "points": "final", "offset": False}
    law = head | {"params": {"alpha": -0.5}, "interval": {"alpha": [-0.6, -0.4]}, "data": {"x": [1.0, 2.0]}}
    write_json(sweep / "report" / "fits.json", {"families": {"var": {"laws": [law], "forecasts": []}}})


def expected(folder: RunFolder) -> list[dict[str, float]]:
    """The numbers of every line of ``metrics.jsonl``, in a fixed order."""
    return ordered([point_of(record).numbers for record in folder.metrics()])


def read_back(tracker: Tracker, folder: RunFolder, project: str = "varscale") -> list[dict[str, float]]:
    """The numbers of every line that the tracker's copy holds, read as its users would."""
    sweep = folder.path.parent
    if tracker == "wandb":
        from analysis.wandb_runs import read_offline

        runs = {run.name: run for run in read_offline(sweep)}
        rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in runs[folder.name].history]
    elif tracker == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        logs = SQLiteStorage.get_logs(trackio_project(project, sweep.name), folder.name)
        rows = [
            {k: v for k, v in row.items() if k != "timestamp" and not isinstance(v, dict)} for row in logs
        ]
    else:
        rows = _scalars(sweep / "tensorboard" / folder.name)
    return ordered([row for row in rows if any("/" in name for name in row)])


def _scalars(place: Path) -> list[dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place), size_guidance={"scalars": 0})
    events.Reload()
    rows: dict[tuple[str, int, int], dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        series, _, name = tag.rpartition("/")
        seen: dict[int, int] = {}
        for event in events.Scalars(tag):
            # A line that is there twice must show as two.
            seen[event.step] = seen.get(event.step, 0) + 1
            row = rows.setdefault((series, event.step, seen[event.step]), {"step": event.step})
            row[name if name in ("tokens", "epochs", "flops", "params") else tag] = event.value
    return list(rows.values())


def ordered(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return sorted(rows, key=lambda row: (row["step"], min(name for name in row if "/" in name)))
