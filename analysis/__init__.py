"""From records to laws, frontiers, intervals, forecasts, figures and reports. No torch.

The names below are loaded on first use, so that ``import analysis`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.errors import DataError
    from analysis.forecast import Backtest, Forecast, backtest
    from analysis.frontier import Frontier, pareto_frontier
    from analysis.powerlaw import PowerLaw, fit_power_law
    from analysis.records import load_runs, load_table
    from analysis.report import make_report

_HOMES = {
    "Backtest": "forecast",
    "DataError": "errors",
    "Forecast": "forecast",
    "Frontier": "frontier",
    "PowerLaw": "powerlaw",
    "backtest": "forecast",
    "fit_power_law": "powerlaw",
    "load_runs": "records",
    "load_table": "records",
    "make_report": "report",
    "pareto_frontier": "frontier",
}

__all__ = [
    "Backtest",
    "DataError",
    "Forecast",
    "Frontier",
    "PowerLaw",
    "backtest",
    "fit_power_law",
    "load_runs",
    "load_table",
    "make_report",
    "pareto_frontier",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"analysis.{_HOMES[name]}"), name)
