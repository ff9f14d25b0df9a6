"""What a study found, in words: rules from numbers to sentences, so that equal fits read alike."""

from __future__ import annotations

from collections.abc import Iterator

from analysis.plots import number
from analysis.study import Law, Study

NAMES = {
    "loss_last": "last-scale loss", "loss_avg": "average loss",
    "error_last": "last-scale error", "error_avg": "average error",
}  # fmt: skip


def headline(study: Study) -> str:
    """One sentence: does the loss fall as a power law of N?"""
    final = study.final
    depths = sorted(int(d) for d in final["depth"].unique())
    if len(depths) == 0:
        return "No run has finished yet: there is no law over model size."
    if len(depths) == 1:
        return f"One depth (d{depths[0]}) has finished; a law over model size needs at least three."
    rows = [study.law(q) for q in ("loss_last", "loss_avg")]
    if any(r.law is None for r in rows):
        return f"{len(depths)} depths have finished; {rows[0].problem or rows[1].problem}."
    kinds = [_verdict(row) for row in rows]
    span = final["params"].max() / final["params"].min()
    over = f"over {len(depths)} depths (d{depths[0]} to d{depths[-1]}, N ×{span:.3g})"
    if kinds[0] == kinds[1]:
        return f"Validation loss {kinds[0]} {over}: {_exponent(rows[0])}; {_exponent(rows[1])}."
    return (
        f"Last-scale loss {kinds[0]}, average loss {kinds[1]}, {over}: "
        f"{_exponent(rows[0])}; {_exponent(rows[1])}."
    )


def _verdict(row: Law) -> str:
    law = row.law
    assert law is not None
    if law.uncertainty is None:
        return "has a slope whose uncertainty is not known"
    low, high = law.interval()["alpha"]
    if low <= 0 <= high:
        return "shows no established trend with model size (the interval of the exponent holds 0)"
    if low > 0:
        return "rises with model size"
    if law.pearson < -0.98:
        return "falls as a power law of model size"
    return f"falls with model size, but only loosely as a power law (r = {_n(law.pearson)})"


def _exponent(row: Law) -> str:
    law = row.law
    assert law is not None
    bounds = ""
    if law.uncertainty is not None:
        low, high = law.interval()["alpha"]
        bounds = f" [{_n(low)}, {_n(high)}]"
    return f"{NAMES[row.quantity]} ∝ N^{_n(law.alpha)}{bounds}, r = {_n(law.pearson)}"


def _n(value: float) -> str:
    """Four decimals, with a true minus sign."""
    return f"{value:.4f}".replace("-", "−")


def sentences(study: Study) -> list[str]:
    """Further findings, the most important first."""
    return list(_sentences(study))


def _sentences(study: Study) -> Iterator[str]:
    for quantity in ("loss_last", "loss_avg"):
        for offset, f in study.forecasts.get(quantity, ()):
            if offset and not f.law.converged:
                continue
            form = "with an offset" if offset else "without offset"
            depth = int(study.final.loc[study.final["params"] == f.x, "depth"].iloc[0])
            yield (
                f"Forecast of d{depth} from the {f.trained} smaller depths, {form}: {NAMES[quantity]} "
                f"{f.predicted:.4f} [{f.low:.4f}, {f.high:.4f}]; it reached {f.actual:.4f} "
                f"({f.error:+.2%}, {'inside' if f.covered else 'outside'} the interval)."
            )
    if study.forecast_problem and len(study.final):
        yield f"No forecast of the largest depth: {study.forecast_problem}."
    for quantity in ("loss_last", "loss_avg"):
        if not len(study.final):
            continue
        row = study.law(quantity, offset=True)
        law = row.law
        if law is None or not law.converged:
            yield f"Offset of the {NAMES[quantity]} over N: {row.status}."
        elif law.uncertainty is not None:
            low, high = law.interval()["offset"]
            free = (
                "; the data do not exclude 0, so they cannot tell the two forms apart"
                if low <= 1e-3 * high
                else ""
            )
            yield (
                f"With a free offset the {NAMES[quantity]} would level off at L∞ = {law.offset:.4g} "
                f"[{low:.4g}, {high:.4g}]{free}."
            )
    for quantity in ("loss_last", "loss_avg"):
        row = study.law(quantity, study.flops, "pareto")
        if row.law is not None and row.law.uncertainty is not None and row.law.converged:
            low, high = row.law.interval()["alpha"]
            reach = row.law.x
            yield (
                f"Along the Pareto frontier {NAMES[quantity]} ∝ C^{_n(row.law.alpha)} "
                f"[{_n(low)}, {_n(high)}], "
                f"r = {_n(row.law.pearson)}, from {number(float(f'{reach[0]:.2g}'))} to "
                f"{number(float(f'{reach[-1]:.2g}'))} FLOP."
            )
