"""What fails is tried again where that may help, what hangs is ended, and the others go on meanwhile."""

from __future__ import annotations

import dataclasses
import errno
import io
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from scaling import records
from scaling.config import ConfigError, LaunchConfig
from scaling.records import RunFolder
from sweeps import attempts, commands, patience, progress, scheduler
from sweeps.patience import Patience, Pulse, Tries
from sweeps.progress import Progress
from sweeps.scheduler import JobState, Result, Scheduler
from sweeps.trunks import clear
from tests.sweeps.fake_sweep import fake_job
from tests.sweeps.test_scheduler import phases, starts

QUICK = Patience(retries=2, retry_seconds=0.05)


def launched(*jobs: Any, patience: Patience = QUICK, places: int = 1, **more: Any) -> Result:
    return Scheduler(jobs, [()] * places, patience=patience, **more).run()


# -- settings ------------------------------------------------------------------------------------


def test_pauses_double_and_count_only_while_a_job_gets_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    tries, three = Tries(), Patience(retries=3, retry_seconds=10.0)

    def pause(step: int, cause: str | None = None, refused: bool = False) -> float | None:
        return tries.pause(cause, refused, {"state": "running", "step": step}, three)

    assert [pause(5) for _ in range(4)] == [10, 20, 40, None]
    assert [pause(s) for s in (6, 6, 9)] == [10, 20, 10], "it got further"
    assert pause(9, refused=True) is None
    assert pause(9, cause="disk", refused=True) is None
    assert [pause(9, cause="memory") for _ in range(9)] == [0] * 9, "each time with half the micro-batch"
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 15.0)
    assert pause(9) == 15.0


@pytest.mark.parametrize(("again", "divergences", "given_up"), [
    (False, 0, True), (True, 0, False), (True, 1, True),
])  # fmt: skip
def test_a_diverged_run_gets_one_more_try_on_request(again: bool, divergences: int, given_up: bool) -> None:
    status = {"state": "failed", "cause": "diverged", "divergences": divergences}
    asked = Patience(retries=5, retry_diverged=again)
    assert asked.given_up(status) == given_up
    assert Tries().pause("diverged", False, status, asked) == (None if given_up else 0.0)
    assert not asked.given_up({"state": "running", "divergences": 3})
    assert not asked.given_up({"state": "failed", "cause": "error"})


def test_a_clock_that_jumps_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(patience.time, "monotonic", lambda: now)
    pulse = Pulse()
    assert pulse.silent({"progress_at": 5e9, "heartbeat": 1}) == 0
    now += 7
    assert pulse.silent({"progress_at": 5e9, "heartbeat": 2}) == 7, "a heart that beats is no progress"
    assert pulse.silent({"progress_at": 3.0}) == 0, "any change is"
    assert not Pulse().due(math.inf)


def test_time_in_which_nobody_looked_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse = Pulse()
    now = time.monotonic()
    monkeypatch.setattr(patience.time, "monotonic", lambda: now)
    assert pulse.silent({"progress_at": 1.0}) == 0
    for seconds, silent in ((30, 30), (3600, 30), (20, 50)):
        now += seconds
        assert pulse.due(1800.0)
        assert pulse.silent({"progress_at": 1.0}) == pytest.approx(silent, abs=1)


def test_settings_are_checked_and_default_to_patience() -> None:
    assert Patience.of(LaunchConfig()) == Patience(2, 10.0, False, 1800.0)
    for bad in ({"retries": -1}, {"retry_seconds": -1.0}, {"hang_seconds": 0.0}):
        with pytest.raises(ConfigError, match=f"launch.{next(iter(bad))} must"):
            LaunchConfig(**bad)  # type: ignore[arg-type]


# -- jobs ----------------------------------------------------------------------------------------


def test_a_job_that_dies_on_its_way_is_done_in_the_end(tmp_path: Path) -> None:
    waiting: list[str] = []

    def watch(states: Sequence[JobState]) -> None:
        if states[0].phase == "waiting" and states[0].reason:
            waiting.append(str(RunFolder(tmp_path / "a").status()))

    result = launched(fake_job(tmp_path, "a", 5, "--flaky"), on_tick=watch)
    assert (phases(result), result.exit_code) == ({"a": "done"}, 0)
    assert starts(tmp_path, "a") == 4, "three failures, but each time a step further"
    assert any("killed by SIGKILL" in text and "'state': 'waiting'" in text for text in waiting)


def test_what_keeps_failing_is_marked_so_and_the_others_go_on_meanwhile(tmp_path: Path) -> None:
    began: list[str] = []

    def watch(states: Sequence[JobState]) -> None:
        began.extend(s.job.name for s in states if s.started and s.job.name not in began)

    slow = Patience(retries=1, retry_seconds=1.5)
    jobs = [fake_job(tmp_path, "bad", behaviour="--die", weight=9), fake_job(tmp_path, "good", weight=1)]
    result = launched(*jobs, patience=slow, on_tick=watch)
    assert phases(result) == {"bad": "failed", "good": "done"}
    assert (starts(tmp_path, "bad"), starts(tmp_path, "good"), result.exit_code) == (2, 1, 1)
    status = RunFolder(tmp_path / "bad").status()
    assert status["error"] == "killed by SIGKILL (out of memory?) (2 times, no further each time)"
    assert (status["state"], status["cause"]) == ("failed", "killed")


