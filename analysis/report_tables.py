"""Numbers of a report as the cells of its tables: text, the same for HTML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from analysis import plots
from analysis.families import Families
from analysis.family_pairs import Pair
from analysis.fidelity import DRAWS, SAMPLING, Protocol, drawing
from analysis.outlook import Outlook
from analysis.settings import in_words, setting_of
from analysis.study import Law, Study

ROUNDING = 1e-9
"""An exponent that moves by less has not moved."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OUTLOOK = ("loss_last_plain", "loss_last_offset", "loss_avg_plain", "loss_avg_offset")


def run_rows(study: Study) -> list[dict[str, Any]]:
    rows = []
    for run in sorted(study.runs, key=lambda r: (r["depth"], r["seed"])):
        part = study.frame[study.frame["run"] == run["run"]]
        row: dict[str, Any] = {
            "run": run["run"],
            "depth": run["depth"],
            "seed": "imported" if run["imported"] else run["seed"],
            "state": run["state"],
            "setting": ""
            if study.settings is None
            else in_words(setting_of(run["config"], study.settings.names)),
        }
        last = part.iloc[-1] if len(part) else None
        for key in ("params", "tokens", "flops", "flops_6nd"):
            row[key] = "–" if last is None else plots.number(float(f"{last[key]:.4g}"))
        row["epochs"] = "–" if last is None else f"{last['epochs']:.3g}"
        for key in plots.QUANTITIES:
            row[key] = "–" if last is None else _with_error(last[key], last[key + "_se"])
        rows.append(row)
    return rows


