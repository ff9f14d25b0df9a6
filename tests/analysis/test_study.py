"""What a study claims of a sweep, and what it will not claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import fit_power_law, make_report
from analysis.findings import headline, sentences
from analysis.study import FRONTIER_CAUTION, _fit_final, make_study
from scaling.records import list_runs
from tests.analysis import fabricate

SEEDS = (0, 1, 2)


def reshaped(folder: Path, truth: Callable[[float], float], depths: range, noise: float = 3e-4) -> Path:
    """The same sweep with other final losses."""
    rng = np.random.default_rng(1)
    for depth in depths:
        value = truth(float(depth**3))
        values: dict[str, Any] = {
            q: value * float(np.exp(noise * rng.normal())) for q in ("loss_last", "loss_avg")
        }
        fabricate.change(folder, depth, **values)
    return folder


def test_two_depths_claim_nothing_with_any_number_of_seeds(tmp_path: Path) -> None:
    text = headline(make_study(fabricate.sweep(tmp_path, depths=(1, 5), seeds=SEEDS, noise=1e-4)))
    assert text == "Two depths (d1 and d5) have finished; a law over model size needs at least three."


@pytest.mark.parametrize(("last", "claimed"), [(3, False), (4, True)])
def test_a_power_law_needs_four_depths(tmp_path: Path, last: int, claimed: bool) -> None:
    text = headline(make_study(fabricate.sweep(tmp_path, depths=range(1, last + 1))))
    assert ("falls as a power law" in text) == claimed
    assert ("three depths cannot tell" in text) != claimed


def test_a_floor_rejects_the_pure_power_law(tmp_path: Path) -> None:
    """The log-log line is straight to r < −0.98 here, and wrong."""
    depths = range(1, 9)
    folder = reshaped(fabricate.sweep(tmp_path, depths), lambda n: 2.0 + 2.0 * n**-0.1, depths)
    study = make_study(folder)
    plain = study.law("loss_last").law
    assert plain is not None
    assert plain.pearson < -0.98
    text = headline(study)
    assert "towards a floor, and a pure power law is rejected" in text
    assert "falls as a power law" not in text
    assert "last-scale loss − L∞ ∝ N^−0." in text
    assert any("would level off at L∞ = " in s for s in sentences(study))


def test_a_rising_loss_has_no_floor(tmp_path: Path) -> None:
    depths = range(1, 9)
    folder = reshaped(fabricate.sweep(tmp_path, depths), lambda n: 2.0 + 0.2 * n**0.3, depths)
    study = make_study(folder)
    rising = study.law("loss_last", offset=True)
    assert rising.drawable
    assert "rises with model size" in headline(study)
    found = sentences(study)
    assert not any("level off" in s for s in found)
    assert sum("say nothing of a floor" in s for s in found) == 2


def test_seeds_do_not_divide_away_what_their_depth_is_off_the_law() -> None:
    """Three seeds of five depths that are 1 % off the law, seed by seed alike."""
    rng = np.random.default_rng(0)
    depth = np.repeat(np.arange(1, 6), 3)
    hits = alone = 0
    for _ in range(300):
        off = 0.01 * rng.normal(size=5)[depth - 1] + 0.0002 * rng.normal(size=15)
        params = 73728.0 * depth**3.0
        final = pd.DataFrame({"params": params, "depth": depth, "loss_last": params**-0.05 * np.exp(off)})
        law, problem = _fit_final(final, "loss_last", False)
        assert law is not None, problem
        low, high = law.interval()["alpha"]
        hits += low <= -0.05 <= high
        low, high = fit_power_law(params, final["loss_last"]).interval()["alpha"]
        alone += low <= -0.05 <= high
    assert 0.92 <= hits / 300 <= 0.99
    assert alone / 300 < 0.85


def test_depths_are_the_units_and_unequal_seeds_are_noted(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, seeds=SEEDS, noise=1e-3)
    study = make_study(folder)
    plain, free = study.law("loss_last").law, study.law("loss_last", offset=True).law
    assert plain is not None
    assert free is not None
    assert (len(plain.x), plain.groups, len(free.x)) == (15, 5, 5)
    assert "CR2" in plain.interval_method
    assert any("seeds of one depth are not independent" in n for n in study.notes)
    assert not any("unequal" in n for n in study.notes)
    (folder / "var-d4-s2-0123456789" / "config.json").unlink()
    notes = make_study(folder).notes
    assert (
        "unequal numbers of seeds (d1: 3, d2: 3, d3: 3, d4: 2, d5: 3); depths with more weigh more" in notes
    )


def test_an_error_of_zero_leaves_the_loss_in_its_laws(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path)
    fabricate.change(folder, 5, error_last=0.0)
    study = make_study(folder)
    counts = {q: len(r.law.x) for q in fabricate.ALPHA if (r := study.law(q)).law is not None}
    assert counts == {"loss_last": 5, "loss_avg": 5, "error_last": 4, "error_avg": 5}
    assert any("error_last 0 or less" in n for n in study.notes)
    assert "over 5 depths" in headline(study)
    text = make_report(folder).read_text()
    assert "d5 unfinished" not in text


def test_frontiers_leave_failed_runs_out_and_say_what_they_are(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, unfinished=(5,))
    fabricate.change(folder, 5, line=0, loss_last=0.5)
    study = make_study(folder)
    assert study.frontiers["loss_last", "pareto"].y.min() > 1
    assert "the frontiers leave out 1 failed run" in study.notes
    assert make_report(folder).read_text().count(FRONTIER_CAUTION) == 1


@pytest.mark.parametrize("quantity", ["loss_last", "loss_avg"])
def test_either_loss_may_overfit(tmp_path: Path, quantity: str) -> None:
    folder = fabricate.sweep(tmp_path)
    lower: dict[str, Any] = {quantity: 3.9}
    fabricate.change(folder, 3, line=-3, **lower)
    word = {"loss_last": "last-scale loss", "loss_avg": "average loss"}[quantity]
    (note,) = [n for n in make_study(folder).notes if "ends more than 0.5 %" in n]
    assert note.startswith(f"the {word} on the validation set")
    assert "var-d3" in note


def test_a_form_without_a_forecast_is_said(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4))
    study = make_study(folder)
    assert {offset for offset, _ in study.forecasts["loss_last"]} == {False}
    (problem,) = study.forecast_problems
    assert problem == "with an offset: hiding 1 needs 4 smaller distinct x, got 4 in all"
    assert f"No forecast of the largest depth {problem}." in sentences(study)
    assert f"None {problem}." in make_report(folder).read_text()


def test_what_is_said_of_several_runs_is_what_is_counted(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, seeds=SEEDS, noise=1e-4)
    fabricate.change(folder, 5, seed=1, loss_last=9.0)
    study = make_study(folder)
    forecast = next(f for offset, f in study.forecasts["loss_last"] if not offset)
    assert (forecast.inside, forecast.runs) == (2, 3)
    said = next(s for s in sentences(study) if "without an offset: last-scale" in s)
    assert f"it reached {forecast.actual:.4f} on average" in said
    assert "2 of 3 runs inside the interval" in said
    row = next(r for r in study.to_json()["forecasts"] if r["quantity"] == "loss_last" and not r["offset"])
    assert (row["inside"], row["runs"]) == (2, 3)


def write_costs(folder: Path) -> None:
    """costs.json of every run, whose parts add up to what was recorded."""
    for run in list_runs(folder):
        record = run.metrics("eval")[-1]
        N, images = record["params"], record["tokens"] // fabricate.SEQ
        params = {
            "qkv": N // 6,
            "projection": N // 18,
            "mlp": N * 8 // 18,
            "adaln": N // 3,
            "adaln_shared": 0,
        }
        flops = {"qkv": 3 * N, "projection": N, "mlp": 8 * N, "attention": 5 * N, "adaln": N, "embedding": N}
        rest = record["flops"] / images - sum(flops.values())
        run.write_costs(
            {
                "params": params | {"biases": 50_000, "embeddings": 50_000, "head": 100_000},
                "flops_per_image": flops | {"head": rest},
                "tokens_per_image": fabricate.SEQ,
            }
        )


def test_exponents_under_other_counts_stand_beside_the_law(tmp_path: Path) -> None:
    """Without costs.json the counts recorded; with it, parts too, each the fit of its own column."""
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4, 5), noise=1e-3)
    bare = make_study(folder).conventions
    assert [(r["x"], r["params"], r["flops"]) for r in bare] == [
        ("params", "blocks", "exact"),
        ("params", "total", "exact"),
        ("flops", "blocks", "exact"),
        ("flops", "blocks", "6nd"),
        ("flops", "total", "6nd"),
    ]
    write_costs(folder)
    study = make_study(folder)
    rows = {(r["x"], r["params"], r["flops"]): r for r in study.conventions}
    assert len(rows) > len(bare)
    law = study.law("loss_last").law
    assert law is not None
    assert rows["params", "blocks", "exact"]["exponent"] == law.alpha
    # Two thirds of N at every depth: another β, the same exponent. A constant on top changes it.
    assert rows["params", "blocks_without_adaln", "exact"]["exponent"] == pytest.approx(law.alpha, rel=1e-12)
    assert abs(rows["params", "total", "exact"]["moved"]) > 1e-4
    assert study.to_json()["conventions"] == list(study.conventions)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["flops_per_image"].update(attention=1.0), "they belong to another model"),
        (lambda c: c["params"].update(qkv="many"), "params has qkv = 'many', expected a number"),
        (lambda c: c.pop("params"), "expected a JSON object with params"),
        (lambda c: c.update(tokens_per_image=0), "tokens_per_image is 0"),
    ],
)
def test_one_bad_costs_file_costs_the_parts_only(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4))
    bare = make_study(folder)
    assert "4 of 4 runs have no costs.json: no exponents by part" in bare.notes
    write_costs(folder)
    assert not [n for n in make_study(folder).notes if "by part" in n]
    run = list_runs(folder)[1]
    costs = run.costs()
    damage(costs)
    run.write_costs(costs)
    study = make_study(folder)
    assert study.conventions == bare.conventions
    (note,) = [n for n in study.notes if n.startswith("no exponents by part: ")]
    assert message in note
    assert "var-d2" in note
    assert str(tmp_path) not in note
