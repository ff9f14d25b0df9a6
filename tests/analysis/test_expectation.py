"""What finished runs say of the others: the law they obey, wide where they are few, and no false alarm."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.expectation import LEVEL, Place, expect, forecast
from scaling.records import RunFolder
from tests.analysis.fabricate import law, run_config, sweep
from tests.analysis.test_grids import write_sweep

TOKENS = 64 * 300 * 30


def place(depth: int, tokens: int = TOKENS, family: str = "var") -> Place:
    return Place(family, 73728 * depth**3, tokens, run_config(depth, family=family), ())


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
            said = forecast(frame.drop(index=i), Place("var", int(sizes[i]), TOKENS, {}, ()), 1 - 0.05 / 6)
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
    said = forecast(frame, Place("var", 73728 * 8**3, 6 * 10**6, {}, ()), LEVEL)
    assert said is not None
    assert said.low < loss(73728 * 8**3, 6e6) < said.high
    assert said.high - said.low < 0.2


def test_an_unfinished_run_counts_as_one_to_come(tmp_path: Path) -> None:
    folder = sweep(tmp_path, depths=(1, 2, 3, 4, 5), unfinished=(5,))
    (last,) = folder.glob("var-d5-*")
    assert RunFolder(last).status()["state"] != "done"
    said = expect(folder, places(folder)).runs[last.name]
    assert said.reached is None


GOOD, BAD = {"lr": 1e-3}, {"lr": 8e-3}


def far_off(depth: int, setting: Mapping[str, Any]) -> float:
    """A rate that costs 20 %, and the more the larger the model."""
    return 1.0 if setting["lr"] == GOOD["lr"] else 1.1 + 0.02 * depth


def settled(folder: Path, *coming: tuple[str, Place]) -> dict[str, Any]:
    found = dict(coming)
    for run in sorted(folder.glob("var-*")):
        config = json.loads((run / "config.json").read_text())
        end = RunFolder(run).metrics("eval")[-1]
        found[run.name] = Place("var", end["params"], end["tokens"], config, ())
    return dict(expect(folder, found).runs)


def coming(tokens: int, depth: int = 7, **train: Any) -> Place:
    config = run_config(depth)
    config["train"] |= train
    return Place("var", 73728 * depth**3, tokens, config, ())


def test_runs_of_each_setting_are_forecast_as_if_they_were_alone(tmp_path: Path) -> None:
    recipe = {"grid": {"train.lr": [1e-3, 8e-3]}}
    depths = (1, 2, 3, 4, 5)
    mixed = write_sweep(tmp_path / "two", depths, [300], "cos", [GOOD, BAD], far_off, recipe)
    (tokens,) = {RunFolder(run).metrics("eval")[-1]["tokens"] for run in mixed.glob("var-*")}
    found = settled(mixed, ("good", coming(tokens, **GOOD)), ("bad", coming(tokens, **BAD)))
    for name, setting in (("good", GOOD), ("bad", BAD)):
        alone = write_sweep(tmp_path / name, depths, [300], "cos", [setting], far_off, recipe)
        expected = settled(alone, (name, coming(tokens, **setting)))
        assert (found[name].value, found[name].low, found[name].high) == (
            expected[name].value, expected[name].low, expected[name].high,
        )  # fmt: skip
        for run in alone.glob("var-*"):
            assert found[run.name].value == expected[run.name].value
            assert not found[run.name].outside


def test_a_setting_that_was_never_run_has_no_forecast(tmp_path: Path) -> None:
    """A recipe that comes to vary something: its new runs are unlike those that are done."""
    folder = write_sweep(tmp_path, (1, 2, 3, 4, 5), [300], "cos", [GOOD])
    (tokens,) = {RunFolder(run).metrics("eval")[-1]["tokens"] for run in folder.glob("var-*")}
    one, other = (coming(tokens, **setting)._replace(varied=("train.lr",)) for setting in (GOOD, BAD))
    found = expect(folder, {"one": one, "other": other})
    assert set(found.runs) == {"one"}
    assert "all of the same setting and tokenizer" in found.note


def test_a_rate_that_follows_the_width_is_one_setting(tmp_path: Path) -> None:
    depths, rule = (1, 2, 3, 4, 5), {"power": 0.5, "depth": 2}
    settings = [{"lr": rate} for rate in (1e-3, 8e-3)]
    recipe = {"grid": {"train.lr": [1e-3, 8e-3]}, "lr_rule": rule}
    folder = write_sweep(tmp_path, depths, [300], "cos", settings, recipe=recipe)
    for run in folder.glob("var-*"):
        config = json.loads((run / "config.json").read_text())
        config["train"]["lr"] *= (config["model"]["depth"] / 2) ** -0.5
        (run / "config.json").write_text(json.dumps(config))
    assert len(settled(folder)) == 2 * len(depths)


def test_other_tokens_forecast_nothing(tmp_path: Path) -> None:
    settings = [{"vocab": vocab} for vocab in (32, 4096)]
    folder = write_sweep(
        tmp_path, (1, 2, 3, 4, 5), [300], "cos", settings, lambda depth, s: 1.0 if s["vocab"] == 32 else 2.0,
        {"grid": {"tokenizer.vocab": [32, 4096]}},
    )  # fmt: skip
    found = settled(folder)
    by_vocab = {v: [e for n, e in found.items() if n.endswith(f"000000{v}")] for v in (32, 4096)}
    assert [len(part) for part in by_vocab.values()] == [5, 5]
    for one, two in zip(*by_vocab.values(), strict=True):
        assert two.value == pytest.approx(2 * one.value, rel=1e-6)
