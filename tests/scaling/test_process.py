"""Jobs end in the state, with the exit code and the words that the scheduler and a person rely on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from scaling import process
from scaling.process import DivergedError, Interrupted, JobProcess, alive, cause_of, one_line, run_job
from scaling.records import FolderBusyError, RecordsError, RunFolder
from scaling.schema import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]

WAITING_JOB = """
    import sys, time
    from scaling.process import Interrupted, JobProcess, run_job
    from scaling.records import RunFolder

    def main():
        with JobProcess(RunFolder(sys.argv[1])) as job:
            print("ready", flush=True)
            for step in range(600):
                job.beat(step=step)
                if job.should_stop():
                    raise Interrupted
                time.sleep(0.05)

    sys.exit(run_job(main))
"""


def because(error: Exception, cause: Exception) -> Exception:
    """As after ``raise error from cause``."""
    error.__cause__ = cause
    return error


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A job that beats until it is asked to leave, already inside its loop."""
    job = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WAITING_JOB), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | environment,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    return job


def test_done_keeps_the_last_facts_and_counts_attempts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for attempt in (1, 2):
        with JobProcess(folder) as job:
            assert folder.status()["state"] == "running"
            assert folder.busy()
            job.beat(step=7, total_steps=7)
        status = folder.status()
        assert (status["state"], status["step"], status["attempt"]) == ("done", 7, attempt)
    assert not folder.busy()


@pytest.mark.parametrize(
    ("error", "code", "state"),
    [
        (Interrupted(), 3, "interrupted"),
        (KeyboardInterrupt(), 3, "interrupted"),
        (ConfigError("data.path is missing"), 2, "failed"),
        (RecordsError("no such\nfolder"), 2, "failed"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y.bin"), 2, "failed"),
        (RuntimeError("boom"), 1, "failed"),
        (OSError(errno.EIO, "Input/output error"), 1, "failed"),
        (because(RecordsError("could not be read"), OSError(errno.ESTALE, "Stale file handle")), 1, "failed"),
        (because(RecordsError("could not be read"), OSError(errno.ENOSPC, "No space")), 2, "failed"),
        (DivergedError("the loss became nan"), 1, "failed"),
    ],
)
def test_how_a_job_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: BaseException, code: int, state: str
) -> None:
    folder = RunFolder(tmp_path)

    def main() -> None:
        with JobProcess(folder) as job:
            job.beat(step=3)
            raise error

    assert run_job(main) == code
    status = folder.status()
    assert (status["state"], status["step"]) == (state, 3)
    told = capfd.readouterr().err
    if code == 2:
        assert told == one_line(error) + "\n"
    assert ("Traceback" in told) == (code == 1 and not isinstance(error, DivergedError))
    if state == "failed":
        assert (status["error"], status["cause"]) == (one_line(error), cause_of(error))
        assert "\n" not in status["error"]
    with JobProcess(folder):
        assert not folder.status().keys() & {"error", "cause", "exit_code"}


def test_a_full_disk_is_one_line_that_says_what_to_do() -> None:
    line = one_line(OSError(errno.ENOSPC, "No space left on device", "/x/y.bin"))
    assert "disk is full (/x/y.bin)" in line
    assert "start again" in line
    told_by_safetensors = RuntimeError("Error while serializing: I/O error: No space left (os error 28)")
    assert "disk is full" in one_line(told_by_safetensors)


def test_a_busy_folder_is_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with JobProcess(folder) as job:
        job.beat(step=1)
        before = folder.status()
        with (
            pytest.raises(FolderBusyError, match="in use by another process"),
            JobProcess(RunFolder(tmp_path)),
        ):
            raise AssertionError("entered a busy folder")
        assert folder.status() == before


def test_a_peer_process_writes_its_failure_only_and_the_first_failure_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def peer() -> None:
        with JobProcess(folder, is_main=False) as job:
            job.beat(step=99)
        assert folder.status()["state"] == "running"
        with JobProcess(folder, is_main=False):
            raise ValueError("the cause")

    def main() -> None:
        with JobProcess(folder) as job:
            with pytest.raises(ValueError, match="cause"):
                peer()
            job.beat(step=4)
            raise RuntimeError("peer gone")

    assert run_job(main) == 1
    assert folder.status()["error"] == "ValueError: the cause"


def test_the_others_enter_after_the_main_process(tmp_path: Path) -> None:
    """Else it would take a failure of theirs for one of the attempt before, and forget it."""
    folder, waited = RunFolder(tmp_path), []
    folder.set_status("running", attempt=1)
    folder.fail("of the attempt before", 1, "error")

    def wait() -> None:
        waited.append(folder.status()["state"])

    with JobProcess(folder, is_main=True, wait=wait):
        with pytest.raises(ValueError, match="cause"), JobProcess(folder, is_main=False, wait=wait):
            raise ValueError("the cause")
        assert folder.status()["error"] == "ValueError: the cause"
    assert waited == ["running", "running"]
    assert folder.status()["state"] == "failed"


