"""A sweep's folders into one tidy table (``analysis.tables`` reads anyone's).

Nothing is dropped in silence: unfinished and failed runs, runs without an evaluation and NaN
losses, which the records hold as null, are kept (or, where there is nothing to keep, counted) and
named in ``frame.attrs["notes"]``. Runs of a family whose tokens are not the same are families of their own
(``analysis.tokens``): nothing may be fitted or chosen across them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.tokens import names_by_tokens
from scaling.records import ListedRun, RecordsError, RunFolder, list_runs, read_sweep

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
FACTS = ("run", "family", "depth", "width", "seed", "schedule", "batch", "state", "imported", "final")
"""What the run is; ``schedule`` and ``batch`` are missing values where the config has none. ``imported``
marks a published checkpoint that was evaluated, not trained, here."""
COLUMNS = (*FACTS, *NUMBERS, *LISTS, "flops_spent")


@dataclass(frozen=True)
class Records:
    """A sweep, or one family of it, as its folders hold it."""

    folder: Path
    sweep: dict[str, Any]
    """The value of ``sweep.json``; empty without one."""
    listed: tuple[ListedRun, ...]
    """The runs in it."""
    frame: pd.DataFrame
    """As from ``load_runs``."""
    runs: list[dict[str, Any]]
    """Facts, config and status of every run, evaluated or not."""

    @property
    def families(self) -> list[str]:
        """Families of the runs, in the sweep's order."""
        return list(dict.fromkeys(str(run["family"]) for run in self.runs))

    def of(self, family: str) -> Records:
        """One family alone, with its own notes; its table may be empty."""
        listed = tuple(run for run in self.listed if run.family == family)
        runs = [run for run in self.runs if run["family"] == family]
        frame = self.frame[self.frame["family"] == family].reset_index(drop=True)
        frame.attrs = {"notes": _notes(listed, runs)}
        return Records(self.folder, self.sweep, listed, frame, runs)


def load_runs(sweep_folder: str | Path) -> pd.DataFrame:
    """One row per evaluation of every run of a sweep, in the sweep's order and by step.

    Columns: ``COLUMNS``; loss in nats per token, error 0 to 1, FLOPs exact and 6ND. ``flops_spent`` counts
    the steps that the run did itself, fewer than ``flops`` does where a longer run did the first ones for it.
    ``final`` marks the last evaluation of a run whose state is ``done``. A loss, error rate or standard error
    that was recorded as null (a diverged run; one image has no standard error) is NaN. ``attrs["notes"]``
    says in words what is unfinished, missing or not finite. A sweep of several families is one table;
    ``family`` tells them apart, and their lists per scale differ in length. It also tells apart runs of one
    family with other tokens, whose losses do not compare: ``var-vocab-256``.

    Raises:
        RecordsError: no such folder, no runs, no evaluation at all, a record or config without
            a column (the file and the keys are named), a damaged ``sweep.json``.
    """
    return read_records(sweep_folder).frame


def read_records(sweep_folder: str | Path) -> Records:
    """``load_runs``, and what lies beside it.

    Raises:
        RecordsError: as ``load_runs``.
    """
    import pandas as pd

    root = Path(sweep_folder)
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for folder in list_runs(root):
        facts, found = _load_run(folder)
        runs.append(facts)
        rows += found
    names = names_by_tokens(runs)
    runs = [run | {"family": names[run["run"]]} for run in runs]
    rows = [row | {"family": names[row["run"]]} for row in rows]
    if not rows:
        states = ", ".join(f"{r['run']} is {r['state']}" for r in runs)
        raise RecordsError(f"{root}: no evaluation recorded yet ({states}); run the sweep first")
    value, listed = {}, tuple[ListedRun, ...]()
    if (root / "sweep.json").exists():
        record = read_sweep(root)
        value, listed = record.value, _named(record.runs, names)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs["notes"] = _notes(listed, runs)
    return Records(root, value, listed, frame, runs)


def _named(listed: Sequence[ListedRun], names: Mapping[str, str]) -> tuple[ListedRun, ...]:
    """With the names of ``names_by_tokens``; a run without its folder has that of runs on the same tokens."""
    alike: dict[tuple[str, str], str] = {}
    for run in listed:
        if run.run in names:
            alike.setdefault((run.family, run.tokens), names[run.run])
            alike.setdefault((run.family, ""), names[run.run])

    def name(run: ListedRun) -> str:
        found = alike.get((run.family, run.tokens)) or alike.get((run.family, ""), run.family)
        return names.get(run.run, found)

    return tuple(replace(run, family=name(run)) for run in listed)


def _notes(listed: Sequence[ListedRun], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What sweep.json lists and is not there, and what the runs' own records lack."""
    found = {run["run"] for run in runs}
    gone = [
        f"{run.run} is listed in sweep.json, but its folder or its config.json is not there; left out"
        for run in listed
        if run.run not in found
    ]
    return gone + [note for run in runs for note in run["notes"]]


def _load_run(folder: RunFolder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config, status = folder.config(), folder.status()
    model = config.get("model")
    if not isinstance(model, dict) or not {"family", "depth", "width"} <= set(model) or "seed" not in config:
        raise RecordsError(
            f"{folder.path / 'config.json'}: expected model.family, model.depth, model.width and seed"
        )
    # The name becomes part of files' names and of ids on the report's page.
    if not re.fullmatch("[a-z0-9-]+", str(model["family"])):
        raise RecordsError(
            f"{folder.path / 'config.json'}: model.family = {model['family']!r}; expected lower-case "
            "letters, digits and hyphens"
        )
    train = config.get("train", {})
    facts = {
        "run": folder.name, "family": model["family"], "depth": int(model["depth"]),
        "width": int(model["width"]), "seed": int(config["seed"]), "schedule": train.get("schedule"),
        "batch": train.get("batch"), "state": status["state"], "imported": bool(status.get("imported")),
    }  # fmt: skip
    file, shared = folder.path / "metrics.jsonl", folder.shared()["flops"]
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
        spent = max(0, values["flops"] - shared)
        rows.append(facts | {"final": False} | values | {"flops_spent": spent})
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
        diverged = status.get("cause") == "diverged"
        became = "diverged" if diverged else f"is {facts['state']}"
        fate = "is never fitted" if diverged else "takes part in no law of final losses"
        notes.append(f"{folder.name} {became}{at}{why}; it {fate}")
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
