"""Anyone's table of runs, with its columns renamed to DESIGN's words.

- CSV, TSV, JSON Lines, parquet, and Weights & Biases: a project (``wandb:entity/project``) or the
  offline files in a folder.
- Names are compared without case and punctuation, so ``Model Size``, ``model_size`` and
  ``modelSize`` are one; ``eval/`` and ``val/`` before a known name are taken off, ``eval_`` and
  ``val_`` before losses and error rates only: ``val_tokens`` were not trained on. Synonyms are
  those of Chinchilla's, Epoch's, Porian's, Gemstones', DataDecide's and OLMo's tables.
- What counts as N moves exponents, so ``params_total``, ``params_non_embedding`` and
  ``params_active`` stay apart from ``params``; one stands in for it, with a note, only where the
  table has no plain N. A training loss stands in for a loss alike. A model's name stands in for a
  run unless it is one for all rows; its seeds are runs of their own.
- ``1.3B``, ``20M``, ``1,300,000`` are read in columns of counts only; units in a column's name
  (``Params (B)``, ``compute (PF-days)``) are applied, and refused where values have one too. Every
  such reading is a note.
- Nothing is made up: ``C = 6·N·D`` fills in a missing one of the three only when asked.
- Rows are counted from 0, the first below the header.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.errors import DataError, rows
from analysis.records import COLUMNS, NUMBERS
from analysis.wandb_runs import read_offline, read_online, to_frame
from scaling.records import RecordsError

if TYPE_CHECKING:
    import pandas as pd

SYNONYMS = {
    "params": (
        "n", "parameters", "num_params", "n_params", "nparams", "num_parameters", "n_parameters",
        "param_count", "params_count", "parameter_count", "number_of_parameters", "model_size",
        "model_params", "model_parameters",
    ),
    "params_total": ("total_params", "total_parameters", "params_all", "all_params", "num_params_total"),
    "params_non_embedding": (
        "non_embedding_params", "nonembedding_params", "params_nonembedding", "non_embedding_parameters",
        "num_non_embedding_params", "non_emb_params", "params_no_embed",
    ),
    "params_active": ("active_params", "active_parameters", "num_active_params", "params_active_precise"),
    "tokens": (
        "d", "tokens_seen", "training_tokens", "train_tokens", "num_tokens", "n_tokens", "total_tokens",
        "num_tokens_seen", "num_train_tokens", "tokens_trained", "tokens_processed", "token_count",
        "throughput_total_tokens",
    ),
    "unique_tokens": ("u", "num_unique_tokens", "dataset_tokens"),
    "epochs": ("epoch", "num_epochs"),
    "flops": (
        "c", "compute", "flop", "training_flop", "training_flops", "train_flop", "train_flops", "total_flop",
        "total_flops", "num_flops", "n_flops", "training_compute", "train_compute", "total_compute",
        "compute_flop", "compute_flops", "compute_budget",
    ),
    "flops_6nd": ("6nd", "c_6nd", "flops_6_n_d"),
    "loss": (
        "l", "val_loss", "validation_loss", "valid_loss", "eval_loss", "test_loss", "final_loss",
        "final_val_loss", "final_eval_loss", "cross_entropy", "cross_entropy_loss", "ce_loss",
    ),
    "loss_train": ("train_loss", "training_loss", "final_train_loss"),
    "run": ("run_id",),
    "family": ("model_family", "architecture", "arch"),
    "seed": ("random_seed",),
    "depth": ("layers", "n_layers", "num_layers", "n_layer", "num_hidden_layers"),
    "width": ("d_model", "hidden_size", "n_embd", "hidden_dim"),
    "step": ("steps", "global_step", "iteration", "iterations"),
    "horizon": ("total_steps", "max_steps", "num_train_steps", "max_iters"),
    "schedule": ("lr_schedule", "lr_scheduler", "lr_scheduler_type", "scheduler"),
    "batch": ("batch_size", "global_batch", "global_batch_size", "train_batch_size"),
    "lr": ("learning_rate", "peak_lr", "max_lr"),
    "state": ("status", "run_state"),
}  # fmt: skip
"""What the columns of other people's tables are called, normalised."""
STAND_INS = {
    "params": ("params_non_embedding", "params_total", "params_active"),
    "loss": ("loss_train",),
    "flops": ("flops_6nd",),
    "run": ("run_name", "name", "experiment", "id"),
}
"""Used, in this order and with a note, where a table lacks the column itself."""
MEANINGS = {
    "params": "parameters N", "tokens": "training tokens D", "flops": "training compute C in FLOP",
    "loss": "the loss",
}  # fmt: skip
COUNTS = (
    *("params", "params_total", "params_non_embedding", "params_active"),
    *("tokens", "unique_tokens", "flops", "flops_6nd", "batch", "step", "horizon"),
)
QUALITIES = ("loss", "error_")
"""How the names of what a run reached begin; all else says what was run."""
NUMERIC = tuple(dict.fromkeys((*NUMBERS, *COUNTS, "loss", "loss_train", "depth", "width", "lr")))
SIX_ND = "6·N·D"
SMALLEST = 1e4
"""A column of N, D or C that stays below this probably has another unit, or another meaning."""
_KNOWN = {**{name: name for name in (*COLUMNS, *SYNONYMS)}, **{s: k for k, v in SYNONYMS.items() for s in v}}
_SCALES = {
    **dict.fromkeys(("k", "thousand", "thousands"), 10**3),
    **dict.fromkeys(("m", "million", "millions", "mil"), 10**6),
    **dict.fromkeys(("b", "bn", "g", "billion", "billions"), 10**9),
    **dict.fromkeys(("t", "tn", "trillion", "trillions"), 10**12),
}
_FLOP_UNITS = {
    **dict.fromkeys(("pf_days", "pf_day", "pflop_s_days", "petaflop_s_days", "pfs_days"), 864 * 10**17),
    **{
        f"{prefix}flop{s}": 10**power
        for prefix, power in {"": 0, "g": 9, "t": 12, "p": 15, "e": 18, "z": 21}.items()
        for s in ("", "s")
    },
}
_PLAIN_UNITS = ("tokens", "params", "parameters", "count", "nats", "nats_per_token", "nats_token", "nat")
_EVALUATED = re.compile(r"(?:eval|val|valid|validation|test)_")
_SECTION = re.compile(r"\s*(?:eval|val|valid|validation|test)\s*/", re.I)
_SUFFIXED = re.compile(
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<scale>[a-z]+)(?:\s+(?:params|parameters|tokens))?", re.I
)
_POWER = re.compile(
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*[x×*·]\s*10\s*(?:\^|\*\*)\s*(?P<power>\d+)", re.I
)