def test_the_heartbeat_goes_on_while_the_job_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(process, "IDLE_SECONDS", 0.02)
    folder = RunFolder(tmp_path)
    with JobProcess(folder):
        first = folder.status()["heartbeat"]
        deadline = time.monotonic() + 5
        while folder.status()["heartbeat"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert folder.status()["heartbeat"] > first


def test_a_heart_that_beats_is_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(process, "IDLE_SECONDS", 0.02)
    folder = RunFolder(tmp_path)

    def until(key: str, changed_from: float) -> dict[str, Any]:
        deadline = time.monotonic() + 5
        while folder.status().get(key) == changed_from and time.monotonic() < deadline:
            time.sleep(0.01)
        return folder.status()

    with JobProcess(folder) as job:
        first = folder.status()
        later = until("heartbeat", first["heartbeat"])
        assert later["progress_at"] == first["progress_at"]
        for sign in (lambda: job.beat(step=1), job.should_stop):
            before = folder.status()
            sign()
            assert until("progress_at", before["progress_at"])["progress_at"] > before["progress_at"]


def test_a_full_disk_that_takes_stderr_too_keeps_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def main() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(sys, "stderr", Full())
    assert run_job(main) == 2


def test_a_full_disk_reaches_the_job_through_its_heartbeat_and_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "BEAT_SECONDS", 0.01)
    folder = RunFolder(tmp_path)

    def full(state: str, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "status.json")

    def main() -> None:
        with JobProcess(folder) as job:
            monkeypatch.setattr(folder, "update_status", full)
            job.beat(step=1)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                job.should_stop()
                time.sleep(0.01)

    assert run_job(main) == 2
    told = capfd.readouterr().err
    assert "the disk is full (status.json)" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_job_finish_its_step(tmp_path: Path, number: signal.Signals) -> None:
    job = start(tmp_path)
    for _ in range(3):  # one Ctrl-C arrives from the terminal, the launcher and the scheduler
        job.send_signal(number)
    assert job.wait(timeout=20) == 3
    assert RunFolder(tmp_path).status()["state"] == "interrupted"


def test_sigkill_leaves_a_readable_folder_that_is_free(tmp_path: Path) -> None:
    job = start(tmp_path)
    job.kill()
    job.wait(timeout=20)
    folder = RunFolder(tmp_path)
    assert folder.status()["state"] == "running"
    assert not folder.busy()


def test_a_job_leaves_when_its_launcher_is_gone(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    job = start(tmp_path, VARSCALE_LAUNCHER_PID=str(launcher.pid))
    assert job.poll() is None
    launcher.kill()  # left as a zombie on purpose: nobody waits for it yet
    assert job.wait(timeout=20) == 3
    assert not alive(launcher.pid)
    launcher.wait()
    assert not alive(launcher.pid)
    assert alive(os.getpid())
    assert RunFolder(tmp_path).status()["state"] == "interrupted"


HUNG_JOB = """
    import sys, time
    from scaling import process
    from scaling.records import RunFolder

    process.BEAT_SECONDS = process.IDLE_SECONDS = 0.05
    with process.JobProcess(RunFolder(sys.argv[1]), is_main=sys.argv[2] == "main") as job:
        print("ready", flush=True)
        def waits_for_a_peer():
            time.sleep(60)
        waits_for_a_peer()
"""


@pytest.mark.parametrize("rank", ["main", "peer"])
def test_a_job_that_hangs_ends_itself_once_its_launcher_is_gone(tmp_path: Path, rank: str) -> None:
    """Each of its processes by itself: nobody is left to end it, and it holds the folder and the device."""
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    job = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HUNG_JOB), str(tmp_path), rank],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"VARSCALE_LAUNCHER_PID": str(launcher.pid), "VARSCALE_HANG_SECONDS": "1.5"},
    )
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):  # its launcher's business, as long as there is one
            job.wait(timeout=2.5)
        launcher.kill()
        launcher.wait()
        _, told = job.communicate(timeout=20)
    finally:
        job.kill()
    assert job.returncode == 1
    assert "in waits_for_a_peer" in told
    folder = RunFolder(tmp_path)
    status = folder.status()
    assert (status["state"], status["cause"], status["exit_code"]) == ("failed", "hung", 1)
    assert "no progress for" in status["error"]
    assert not folder.busy()


def test_an_id_given_to_another_process_is_no_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "BEAT_SECONDS", 0.01)
    monkeypatch.setenv(process.LAUNCHER, str(os.getpid()))
    births = iter(["1", "1", "1"])
    monkeypatch.setattr(process, "_birth", lambda pid: next(births, "2"))
    with JobProcess(RunFolder(tmp_path)) as job:
        deadline = time.monotonic() + 10
        while not job.should_stop() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert next(births, None) is None, "not before"
        assert job.should_stop()


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with JobProcess(RunFolder(tmp_path)):
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("is_main", [True, False])
def test_a_failure_to_meet_the_others_is_recorded(tmp_path: Path, is_main: bool) -> None:
    folder = RunFolder(tmp_path)

    def wait() -> None:
        raise RuntimeError("connection reset by peer")

    with pytest.raises(RuntimeError, match="reset"), JobProcess(folder, is_main, wait):
        raise AssertionError("entered alone")
    status = folder.status()
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["error"] == "RuntimeError: connection reset by peer"
    assert not folder.busy()


def test_a_signal_while_the_others_are_waited_for_is_heard(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def main() -> None:
        with JobProcess(folder, wait=lambda: os.kill(os.getpid(), signal.SIGTERM)) as job:
            assert job.should_stop()
            raise Interrupted

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run_job(main) == 3
    finally:
        signal.signal(signal.SIGTERM, before)
    assert folder.status()["state"] == "interrupted"
