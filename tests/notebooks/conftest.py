"""Runs notebooks: as a reader does, in a kernel, or as plain Python, to look at what they hold."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from scaling.config import RunConfig, from_dict
from scaling.flops import costs
from scaling.records import RunFolder

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
RECORDS = NOTEBOOKS / "records" / "quickstart"
Script = Callable[..., dict[str, Any]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Script]:
    """``script(name, VARIABLE=value)`` runs the ``.py`` and gives its globals."""

    def run(name: str, **environment: str) -> dict[str, Any]:
        for key in ("VARSCALE_SWEEP", "VARSCALE_CHINCHILLA", "VARSCALE_SHARED"):
            monkeypatch.delenv(key, raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.chdir(tmp_path)
        return runpy.run_path(str(NOTEBOOKS / f"{name}.py"))

    options = ("display.max_colwidth", "display.float_format")
    before = [value for key in options for value in (key, pd.get_option(key))]
    with mpl.rc_context(), pd.option_context(*before):
        plt.switch_backend("Agg")
        yield run
        plt.close("all")


def copied_records(target: Path, with_costs: bool) -> Path:
    """The shipped records, with or without ``costs.json`` in every run."""
    shutil.copytree(RECORDS, target)
    for run in sorted(target.glob("var-*")):
        (run / "costs.json").unlink(missing_ok=True)
        if with_costs:
            folder = RunFolder(run)
            folder.write_costs(costs(from_dict(RunConfig, folder.config())))
    return target