def load_table(source: str | Path, derive: bool = False, quantity: str | None = None) -> pd.DataFrame:
    """A table of runs with columns like N, D, C, loss, renamed to DESIGN's words.

    Args:
        source: a .csv, .tsv, .jsonl, .ndjson or .parquet file; ``wandb:entity/project``; a
            .wandb file, or a folder with wandb's offline files somewhere below it.
        derive: fill in the one of params, tokens and flops that is missing by C = 6·N·D.
        quantity: the column to be fitted, by its own name or DESIGN's; by default the loss. Where
            several columns mean the same, as ``eval/loss`` and ``test/loss`` do, its own name
            says which to take; of wandb's runs the last record that has it is ``final``.

    ``attrs["notes"]`` says in words what was read how: unknown columns (kept as they are), stand-ins,
    units, rows with missing or non-finite numbers (kept, for ``tidy.ready`` to count).
    ``attrs["conventions"]`` says of params, tokens, flops where each comes from, ``attrs["names"]``
    what every column of the table is called now.

    Raises:
        RecordsError: no such file, unknown ending, unreadable, empty, two columns of one
            meaning, a column of numbers with text in it or with a unit in both name and values (the
            rows are named); wandb: no key, no such project, no readable run.
        DataError: ``derive`` without two of the three.
    """
    frame, notes = _read(source, quantity)
    if frame.empty:
        raise RecordsError(f"{source}: the table has no rows")
    named: dict[str, str] = {}
    factors: dict[str, tuple[str, float]] = {}
    for column in map(str, frame.columns):
        name, factor = meaning(column)
        named[column] = name or column
        if factor != 1:
            factors[named[column]] = (column, factor)
    known = dict.fromkeys((*COLUMNS, *SYNONYMS))
    for key in known:
        if len(same := [column for column, name in named.items() if name == key]) > 1:
            taken = _one_of(same, key, quantity, source)
            named |= {column: column for column in same if column != taken}
            factors.pop(key, None)
            if (factor := meaning(taken)[1]) != 1:
                factors[key] = (taken, factor)
            notes.append(f"columns {', '.join(same)} all mean '{key}'; '{taken}' is taken")
    originals = {name: column for column, name in named.items()}
    frame.columns = frame.columns.map(str)
    frame = frame.rename(columns=named)
    for key in NUMERIC:
        if key in frame:
            frame[key] = _numbers(frame[key], key, source, notes, factors[key][0] if key in factors else None)
    for key, (column, factor) in factors.items():
        frame[key] = frame[key].astype("float64") * factor  # 18 EFLOP in whole numbers overflow
        notes.append(f"column '{column}': the unit in its name makes 1 there {factor:g}")
    for key, others in STAND_INS.items():
        found = _first(frame.columns, others)
        if key == "run" and found is not None and frame[found].nunique() < 2:
            found = None
        if key not in frame and found is not None:
            notes.append(f"'{originals[found]}' stands in for {key}: the table has no plain {key}")
            originals[key] = originals[found]
            if found in known:
                frame[key] = frame[found]
            else:
                frame = frame.rename(columns={found: key})
                named[originals[found]] = key
            if key == "run" and "seed" in frame and frame["run"].duplicated().any():
                frame["run"] = frame["run"].astype(str) + " seed " + frame["seed"].astype(str)
    if unknown := [str(c) for c in frame.columns if c not in known]:
        notes.append(f"unknown columns, kept as they are: {', '.join(unknown)}")
    conventions: dict[str, str] = {
        key: f"column '{originals[key]}' of the table"
        for key in ("params", "tokens", "flops")
        if key in originals
    }
    if derive:
        derived = _derive(frame, source)
        if derived:
            conventions[derived] = f"derived: C = {SIX_ND}"
            notes.append(f"{derived} derived by the convention C = {SIX_ND}")
        else:
            notes.append("nothing to derive: the table has params, tokens and flops")
    for key in NUMERIC:
        if key in frame:
            bad = frame[key].isna() | frame[key].isin([math.inf, -math.inf])
            if bad.any():
                count = f"{int(bad.sum())} row{'s' if bad.sum() > 1 else ''}"
                notes.append(f"column '{key}': {count} missing or not finite ({rows(bad.to_numpy())})")
    for key in conventions:
        if (most := frame[key].max()) < SMALLEST:
            notes.append(
                f"'{originals.get(key, key)}' as {MEANINGS[key]} is {most:g} at most; if it counts in "
                f"another unit, say so in its name, such as '{key} (B)' for billions"
            )
    frame.attrs = {"notes": notes, "conventions": conventions, "names": named}
    return frame


