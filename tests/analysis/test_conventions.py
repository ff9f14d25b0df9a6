"""Conventions count what their names say, are refused where they cannot be known, and are always named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import DataError, fit_power_law
from analysis.conventions import (
    FLOPS_CONVENTIONS,
    FLOPS_PARTS,
    PARAMS_CONVENTIONS,
    PARAMS_PARTS,
    conventions_table,
    flops_convention,
    labels_of,
    params_convention,
    with_conventions,
)
from scaling.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
)
from scaling.flops import costs as costs_of
from scaling.flops import (
    flops_6nd,
    forward_flops_by_part,
    params,
    params_by_part,
    params_total,
    spent,
    train_flops,
)
from scaling.records import RecordsError

SCALES = (1, 2, 3, 4)
L = sum(s * s for s in SCALES)


def table(shared: bool = False) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    rows, costs = [], {}
    for d in range(1, 7):
        model = ModelConfig.from_depth(d, scales=SCALES, vocab=512, adaln="shared" if shared else "own")
        by_part = forward_flops_by_part(model).items()
        costs[f"d{d}"] = {
            "params": params_by_part(model), "flops_per_image": {part: 3 * n for part, n in by_part},
            "tokens_per_image": L,
        }  # fmt: skip
        for images in (1_000, 10_000, 100_000):
            N, D = params(model), images * L
            rows.append(
                {
                    "run": f"d{d}", "depth": d, "params": N, "params_total": params_total(model), "tokens": D,
                    "flops": train_flops(model) * images, "flops_6nd": flops_6nd(model, D),
                    "loss_last": 2 + 40 * N**-0.3 + 120 * D**-0.32, "final": images == 100_000,
                }
            )  # fmt: skip
    return pd.DataFrame(rows), costs


RUNS, COSTS = table()


def test_the_records_own_counts() -> None:
    frame = with_conventions(RUNS)
    assert frame["N"].tolist() == RUNS["params"].tolist()
    assert frame["C"].tolist() == RUNS["flops"].tolist()
    other = with_conventions(RUNS, params="total", flops="6nd")
    assert other["N"].tolist() == RUNS["params_total"].tolist()
    np.testing.assert_allclose(other["C"], 6.0 * RUNS["params_total"] * RUNS["tokens"], rtol=1e-15)
    np.testing.assert_allclose(with_conventions(RUNS, flops="6nd")["C"], RUNS["flops_6nd"], rtol=1e-15)
    assert "N" not in RUNS
    assert not RUNS.attrs


@settings(deadline=None, max_examples=25)
@given(st.sets(st.sampled_from(PARAMS_PARTS), min_size=1), st.sets(st.sampled_from(FLOPS_PARTS), min_size=1))
def test_a_part_left_out_is_missing_by_its_count(of_params: set[str], of_flops: set[str]) -> None:
    """Whatever is left out, what remains is the sum of the other parts."""
    word = "total_without_" + "_and_".join(sorted(of_params))
    frame = with_conventions(RUNS, COSTS, word, "without_" + "_and_".join(sorted(of_flops)))
    for row in frame.iloc[::5].itertuples():
        cost = COSTS[str(row.run)]
        N = sum(v for k, v in cost["params"].items() if k not in of_params)
        C = sum(v for k, v in cost["flops_per_image"].items() if k not in of_flops)
        assert pytest.approx(N, rel=1e-12, abs=1e-3) == row.N
        assert pytest.approx(C * row.tokens / L, rel=1e-9, abs=1e-9 * row.flops) == row.C


def test_parts_added_to_the_blocks() -> None:
    frame = with_conventions(RUNS, COSTS, "blocks_with_embeddings_and_head")
    cost = COSTS["d1"]["params"]
    assert frame["N"][0] == RUNS["params"][0] + cost["embeddings"] + cost["head"]
    whole = with_conventions(RUNS, COSTS, "blocks_with_adaln_shared_and_biases_and_embeddings_and_head")
    assert whole["N"].tolist() == RUNS["params_total"].tolist()


def test_a_shared_adaln_is_no_part_of_the_blocks() -> None:
    """VAR's N with shared adaLN is 12·w²·d; the shared matrices do not grow with the depth."""
    runs, costs = table(shared=True)
    frame = with_conventions(runs, costs, "blocks_without_adaln", "without_adaln")
    assert frame["N"].tolist() == runs["params"].tolist()
    shared = with_conventions(runs, costs, "blocks_with_adaln_shared")["N"] - runs["params"]
    np.testing.assert_array_equal(shared, 6 * (64 * runs["depth"]) ** 2 + 6 * 64 * runs["depth"])
    assert (frame["C"] < runs["flops"]).all()


