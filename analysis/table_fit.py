"""``run_sweep.py fit TABLE``: anyone's runs in, a law in words out.

- The table is read by ``load_table`` (or, a sweep's folder, by ``load_runs``), cleaned by
  ``tidy.ready``, fitted, and told with all that was left out and by which convention N, D, C count.
- Of a sweep the last evaluations of finished runs are fitted, as in its report.
- Huber's loss for the parametric law, as Hoffmann et al. (2203.15556) fit it; squares for a power
  law, whose intervals then need no bootstrap. IsoFLOP fits parabolas by least squares.
- Rows of one run are not independent: runs are the groups wherever one has several rows; failing
  that, seeds of one size are.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.errors import DataError
from analysis.records import load_runs
from analysis.tables import load_table, require
from analysis.tidy import FORMS, Form, Ready, ready
from scaling.records import write_atomic, write_json

if TYPE_CHECKING:
    import pandas as pd

    from analysis.isoflop import IsoFlop
    from analysis.parametric import ParametricLaw
    from analysis.powerlaw import PowerLaw

    Law = PowerLaw | ParametricLaw | IsoFlop

AXES = {"N": "params", "D": "tokens", "C": "flops"}
X_LABELS = {
    "params": "parameters N", "tokens": "training tokens D", "flops": "training compute C (FLOP)",
}  # fmt: skip
OWN = {
    "power": ("x", "offset"), "parametric": ("repeated",), "isoflop": ("budget", "tolerance"),
    "power parametric": ("loss_fn", "delta", "bootstrap"),
}  # fmt: skip
"""Laws -> options that mean something to them only."""
SWEEP_CONVENTIONS = {
    "params": "parameters of the blocks' matrices (VAR eq. 8)",
    "tokens": "training tokens seen",
    "flops": "exact training FLOP",
}


@dataclass(frozen=True)
class FitOptions:
    """Options of ``fit``."""

    law: Literal["power", "parametric", "isoflop"] = "power"
    """power: L = (βX)^α; parametric: L = E + A/N^α + B/D^β; isoflop: the best N of each compute budget."""
    x: Literal["N", "D", "C"] = "N"
    """The scale X of a power law."""
    y: str | None = None
    """The column to fit; by default loss, of a sweep loss_last."""
    offset: bool = False
    """A power law with an irreducible part: L = L∞ + (βX)^α."""
    loss_fn: Literal["huber", "squared"] | None = None
    """The loss of the residuals of log L; by default squared for power, huber for parametric."""
    delta: float = 1e-3
    """Huber's δ, in units of log L."""
    bootstrap: int = 0
    """Resamples for intervals, such as 4000; huber needs them, and an offset with several rows per run."""
    groups: str | None = None
    """Column of what is independent of each other; by default run where one has several rows, else the sizes
    where one has several seeds."""
    level: float = 0.95
    """Of the intervals."""
    budget: str | None = None
    """isoflop: column of the compute budgets; by default rows whose C agree within tolerance."""
    tolerance: float = 0.05
    """isoflop: C within this share of one another are one budget."""
    below: float | None = None
    """Leave out rows whose y is not strictly below this."""
    repeated: bool = False
    """parametric: tokens beyond the column unique_tokens count less and less (Muennighoff et al. 2023)."""
    mixed: bool = False
    """Fit several learning-rate schedules or model families as one."""
    derive: bool = False
    """Compute the one of N, D and C that the table lacks by C = 6·N·D."""
    out: str | None = None
    """A folder for fit.json, fit.svg and fit.png."""
    json: bool = False
    """Print JSON instead of words."""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise DataError(f"--level must lie between 0 and 1, got {self.level:g}")
        if self.bootstrap < 0:
            raise DataError(f"--bootstrap must not be negative, got {self.bootstrap}")
        if not self.delta > 0:
            raise DataError(f"--delta must be positive, got {self.delta:g}")
        for law, names in OWN.items():
            for name in names if self.law not in law.split() else ():
                if getattr(self, name) != getattr(FitOptions, name):
                    raise DataError(f"--{name.replace('_', '-')} does nothing with --law {self.law}")


def fit_table(path: str, options: FitOptions) -> str:
    """Fit what ``options`` ask for to the table at ``path``; the answer as text, or as strict JSON.

    Args:
        path: what ``load_table`` takes, or a sweep's folder.

    With ``options.out`` fit.json, fit.svg and fit.png are written into that folder.

    Raises:
        RecordsError: as ``load_table`` and ``load_runs``.
        DataError: a missing column, or a table that cannot carry the law (rows and reasons named).
    """
    frame, y, conventions = _load(path, options)
    if options.law == "power":
        xs = [AXES[options.x]]
    else:
        second = "flops" if options.law == "isoflop" and "flops" in frame else "tokens"
        xs = ["params", second]
    form: Form = "offset" if options.offset else options.law
    needed = [*xs, *(["unique_tokens"] if options.repeated else []), y]
    require(frame, [*needed, *(c for c in (options.groups, options.budget) if c)], path)
    rows = ready(frame, needed, form, options.mixed, options.below)
    groups, grouping = _groups(rows.frame, options.groups)
    try:
        law = _fit(rows.frame, xs, y, groups, options)
    except DataError as error:
        if rows.dropped.empty:
            raise
        # The fits count the rows that they were given.
        raise DataError(f"{error} (counting rows without the {len(rows.dropped)} left out)") from None
    used = {name: conventions.get(name, "as in the table") for name in xs}
    notes = [*frame.attrs.get("notes", []), *rows.notes]
    facts = _facts(path, law, form, y, used, grouping, rows, notes, options)
    if options.out is not None:
        folder = Path(options.out)
        write_json(folder / "fit.json", facts)
        _draw(law, folder, xs[0] if options.law == "power" else "flops", y, options.level)
    if options.json:
        return json.dumps(facts, indent=1, allow_nan=False)
    said = [f"{y} over {' and '.join(xs)}, {path}", law.summary(options.level), f"groups: {grouping}"]
    said += [f"{name}: {convention}" for name, convention in used.items()]
    said += rows.summary().split("\n")[: 1 + len(rows.counts)]
    said += [f"note: {' '.join(note.split())}" for note in notes]
    if options.out is not None:
        said.append(f"written: {Path(options.out) / 'fit.json'}, fit.svg, fit.png")
    return "\n".join(_printable(line) for text in said for line in text.split("\n"))