def meaning(column: str) -> tuple[str | None, float]:
    """(DESIGN's word, factor to its unit) of a column's name; (None, 1) of an unknown one."""
    name, _, unit = column.strip().rstrip(")]").replace("[", "(").partition("(")
    base, unit = _normal(name), _normal(unit).removeprefix("in_")
    if unit:
        key, _ = meaning(name)
        if key is None:
            return None, 1
        if unit in _PLAIN_UNITS or (unit in _FLOP_UNITS and key.startswith("flops")):
            return key, _FLOP_UNITS.get(unit, 1)
        if key in COUNTS and unit in _SCALES:
            return key, _SCALES[unit]
        return (
            (key, math.log(2)) if key.startswith("loss") and unit.startswith("bits_per_token") else (None, 1)
        )
    if base in _KNOWN:
        return _KNOWN[base], 1
    evaluated = _KNOWN.get(_EVALUATED.sub("", base, count=1), "")
    if evaluated and (_SECTION.match(column) or evaluated.startswith(QUALITIES)):
        return evaluated, 1
    if found := re.fullmatch(r"(\w\w+?)_(?:in_)?(m|b|millions?|billions?)", base):
        key = _KNOWN.get(found[1])
        if key in COUNTS:
            return key, _SCALES[found[2]]
    return None, 1


