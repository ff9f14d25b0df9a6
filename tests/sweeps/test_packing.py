"""Sharing a GPU: only where it is known to end the sweep sooner, and where it fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import LaunchConfig
from sweeps.machine import Machine, allot
from sweeps.packing import GAIN, MEMORY_SHARE, makespan, runs_per_gpu

SMALL = [1] * 8


def test_small_runs_that_lose_little_side_by_side_share() -> None:
    assert runs_per_gpu({1: [60.0] * 8, 2: [70.0] * 8}, SMALL, room=100, groups=1) == 2
    assert runs_per_gpu({1: [60.0] * 8, 2: [70.0] * 8, 4: [90.0] * 8}, SMALL, room=100, groups=1) == 4


def test_large_runs_that_gain_nothing_do_not() -> None:
    assert runs_per_gpu({1: [60.0] * 8, 2: [120.0] * 8}, SMALL, room=100, groups=1) == 1
    assert runs_per_gpu({1: [60.0] * 8, 2: [118.0] * 8}, SMALL, room=100, groups=1) == 1, "hardly anything"


def test_what_does_not_fit_together_does_not_share() -> None:
    seconds = {1: [60.0] * 4, 2: [61.0] * 4}
    assert runs_per_gpu(seconds, [50, 1, 1, 1], room=100, groups=1) == 2
    assert runs_per_gpu(seconds, [50, 45, 1, 1], room=100, groups=1) == 1, "the two largest may meet"


def test_nothing_measured_means_nothing_shared() -> None:
    assert runs_per_gpu({}, SMALL, 100, 1) == 1
    assert runs_per_gpu({1: [None] * 8, 2: [1.0] * 8}, SMALL, 100, 1) == 1
    assert runs_per_gpu({1: [60.0] * 8, 2: [61.0] * 7 + [None]}, SMALL, 100, 1) == 1
    assert runs_per_gpu({1: [60.0] * 8, 2: [61.0] * 8}, SMALL, room=0, groups=1) == 1, "memory not known"


def test_as_many_gpus_as_runs_are_not_shared() -> None:
    assert runs_per_gpu({1: [60.0] * 4, 2: [30.0] * 4}, [1] * 4, room=100, groups=4) == 1


@given(
    alone=st.lists(st.floats(1, 1e5), min_size=1, max_size=10),
    slower=st.lists(st.floats(1, 8), min_size=2, max_size=2),
    memories=st.lists(st.integers(1, 60), min_size=10, max_size=10),
    groups=st.integers(1, 4),
)
def test_the_choice_fits_and_is_never_expected_to_end_later(
    alone: list[float], slower: list[float], memories: list[int], groups: int
) -> None:
    seconds = {1: alone} | {2 * k: [s * slower[k - 1] for s in alone] for k in (1, 2)}
    chosen = runs_per_gpu(seconds, memories[: len(alone)], room=100, groups=groups)
    if chosen > 1:
        assert sum(sorted(memories[: len(alone)])[-chosen:]) <= MEMORY_SHARE * 100
        assert makespan(seconds[chosen], groups * chosen) < (1 - GAIN) * makespan(alone, groups)


def test_places_of_shared_gpus_are_on_different_ones_first() -> None:
    node = Machine("a node", 64, 2**40, ("0", "1"), 80 * 10**9)
    shared = allot(node, LaunchConfig(), [1] * 8, per_gpu=3)
    assert shared.slots == (("0",), ("1",)) * 3
    assert (shared.per_gpu, shared.threads) == (3, 64 // 6)
    assert allot(node, LaunchConfig(runs_at_once=4), [1] * 8).per_gpu == 2
    assert allot(node, LaunchConfig(), [1] * 3, per_gpu=3).slots == (("0",), ("1",), ("0",)), (
        "no more than runs"
    )
    cpu = allot(Machine("a laptop", 4, 2**34, ()), LaunchConfig(), [1] * 8, per_gpu=3)
    assert (len(cpu.slots), cpu.per_gpu) == (4, 1)


@pytest.mark.parametrize("durations", [[9.0, 1.0, 1.0, 1.0], [5.0, 4.0, 3.0, 3.0, 3.0]])
def test_longest_first_ends_no_later_than_shortest_first(durations: list[float]) -> None:
    assert makespan(durations, 2) <= makespan(durations[::-1], 2)