def _load(path: str, options: FitOptions) -> tuple[pd.DataFrame, str, dict[str, str]]:
    """The table, the column to fit, and where params, tokens and flops come from."""
    if not path.startswith("wandb:") and _is_sweep(Path(path)):
        if options.derive:
            raise DataError("--derive does nothing for a sweep: its records have N, D and C")
        return load_runs(path), options.y or "loss_last", SWEEP_CONVENTIONS
    frame = load_table(path, options.derive)
    y = options.y or ("loss" if "loss" in frame or "loss_last" not in frame else "loss_last")
    return frame, y, frame.attrs["conventions"]


def _is_sweep(folder: Path) -> bool:
    """Whether runs of this project lie in it; offline wandb files alone do not make a sweep."""
    return (folder / "sweep.json").is_file() or any(
        (file.parent / "metrics.jsonl").is_file() for file in folder.glob("*/config.json")
    )


def _groups(frame: pd.DataFrame, column: str | None) -> tuple[np.ndarray | None, str]:
    """What is independent of each other, and in words."""
    if column is not None:
        return frame[column].to_numpy(), f"column '{column}'"
    if "run" in frame and frame["run"].notna().all() and frame["run"].duplicated().any():
        return frame["run"].to_numpy(), "runs, of which some have several rows"
    if {"seed", "params"} <= set(frame.columns):
        seeds = frame.groupby("params")["seed"].nunique()
        if seeds.max() > 1 and len(seeds) > 2:
            return frame["params"].to_numpy(), "sizes, of which some have several seeds"
    return None, "none, every row is taken as independent"


def _fit(frame: pd.DataFrame, xs: list[str], y: str, groups: np.ndarray | None, options: FitOptions) -> Law:
    numbers = {name: frame[name].to_numpy(dtype=np.float64) for name in (*xs, y)}
    if options.law == "power":
        from analysis.powerlaw import fit_power_law

        return fit_power_law(
            numbers[xs[0]], numbers[y], options.offset, None, groups, options.bootstrap,
            loss_fn=options.loss_fn or "squared", delta=options.delta,
        )  # fmt: skip
    if options.law == "parametric":
        from analysis.parametric import fit_parametric

        return fit_parametric(
            numbers["params"], numbers["tokens"], numbers[y], options.loss_fn or "huber", options.delta,
            frame["unique_tokens"].to_numpy(dtype=np.float64) if options.repeated else None,
            groups, bootstrap=options.bootstrap,
        )  # fmt: skip
    from analysis.isoflop import fit_isoflop

    return fit_isoflop(
        numbers["params"], numbers[y], numbers.get("tokens"), numbers.get("flops"),
        tolerance=options.tolerance, groups=groups,
        budget=frame[options.budget].to_numpy() if options.budget else None,
    )  # fmt: skip


def _facts(
    path: str,
    law: Law,
    form: Form,
    y: str,
    conventions: dict[str, str],
    grouping: str,
    rows: Ready,
    notes: list[str],
    options: FitOptions,
) -> dict[str, Any]:
    """``fit.json``: plain values, null for what is no finite number."""
    level = options.level
    value: dict[str, Any] = {
        "table": path, "law": options.law, "form": FORMS[form][0], "y": y, "conventions": conventions,
        "groups": grouping, "converged": law.converged, "status": law.status,
        "params": {name: v for name, v, _, _ in law.rows(level)},
        "level": level, "no_interval": law.no_interval(level) or None,
        "interval": None if law.no_interval(level) else {n: [a, b] for n, _, a, b in law.rows(level)},
        "objective": getattr(law, "objective", None),
        "rows": len(rows.frame) + len(rows.dropped), "used": len(rows.frame),
        "left_out": {
            str(reason): [str(i) for i in part.index] for reason, part in rows.dropped.groupby("reason")
        },
        "notes": notes,
    }  # fmt: skip
    plain: dict[str, Any] = _plain(value)
    return plain


def _draw(law: Law, folder: Path, x: str, y: str, level: float) -> None:
    """fit.svg and fit.png."""
    from analysis import plots
    from analysis.powerlaw import PowerLaw

    with plots.styled():
        label = y.replace("$", r"\$")  # a column's name is text, not mathematics
        fig, ax = plots.figure("", X_LABELS[x], label)
        if isinstance(law, PowerLaw):
            plots.log_axes(ax, plots.limits(law.x), plots.limits(law.y, 0.3, 0.14))
        law.plot(ax, level=level)
        ax.set_ylabel(label)
        if ax.get_legend() is None and ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best")
        svg, png = plots.to_svg(fig), plots.to_png(fig)
    write_atomic(folder / "fit.svg", svg)
    # Beside its place first, as ``write_atomic`` does with text.
    aside = folder / f".fit.png.{os.getpid()}"
    aside.write_bytes(png)
    aside.replace(folder / "fit.png")


def _printable(line: str) -> str:
    """Names from a table may hold anything, escape sequences of a terminal too."""
    return "".join(c if c.isprintable() else "?" for c in line)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