def parse_number(text: str, count: bool) -> float | None:
    """A number written as text, or None; ``1.3B``, ``1,300,000`` and ``3x10^9`` only for counts."""
    text = text.strip()
    try:
        return float(text)
    except ValueError:
        if not count:
            return None
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        return float(text.replace(",", ""))
    if found := _POWER.fullmatch(text):
        return float(Decimal(found["number"]).scaleb(int(found["power"])))
    if (found := _SUFFIXED.fullmatch(text)) and (scale := _SCALES.get(found["scale"].lower())):
        return float(Decimal(found["number"]) * scale)
    return None


def require(frame: pd.DataFrame, columns: Iterable[str], source: str = "the table") -> None:
    """Raise ``DataError`` unless all columns are there; says what comes close, or could be derived."""
    for column in columns:
        if column in frame:
            continue
        word = f" ({MEANINGS[column]})" if column in MEANINGS else ""
        names = {_normal(str(c)): str(c) for c in frame.columns}
        wanted = [column, *(s for s in SYNONYMS.get(column, ()) if len(s) > 2)]
        near = [
            names[n]
            for n in names
            if n not in _KNOWN and difflib.get_close_matches(n, wanted, n=1, cutoff=0.75)
        ]
        hint = f"; did you mean {', '.join(near)}? rename it to {column}" if near else ""
        three = {"params", "tokens", "flops"}
        if column in three and three - {column} <= set(frame.columns):
            hint += f"; --derive (derive=True) computes it by C = {SIX_ND}"
        has = ", ".join(map(str, frame.columns))
        raise DataError(f"{source} has no column '{column}'{word}; it has {has}{hint}")


def plain_column(column: pd.Series[Any]) -> pd.Series[Any]:
    """The column; of pandas' numbers with a mark for missing ones (``Int64``), as floats with NaN."""
    import pandas as pd

    if isinstance(column.dtype, np.dtype) or not pd.api.types.is_numeric_dtype(column):
        return column
    if pd.api.types.is_bool_dtype(column):
        return column
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return pd.Series(values, index=column.index, name=column.name)


def _one_of(same: list[str], key: str, quantity: str | None, source: str | Path) -> str:
    """Which of several columns of one meaning to take: the one to be fitted, or of the same section."""
    if quantity in same:
        return quantity
    losses = key.startswith(QUALITIES)
    bare = [column for column in same if not _SECTION.match(column)]
    if not losses and len(bare) == 1:
        return bare[0]
    section = (quantity or "").partition("/")[0]
    if not losses and len(near := [c for c in same if c.partition("/")[0] == section]) == 1:
        return near[0]
    hint = ", or name the one to fit by --y (quantity=...)" if losses or len(bare) < len(same) else ""
    raise DataError(f"{source}: columns {', '.join(same)} all mean '{key}'; keep one{hint}")


