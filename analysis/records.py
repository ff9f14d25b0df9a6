"""Records into one tidy table: a sweep's folders, or anyone's file.

Nothing is dropped in silence: unfinished and failed runs, runs without an evaluation and NaN
losses are kept (or, where there is nothing to keep, counted) and named in ``frame.attrs["notes"]``.
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
LISTS = ("loss_scales", "error_scales")
"""Per-scale columns, coarse to fine."""
QUANTITIES = ("loss_last", "loss_avg", "error_last", "error_avg")
"""Columns that laws are fitted to."""
FACTS = ("run", "family", "depth", "width", "seed", "state", "final")
COLUMNS = (*FACTS, *NUMBERS, *LISTS)

SYNONYMS = {
    "params": ("params", "n", "parameters", "num_params", "n_params", "model size", "model_size"),
    "params_total": ("params_total", "total_params"),
    "tokens": ("tokens", "d", "tokens_seen", "training tokens", "training_tokens", "num_tokens"),
    "unique_tokens": ("unique_tokens", "u", "unique tokens"),
    "epochs": ("epochs", "epoch"),
    "flops": ("flops", "c", "compute", "flop", "training flop", "training_flops", "train_flops"),
    "flops_6nd": ("flops_6nd", "6nd"),
    "loss": ("loss", "l", "val_loss", "validation_loss", "eval_loss", "final_loss"),
    "run": ("run", "run_id", "run_name", "name", "id"),
    "seed": ("seed",),
    "depth": ("depth", "layers", "n_layers"),
    "step": ("step", "steps"),
}
"""What the columns of other people's tables are called, in lower case."""


def load_runs(sweep_folder: str | Path) -> pd.DataFrame:
    """One row per evaluation of every run of a sweep, in the sweep's order and by step.

    Columns: ``COLUMNS``; loss in nats per token, error 0 to 1, FLOPs exact and 6ND. ``final``
    marks the last evaluation of a run whose state is ``done``. ``attrs["notes"]`` says in words
    what is unfinished, missing or not finite.

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
    facts = {
        "run": folder.name, "family": model["family"], "depth": int(model["depth"]),
        "width": int(model["width"]), "seed": int(config["seed"]), "state": status["state"],
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
        wrong = [k for k in NUMBERS if isinstance(values[k], bool) or not isinstance(values[k], int | float)]
        if wrong:
            raise RecordsError(
                f"{file}: the evaluation at step {record['step']} has "
                f"{wrong[0]} = {values[wrong[0]]!r}; expected a number"
            )
        rows.append(facts | {"final": False} | values)
    rows.sort(key=lambda row: row["step"])
    notes = []
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


def load_table(path: str | Path) -> pd.DataFrame:
    """A CSV, JSON Lines or parquet file with columns like N, D, C, loss, renamed to DESIGN's words.

    Synonyms (``N``, ``Model Size``, ``Training FLOP``, …) become params, tokens, flops, loss;
    columns already named as in DESIGN stay. ``attrs["notes"]`` names unknown columns (kept as
    they are) and rows with missing or non-finite numbers (kept, for the fit to name).

    Raises:
        RecordsError: no such file, unknown ending, unreadable, empty, two columns of one
            meaning, a column of numbers with text in it (the rows are named).
    """
    import pandas as pd

    file = Path(path)
    if file.suffix not in (".csv", ".jsonl", ".parquet"):
        raise RecordsError(f"{file}: expected a .csv, .jsonl or .parquet file")
    if not file.is_file():
        raise RecordsError(f"{file}: no such file")
    try:
        if file.suffix == ".csv":
            frame = pd.read_csv(file)
        elif file.suffix == ".parquet":
            frame = pd.read_parquet(file)
        else:
            frame = pd.read_json(file, lines=True)
    except (ValueError, OSError) as error:
        raise RecordsError(f"{file}: not a readable {file.suffix[1:]} table ({error})") from None
    if frame.empty:
        raise RecordsError(f"{file}: the table has no rows")
    meaning = {name: key for key, names in SYNONYMS.items() for name in names}
    known = set(SYNONYMS) | set(COLUMNS)
    renamed = {c: meaning.get(str(c).strip().lower(), str(c)) for c in frame.columns}
    for key in known:
        same = [str(c) for c, name in renamed.items() if name == key]
        if len(same) > 1:
            raise RecordsError(f"{file}: columns {', '.join(same)} all mean '{key}'; keep one")
    frame = frame.rename(columns=renamed)
    notes = []
    unknown = [c for c in frame.columns if c not in known]
    if unknown:
        notes.append(f"unknown columns, kept as they are: {', '.join(unknown)}")
    for key in (*NUMBERS, "loss", "depth", "seed"):
        if key not in frame:
            continue
        numbers = pd.to_numeric(frame[key], errors="coerce")
        text = numbers.isna() & frame[key].notna()
        if text.any():
            where = ", ".join(f"{i} ({frame[key][i]!r})" for i in frame.index[text][:6])
            raise RecordsError(f"{file}: column '{key}' has text where numbers belong, row {where}")
        frame[key] = numbers
        bad = numbers.isna() | numbers.isin([math.inf, -math.inf])
        if bad.any():
            places = ", ".join(str(i) for i in frame.index[bad][:6])
            notes.append(f"column '{key}': {int(bad.sum())} rows missing or not finite (row {places})")
    frame.attrs["notes"] = notes
    return frame
