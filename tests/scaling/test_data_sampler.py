"""Which images a step sees is a pure function of (seed, step), and an epoch is a permutation."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scaling.data.sampler import batch_indices, batch_views, permutation, uniforms

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 200)


@given(seeds, sizes, st.integers(1, 64), st.integers(1, 3))
def test_every_epoch_holds_each_image_once(seed: int, n: int, batch: int, epochs: int) -> None:
    steps = -(-n * epochs // batch)
    stream = np.concatenate([batch_indices(seed, step, batch, n) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(seeds, sizes, st.integers(0, 50), st.integers(1, 40), st.integers(1, 4))
def test_the_stream_does_not_depend_on_how_it_is_cut(
    seed: int, n: int, step: int, batch: int, cuts: int
) -> None:
    whole = batch_indices(seed, step, batch * cuts, n)
    parts = [batch_indices(seed, step * cuts + cut, batch, n) for cut in range(cuts)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@given(sizes, st.integers(1, 5), st.integers(0, 100), st.integers(1, 64))
def test_the_view_of_a_position_is_its_epoch_modulo_views(n: int, views: int, step: int, batch: int) -> None:
    expected = [((step * batch + j) // n) % views for j in range(batch)]
    assert batch_views(step, batch, n, views).tolist() == expected


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = [permutation(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_draws_are_these_for_ever() -> None:
    """A changed value would change every data set, crop and order that was ever recorded."""
    assert permutation(3, 1, 8).tolist() == PERMUTATION
    assert uniforms(2, "crop", 0, 5, 1) == UNIFORMS


@given(st.integers(1, 8), st.lists(st.integers(-5, 5), max_size=3))
def test_uniforms_are_in_the_unit_interval_and_depend_on_every_part_of_the_key(
    count: int, key: list[int]
) -> None:
    draws = uniforms(count, "a", *key)
    assert len(draws) == count
    assert all(0 <= u < 1 for u in draws)
    assert draws != uniforms(count, "b", *key)
    assert draws != uniforms(count, "a", *key, 0)


PERMUTATION = [0, 6, 2, 1, 3, 7, 4, 5]
UNIFORMS = (0.592951633870935, 0.4963363050423434)
