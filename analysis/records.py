"""A sweep's folders into one tidy table (``analysis.tables`` reads anyone's).

Nothing is dropped in silence: unfinished and failed runs, runs without an evaluation and NaN
losses, which the records hold as null, are kept (or, where there is nothing to keep, counted) and
named in ``frame.attrs["notes"]``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.records import RecordsError, RunFolder, list_runs, read_json

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = (
    "step", "params", "params_total", "tokens", "unique_tokens", "epochs", "flops", "flops_6nd",
    "loss_avg", "loss_avg_se", "loss_last", "loss_last_se",
    "error_avg", "error_avg_se", "error_last", "error_last_se",
)  # fmt: skip
"""Columns that every evaluation has (DESIGN's words and units)."""
STANDARD_ERRORS = tuple(name for name in NUMBERS if name.endswith("_se"))
LISTS = ("loss_scales", "error_scales")
"""Per-scale columns, coarse to fine."""
QUANTITIES = ("loss_last", "loss_avg", "error_last", "error_avg")
"""Columns that laws are fitted to."""
FACTS = ("run", "family", "depth", "width", "seed", "schedule", "batch", "state", "final")
"""What the run is; ``schedule`` and ``batch`` are missing values where the config has none."""
COLUMNS = (*FACTS, *NUMBERS, *LISTS)


def load_runs(sweep_folder: str | Path) -> pd.DataFrame:
    """One row per evaluation of every run of a sweep, in the sweep's order and by step.

    Columns: ``COLUMNS``; loss in nats per token, error 0 to 1, FLOPs exact and 6ND. ``final``
    marks the last evaluation of a run whose state is ``done``. A loss, error rate or standard error
    that was recorded as null (a diverged run; one image has no standard error) is NaN. ``attrs["notes"]``
    says in words what is unfinished, missing or not finite.

    Raises:
        RecordsError: no such folder, no runs, no evaluation at all, a record or config without
            a column (the file and the keys are named).
    """
    return read_sweep(sweep_folder)[0]


def read_sweep(sweep_folder: str | Path) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """``load_runs``, and beside it the facts, config and status of every run, evaluated or not."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    folders = list_runs(sweep_folder)
    notes = _gone(Path(sweep_folder), {folder.name for folder in folders})
    for folder in folders:
        facts, found = _load_run(folder)
        runs.append(facts)
        rows += found
        notes += facts["notes"]
    if not rows:
        states = ", ".join(f"{r['run']} is {r['state']}" for r in runs)
        raise RecordsError(f"{sweep_folder}: no evaluation recorded yet ({states}); run the sweep first")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs["notes"] = notes
    return frame, runs


def _gone(sweep: Path, found: set[str]) -> list[str]:
    """A note on every run that sweep.json lists and that is not there."""
    file = sweep / "sweep.json"
    listed = read_json(file).get("runs", []) if file.exists() else []
    return [
        f"{name} is listed in sweep.json, but its folder or its config.json is not there; left out"
        for name in listed
        if name not in found
    ]


def _load_run(folder: RunFolder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config, status = folder.config(), folder.status()
    model = config.get("model")
    if not isinstance(model, dict) or not {"family", "depth", "width"} <= set(model) or "seed" not in config:
        raise RecordsError(
            f"{folder.path / 'config.json'}: expected model.family, model.depth, model.width and seed"
        )
    train = config.get("train", {})
    facts = {
        "run": folder.name, "family": model["family"], "depth": int(model["depth"]),
        "width": int(model["width"]), "seed": int(config["seed"]), "schedule": train.get("schedule"),
        "batch": train.get("batch"), "state": status["state"],
    }  # fmt: skip
    file = folder.path / "metrics.jsonl"
    rows = []
    for record in folder.metrics("eval"):
        missing = [key for key in (*NUMBERS, *LISTS) if key not in record]
        if missing:
            raise RecordsError(
                f"{file}: the evaluation at step {record.get('step')} lacks {', '.join(missing)}"
            )
        values = {key: record[key] for key in (*NUMBERS, *LISTS)}
        values |= {key: math.nan for key in (*QUANTITIES, *STANDARD_ERRORS) if values[key] is None}
        wrong = [k for k in NUMBERS if isinstance(values[k], bool) or not isinstance(values[k], int | float)]
        if wrong:
            raise RecordsError(
                f"{file}: the evaluation at step {record['step']} has "
                f"{wrong[0]} = {values[wrong[0]]!r}; expected a number"
            )
        rows.append(facts | {"final": False} | values)
    rows.sort(key=lambda row: row["step"])
    notes = []
    if imported := status.get("imported"):
        notes.append(
            f"{folder.name} is a published checkpoint that was evaluated here, not a run of this sweep's "
            f"recipe; its tokens and FLOPs: {imported['training']}"
        )
    if facts["state"] != "done":
        step, total = status.get("step"), status.get("total_steps")
        at = f" at step {step}" + (f" of {total}" if total is not None else "") if step is not None else ""
        why = f": {status['error']}" if status.get("error") else ""
        notes.append(f"{folder.name} is {facts['state']}{at}{why}; it takes part in no law of final losses")
    elif not rows:
        notes.append(f"{folder.name} is done but recorded no evaluation")
    else:
        rows[-1]["final"] = True
    for row in rows:
        for word, bad in (
            ("not finite", [k for k in QUANTITIES if not math.isfinite(row[k])]),
            ("0 or less, which has no logarithm", [k for k in QUANTITIES if row[k] <= 0]),
        ):
            if bad:
                notes.append(
                    f"{folder.name}, step {row['step']}: {', '.join(bad)} {word}; left out of the laws "
                    f"of {'it' if len(bad) == 1 else 'them'}"
                )
    return facts | {"notes": notes, "evaluations": len(rows), "status": status, "config": config}, rows
