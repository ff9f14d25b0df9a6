"""Which parameters N counts and which FLOPs C counts: switchable, named, and their effect on exponents shown.

- Conventions move exponents: one set of runs gives compute-optimal exponents from 0.37 to 0.70 by
  what is counted alone. Kaplan et al. (2001.08361) and Hoffmann et al. (2203.15556) differ mostly so
  (Pearce and Song, 2406.12907; Porian et al., 2406.19146).
- A convention is a word: ``blocks``, ``total``, ``exact``, ``6nd``, each but the last with
  ``_with_`` or ``_without_`` and parts joined by ``_and_``: ``blocks_without_adaln``,
  ``blocks_with_embeddings_and_head``, ``without_attention`` (of ``exact``).
- ``6nd`` is 6·N·D with the N chosen beside it; that pairing is what the literature disagrees on.
- Parts come from each run's ``costs.json``. A run without it still has ``blocks``, ``total``,
  ``exact`` and ``6nd``; what needs parts is refused and names the runs.
- Parts are held against the recorded totals, so that the costs of another run are not believed. Where the
  steps of an image are drawn at random (FlexVAR), parts are means over the whole run: they add up at its end
  alone, and before it a part is taken for the same share of C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.errors import DataError
from scaling.records import RunFolder

if TYPE_CHECKING:
    import pandas as pd

Costs = Mapping[str, Mapping[str, Any]]
"""Run name -> the value of its ``costs.json``."""
Exponent = Literal["params", "flops", "optimal"]
PARAMS_PARTS = ("qkv", "projection", "mlp", "adaln", "adaln_shared", "biases", "embeddings", "head")
MAMBA_PARTS = ("conv", "scan")
"""Parts that only runs of flexvar-mamba have; 0 for the others."""
FLOPS_PARTS = ("qkv", "projection", "mlp", "attention", *MAMBA_PARTS, "adaln", "embedding", "head")
BLOCKS = ("qkv", "projection", "mlp", "adaln")
"""The parts of N(d), VAR eq. 8."""
PARAMS_CONVENTIONS = (
    "blocks", "blocks_without_adaln", "blocks_with_head", "blocks_with_embeddings_and_head", "total",
)  # fmt: skip
FLOPS_CONVENTIONS = (
    "exact", "6nd", "without_head", "without_adaln", "without_attention", "without_embedding_and_head",
)  # fmt: skip
"""What ``conventions_table`` compares if not told otherwise; any other word of the grammar works too."""
_BASES = {
    "blocks": "N: block matrices (VAR eq. 8)",
    "total": "N: all trained parameters",
    "exact": "C: exact training FLOPs, attention under its mask",
    "6nd": "C: 6·N·D",
}
PARTS_AGREE = 1e-9
"""Relative difference allowed between the parts' sum and the recorded total: rounding only."""


@dataclass(frozen=True)
class Convention:
    """A parsed word: the base, and the parts counted beside it or left out of it."""

    base: str
    sign: int
    """+1 with, −1 without; 0 for the base alone."""
    parts: tuple[str, ...]

    @property
    def label(self) -> str:
        """For an axis or a table: ``N: block matrices (VAR eq. 8), without adaln``."""
        if not self.sign:
            return _BASES[self.base]
        return f"{_BASES[self.base]}, {'with' if self.sign > 0 else 'without'} {' and '.join(self.parts)}"


def params_convention(word: str) -> Convention:
    """Parse a convention of N.

    Raises:
        DataError: not a word of the grammar, a part that is already counted or not there to leave out.
    """
    found = _parse(word, ("blocks", "total"), PARAMS_PARTS)
    inside = BLOCKS if found.base == "blocks" else PARAMS_PARTS
    for part in found.parts:
        if (part in inside) == (found.sign > 0):
            raise DataError(
                f"params convention {word!r}: {part} is {'already' if found.sign > 0 else 'not'} "
                f"counted in '{found.base}' ({', '.join(inside)})"
            )
    return found


def flops_convention(word: str) -> Convention:
    """Parse a convention of C.

    Raises:
        DataError: not a word of the grammar; parts added to the exact count, which has them all.
    """
    found = _parse(f"exact_{word}" if word.startswith("without_") else word, ("exact", "6nd"), FLOPS_PARTS)
    if found.sign > 0 or (found.base == "6nd" and found.sign):
        raise DataError(
            f"flops convention {word!r}: parts can be left out of 'exact' (without_…), no other way"
        )
    return found


def _parse(word: str, bases: tuple[str, ...], parts: tuple[str, ...]) -> Convention:
    for base in bases:
        if word == base:
            return Convention(base, 0, ())
        for join, sign in (("_with_", 1), ("_without_", -1)):
            if word.startswith(base + join):
                named = tuple(word.removeprefix(base + join).split("_and_"))
                if unknown := [p for p in named if p not in parts]:
                    raise DataError(
                        f"convention {word!r}: unknown part '{unknown[0]}'; there are {', '.join(parts)}"
                    )
                if len(set(named)) < len(named):
                    raise DataError(f"convention {word!r} names a part twice")
                return Convention(base, sign, named)
    raise DataError(
        f"convention {word!r}: expected {' or '.join(bases)}, with parts after _with_ or _without_, "
        f"as in '{bases[0]}_without_head_and_adaln'"
    )


