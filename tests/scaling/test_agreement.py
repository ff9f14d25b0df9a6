"""All processes leave after the same step, soon, and without asking at every fast one."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling import agreement
from scaling.agreement import AGREE_SECONDS, MOST_STEPS, Agreement, same_start, steps_until_next
from scaling.process import FAILED, cause_of, exit_code
from scaling.records import RecordsError


@given(st.floats(0, 1e6))
def test_about_two_seconds_go_by_but_at_least_a_step(pace: float) -> None:
    steps = steps_until_next(pace)
    assert 1 <= steps <= MOST_STEPS
    assert steps == 1 or steps * pace <= AGREE_SECONDS
    assert steps == MOST_STEPS or (steps + 1) * pace > AGREE_SECONDS


class Together:
    """Processes as threads; ``reduce`` adds up as a collective does, and counts."""

    def __init__(self, world: int) -> None:
        self.world, self.asked = world, 0
        self._barrier, self._values = threading.Barrier(world, timeout=20), [torch.zeros(3)] * world

    def process(self, rank: int) -> Any:
        return SimpleNamespace(
            num_processes=self.world, is_main_process=rank == 0, device=torch.device("cpu"),
            reduce=lambda value, reduction: self._reduce(rank, value),
        )  # fmt: skip

    def _reduce(self, rank: int, value: torch.Tensor) -> torch.Tensor:
        self._values[rank] = value
        self._barrier.wait()
        total = torch.stack(self._values).sum(dim=0)
        if self._barrier.wait() == 0:
            self.asked += 1
        return total


def walk(
    paces: list[list[float]], wishes: list[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], int]:
    """The step after which each process leaves, and how often they asked.

    Args:
        paces: of each process, the seconds that its steps take, by its own clock.
        wishes: the step from which each process wants to leave.
    """
    together, left, clocks = Together(len(paces)), [0] * len(paces), threading.local()
    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: clocks.now))

    def process(rank: int) -> None:
        clocks.now = 1000.0 * rank
        asking = Agreement(together.process(rank), start=0)
        for done, seconds in enumerate(paces[rank], 1):
            clocks.now += seconds
            if asking.ask(done, done >= wishes[rank], due=False)[0]:
                left[rank] = done
                return

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(paces))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return left, together.asked


@given(
    st.lists(st.lists(st.floats(1e-4, 20), min_size=150, max_size=150), min_size=2, max_size=3),
    st.integers(1, 40),
    st.data(),
)
@settings(max_examples=15, deadline=None)
def test_all_leave_after_the_same_step_whatever_their_clocks_say(
    paces: list[list[float]], wish: int, data: st.DataObject
) -> None:
    wisher = data.draw(st.integers(0, len(paces) - 1))
    wishes = [wish if rank == wisher else 10**6 for rank in range(len(paces))]
    with pytest.MonkeyPatch.context() as patch:
        left, _ = walk(paces, wishes, patch)
    assert len(set(left)) == 1
    assert wish <= left[0] <= wish + MOST_STEPS


@pytest.mark.parametrize(("seconds", "patience"), [(5.0, 1), (0.5, 4), (0.02, 100), (1e-4, MOST_STEPS)])
def test_slow_steps_ask_each_time_and_fast_ones_seldom(
    seconds: float, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = 300
    left, asked = walk([[seconds] * 500] * 2, [wish, 10**6], monkeypatch)
    assert left[0] == left[1] <= wish + patience
    assert asked <= 3 + left[0] / patience


def test_one_process_asks_nobody() -> None:
    alone = SimpleNamespace(num_processes=1)  # no reduce to call
    assert Agreement(alone, 0).ask(1, True, False) == (True, False)  # type: ignore[arg-type]


def test_processes_that_found_different_checkpoints_do_not_go_on() -> None:
    def of(*steps: int) -> Any:
        return SimpleNamespace(device=torch.device("cpu"), gather=lambda mine: torch.tensor(steps))

    same_start(of(12, 12, 12), Path("checkpoints"), 12)
    with pytest.raises(RecordsError, match=r"checkpoints: .* \(steps 12, 0 by process\)") as raised:
        same_start(of(12, 0), Path("checkpoints"), 12)
    # A file system that is late is right a little later: no refusal, which would end the run for good.
    assert (exit_code(raised.value), cause_of(raised.value)) == (FAILED, "error")
