"""The scheduler: what is missing is done, once, whatever fails, is killed or runs beside it."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from scaling.process import alive
from scaling.records import RunFolder
from sweeps.patience import Patience
from sweeps.scheduler import JobState, Result, Scheduler, claim
from tests.sweeps.fake_sweep import HERE, REPOSITORY, fake_job


def phases(result: Result) -> dict[str, str]:
    return {s.job.name: s.phase for s in result.states}


def starts(root: Path, name: str) -> int:
    file = root / name / "starts.txt"
    return len(file.read_text().splitlines()) if file.exists() else 0


def launcher(root: Path, *jobs: str, places: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "fake_sweep.py"), str(root), str(places), *jobs],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def step(root: Path, name: str) -> int:
    return int(RunFolder(root / name).status().get("step", 0))


def test_all_jobs_are_done_in_the_order_of_need_and_a_second_launch_starts_nothing(tmp_path: Path) -> None:
    jobs = [
        fake_job(tmp_path, "tokenizer"),
        fake_job(tmp_path, "tokens", needs=("tokenizer",)),
        fake_job(tmp_path, "small", needs=("tokens",), weight=1),
        fake_job(tmp_path, "large", needs=("tokens",), weight=9),
    ]
    began: list[str] = []

    def watch(states: Sequence[JobState]) -> None:
        began.extend(s.job.name for s in states if s.started and s.job.name not in began)

    scheduler = Scheduler(jobs, [()], on_tick=watch)
    result = scheduler.run()
    assert set(phases(result).values()) == {"done"}
    assert result.exit_code == 0
    assert began == ["tokenizer", "tokens", "large", "small"], "the heavier run goes first"

    again = Scheduler(jobs, [()]).run()
    assert (again.started, again.exit_code) == (0, 0)
    assert [starts(tmp_path, j.name) for j in jobs] == [1, 1, 1, 1]


def test_runs_side_by_side_get_different_gpus_and_the_environment_of_their_job(tmp_path: Path) -> None:
    most = 0

    def watch(states: Sequence[JobState]) -> None:
        nonlocal most
        most = max(most, sum(s.phase == "running" for s in states))

    scheduler = Scheduler([fake_job(tmp_path, n, 8) for n in "abc"], [("0", "1"), ("2", "3")], on_tick=watch)
    assert scheduler.run().exit_code == 0
    assert most == 2
    seen = {(tmp_path / n / "starts.txt").read_text().strip() for n in "abc"}
    assert seen == {"1 0,1", "1 2,3"}


def test_of_several_places_on_a_gpu_the_one_is_taken_whose_gpu_has_least_to_do(tmp_path: Path) -> None:
    """A run that comes late must not share a GPU with another while one idles."""
    jobs = [
        fake_job(tmp_path, "a", 2, weight=9),
        fake_job(tmp_path, "b", 2, weight=8),
        fake_job(tmp_path, "long", 200, weight=7),
        fake_job(tmp_path, "d", 2, weight=6),
        fake_job(tmp_path, "late", 2, weight=5, needs=("a", "b", "d")),
    ]
    scheduler = Scheduler(jobs, [("0",), ("1",), ("0",), ("1",)])

    def leave_after(states: Sequence[JobState]) -> None:
        if states[-1].phase == "done":
            scheduler._signals.append(time.monotonic())

    scheduler.on_tick = leave_after
    assert phases(scheduler.run())["long"] == "interrupted", "it was there all the time"
    got = {job.name: (tmp_path / job.name / "starts.txt").read_text().split()[1] for job in jobs}
    assert got == {"a": "0", "b": "1", "long": "0", "d": "1", "late": "1"}


def test_a_failure_is_told_with_its_log_and_takes_down_only_what_needs_it(tmp_path: Path) -> None:
    jobs = [
        fake_job(tmp_path, "bad", behaviour="--fail"),
        fake_job(tmp_path, "after-bad", needs=("bad",)),
        fake_job(tmp_path, "good", needs=()),
    ]
    result = Scheduler(jobs, [(), ()]).run()
    assert phases(result) == {"bad": "failed", "after-bad": "blocked", "good": "done"}
    assert result.exit_code == 1
    (bad,) = result.failed
    assert bad.reason == "ValueError: loss is not a number"
    assert bad.log_tail() == ["a line of the log"]
    assert [s.job.name for s in result.missing] == ["bad", "after-bad"]

    repaired = [fake_job(tmp_path, "bad"), fake_job(tmp_path, "after-bad", needs=("bad",)), jobs[2]]
    second = Scheduler(repaired, [()]).run()
    assert (second.exit_code, second.started) == (0, 2)
    assert starts(tmp_path, "good") == 1


def test_a_refusal_of_a_job_is_exit_code_2(tmp_path: Path) -> None:
    result = Scheduler([fake_job(tmp_path, "a", behaviour="--refuse")], [()]).run()
    assert result.exit_code == 2
    assert result.failed[0].reason == "data.path: nothing there"


def test_a_job_that_is_killed_or_leaves_nothing_is_a_failure_and_recorded(tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path, "killed", behaviour="--die"), fake_job(tmp_path, "empty", behaviour="--empty")]
    result = Scheduler(jobs, [(), ()]).run()
    reasons = {s.job.name: s.reason for s in result.failed}
    assert reasons == {
        "killed": "killed by SIGKILL (out of memory?)",
        "empty": "ended without leaving product",
    }
    assert {RunFolder(tmp_path / n).status()["state"] for n in reasons} == {"failed"}
    assert result.exit_code == 1


def test_a_job_whose_product_was_removed_is_done_again(tmp_path: Path) -> None:
    job = fake_job(tmp_path, "a")
    assert Scheduler([job], [()]).run().started == 1
    (tmp_path / "a" / "product").unlink()
    assert Scheduler([job], [()]).run().started == 1
    assert (tmp_path / "a" / "product").exists()


def test_a_signal_lets_jobs_save_and_the_next_launch_goes_on_from_there(tmp_path: Path) -> None:
    first = launcher(tmp_path, "a:40", "b:40", "c:40")
    wait_for(lambda: step(tmp_path, "a") > 2 and step(tmp_path, "b") > 2)
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=20)
    assert first.returncode == 130, errors
    assert "a=interrupted b=interrupted c=waiting" in output
    assert errors == ""
    reached = step(tmp_path, "a")
    assert 2 < reached < 40

    second = launcher(tmp_path, "a:40", "b:40", "c:2")
    output, errors = second.communicate(timeout=20)
    assert second.returncode == 0, errors
    assert starts(tmp_path, "a") == 2
    assert step(tmp_path, "a") == 40


def test_orphans_of_a_killed_launcher_are_waited_for_and_continued(tmp_path: Path) -> None:
    first = launcher(tmp_path, "a:30")
    wait_for(lambda: step(tmp_path, "a") > 2)
    first.kill()
    second = launcher(tmp_path, "a:30")  # the orphan still holds the folder for a moment
    output, errors = second.communicate(timeout=20)
    first.communicate()
    assert (second.returncode, errors) == (0, "")
    assert "a=done" in output
    assert starts(tmp_path, "a") == 2, "once by the orphan, once to go on"


def test_two_launchers_at_once_do_every_job_once(tmp_path: Path) -> None:
    jobs = ["a:12", "b:10", "c:8", "d:6"]
    both = [launcher(tmp_path, *jobs, places=1) for _ in range(2)]
    outputs = [p.communicate(timeout=30) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert [starts(tmp_path, name) for name in "abcd"] == [1, 1, 1, 1]
    assert sum(int(out.split()[-1]) for out, _ in outputs) == 4


def test_a_failure_under_another_launcher_is_not_tried_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    with contextlib.ExitStack() as other:
        held = claim(folder.path / ".launcher")
        assert held is not None
        other.enter_context(held)
        other.enter_context(folder.lock())

        def fail_there(states: Sequence[JobState]) -> None:
            if states[0].phase == "elsewhere":
                folder.set_status("failed", error="out of luck")
                other.close()

        result = Scheduler([fake_job(tmp_path, "a")], [()], on_tick=fail_there).run()
    assert phases(result) == {"a": "failed"}
    assert result.failed[0].reason == "out of luck"
    assert starts(tmp_path, "a") == 0


@pytest.mark.parametrize(("retries", "started", "phase"), [(1, 1, "done"), (0, 0, "failed")])
def test_an_orphan_that_fails_is_tried_again_as_any_job(
    tmp_path: Path, retries: int, started: int, phase: str
) -> None:
    folder = RunFolder(tmp_path / "a")
    with contextlib.ExitStack() as orphan:
        orphan.enter_context(folder.lock())  # and nobody has its .launcher

        def fail_there(states: Sequence[JobState]) -> None:
            if states[0].phase == "elsewhere":
                folder.set_status("failed", error="out of luck", exit_code=1, cause="hung")
                orphan.close()

        scheduler = Scheduler(
            [fake_job(tmp_path, "a")], [()], on_tick=fail_there, patience=Patience(retries, 0.01)
        )
        result = scheduler.run()
    assert (phases(result), starts(tmp_path, "a")) == ({"a": phase}, started)


def test_an_error_of_the_launcher_itself_leaves_no_process_behind(tmp_path: Path) -> None:
    def break_down(states: Sequence[JobState]) -> None:
        if step(tmp_path, "a") > 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Scheduler([fake_job(tmp_path, "a", 200)], [()], on_tick=break_down).run()
    assert not RunFolder(tmp_path / "a").busy()
    assert RunFolder(tmp_path / "a").status()["state"] == "interrupted"


def test_a_second_signal_kills_what_torchrun_would_have_started_too(tmp_path: Path) -> None:
    pid = tmp_path / "child.txt"
    hanging = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import pathlib, signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"child = subprocess.Popen([sys.executable, '-c', {hanging!r}], start_new_session=True);"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid)); child.wait()"
    )
    job = dataclasses.replace(fake_job(tmp_path, "a"), command=(sys.executable, "-c", code))
    scheduler = Scheduler([job], [()])

    def interrupt(states: Sequence[JobState]) -> None:
        if pid.exists() and pid.read_text():
            scheduler._signals += [time.monotonic() - 4, time.monotonic()]

    scheduler.on_tick = interrupt
    assert scheduler.run().exit_code == 130
    wait_for(lambda: not alive(int(pid.read_text())))
