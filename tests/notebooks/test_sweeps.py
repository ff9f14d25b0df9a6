"""The notebooks about a sweep, on sweeps of other kinds than the shipped one; as plain Python, in process."""

from __future__ import annotations

from pathlib import Path

import pytest

import analysis
from analysis import DataError
from tests.analysis import fabricate
from tests.notebooks.conftest import RECORDS, Script, copied_records

SWEEPS = ("first_look", "paper_figures")


@pytest.mark.parametrize("name", SWEEPS)
def test_without_a_sweep_of_ones_own_the_shipped_records_are_read(
    name: str,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(analysis, "__file__", str(tmp_path / "analysis" / "__init__.py"))
    copied_records(tmp_path / "notebooks" / "records" / "quickstart", with_costs=False)
    script(name)
    assert "reading records/quickstart: the records that ship" in capsys.readouterr().out


@pytest.mark.parametrize("name", SWEEPS)
def test_ones_own_quickstart_comes_first(
    name: str,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(analysis, "__file__", str(tmp_path / "analysis" / "__init__.py"))
    fabricate.sweep(tmp_path / "runs", noise=0.003, name="quickstart")
    found = script(name)
    assert "reading runs/quickstart: it is there" in capsys.readouterr().out
    assert found["study"].name == "quickstart"


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("kind", ["an unfinished run", "three seeds", "eight depths"])
def test_other_sweeps(name: str, kind: str, script: Script, tmp_path: Path) -> None:
    options = {
        "an unfinished run": {"unfinished": (5,)},
        "three seeds": {"seeds": (0, 1, 2)},
        "eight depths": {"depths": range(1, 9)},
    }[kind]
    folder = fabricate.sweep(tmp_path, noise=0.004, **options)  # type: ignore[arg-type]
    found = script(name, VARSCALE_SWEEP=str(folder))
    finished = {"an unfinished run": 4, "three seeds": 5, "eight depths": 8}[kind]
    assert found["study"].finished["depth"].nunique() == finished


def test_the_first_look_fits_what_the_library_fits(script: Script) -> None:
    found = script("first_look", VARSCALE_SWEEP=str(RECORDS))
    last = found["last"]
    law = analysis.fit_power_law(last["params"], last["loss_last"])
    assert found["law"].alpha == pytest.approx(law.alpha)
    assert found["rolled"].forecasts[-1].actual == last["loss_last"].iloc[-1]


def test_costs_open_more_conventions(script: Script, tmp_path: Path) -> None:
    few, many = (
        script("first_look", VARSCALE_SWEEP=str(copied_records(tmp_path / str(costs), with_costs=costs)))[
            "shown"
        ]
        for costs in (False, True)
    )
    assert len(many) > len(few)
    assert {"N: block matrices (VAR eq. 8), without adaln"} <= set(many["N"]) - set(few["N"])
    assert (many["status"] == "converged").all()


def test_a_sweep_too_small_for_a_law_says_so(script: Script, tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    with pytest.raises(DataError, match="needs at least 3 points"):
        script("first_look", VARSCALE_SWEEP=str(folder))


def test_the_paper_slope_goes_through_the_middle_of_the_points(script: Script) -> None:
    found = script("paper_figures", VARSCALE_SWEEP=str(RECORDS))
    table = found["table"].set_index(["over", "quantity"])
    assert table.loc[("N", "loss_last"), "the paper's"] == -0.23
    assert table.loc[("C", "loss_last"), "exchanged"] == -0.16
    law = found["study"].law("loss_last", offset=found["floors"]["loss_last"] > 0).law
    assert table.loc[("N", "loss_last"), "yours"] == law.alpha
    assert tuple(table.loc[("N", "loss_last"), ["from", "to"]]) == pytest.approx(law.interval()["alpha"])
    # Over C too the slope lies between those that the ends of L∞'s interval give.
    known = table.dropna(subset=["from", "to"])
    assert (known["from"] < known["yours"]).all()
    assert (known["yours"] < known["to"]).all()