def test_every_result_is_named() -> None:
    frame = with_conventions(RUNS, COSTS, "blocks_without_adaln", "without_embedding_and_head")
    assert frame.attrs["conventions"] == {
        "N": "N: block matrices (VAR eq. 8), without adaln",
        "C": "C: exact training FLOPs, attention under its mask, without embedding and head",
    }
    assert labels_of(frame, "N", "C") == frame.attrs["conventions"]
    assert labels_of(frame, "params", "flops_6nd")["N"] == "N: block matrices (VAR eq. 8)"
    six = with_conventions(RUNS, flops="6nd", params="total")
    assert six.attrs["conventions"]["C"] == "C: 6·N·D (N: all trained parameters)"
    assert labels_of(RUNS, "width", "price") == {"N": "N: column width", "C": "C: column price"}


def random_steps(steps: int, seed: int) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Runs of a FlexVAR that are evaluated half-way and at the end, with their costs."""
    rows, costs = [], {}
    for d in range(1, 5):
        config = flexvar(d, steps, seed)
        costs[f"d{d}"] = costs_of(config)
        for step in (steps // 2, steps):
            done = spent(config, step)
            rows.append(
                {
                    "run": f"d{d}", "depth": d, "params": params(config.model), "tokens": done.tokens,
                    "flops": done.flops, "final": step == steps, "loss_last": 4.0,
                }
            )  # fmt: skip
    return pd.DataFrame(rows), costs


def flexvar(depth: int, steps: int, seed: int) -> RunConfig:
    tokenizer = TokenizerConfig(quantizer="scalable", multipliers=(1, 1, 1, 1), scales=(1, 2, 3, 4))
    data = DataConfig(train_images=100, val_images=10, num_classes=5)
    model = ModelConfig.from_depth(depth, family="flexvar", scales=SCALES, num_classes=5)
    train = TrainConfig(steps=steps, batch=8)
    return RunConfig(model, data, tokenizer, TokenizerTrainConfig(), train, EvaluationConfig(), seed)


def test_parts_of_random_steps_are_exact_at_the_end_and_shares_before() -> None:
    """Means over a whole run do not add up half-way, and are no other model's for that."""
    runs, costs = random_steps(steps=40, seed=3)
    middle = costs["d2"]["flops_per_image"]
    images = runs["tokens"] / costs["d2"]["tokens_per_image"]
    assert abs(sum(middle.values()) * images[2] / runs["flops"][2] - 1) > 1e-6, "the draws differ"
    frame = with_conventions(runs, costs, flops="without_attention")
    for row in frame.itertuples():
        parts = costs[str(row.run)]["flops_per_image"]
        share = 1 - parts["attention"] / sum(parts.values())
        assert pytest.approx(row.flops * share, rel=1e-12) == row.C
        if row.final:
            left = sum(v for k, v in parts.items() if k != "attention")
            assert pytest.approx(left * 40 * 8, rel=1e-9) == row.C
    other = random_steps(steps=40, seed=4)[1]
    with pytest.raises(DataError, match="belong to another model"):
        with_conventions(runs, other, flops="without_attention")


def test_costs_from_a_sweeps_folder(tmp_path: Path) -> None:
    for name, cost in COSTS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "costs.json").write_text(json.dumps(cost))
    frame = with_conventions(RUNS, tmp_path, "blocks_without_adaln", "without_head")
    expected = with_conventions(RUNS, COSTS, "blocks_without_adaln", "without_head")
    pd.testing.assert_frame_equal(frame, expected)
    (tmp_path / "d3" / "costs.json").unlink()
    assert with_conventions(RUNS, tmp_path, "total", "6nd") is not None
    with pytest.raises(RecordsError, match=r"d3/costs\.json: no such file"):
        with_conventions(RUNS, tmp_path, "blocks_without_adaln")


