"""The depth chosen is the best of all depths, and what is said about it follows from surface and cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from analysis import DataError, fit_power_law
from analysis.allocation import allocate
from analysis.conventions import with_conventions
from analysis.ladder import Ladder
from analysis.parametric import ParametricLaw, fit_parametric
from analysis.solver import LossFn
from scaling.config import ModelConfig
from scaling.flops import params, train_flops

TRUTH = {"E": 2.0, "A": 40.0, "B": 120.0, "alpha": 0.30, "beta": 0.32}
SCALES = (1, 2, 3, 4)
L = sum(s * s for s in SCALES)
IMAGES = 50_000


def model(depth: int, shared: bool = False) -> ModelConfig:
    return ModelConfig.from_depth(depth, scales=SCALES, vocab=512, adaln="shared" if shared else "own")


def runs_of(
    depths: tuple[int, ...] = (1, 2, 3, 4), epochs: tuple[float, ...] = (5, 20, 80), noise: float = 0.002,
    shared: bool = False, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Final evaluations with the model's own N and FLOPs and losses on ``TRUTH``."""
    rng = np.random.default_rng(seed)
    rows = []
    for d in depths:
        for e in epochs:
            D = e * IMAGES * L
            N = params(model(d, shared))
            loss = TRUTH["E"] + TRUTH["A"] * N ** -TRUTH["alpha"] + TRUTH["B"] * D ** -TRUTH["beta"]
            rows.append(
                {
                    "run": f"d{d}-e{e}", "depth": d, "params": N, "tokens": D, "epochs": e, "final": True,
                    "flops": train_flops(model(d, shared)) * e * IMAGES,
                    "loss_last": loss * math.exp(noise * rng.normal()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def surface_of(runs: pd.DataFrame, loss_fn: LossFn = "squared", bootstrap: int = 0) -> ParametricLaw:
    return fit_parametric(
        runs["params"], runs["tokens"], runs["loss_last"], loss_fn, delta=0.01, bootstrap=bootstrap
    )


RUNS = runs_of()
SURFACE = surface_of(RUNS)
BLIND = surface_of(RUNS, "huber")
MANY = runs_of((1, 2, 3, 4, 5, 6), (2, 5, 20, 80, 200))
REPLICATED = surface_of(MANY, "huber", 1000)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("depths", [(1, 2, 3), (1, 3, 4, 6), (2, 8, 16, 30)])
def test_the_ladder_is_the_models_own_cost(depths: tuple[int, ...], shared: bool) -> None:
    """Three depths say what every depth costs, to rounding."""
    ladder = Ladder.from_runs(runs_of(depths, shared=shared))
    every = range(1, 37)
    N = np.array([params(model(d, shared)) for d in every])
    cost = np.array([train_flops(model(d, shared)) / L for d in every])
    np.testing.assert_allclose(ladder.size(np.array(every)), N, rtol=1e-12)
    np.testing.assert_allclose(ladder.cost(np.array(every)), cost, rtol=1e-12)
    assert ladder.params[2] == pytest.approx(49152 if shared else 73728, rel=1e-12)
    assert ladder.note == ""
    assert ladder.epoch_tokens == pytest.approx(IMAGES * L)


@pytest.mark.parametrize("depths", [(3,), (2, 4)])
def test_fewer_depths_say_which_approximation(depths: tuple[int, ...]) -> None:
    runs = runs_of(depths)
    ladder = Ladder.from_runs(runs)
    np.testing.assert_allclose(ladder.cost(runs["depth"]) * runs["tokens"], runs["flops"], rtol=1e-12)
    np.testing.assert_allclose(ladder.size(runs["depth"]), runs["params"], rtol=1e-12)
    assert "an approximation" in ladder.note
    assert ladder.note in allocate(1e16, ladder, BLIND).warnings


@settings(deadline=None, max_examples=40)
@given(st.floats(12.0, 22.0))
def test_the_optimum_is_the_best_of_all_depths(log_budget: float) -> None:
    """Brute force, straight from the model's closed forms."""
    C = 10.0**log_budget
    found = allocate(C, RUNS, BLIND)
    depths = np.arange(1, 3 * found.depth + 10)
    N = np.array([params(model(int(d))) for d in depths])
    D = C * L / np.array([train_flops(model(int(d))) for d in depths])
    loss = BLIND.value(N, D)
    assert found.depth == depths[loss.argmin()]
    assert found.loss == pytest.approx(loss.min(), rel=1e-12)
    assert found.tokens == pytest.approx(D[loss.argmin()], rel=1e-9)
    assert found.tokens * train_flops(model(found.depth)) / L == pytest.approx(C, rel=1e-9)
    assert (found.table["worse"] >= 0).all()


@settings(deadline=None, max_examples=25)
@given(st.floats(13.0, 20.0), st.floats(1.05, 30.0))
def test_more_compute_is_never_worse_nor_shallower(log_budget: float, factor: float) -> None:
    less, more = (allocate(10.0**log_budget * f, RUNS, BLIND) for f in (1.0, factor))
    assert more.loss < less.loss
    assert more.depth >= less.depth


def test_units_do_not_matter() -> None:
    """Tokens counted in millions, or C in PFLOP, or time: the same depth, loss and training."""
    plain = allocate(1e17, RUNS, BLIND)
    million = RUNS.assign(tokens=RUNS["tokens"] / 1e6)
    other = allocate(1e17, million, surface_of(million, "huber"))
    assert other.depth == plain.depth
    assert other.tokens * 1e6 == pytest.approx(plain.tokens, rel=1e-9)
    assert other.loss == pytest.approx(plain.loss, rel=1e-7)
    peta = allocate(1e2, RUNS.assign(flops=RUNS["flops"] / 1e15), BLIND)
    assert (peta.depth, peta.tokens) == (plain.depth, pytest.approx(plain.tokens, rel=1e-9))
    hours = allocate(None, RUNS, BLIND, gpu_hours=1e17 / 3.6e16, flops_per_second=1e13)
    assert hours.budget == pytest.approx(1e17)
    assert hours.depth == plain.depth


def test_length_in_tokens_images_and_epochs() -> None:
    found = allocate(1e17, RUNS, BLIND, tokens_per_image=L)
    assert found.images == pytest.approx(found.tokens / L)
    assert found.epochs == pytest.approx(found.tokens / (IMAGES * L))
    assert allocate(1e17, RUNS, BLIND, unique_tokens=1e9).epochs == pytest.approx(found.tokens / 1e9)
    assert allocate(1e17, RUNS.drop(columns="epochs"), BLIND).epochs is None


@pytest.mark.parametrize(("runs", "surface"), [(RUNS, SURFACE), (MANY, REPLICATED)])
def test_depths_that_cannot_be_told_apart(runs: pd.DataFrame, surface: ParametricLaw) -> None:
    found = allocate(1e18, runs, surface)
    assert found.indistinguishable
    assert found.depth in found.indistinguishable
    low, high = found.depth_interval or (0, 0)
    assert low <= found.depth <= high
    few, many = found.tokens_interval or (0, 0)
    assert few <= found.tokens <= many
    assert found.low < found.loss < found.high
    best = found.table[found.table["depth"] == found.depth].iloc[0]
    assert best[["worse", "worse_low", "worse_high"]].tolist() == [0, 0, 0]
    others = found.table[found.table["depth"] != found.depth]
    assert (others["worse_low"] < others["worse"]).all()
    assert (others["worse"] < others["worse_high"]).all()
    apart = found.table["told_apart"].astype(bool)
    assert ((found.table["worse_low"] > 0) == apart).all()
    assert not set(found.table["depth"][apart]) & set(found.indistinguishable)
    surer = allocate(1e18, runs, surface, level=0.5).indistinguishable or ()
    assert set(surer) <= set(found.indistinguishable)


@given(st.floats(0.3, 300.0))
def test_the_depth_of_a_size(depth: float) -> None:
    ladder = Ladder((5e3, -2e3, 73728.0), (1.0, 1.0, 1.0), {})
    assert float(ladder.depth_of(ladder.size(depth))) == pytest.approx(depth, rel=1e-12)


def test_candidates_from_the_ladder() -> None:
    frame = Ladder.from_runs(RUNS).runs([2, 5], [1e7, 1e9])
    assert frame["depth"].tolist() == [2, 2, 5, 5]
    expected = [train_flops(model(d)) / L * D for d in (2, 5) for D in (1e7, 1e9)]
    np.testing.assert_allclose(frame["flops"], expected, rtol=1e-12)
    np.testing.assert_allclose(frame["epochs"] * IMAGES * L, frame["tokens"], rtol=1e-12)


def test_nearly_exact_data_leave_the_best_alone() -> None:
    exact = runs_of(depths=(1, 2, 3, 4, 5), noise=1e-9)
    found = allocate(1e17, exact, surface_of(exact))
    assert found.indistinguishable == (found.depth,)
    low, high = found.depth_interval or (0, 0)
    assert high - low == 1
    assert low <= found.depth <= high


def test_without_a_surfaces_interval_the_choice_has_none_and_says_so() -> None:
    found = allocate(1e17, RUNS, BLIND)
    assert found.depth_interval is found.tokens_interval is found.indistinguishable is None
    assert math.isnan(found.low)
    assert "bootstrap" in found.no_interval
    assert found.no_interval in found.summary()


def test_extrapolation_is_measured() -> None:
    inside = allocate(RUNS["flops"].median(), RUNS, BLIND, depths=[1, 2, 3, 4])
    assert not [w for w in inside.warnings if "extrapolation" in w]
    far = allocate(1e21, RUNS, BLIND)
    ratio = 73728 * far.depth**3 / RUNS["params"].max()
    text = "\n".join(far.warnings)
    assert f"the model is {ratio:.3g} times larger" in text
    assert f"the budget is {1e21 / RUNS['flops'].max():.3g} times larger" in text
    assert "takes a repeated token for a fresh one" in text
    assert f"seen {far.epochs:.3g} times; the runs saw it up to 80 times" in text
    pinned = allocate(1e21, RUNS, BLIND, depths=[2, 3])
    assert "may lie beyond" in "\n".join(pinned.warnings)
    tiny = allocate(RUNS["flops"].min() / 50, RUNS, BLIND)
    assert "50 times smaller than the smallest" in "\n".join(tiny.warnings)


def test_repeated_data_make_deeper_and_shorter_best() -> None:
    """A surface of repeated data gets the tokens there are, and its optimum is brute force's."""
    U = 2.0 * IMAGES * L
    D_seen = np.minimum(MANY["tokens"], U) * (1 + 4 * -np.expm1(-np.maximum(MANY["tokens"] / U - 1, 0) / 4))
    loss = TRUTH["E"] + TRUTH["A"] * MANY["params"] ** -TRUTH["alpha"] + TRUTH["B"] * D_seen ** -TRUTH["beta"]
    surface = fit_parametric(MANY["params"], MANY["tokens"], loss, unique_tokens=U)
    found = allocate(1e17, MANY, surface, unique_tokens=U)
    ladder = Ladder.from_runs(MANY)
    depths = np.arange(1, 60)
    D = 1e17 / ladder.cost(depths)
    assert found.depth == depths[surface.value(ladder.size(depths), D, np.minimum(D, U)).argmin()]
    assert found.depth > allocate(1e17, MANY, surface, unique_tokens=1e15).depth
    assert "takes a repeated token" not in "\n".join(found.warnings)
    unknown = allocate(1e17, MANY.drop(columns="epochs"), surface)
    assert "taken for a fresh one" in "\n".join(unknown.warnings)


def test_runs_alone_are_enough_when_they_vary_in_length() -> None:
    found = allocate(1e17, RUNS)
    ladder, depths = Ladder.from_runs(RUNS), np.arange(1, 40)
    assert found.depth == depths[SURFACE.value(ladder.size(depths), ladder.tokens(depths, 1e17)).argmin()]
    assert found.indistinguishable
    text = found.summary()
    assert text.startswith("1e+17 FLOP: depth")
    assert "N: block matrices (VAR eq. 8)" in text
    assert "C: exact training FLOPs" in text


def one_length() -> pd.DataFrame:
    return runs_of(epochs=(20,))


def over_size() -> Any:
    return fit_power_law(one_length()["params"], one_length()["loss_last"])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: allocate(1e17, one_length()), "at most .*at a quarter and at four times the epochs"),
        (lambda: allocate(1e17, RUNS[RUNS["depth"] < 3]), "3 depths at 2 or more training lengths"),
        (lambda: allocate(1e17, RUNS, over_size()), "surface .*got PowerLaw"),
        (lambda: allocate(1e17, Ladder.from_runs(RUNS)), "give a surface, or runs"),
        (lambda: allocate(1e17, RUNS.assign(final=False), SURFACE), "no run has finished"),
        (lambda: allocate(1e17, RUNS, quantity="loss_avg"), "column loss_avg is not there"),
        (lambda: allocate(1e17, RUNS.drop(columns="depth"), SURFACE), "needs the column depth"),
        (lambda: allocate(1e17, RUNS, replace(SURFACE, converged=False, status="bad")), "no fit .*: bad"),
        (lambda: allocate(None, RUNS, SURFACE), "give one budget"),
        (lambda: allocate(1e17, RUNS, SURFACE, gpu_hours=1, flops_per_second=1), "give one budget"),
        (lambda: allocate(None, RUNS, SURFACE, gpu_hours=1), "go together"),
        (lambda: allocate(-1.0, RUNS, SURFACE), "positive number of FLOPs"),
        (lambda: allocate(1.0, RUNS, SURFACE), "do not train the smallest depth"),
        (lambda: allocate(1e17, RUNS, SURFACE, depths=[0, 1]), "whole numbers"),
        (lambda: allocate(1e17, RUNS, SURFACE, depths=[]), "whole numbers"),
        (
            lambda: Ladder.from_runs(pd.concat([RUNS, runs_of(shared=True)])),
            "params at depth 1 lies between .*one family",
        ),
        (
            lambda: Ladder.from_runs(RUNS.assign(params=RUNS["params"] + 1e6 * (RUNS["depth"] > 2))),
            "does not follow",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        act()


def test_other_conventions_are_named_and_change_nothing_they_should_not() -> None:
    """With 6·N·D for C, a budget buys other lengths; the answer says so."""
    runs = with_conventions(RUNS, flops="6nd")
    found = allocate(1e17, runs, BLIND, params="N", flops="C")
    assert found.labels["C"] == "C: 6·N·D"
    assert found.tokens == pytest.approx(1e17 / (6 * found.params), rel=1e-9)
    closed = BLIND.optimal(1e17)
    assert abs(found.depth - (closed.params / 73728) ** (1 / 3)) < 1


def test_page_and_figure() -> None:
    found = allocate(1e18, RUNS, SURFACE)
    hostile = replace(found, labels={"N": "N: <script>"})
    assert "<script>" not in hostile._repr_html_()
    assert "&lt;script&gt;" in hostile._repr_html_()
    assert found.labels["C"] in found.summary()
    ax = Figure().subplots()
    found.plot(ax)
    assert f"best: depth {found.depth}" in [t.get_text() for t in ax.get_legend().get_texts()]
