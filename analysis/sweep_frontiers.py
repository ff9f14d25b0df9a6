"""The Pareto frontiers of a sweep's runs, as plain numbers: for dashboards, which draw but do not fit."""

from __future__ import annotations

from pathlib import Path

from analysis.frontier import pareto_frontier
from analysis.grids import comparable
from analysis.records import QUANTITIES, read_records
from analysis.study import usable
from scaling.records import RecordsError


def sweep_frontiers(sweep: str | Path) -> dict[str, list[tuple[float, float]]]:
    """(FLOPs, value) by growing FLOPs of each quantity, ``loss_avg``; of several families ``var/loss_avg``.

    Of every evaluation of every run that did not fail, of wsd only the ends, as in the report; empty before
    there is any.
    """
    try:
        records = read_records(sweep)
    except RecordsError:
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    for family in records.families:
        frame = records.of(family).frame
        before = f"{family}/" if len(records.families) > 1 else ""
        for quantity in QUANTITIES:
            good = frame[usable(frame, quantity) & (frame["state"] != "failed") & comparable(frame)]
            if len(good):
                frontier = pareto_frontier(good["flops"].to_numpy(), good[quantity].to_numpy())
                found[before + quantity] = list(zip(frontier.x.tolist(), frontier.y.tolist(), strict=True))
    return found