def _with_error(value: float, error: float) -> str:
    """A single validation image has no standard error."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def law_rows(study: Study) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """A row per law, and the methods of their intervals with the letters that mark them."""
    rows = [_law_row(row) for row in study.laws]
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"]))
    for row in rows:
        row["mark"] = LETTERS[methods.index(row["method"])] if row["method"] else ""
    return rows, list(zip(LETTERS, methods, strict=False))


def _law_row(row: Law) -> dict[str, Any]:
    over = {"params": "N", "flops": "C", "flops_6nd": "C (6ND)"}[row.x]
    points = {"final": "final", "pareto": "Pareto set", "hull": "log-log hull"}[row.points]
    cells = {
        "quantity": plots.QUANTITIES[row.quantity][0], "x": over, "points": points, "drawable": row.drawable,
        "form": f"L∞ + (β{over[0]})^α" if row.offset else f"(β{over[0]})^α",
        "status": "converged" if row.drawable else row.status,
        "alpha": "–", "beta": "–", "offset": "–", "pearson": "–", "n": "–", "method": "",
    }  # fmt: skip
    law = row.law
    if law is None:
        return cells
    cells["pearson"], cells["n"] = f"{law.pearson:.4f}", f"{len(law.x)} ({law.groups})"
    if not law.converged:
        return cells
    why = law.no_interval()
    bounds = {} if why else law.interval()
    cells["method"] = f"no interval: {why}" if why else law.interval_method
    cells["alpha"] = _with_interval(law.alpha, bounds.get("alpha"))
    cells["beta"] = _big(law.log_beta)
    if row.offset:
        cells["offset"] = _with_interval(law.offset, bounds.get("offset"))
    return cells


def outlook_rows(outlook: tuple[Outlook, ...]) -> list[dict[str, str]]:
    """A row per depth, a cell per loss and form."""
    rows: dict[int, dict[str, str]] = {}
    for o in outlook:
        start = {"depth": f"d{o.depth}", "params": plots.number(float(f"{o.params:.4g}"))}
        start["flops"] = plots.number(float(f"{o.flops:.3g}"))
        cells = rows.setdefault(o.depth, start | dict.fromkeys(OUTLOOK, "–"))
        cells[f"{o.quantity}_{'offset' if o.offset else 'plain'}"] = (
            f"{o.value:.4f} [{o.low:.5g}, {o.high:.5g}]"
        )
    return list(rows.values())


def grid_rows(study: Study) -> list[dict[str, str]]:
    """A row per quantity: the surface over N and D, or why there is none; minima at budgets."""
    rows = []
    for grid in study.grids:
        law = grid.surface
        cells = {"quantity": plots.QUANTITIES[grid.quantity][0], "status": grid.problem, "points": "–"}
        cells |= dict.fromkeys(("E", "alpha", "beta", "a", "equation"), "–")
        if law is not None:
            cells |= {"status": law.status, "points": f"{len(law.loss)} ({law.groups})"}
        if law is not None and law.converged:
            cells["equation"] = law.equation
            found = {name: (value, low, high) for name, value, low, high in law.rows()}
            for name in ("E", "alpha", "beta", "a"):
                value, low, high = found[name]
                cells[name] = _with_interval(value, None if math.isnan(low) else (low, high))
        minima = grid.isoflop
        cells["isoflop"] = grid.isoflop_problem if minima is None else minima.status
        if minima is not None and minima.laws:
            exponents = ", ".join(f"{name} {value:.4g}" for name, value, _, _ in minima.rows())
            cells["isoflop"] = f"{exponents}; {minima.status}"
        rows.append(cells)
    return rows


def setting_rows(study: Study) -> list[dict[str, str]]:
    """A row per depth and length: its best setting."""
    if study.settings is None:
        return []
    return [
        {
            "depth": f"d{b.depth}", "tokens": plots.number(float(f"{b.tokens:.4g}")), "setting": b.setting,
            "loss": f"{b.loss:.4f}", "second": "–" if math.isnan(b.second) else f"{b.second:.4f}",
            "tried": str(b.tried),
        }
        for b in study.settings.best
    ]  # fmt: skip


def rate_sentences(study: Study) -> list[str]:
    """The best learning rate of every depth, and how it falls with the width."""
    found = study.settings
    if found is None or not found.rates:
        return []
    said = [
        f"Depth {r.depth} (width {r.width}): best learning rate {r.lr:.3g}"
        if r.lr is not None
        else f"Depth {r.depth}: the best of {', '.join(f'{v:g}' for v in r.tried)} is at the edge of what "
        "was tried, or fewer than three were; try more"
        for r in found.rates
    ]
    if found.power is None:
        return [*said, "How the rate falls with the width needs the best one of two depths"]
    return [*said, f"lr ∝ width^−{found.power:.3g}: a recipe's lr_rule has this as its power"]


def convention_rows(study: Study) -> list[dict[str, str]]:
    rows = []
    for row in study.conventions:
        fitted = math.isfinite(row["exponent"])
        rows.append(
            {
                "axis": row["N"] if row["x"] == "params" else row["C"],
                "points": "final losses" if row["x"] == "params" else "Pareto set",
                "alpha": _with_interval(row["exponent"], (row["low"], row["high"])) if fitted else "–",
                "moved": f"{row['moved']:+.2g}" if fitted and abs(row["moved"]) > ROUNDING else "–",
                "status": row["status"],
            }
        )
    return rows


def _with_interval(value: float, bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return f"{value:.4g}"
    return f"{value:.4g} [{bounds[0]:.4g}, {bounds[1]:.4g}]"


def _big(log_value: float) -> str:
    """exp(log_value) as m×10ⁿ, also beyond the range of floats."""
    exponent = math.floor(log_value / math.log(10))
    mantissa = math.exp(log_value - exponent * math.log(10))
    return f"{mantissa:.2f}×{plots.number(10.0**4)[:2]}{str(exponent).translate(plots._SUPER)}"


def forecast_rows(study: Study) -> list[dict[str, Any]]:
    rows = []
    for quantity, found in study.forecasts.items():
        for offset, f in found:
            row: dict[str, Any] = {
                "quantity": plots.QUANTITIES[quantity][0], "form": "with offset" if offset else "power law",
                "fitted": f.trained, "actual": f"{f.actual:.4f}", "status": f.law.status,
                "predicted": "–", "error": "–", "covered": "–",
            }  # fmt: skip
            if f.law.converged:
                row |= {
                    "predicted": f"{f.predicted:.4f} [{f.low:.5g}, {f.high:.5g}]",
                    "error": f"{f.error:+.2%}", "covered": f.verdict, "status": "converged",
                }  # fmt: skip
            rows.append(row)
    return rows


# -- several families --------------------------------------------------------------------------


def exponent_rows(found: Families) -> list[dict[str, str]]:
    """A row per family: its exponents, and a letter for its tokens."""
    rows = []
    for group, letter in zip(found.groups, LETTERS.upper(), strict=False):
        for study in group.studies:
            plain, free = (study.law("loss_last", offset=offset) for offset in (False, True))
            along = study.law("loss_last", study.flops, "pareto")
            rows.append(
                {
                    "family": study.family, "tokens": letter, "params": _exponent(plain),
                    "offset": _exponent(free), "flops": _exponent(along),
                    "floor": _exponent(free, "offset") if free.drawable else "–",
                    "runs": str(len(study.finished)),
                }
            )  # fmt: skip
    order = list(found.studies)
    return sorted(rows, key=lambda row: order.index(row["family"]))


def _exponent(row: Law, name: str = "alpha") -> str:
    law = row.law
    if law is None or not law.converged:
        return row.status
    return _with_interval(law.params[name], None if law.no_interval() else law.interval()[name])


def pair_rows(found: Families) -> list[dict[str, str]]:
    """A row per comparison of two families with the same tokens."""
    return [_pair_row(pair) for pair in found.pairs]


def _pair_row(pair: Pair) -> dict[str, str]:
    row = {
        "pair": f"{pair.first} and {pair.second}", "x": "N" if pair.x == "params" else "C",
        "form": "with offset" if pair.offset else "power law", "status": pair.problem,
        **dict.fromkeys(("difference", "apart", "at", "first", "second", "ratio", "lower"), "–"),
    }  # fmt: skip
    if pair.found is None:
        return row
    row |= {"difference": _with_interval(pair.found.difference, pair.found.interval()), "apart": pair.apart}
    row |= {"status": pair.found.verdict, "lower": pair.lower}
    if pair.at is not None and pair.ratio is not None:
        first, second = (_with_interval(value, (low, high)) for value, low, high in pair.losses)
        value, low, high = pair.ratio
        row |= {"at": plots.number(float(f"{pair.at:.4g}")), "first": first, "second": second}
        row["ratio"] = _with_interval(value, (low, high))
    return row


def fidelity_rows(protocol: Protocol, families: Sequence[str]) -> list[dict[str, str]]:
    """The latest measurement of every run, by family and N."""
    last = protocol.last.assign(place=[list(families).index(f) for f in protocol.last["family"]])
    rows = []
    for row in last.sort_values(["place", "params", "seed", *SAMPLING], kind="stable").to_dict("records"):
        score, spread = row["is"], row["is_std"]
        rows.append(
            {
                "family": str(row["family"]), "depth": f"d{row['depth']}", "seed": str(row["seed"]),
                "params": plots.number(float(f"{row['params']:.4g}")),
                "flops": plots.number(float(f"{row['flops']:.4g}")),
                "fid": _short(row["fid"]),
                "is": _short(score) + ("" if math.isnan(spread) else f" ± {_short(spread)}"),
                "precision": _short(row["precision"]), "recall": _short(row["recall"]),
                "drawing": drawing([row[key] for key in SAMPLING])
                + (f"; mean of {row[DRAWS]} seeds" if row[DRAWS] > 1 else ""),
            }
        )  # fmt: skip
    return rows


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"