@pytest.mark.parametrize(
    ("behaviour", "times", "code"), [("--refuse", 1, 2), ("--diverge", 1, 1), ("--fail", 3, 1)]
)
def test_what_another_try_cannot_mend_is_not_tried_again(
    tmp_path: Path, behaviour: str, times: int, code: int
) -> None:
    result = launched(fake_job(tmp_path, "a", behaviour=behaviour))
    assert (starts(tmp_path, "a"), result.exit_code) == (times, code)


def test_a_diverged_run_is_not_trained_again_by_the_next_launch_either(tmp_path: Path) -> None:
    job = fake_job(tmp_path, "a", behaviour="--diverge")
    for _ in range(2):
        result = launched(job)
        assert (phases(result), result.exit_code, result.failed[0].reason) == (
            {"a": "failed"},
            1,
            "it diverged",
        )
    assert starts(tmp_path, "a") == 1
    once_more = Patience(retry_diverged=True)
    for _ in range(2):
        assert launched(job, patience=once_more).exit_code == 1
    assert starts(tmp_path, "a") == 2


@pytest.mark.parametrize("behaviour", ["--diverge", "--refuse"])
def test_crashes_before_are_not_counted_as_what_ended_it(tmp_path: Path, behaviour: str) -> None:
    sweep = Scheduler([fake_job(tmp_path, "a", behaviour=behaviour)], [()], patience=QUICK)
    sweep.states[0].attempts.tries.count = 2
    (failed,) = sweep.run().failed
    assert failed.reason == {"--diverge": "it diverged", "--refuse": "data.path: nothing there"}[behaviour]


def test_memory_is_tried_again_at_once_and_as_often_as_it_takes(tmp_path: Path) -> None:
    result = launched(fake_job(tmp_path, "a", behaviour="--short"), patience=Patience())
    assert (phases(result), starts(tmp_path, "a")) == ({"a": "done"}, 5)


def test_a_hung_job_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    hasty = Patience(hang_seconds=1.0)
    result = launched(
        fake_job(tmp_path, "stuck", 50, "--hang"), fake_job(tmp_path, "good", 3), patience=hasty, places=2
    )
    assert phases(result) == {"stuck": "failed", "good": "done"}
    status = RunFolder(tmp_path / "stuck").status()
    assert status["cause"] == "hung"
    assert re.fullmatch(r"made no progress for \d+ s and was ended", status["error"])
    assert not RunFolder(tmp_path / "stuck").busy()
    found = subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "stuck") not in found


HUNG = """
import os, sys, time
from scaling import process
from scaling.records import RunFolder
process.BEAT_SECONDS = process.IDLE_SECONDS = 0.05
with process.JobProcess(RunFolder(sys.argv[1])) as job:
    job.beat(step=1)
    def waits_for_a_peer():
        time.sleep(60)
    waits_for_a_peer()
"""


def test_a_real_job_that_hangs_beats_on_and_shows_where_it_stood(tmp_path: Path) -> None:
    job = dataclasses.replace(
        fake_job(tmp_path, "a"), command=(sys.executable, "-c", HUNG, str(tmp_path / "a"))
    )
    seen: set[tuple[float, float]] = set()

    def watch(states: Sequence[JobState]) -> None:
        status = RunFolder(tmp_path / "a").status()
        if status.get("step") == 1 and status["state"] == "running":
            seen.add((status["progress_at"], status["heartbeat"]))

    result = launched(job, patience=Patience(hang_seconds=6.0), on_tick=watch)
    assert re.fullmatch(r"made no progress for \d+ s and was ended", result.failed[0].reason)
    assert len({moved for moved, _ in seen}) == 1
    assert len(seen) > 1, "the heart beat on"
    log = result.failed[0].log.read_text()
    assert "the threads stand here" in log
    assert "in waits_for_a_peer" in log


# -- a full disk ---------------------------------------------------------------------------------


def test_a_job_that_cannot_be_started_for_lack_of_space_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scheduler.write_json

    def full(path: Path, value: Any) -> None:
        if path.parent.name == "bad":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, value)

    monkeypatch.setattr(scheduler, "write_json", full)
    result = launched(fake_job(tmp_path, "bad"), fake_job(tmp_path, "good"))
    assert phases(result) == {"bad": "failed", "good": "done"}
    assert result.failed[0].reason.startswith("the disk is full: free some space and start again")
    assert result.exit_code == 2


