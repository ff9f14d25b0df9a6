"""What finished runs say of the others: the law they obey, wide where they are few, and no false alarm."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.expectation import LEVEL, Place, expect, forecast
from scaling.records import RunFolder
from tests.analysis.fabricate import law, sweep

TOKENS = 64 * 300 * 30


def place(depth: int, tokens: int = TOKENS, family: str = "var") -> Place:
    return Place(family, 73728 * depth**3, tokens)


def places(folder: Path, *coming: int) -> dict[str, Place]:
    found = {f"coming-{depth}": place(depth) for depth in coming}
    for run in sorted(folder.glob("var-*")):
        found[run.name] = place(json.loads((run / "config.json").read_text())["model"]["depth"])
    return found


def test_a_run_to_come_is_forecast_by_the_law_of_the_others(tmp_path: Path) -> None:
    folder = sweep(tmp_path, depths=(1, 2, 3, 4, 5), noise=0.002)
    found = expect(folder, places(folder, 6, 8))
    for depth in (6, 8):
        said = found.runs[f"coming-{depth}"]
        assert said.low < law("loss_last", 73728 * depth**3) < said.high
        assert said.low < said.value < said.high
        assert (said.reached, said.outside, said.level) == (None, False, LEVEL)
    assert found.note == ""
    wide = [found.runs[f"coming-{d}"].high - found.runs[f"coming-{d}"].low for d in (6, 8)]
    assert wide[1] > wide[0], "further from the data"


def test_too_few_runs_say_nothing_and_why(tmp_path: Path) -> None:
    folder = sweep(tmp_path, depths=(1, 2))
    found = expect(folder, places(folder, 3))
    assert found.runs == {}
    assert "needs 3 finished sizes of a family at as many tokens" in found.note
    assert "no such sweep folder" in expect(tmp_path / "none", {"a": place(1)}).note


def test_a_run_off_the_law_is_flagged_and_the_others_are_not(tmp_path: Path) -> None:
    folder = sweep(tmp_path, depths=(1, 2, 3, 4, 5, 6, 7), noise=0.001)
    assert not any(e.outside for e in expect(folder, places(folder)).runs.values())
    (odd,) = folder.glob("var-d4-*")
    lines = [json.loads(line) for line in (odd / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line["loss_last"] *= 1.06
    (odd / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = expect(folder, places(folder))
    assert [run for run, e in found.runs.items() if e.outside] == [odd.name]
    assert found.runs[odd.name].level == pytest.approx(1 - 0.05 / 7)


def test_a_sweep_on_its_law_is_seldom_flagged() -> None:
    """At most one in twenty such sweeps has a run flagged: leave-one-out at 1 - 5 %/n."""
    rng = np.random.default_rng(0)
    sizes, flagged, studies = np.array([73728 * d**3 for d in range(1, 7)]), 0, 30
    for _ in range(studies):
        losses = 4.4 * (sizes / 1e6) ** -0.02 * np.exp(0.003 * rng.standard_normal(6))
        frame = pd.DataFrame({"params": sizes, "tokens": TOKENS, "loss_last": losses})
        outside = 0
        for i in range(6):
            said = forecast(frame.drop(index=i), Place("var", int(sizes[i]), TOKENS), 1 - 0.05 / 6)
            assert said is not None
            outside += not said.low <= losses[i] <= said.high
        flagged += outside > 0
    assert flagged <= 5, "expected 1.5 of 30; 6 or more has a chance of 0.4 %"


def test_runs_of_other_lengths_are_not_mixed_in(tmp_path: Path) -> None:
    folder = sweep(tmp_path, depths=(1, 2, 3, 4, 5), noise=0.002)
    found = expect(folder, {"longer": place(6, tokens=2 * TOKENS)})
    assert found.runs == {}


def test_a_grid_of_sizes_and_lengths_is_forecast_by_its_surface() -> None:
    def loss(params: float, tokens: float) -> float:
        return 2.0 + 30 / params**0.25 + 400 / tokens**0.45

    rng = np.random.default_rng(1)
    grid = [(73728 * d**3, t * 10**6) for d in (2, 3, 4, 6) for t in (1, 2, 3, 4)]
    rows = [(n, d, loss(n, d) * np.exp(0.001 * rng.standard_normal())) for n, d in grid]
    frame = pd.DataFrame(rows, columns=["params", "tokens", "loss_last"])
    said = forecast(frame, Place("var", 73728 * 8**3, 6 * 10**6), LEVEL)
    assert said is not None
    assert said.low < loss(73728 * 8**3, 6e6) < said.high
    assert said.high - said.low < 0.2


def test_an_unfinished_run_counts_as_one_to_come(tmp_path: Path) -> None:
    folder = sweep(tmp_path, depths=(1, 2, 3, 4, 5), unfinished=(5,))
    (last,) = folder.glob("var-d5-*")
    assert RunFolder(last).status()["state"] != "done"
    said = expect(folder, places(folder)).runs[last.name]
    assert said.reached is None
