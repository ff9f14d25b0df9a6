"""What a study found, in words: rules from numbers to sentences, so that equal fits read alike.

- A slope is claimed from three depths on, a power law from four: three cannot show a curve.
- A straight line (r < −0.98) is not evidence against a floor: where the form with an offset
  converged and its L∞ excludes 0, the headline says so, and gives that form's numbers first.
"""

from __future__ import annotations

from collections.abc import Iterator

from analysis.plots import number
from analysis.study import FORMS, Law, Study

NAMES = {
    "loss_last": "last-scale loss", "loss_avg": "average loss",
    "error_last": "last-scale error", "error_avg": "average error",
}  # fmt: skip


def headline(study: Study) -> str:
    """One sentence: does the loss fall as a power law of N?"""
    final = study.finished
    depths = sorted(int(d) for d in final["depth"].unique())
    if len(depths) == 0:
        return "No run has finished yet: there is no law over model size."
    if len(depths) < 3:
        many = "One depth" if len(depths) == 1 else "Two depths"
        shown = " and ".join(f"d{d}" for d in depths)
        has = "has" if len(depths) == 1 else "have"
        return f"{many} ({shown}) {has} finished; a law over model size needs at least three."
    rows = [study.law(q) for q in ("loss_last", "loss_avg")]
    if any(r.law is None for r in rows):
        return f"{len(depths)} depths have finished; {rows[0].problem or rows[1].problem}."
    kinds = [_verdict(study, row) for row in rows]
    span = final["params"].max() / final["params"].min()
    over = f"over {len(depths)} depths (d{depths[0]} to d{depths[-1]}, N ×{span:.3g})"
    if kinds[0] == kinds[1]:
        return f"Validation loss {kinds[0]} {over}: {_exponent(study, rows[0])}; {_exponent(study, rows[1])}."
    kinds = [kind.rstrip(",") for kind in kinds]
    return (
        f"Last-scale loss {kinds[0]}, average loss {kinds[1]}, {over}: "
        f"{_exponent(study, rows[0])}; {_exponent(study, rows[1])}."
    )


def _floor(study: Study, quantity: str) -> Law | None:
    """The law with an offset over N, where its offset excludes 0."""
    row = study.law(quantity, offset=True)
    return row if row.floor else None


def _verdict(study: Study, row: Law) -> str:
    law = row.law
    assert law is not None
    if law.no_interval():
        return "has a slope whose uncertainty is not known"
    low, high = law.interval()["alpha"]
    if low <= 0 <= high:
        return "shows no established trend with model size (the interval of the exponent holds 0)"
    if low > 0:
        return "rises with model size"
    if _floor(study, row.quantity) is not None:
        return "falls with model size towards a floor, and a pure power law is rejected,"
    if len(set(law.x.tolist())) < 4:
        return "falls with model size, which three depths cannot tell from a power law or against one,"
    if law.pearson < -0.98:
        return "falls as a power law of model size"
    return f"falls with model size, but only loosely as a power law (r = {_n(law.pearson)})"


def _exponent(study: Study, row: Law) -> str:
    law, floor = row.law, _floor(study, row.quantity)
    assert law is not None
    plain = (
        f"∝ N^{_n(law.alpha)}{_bounds(law.no_interval() or law.interval()['alpha'])}, r = {_n(law.pearson)}"
    )
    if floor is None:
        return f"{NAMES[row.quantity]} {plain}"
    assert floor.law is not None
    found = floor.law.interval()
    return (
        f"{NAMES[row.quantity]} − L∞ ∝ N^{_n(floor.law.alpha)}{_bounds(found['alpha'])} with "
        f"L∞ = {_n(floor.law.offset)}{_bounds(found['offset'])} (forced through no floor {plain})"
    )


def _bounds(interval: tuple[float, float] | str) -> str:
    return "" if isinstance(interval, str) else f" [{_n(interval[0])}, {_n(interval[1])}]"


def _n(value: float) -> str:
    """Four decimals, or two digits of what is far off, with a true minus sign."""
    return (f"{value:.4f}" if abs(value) < 100 else f"{value:.2g}").replace("-", "−")


def sentences(study: Study) -> list[str]:
    """Further findings, the most important first."""
    return list(_sentences(study))


def _ahead(study: Study) -> Iterator[str]:
    """The question that a sweep is for, of the depth twice as deep as the largest."""
    found = [o for o in study.outlook if o.quantity == "loss_last"]
    if not found:
        return
    depth = sorted({o.depth for o in found})[len({o.depth for o in found}) // 2]
    said = [f"{o.value:.3f} [{o.low:.4g}, {o.high:.4g}] {FORMS[o.offset]}" for o in found if o.depth == depth]
    size = next(o.params for o in found if o.depth == depth)
    yield (
        f"A model of depth {depth} (N = {number(float(f'{size:.3g}'))}), trained the same way, should reach "
        f"a last-scale loss of {' or '.join(said)}; nobody has trained it."
    )


def _sentences(study: Study) -> Iterator[str]:
    finished = study.finished
    yield from _ahead(study)
    for quantity in ("loss_last", "loss_avg"):
        for offset, f in study.forecasts.get(quantity, ()):
            if offset and not f.law.converged:
                yield f"No forecast of the {NAMES[quantity]} {FORMS[offset]}: {f.law.status}."
                continue
            depth = int(finished.loc[finished["params"] == f.x, "depth"].iloc[0])
            mean = " on average" if f.runs > 1 else ""
            yield (
                f"Forecast of d{depth} from the {f.trained} smaller depths, {FORMS[offset]}: "
                f"{NAMES[quantity]} {f.predicted:.4f} [{f.low:.5g}, {f.high:.5g}] for one run; "
                f"it reached {f.actual:.4f}{mean} ({f.error:+.2%}, {f.verdict} the interval)."
            )
    for problem in study.forecast_problems if len(finished) else ():
        yield f"No forecast of the largest depth {problem}."
    for quantity in ("loss_last", "loss_avg"):
        if not len(finished):
            continue
        row = study.law(quantity, offset=True)
        law = row.law
        if law is None or not law.converged:
            yield f"Offset of the {NAMES[quantity]} over N: {row.status}."
        elif law.no_interval():
            yield f"Offset of the {NAMES[quantity]} over N: {law.no_interval()}."
        elif not row.falls:
            low, high = law.interval()["alpha"]
            yield (
                f"With a free offset the {NAMES[quantity]} does not fall for certain (exponent "
                f"{_n(law.alpha)}{_bounds((low, high))}), so the data say nothing of a floor."
            )
        else:
            low, high = law.interval()["offset"]
            free = (
                "" if row.floor else ("; the data do not exclude 0, so they cannot tell the two forms apart")
            )
            yield (
                f"With a free offset the {NAMES[quantity]} would level off at L∞ = {law.offset:.4g} "
                f"[{low:.4g}, {high:.4g}]{free}."
            )
    for quantity in ("loss_last", "loss_avg"):
        row = study.law(quantity, study.flops, "pareto")
        if row.law is not None and row.drawable and not row.law.no_interval():
            reach = row.law.x
            yield (
                f"Along the Pareto frontier {NAMES[quantity]} ∝ C^{_n(row.law.alpha)}"
                f"{_bounds(row.law.interval()['alpha'])}, "
                f"r = {_n(row.law.pearson)}, from {number(float(f'{reach[0]:.2g}'))} to "
                f"{number(float(f'{reach[-1]:.2g}'))} FLOP."
            )