def test_a_file_system_that_fails_for_a_moment_costs_a_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = scheduler.write_json, [errno.ESTALE, errno.EIO]

    def stale(path: Path, value: Any) -> None:
        if failures:
            raise OSError(failures.pop(), "for a moment", str(path))
        real(path, value)

    monkeypatch.setattr(scheduler, "write_json", stale)
    result = launched(fake_job(tmp_path, "a"))
    assert (phases(result), starts(tmp_path, "a"), result.states[0].attempts.tries.count) == (
        {"a": "done"},
        1,
        2,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_ends_as_always_when_its_launcher_s_looks_fail_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Of all that it reads of its jobs, wherever it reads it; and no try is spent on that."""
    real, chance, failed = records._read_if_there, random.Random(seed), set[Path]()

    def stale(path: Path, otherwise: Any) -> Any:
        if path not in failed or chance.random() < 0.2:
            failed.add(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, otherwise)

    jobs = [
        fake_job(tmp_path, "a", 12),
        fake_job(tmp_path, "b", 6, needs=("a",)),
        fake_job(tmp_path, "bad", behaviour="--fail"),
    ]
    display = Progress(Console(file=io.StringIO()), 2)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    sweep = Scheduler(
        jobs, [(), ()], patience=Patience(hang_seconds=60.0), on_tick=display.update,
        on_done=lambda state: clear(jobs),
    )  # fmt: skip
    monkeypatch.setattr(records, "_read_if_there", stale)
    result = sweep.run()
    monkeypatch.undo()
    assert phases(result) == {"a": "done", "b": "done", "bad": "failed"}
    assert result.failed[0].reason == "ValueError: loss is not a number"
    assert [starts(tmp_path, job.name) for job in jobs] == [1, 1, 1]
    assert {path.parent.name for path in failed} == {"a", "b", "bad"}


def test_a_folder_that_stays_unreadable_fails_its_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = records._read_if_there

    def stale(path: Path, otherwise: Any) -> Any:
        if path.parent.name == "lost" or (path.parent.name == "ended" and path.with_name("product").exists()):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, otherwise)

    jobs = [fake_job(tmp_path, "lost"), fake_job(tmp_path, "ended"), fake_job(tmp_path, "good")]
    sweep = Scheduler(jobs, [()])
    monkeypatch.setattr(scheduler, "UNREAD_SECONDS", 0.5)
    monkeypatch.setattr(records, "_read_if_there", stale)
    result = sweep.run()
    assert phases(result) == {"lost": "failed", "ended": "failed", "good": "done"}
    assert "could not be started: [Errno 5]" in result.states[0].reason
    assert result.states[1].reason == "its folder could not be read for 0 s after it ended"


def test_a_launcher_whose_own_output_is_on_the_full_disk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = Console(file=Full())
    with pytest.raises(OSError, match="No space left"):
        out.print("a line")
    with Progress(out, 1) as display:
        result = launched(fake_job(tmp_path, "a"), on_tick=display.update)
    commands.say(out, "done")
    assert result.exit_code == 0


def test_a_job_that_could_not_even_say_that_the_disk_is_full_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = type("Usage", (), {"free": 0})
    monkeypatch.setattr(attempts.shutil, "disk_usage", lambda path: used)
    result = launched(fake_job(tmp_path, "a", behaviour="--empty"))
    assert result.failed[0].reason.startswith("the disk is full")
    assert (starts(tmp_path, "a"), result.exit_code) == (1, 2)


# -- a job that needs the machine for itself -------------------------------------------------------


def test_an_alone_job_that_comes_late_waits_for_no_run_that_has_not_begun(tmp_path: Path) -> None:
    """A second tokenizer that fails once: light runs of the first must not push it to the end."""
    order: list[str] = []

    def watch(states: Sequence[JobState]) -> None:
        for state in states:
            mark = f"{state.job.name}{state.attempts.tries.count}"
            if state.process is not None and mark not in order:
                order.append(mark)

    stage = dataclasses.replace(fake_job(tmp_path, "tokenizer", 2, "--flaky"), alone=True)
    runs = [fake_job(tmp_path, f"run{i}", 20, weight=10 - i) for i in range(4)]
    second = fake_job(tmp_path, "second", 2, needs=("tokenizer",), weight=1)
    slow = Patience(retries=1, retry_seconds=0.4)
    assert launched(stage, *runs, second, patience=slow, places=2, on_tick=watch).exit_code == 0
    assert order[:3] == ["tokenizer0", "run00", "run10"]
    assert order[3] == "tokenizer1", "before the third run"


def test_while_it_waits_only_what_ends_before_the_running_ones_is_started(tmp_path: Path) -> None:
    jobs = [
        dataclasses.replace(fake_job(tmp_path, "alone"), alone=True),
        fake_job(tmp_path, "long", 40, weight=40.0),
        fake_job(tmp_path, "longer", 60, weight=60.0),
        fake_job(tmp_path, "short", 4, weight=4.0),
    ]
    held, begun = Scheduler(jobs, [(), ()]), list[str]()
    by_name = {s.job.name: s for s in held.states}
    by_name["alone"].not_before = by_name["longer"].not_before = by_name["short"].not_before = math.inf

    def watch(states: Sequence[JobState]) -> None:
        begun.extend(s.job.name for s in states if s.process is not None and s.job.name not in begun)
        if by_name["long"].job.folder.status().get("step", 0) >= 3:
            for state in states:
                state.not_before = 0.0

    held.on_tick = watch
    assert held.run().exit_code == 0
    assert begun == ["long", "short", "alone", "longer"]
