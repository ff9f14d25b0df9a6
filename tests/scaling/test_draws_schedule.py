"""Random draws and rates are pure functions of the step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import SCHEDULES, ModelConfig, TrainConfig
from scaling.draws import step_draws
from scaling.schedule import learning_rate, weight_decay


@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**7), batch=st.integers(1, 32))
def test_draws_repeat(seed: int, step: int, batch: int) -> None:
    model = ModelConfig.from_depth(3)
    one, other = step_draws(model, seed, step, batch), step_draws(model, seed, step, batch)
    assert np.array_equal(one.drop_label, other.drop_label)
    assert one.path_scale is not None
    assert np.array_equal(one.path_scale, other.path_scale)  # type: ignore[arg-type]
    this, following = (step_draws(model, seed, at, 512).drop_label for at in (step, step + 1))
    assert not np.array_equal(this, following)


def test_drop_path_rises_linearly_and_keeps_the_mean() -> None:
    model = ModelConfig.from_depth(6, drop_path=0.4)
    scales = np.concatenate(
        [step_draws(model, 1, step, 512).path_scale for step in range(40)], axis=2  # type: ignore[list-item]
    )  # fmt: skip
    dropped = (scales == 0).mean(axis=(1, 2))
    assert dropped == pytest.approx(np.linspace(0, 0.4, 6), abs=0.01)
    assert scales.mean(axis=(1, 2)) == pytest.approx(np.ones(6), abs=0.02)


def test_without_drop_path_nothing_is_drawn_for_it() -> None:
    assert (
        step_draws(ModelConfig.from_depth(1), 0, 0, 4).path_scale is None
    )  # one layer: the rise starts at 0
    assert step_draws(ModelConfig.from_depth(4, drop_path=0.0), 0, 0, 4).path_scale is None


def test_the_two_branches_of_a_layer_are_dropped_apart() -> None:
    scales = step_draws(ModelConfig.from_depth(2, drop_path=0.5), 0, 0, 2000).path_scale
    assert scales is not None
    attention, mlp = scales[1] == 0
    assert np.corrcoef(attention, mlp)[0, 1] == pytest.approx(0, abs=0.1)


@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(2, 5000),
    warmup=st.floats(0, 0.5),
    end=st.floats(1e-4, 1.0),
)
def test_rates_stay_between_their_ends(schedule: str, total: int, warmup: float, end: float) -> None:
    first = min(round(warmup * total), total - 1)
    own = {"warmup_steps": first} if schedule == "wsd" else {"warmup": warmup}
    train = TrainConfig(steps=total, lr=1.0, schedule=schedule, lr_end=end, lr_start=0.01, **own)  # type: ignore[arg-type]
    rates = [learning_rate(train, step, total) for step in range(total)]
    low = min(0.01, end) if first else end
    assert all(low * (1 - 1e-9) <= rate <= 1 + 1e-9 for rate in rates)
    after = rates[first:]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    if schedule != "constant" and len(after) > 1:
        assert after[-1] == pytest.approx(end)


def test_default_rate_follows_the_batch() -> None:
    assert TrainConfig(steps=1, batch=768).peak_lr == pytest.approx(3e-4)
    assert TrainConfig(steps=1, batch=768, lr=1e-3).peak_lr == 1e-3


def test_weight_decay_is_constant_or_a_half_cosine() -> None:
    constant = TrainConfig(steps=100)
    assert {weight_decay(constant, s, 100) for s in range(100)} == {0.05}
    rising = TrainConfig(steps=100, weight_decay_end=0.08)
    assert weight_decay(rising, 0, 101) == pytest.approx(0.05)
    assert weight_decay(rising, 50, 101) == pytest.approx(0.065)
    assert weight_decay(rising, 100, 101) == pytest.approx(0.08)