def test_the_table_shows_how_far_an_exponent_moves() -> None:
    found = conventions_table(RUNS, COSTS)
    assert tuple(found["params"]) == PARAMS_CONVENTIONS
    assert found["moved"][0] == 0
    final = RUNS[RUNS["final"]]
    assert found["exponent"][0] == fit_power_law(final["params"], final["loss_last"]).alpha
    # adaLN is a third of N at every depth: another unit of N, the same exponent.
    row = found.set_index("params").loc["blocks_without_adaln"]
    assert row["moved"] == pytest.approx(0, abs=1e-12)
    # Embeddings and head weigh most in small models: N grows less, and the exponent is steeper.
    assert found.set_index("params").loc["total", "moved"] < -1e-3
    assert (found["low"] < found["exponent"]).all()
    assert (found["exponent"] < found["high"]).all()
    assert found["N"].str.startswith("N: ").all()


def test_compute_conventions_move_the_optimum() -> None:
    found = conventions_table(RUNS, COSTS, "optimal")
    assert len(found) == len(PARAMS_CONVENTIONS) * len(FLOPS_CONVENTIONS)
    fitted = found.dropna(subset="exponent")
    assert np.ptp(fitted["exponent"]) > 0.01
    curves = conventions_table(RUNS, COSTS, "flops")
    assert list(curves["flops"]).count("exact") == 1
    assert list(curves["flops"]).count("6nd") == len(PARAMS_CONVENTIONS)


def test_without_costs_the_table_has_what_the_records_hold() -> None:
    found = conventions_table(RUNS, exponent="optimal")
    assert set(zip(found["params"], found["flops"], strict=True)) == {
        ("blocks", "exact"), ("blocks", "6nd"), ("total", "exact"), ("total", "6nd"),
    }  # fmt: skip


def test_a_fit_that_is_impossible_keeps_its_row() -> None:
    found = conventions_table(RUNS[RUNS["depth"] < 3])
    assert found["exponent"].isna().all()
    assert found["status"].str.contains("at least 3 points").all()


def spoiled(**values: Any) -> dict[str, dict[str, Any]]:
    return COSTS | {"d2": COSTS["d2"] | values}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: params_convention("everything"), "'everything': expected blocks or total"),
        (lambda: params_convention("blocks_without_heads"), "unknown part 'heads'; there are qkv"),
        (lambda: params_convention("blocks_with_adaln"), "adaln is already counted in 'blocks'"),
        (lambda: params_convention("blocks_without_head"), "head is not counted in 'blocks'"),
        (lambda: params_convention("total_without_mlp_and_mlp"), "names a part twice"),
        (lambda: flops_convention("6nd_without_head"), "no other way"),
        (lambda: flops_convention("exact_with_head"), "no other way"),
        (lambda: flops_convention("without_biases"), "unknown part 'biases'"),
        (lambda: with_conventions(RUNS, flops="without_head"), "need costs by part: give the sweep's folder"),
        (
            lambda: with_conventions(RUNS, {"d1": COSTS["d1"]}, flops="without_head"),
            r"no costs by part for 5 of 6 runs \(d2, d3, d4\)",
        ),
        (lambda: with_conventions(RUNS.drop(columns="params_total"), params="total"), "column params_total"),
        (lambda: with_conventions(RUNS.drop(columns="tokens"), flops="6nd"), "column tokens"),
        (
            lambda: with_conventions(RUNS, spoiled(params=COSTS["d3"]["params"]), "blocks_with_head"),
            "costs of d2 add up to .*belong to another model",
        ),
        (
            lambda: with_conventions(RUNS, spoiled(tokens_per_image=31), flops="without_head"),
            "costs of d2 add up to .*'exact'",
        ),
        (lambda: with_conventions(RUNS, spoiled(tokens_per_image=0), flops="without_head"), "is 0, exp"),
        (lambda: with_conventions(RUNS, spoiled(params={"qkv": 1}), "blocks_with_head"), "params lacks proj"),
        (lambda: conventions_table(RUNS, COSTS, quantity="error"), "column error is not there"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        act()
