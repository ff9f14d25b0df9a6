"""The share of device time that was training: of this launch, and of all its places."""

from pathlib import Path

import pytest

from sweeps.scheduler import JobState
from sweeps.share import TimeSpent, time_spent
from tests.sweeps.test_plan import planned


def test_only_what_this_launch_has_trained_counts(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    first, second, others = plan.run_jobs[:3]
    first.folder.set_status("interrupted", seconds={"train": 30.0, "evaluation": 4.0})
    before = time_spent(plan.jobs)
    first.folder.set_status("done", seconds={"train": 90.0, "evaluation": 10.0})
    second.folder.set_status("done", seconds={"train": 40.0})
    others.folder.set_status("running", seconds={"train": 95.0})  # by another launcher, meanwhile
    states = [JobState(job) for job in plan.jobs]
    for state in states:
        state.started = 1.0 if state.job in (first, second) else None
    used = TimeSpent.by(states, 2, 100.0, before)
    assert used.of("train") == 60 + 40
    assert used.of("evaluation") == 6
    assert used.share([], whole_machine=True) == pytest.approx(100 / 200)


def test_a_tokenizer_uses_every_place_of_a_cpu_and_one_gpu(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    states = [JobState(job) for job in plan.jobs]
    states[0].started, states[0].seconds = 1.0, 50.0
    used = TimeSpent(2, 100.0, {}, {"a": {"train": 60.0}})
    assert used.share(states, whole_machine=True) == pytest.approx((60 + 2 * 50) / 200)
    assert used.share(states, whole_machine=False) == pytest.approx((60 + 50) / 200)
    told = used.told(states, whole_machine=False)
    assert told.startswith("device time: 55% of 2 places x 2 min spent training")
    assert "training 60 s" in told


def test_a_share_is_at_most_one_when_all_places_train_always(tmp_path: Path) -> None:
    runs = {str(i): {"train": 80.0} for i in range(3)}
    assert TimeSpent(3, 80.0, {}, runs).share([], whole_machine=True) == pytest.approx(1.0)


def test_records_without_an_account_say_nothing(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.run_jobs[0].folder.set_status("done", seconds="long")
    plan.run_jobs[1].folder.set_status("done", seconds={"train": None})
    assert time_spent(plan.jobs) == {plan.run_jobs[1].name: {}}