def _read(source: str | Path, quantity: str | None) -> tuple[pd.DataFrame, list[str]]:
    import pandas as pd

    if str(source).startswith("wandb:"):
        return to_frame(read_online(str(source).removeprefix("wandb:")), _word, _fits, quantity)
    file = Path(source)
    ending = file.suffix.lower()
    if not file.exists():
        raise RecordsError(f"{file}: no such file")
    if file.is_dir() or ending == ".wandb":
        return to_frame(read_offline(file), _word, _fits, quantity)
    if ending not in (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"):
        raise RecordsError(
            f"{file}: expected a .csv, .tsv, .jsonl, .ndjson or .parquet file, a folder of wandb's offline "
            "files, or wandb:entity/project"
        )
    try:
        if ending in (".csv", ".tsv"):
            frame = pd.read_csv(file, sep="\t" if ending == ".tsv" else ",", float_precision="round_trip")
        elif ending == ".parquet":
            frame = pd.read_parquet(file)
        else:
            frame = pd.DataFrame(_json_lines(file))
    except (ValueError, OSError) as error:
        raise DataError(f"{file}: not a readable {ending[1:]} table ({error})") from None
    frame = frame.reset_index(drop=all(name is None for name in frame.index.names))
    # Written by pandas with its row numbers; they would make equal rows look different.
    numbered = [c for c in frame.columns if str(c).startswith("Unnamed: ")]
    notes = [f"column '{c}' has no name; left out" for c in numbered]
    return frame.drop(columns=numbered), notes


def _json_lines(file: Path) -> list[dict[str, Any]]:
    found = []
    # Not splitlines: U+2028 and its like end no line of JSON.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"line {number}: expected a JSON object")
        found.append(record)
    return found


def _numbers(
    column: pd.Series[Any], key: str, source: str | Path, notes: list[str], scaled: str | None
) -> pd.Series[Any]:
    """The column as numbers; text that is none is refused by row, values with a unit are noted.

    ``scaled`` is the column's own name where that has a unit: then the values may have none.
    """
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        column = plain_column(column)
        return column if column.dtype.kind in "iuf" else column.astype("float64")
    values: list[float] = []
    bad: list[str] = []
    twice: list[str] = []
    worded: list[str] = []
    for row, value in enumerate(column):
        number: float | None = None
        if isinstance(value, str):
            number = parse_number(value, key in COUNTS) if value.strip() else math.nan
            if scaled and number is not None and _SUFFIXED.fullmatch(value.strip()):
                twice.append(f"{row} ({value!r})")
            if number is not None and re.search(
                r"[a-z,×·*^]", re.sub(r"(?i)nan|inf(inity)?|e", "", value), re.I
            ):
                worded.append(f"'{value}' as {number:g}")
        elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            number = float(value)
        elif not isinstance(value, Mapping | list) and pd.isna(value):
            number = math.nan
        if number is None:
            bad.append(f"{row} ({value!r})")
        values.append(math.nan if number is None else number)
    for wrong, name, words in (
        (bad, key, "text where numbers belong"),
        (twice, scaled, "a unit in its name and another in values"),
    ):
        if wrong:
            more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
            raise DataError(f"{source}: column '{name}' has {words}, row {', '.join(wrong[:6])}{more}")
    if worded:
        notes.append(f"column '{key}': {len(worded)} values have a unit or marks, read like {worded[0]}")
    return pd.Series(values, index=column.index, dtype="float64")


def _derive(frame: pd.DataFrame, source: str | Path) -> str | None:
    """Add the one of params, tokens and flops that is missing; its name."""
    missing = [key for key in ("params", "tokens", "flops") if key not in frame]
    if len(missing) > 1:
        raise DataError(
            f"{source}: C = {SIX_ND} needs two of params, tokens, flops; there is no {', no '.join(missing)}"
        )
    if not missing:
        return None
    if missing == ["flops"]:
        frame["flops"] = 6.0 * frame["params"] * frame["tokens"]
    else:
        other = "tokens" if missing == ["params"] else "params"
        frame[missing[0]] = frame["flops"] / (6.0 * frame[other])
    return missing[0]


def _first(columns: Iterable[Any], wanted: Iterable[str]) -> str | None:
    """The first of the wanted names that a column has, known or by its normalised name."""
    by_name = {_normal(str(c)): str(c) for c in columns}
    return next((by_name[name] for name in wanted if name in by_name), None)


def _word(column: str) -> str | None:
    return meaning(column)[0]


def _fits(key: str, value: Any) -> bool:
    """Whether a value can stand in the column: text that is no number cannot where numbers belong."""
    return key not in NUMERIC or not isinstance(value, str) or parse_number(value, key in COUNTS) is not None


def _normal(name: str) -> str:
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[^a-z0-9]+", "_", split.lower()).strip("_")