def load_costs(sweep_folder: str | Path, runs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``costs.json`` of the named runs of a sweep folder.

    Raises:
        RecordsError: a run has none (it is older than the file), or it is damaged.
    """
    return {name: RunFolder(Path(sweep_folder) / name).costs() for name in runs}


def with_conventions(
    runs: pd.DataFrame,
    costs: str | Path | Costs | None = None,
    params: str = "blocks",
    flops: str = "exact",
) -> pd.DataFrame:
    """A copy of ``runs`` with the columns ``N`` and ``C`` by the conventions named.

    Args:
        runs: as from ``load_runs``: run, params, tokens, flops; params_total for ``total``.
        costs: the sweep folder, or costs by run name; only needed where parts are.
        params: ``blocks``, ``total``, or either with or without parts.
        flops: ``exact``, ``6nd`` (6·N·D, with this N), or ``without_<part>[_and_<part>]``.

    Returns:
        the frame; ``attrs["conventions"]`` holds the two labels, under ``N`` and ``C``.

    Raises:
        DataError: an unknown word, a missing column, a run without costs, parts that do not add
            up to what the run recorded.
        RecordsError: a run of the folder has no ``costs.json``.
    """
    of_params, of_flops = params_convention(params), flops_convention(flops)
    needed = ["params" if of_params.base == "blocks" else "params_total"]
    needed += ["flops" if of_flops.base == "exact" else "tokens"]
    needed += ["run", "tokens"] if of_params.sign or of_flops.sign else []
    if missing := [c for c in needed if c not in runs]:
        raise DataError(
            f"conventions '{params}' and '{flops}' need the column {missing[0]}, which is missing"
        )
    frame = runs.copy()
    frame["N"] = runs[needed[0]].astype(float)
    if of_params.sign or of_flops.sign:
        names = [str(name) for name in runs["run"].unique()]
        if costs is None:
            raise DataError(
                f"conventions '{params}' and '{flops}' need costs by part: give the sweep's folder as costs"
            )
        by_run = load_costs(costs, names) if isinstance(costs, str | Path) else costs
        if lacking := [name for name in names if name not in by_run]:
            raise DataError(
                f"no costs by part for {len(lacking)} of {len(names)} runs ({', '.join(lacking[:3])}); "
                "without them there are blocks, total, exact and 6nd"
            )
    if of_params.sign:
        _check_sum(runs, by_run, of_params.base)
        frame["N"] += of_params.sign * _per_run(runs, by_run, "params", of_params.parts)
    if of_flops.base == "6nd":
        frame["C"] = 6.0 * frame["N"] * runs["tokens"]
    else:
        frame["C"] = runs["flops"].astype(float)
        if of_flops.sign:
            _check_sum(runs, by_run, "exact")
            left_out, every = (
                _per_run(runs, by_run, "flops_per_image", parts) for parts in (of_flops.parts, FLOPS_PARTS)
            )
            frame["C"] *= 1 - left_out / every
    labels = {"N": of_params.label, "C": of_flops.label}
    if of_flops.base == "6nd" and params != "blocks":
        labels["C"] += f" (N: {of_params.label[3:]})"
    frame.attrs = {**runs.attrs, "conventions": labels}
    return frame


def labels_of(runs: pd.DataFrame, params: str, flops: str) -> dict[str, str]:
    """Labels of the columns ``params`` and ``flops`` of a frame: what N and what C they are."""
    known = {
        "params": _BASES["blocks"], "params_total": _BASES["total"],
        "flops": _BASES["exact"], "flops_6nd": _BASES["6nd"],
    }  # fmt: skip
    known |= runs.attrs.get("conventions", {})
    return {
        "N": known.get(params, f"N: column {params}"),
        "C": known.get(flops, f"C: column {flops}"),
    }


def _per_run(runs: pd.DataFrame, costs: Costs, kind: str, parts: Sequence[str]) -> pd.Series[float]:
    """The sum of parts of every row's run."""
    by_name: dict[str, float] = {}
    for name in runs["run"].unique():
        of_run = dict.fromkeys(MAMBA_PARTS, 0) | costs[str(name)].get(kind, {})
        if missing := [p for p in parts if p not in of_run]:
            raise DataError(f"costs of {name}: {kind} lacks {missing[0]}")
        if wrong := [p for p in parts if not isinstance(of_run[p], int | float)]:
            raise DataError(
                f"costs of {name}: {kind} has {wrong[0]} = {of_run[wrong[0]]!r}, expected a number"
            )
        by_name[name] = float(sum(of_run[p] for p in parts))
    return runs["run"].map(by_name).astype(float)


def _images(runs: pd.DataFrame, costs: Costs) -> pd.Series[float]:
    per_image: dict[str, float] = {}
    for name in runs["run"].unique():
        tokens = costs[str(name)].get("tokens_per_image")
        if not isinstance(tokens, int | float) or not tokens > 0:
            raise DataError(f"costs of {name}: tokens_per_image is {tokens!r}, expected a positive number")
        per_image[name] = float(tokens)
    return runs["tokens"] / runs["run"].map(per_image).astype(float)


def _check_sum(runs: pd.DataFrame, costs: Costs, base: str) -> None:
    if base == "exact":
        runs = runs[runs["final"]] if "final" in runs else runs
        total = runs["flops"]
        parts = _per_run(runs, costs, "flops_per_image", FLOPS_PARTS) * _images(runs, costs)
    else:
        total = runs["params" if base == "blocks" else "params_total"]
        parts = _per_run(runs, costs, "params", BLOCKS if base == "blocks" else PARAMS_PARTS)
    wrong = ~(np.abs(parts / total - 1) <= PARTS_AGREE)
    if wrong.any():
        first = wrong.idxmax()
        raise DataError(
            f"costs of {runs['run'][first]} add up to {parts[first]:.6g}, but the run recorded "
            f"{total[first]:.6g} ('{base}', row {first}); they belong to another model"
        )


def conventions_table(
    runs: pd.DataFrame,
    costs: str | Path | Costs | None = None,
    exponent: Exponent = "params",
    quantity: str = "loss_last",
    params: Sequence[str] | None = None,
    flops: Sequence[str] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """One law, refitted under every convention: how far its exponent moves by the counting alone.

    Args:
        runs, costs: as ``with_conventions``.
        exponent: ``params``: α of L = (βN)^α over the last evaluations of finished runs;
            ``flops``: α of L = (βC)^α along the Pareto frontier of all evaluations;
            ``optimal``: a of N ∝ C^a along that frontier (Hoffmann et al. 2022, approach 1).
        quantity: the column that is fitted.
        params, flops: conventions to compare; by default those that the data allow (all with
            ``costs``), of the axes that the exponent has.
        level: of the intervals.

    Returns:
        a frame with params, flops (conventions), exponent, low, high, moved (minus the first
        row's exponent), status, and the labels N and C. A convention whose fit is impossible
        keeps its row and says why in status.

    Raises:
        DataError: as ``with_conventions``.
    """
    import pandas as pd

    some = costs is not None
    if params is None:
        params = PARAMS_CONVENTIONS if some else ("blocks", "total")
    if flops is None:
        flops = FLOPS_CONVENTIONS if some else ("exact", "6nd")
    if exponent == "params":
        flops = flops[:1]
    if exponent == "flops":
        # N enters C by 6·N·D only.
        pairs = [(n, c) for c in flops for n in (params if c == "6nd" else params[:1])]
    else:
        pairs = [(n, c) for n in params for c in flops]
    if quantity not in runs:
        raise DataError(f"the column {quantity} is not there; there are {', '.join(map(str, runs.columns))}")
    rows = []
    for of_params, of_flops in pairs:
        frame = with_conventions(runs, costs, of_params, of_flops)
        row: dict[str, Any] = {"params": of_params, "flops": of_flops}
        try:
            row |= _FITS[exponent](frame, quantity, level)
        except DataError as error:
            row |= {"exponent": np.nan, "low": np.nan, "high": np.nan, "status": str(error)}
        rows.append(row | frame.attrs["conventions"])
    table = pd.DataFrame(rows)
    table.insert(5, "moved", table["exponent"] - table["exponent"].iloc[0])
    return table


def _fit(x: Any, y: Any, groups: Any, level: float) -> dict[str, Any]:
    from analysis.powerlaw import fit_power_law

    law = fit_power_law(x, y, groups=groups)
    low, high = law.interval(level)["alpha"]
    return {"exponent": law.alpha, "low": low, "high": high, "status": law.status}


def _of_size(frame: pd.DataFrame, quantity: str, level: float) -> dict[str, Any]:
    final = frame[frame["final"]] if "final" in frame else frame
    # Seeds of one size share what keeps that size off the law (analysis.study).
    groups = final["N"] if final["N"].duplicated().any() else None
    return _fit(final["N"], final[quantity], groups, level)


def _along_frontier(frame: pd.DataFrame, quantity: str, level: float) -> dict[str, Any]:
    from analysis.frontier import pareto_frontier

    front = pareto_frontier(frame["C"], frame[quantity])
    return _fit(front.x, front.y, _run_of(frame, front.index), level)


def _optimal(frame: pd.DataFrame, quantity: str, level: float) -> dict[str, Any]:
    from analysis.frontier import pareto_frontier

    front = pareto_frontier(frame["C"], frame[quantity])
    return _fit(front.x, frame["N"].to_numpy()[front.index], _run_of(frame, front.index), level)


def _run_of(frame: pd.DataFrame, index: Any) -> Any:
    return frame["run"].to_numpy()[index] if "run" in frame else None


_FITS: dict[str, Callable[[pd.DataFrame, str, float], dict[str, Any]]] = {
    "params": _of_size,
    "flops": _along_frontier,
    "optimal": _optimal,
}
