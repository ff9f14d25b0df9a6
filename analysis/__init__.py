"""From records to laws, frontiers, intervals, forecasts, figures and reports. No torch.

The names below are loaded on first use, so that ``import analysis`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.allocation import Allocation, allocate
    from analysis.broken import BrokenLaw, FormChoice, choose_form, fit_broken_power_law
    from analysis.comparison import Comparison, compare
    from analysis.conventions import conventions_table, with_conventions
    from analysis.design import NextRun, next_run
    from analysis.errors import DataError
    from analysis.families import Families, compare_families
    from analysis.forecast import Backtest, Forecast, backtest
    from analysis.frontier import Frontier, pareto_frontier
    from analysis.isoflop import IsoFlop, fit_isoflop
    from analysis.ladder import Ladder
    from analysis.parametric import ParametricLaw, fit_parametric
    from analysis.powerlaw import PowerLaw, fit_power_law
    from analysis.records import load_runs
    from analysis.report import make_report
    from analysis.study import make_studies
    from analysis.surface_forecast import hold_out
    from analysis.table_fit import FitOptions, fit_table
    from analysis.tables import load_table
    from analysis.tidy import Ready, ready

_HOMES = {
    "Allocation": "allocation",
    "Backtest": "forecast",
    "BrokenLaw": "broken",
    "Comparison": "comparison",
    "DataError": "errors",
    "Families": "families",
    "FitOptions": "table_fit",
    "Forecast": "forecast",
    "FormChoice": "broken",
    "Frontier": "frontier",
    "IsoFlop": "isoflop",
    "Ladder": "ladder",
    "NextRun": "design",
    "ParametricLaw": "parametric",
    "PowerLaw": "powerlaw",
    "Ready": "tidy",
    "allocate": "allocation",
    "backtest": "forecast",
    "choose_form": "broken",
    "compare": "comparison",
    "compare_families": "families",
    "conventions_table": "conventions",
    "fit_broken_power_law": "broken",
    "fit_isoflop": "isoflop",
    "fit_parametric": "parametric",
    "fit_power_law": "powerlaw",
    "fit_table": "table_fit",
    "hold_out": "surface_forecast",
    "load_runs": "records",
    "load_table": "tables",
    "make_report": "report",
    "make_studies": "study",
    "next_run": "design",
    "pareto_frontier": "frontier",
    "ready": "tidy",
    "with_conventions": "conventions",
}

__all__ = [
    "Allocation",
    "Backtest",
    "BrokenLaw",
    "Comparison",
    "DataError",
    "Families",
    "FitOptions",
    "Forecast",
    "FormChoice",
    "Frontier",
    "IsoFlop",
    "Ladder",
    "NextRun",
    "ParametricLaw",
    "PowerLaw",
    "Ready",
    "allocate",
    "backtest",
    "choose_form",
    "compare",
    "compare_families",
    "conventions_table",
    "fit_broken_power_law",
    "fit_isoflop",
    "fit_parametric",
    "fit_power_law",
    "fit_table",
    "hold_out",
    "load_runs",
    "load_table",
    "make_report",
    "make_studies",
    "next_run",
    "pareto_frontier",
    "ready",
    "with_conventions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"analysis.{_HOMES[name]}"), name)
