"""Several machines: a run is called when all are there, joined once, and nothing stale is believed."""

import dataclasses
import errno
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from scaling.config import ConfigError, LaunchConfig, content_hash
from scaling.process import alive
from scaling.records import RecordsError, RunFolder
from sweeps import commands, meeting
from sweeps.jobs import Job, command, tokenizer_jobs
from sweeps.meeting import Follower, Leader, Sign
from sweeps.plan import stage_of
from sweeps.recipe import load_recipe
from sweeps.scheduler import JobState, Scheduler
from tests.sweeps.fake_sweep import fake_job
from tests.sweeps.test_plan import LAPTOP, NODE, planned


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(meeting, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(meeting, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(meeting, "KILL_SECONDS", 2.0)


def share(root: Path, name: str, code: str = "") -> Job:
    """A follower's part of a run: it leaves the name of its rendezvous, then does ``code``."""
    folder = RunFolder(root / name)
    folder.path.mkdir(parents=True, exist_ok=True)
    met = str(folder.path / "met.txt")
    text = f"import os, time; open({met!r}, 'a').write(os.environ['PET_RDZV_ID']); {code}"
    return Job(name, "run", folder, (sys.executable, "-c", text), "product")


def follower(root: Path, *jobs: Job, told: list[str] | None = None) -> Follower:
    return Follower(root, 1, jobs, (), (told if told is not None else []).append)


class Led:
    """A leader in a thread, as the scheduler would drive it."""

    def __init__(self, root: Path) -> None:
        self.told: list[str] = []
        self.leader = Leader(root, 2, self.told.append)
        self.running = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick)
        self._thread.start()

    def _tick(self) -> None:
        while not self._end.wait(0.02):
            self.leader.tick(self.running)

    def call(self, job: Job) -> dict[str, str]:
        """Wait until the run can be called, and call it."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            self.running = True  # before the call: a tick in between must not close the turn
            found = self.leader.ready(job)
            if found is not None:
                return found
            self.running = False
            time.sleep(0.02)
        raise AssertionError(f"the other machine never came: {self.told}")

    def stop(self, code: int | None = None) -> None:
        self._end.set()
        self._thread.join()
        if code is not None:
            self.leader.end(code)


@pytest.fixture
def led(tmp_path: Path) -> Iterator[Led]:
    made = Led(tmp_path)
    yield made
    made.stop()


def aside(script: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=script, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_write_that_fails_at_the_end_of_a_run_ends_no_leader_and_closes_the_turn_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, full = Leader(tmp_path, 2, print), threading.Event()
    real = meeting.write_json

    def write(path: Path, value: object) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    def shown() -> str:
        return str(json.loads((tmp_path / "machines" / "0.json").read_text())["run"])

    leader._run = "a run that was called"
    leader._show()
    monkeypatch.setattr(meeting, "write_json", write)
    full.set()
    leader.tick(running=False)
    assert shown() == "a run that was called"
    full.clear()
    end = time.monotonic() + 10
    while shown() and time.monotonic() < end:
        leader.tick(running=False)
    assert shown() == ""
    full.set()
    leader.end(0)


def test_every_run_is_called_once_and_met_at_its_own_place_and_the_exit_code_is_shared(
    tmp_path: Path, led: Led
) -> None:
    jobs = [share(tmp_path, name) for name in "ab"]
    places: list[str] = []

    def lead() -> None:
        for job in jobs:
            places.extend(led.call(job).values())
            wait_for((job.folder.path / "met.txt").exists)
            led.running = False
            time.sleep(0.1)
        led.stop(7)

    thread = aside(lead)
    assert follower(tmp_path, *jobs).run() == 7
    thread.join()
    assert [(job.folder.path / "met.txt").read_text() for job in jobs] == places
    assert len(set(places)) == 2


def test_what_a_dead_leader_left_is_never_believed(tmp_path: Path) -> None:
    job, told = share(tmp_path, "a"), list[str]()
    Sign(tmp_path / "machines" / "0.json").show(session="old", turn=3, run="a")
    assert follower(tmp_path, job, told=told).run() == 1
    assert not (job.folder.path / "met.txt").exists()
    assert told[-1] == f"machine 1: no sign of machine 0 in {tmp_path / 'machines'} any more"


def test_a_leader_calls_only_when_the_others_are_there_free_and_its_own(tmp_path: Path) -> None:
    told: list[str] = []
    leader, job = Leader(tmp_path, 2, told.append), share(tmp_path, "a")
    session = json.loads((tmp_path / "machines" / "0.json").read_text())["session"]
    other = Sign(tmp_path / "machines" / "1.json")

    def seen(**facts: object) -> bool:
        for _ in range(2):
            other.show(**facts)
            leader.tick(False)
        return leader.ready(job) is not None

    assert leader.ready(job) is None
    assert leader.ready(job) is None
    (said,) = told  # once
    assert said.startswith("waiting for machine 1 before a: start the same command there")
    assert not seen(leader="another", busy=False)
    assert not seen(leader=session, busy=True)
    assert seen(leader=session, busy=False)


def test_tokenizer_and_tokens_wait_for_no_other_machine(tmp_path: Path) -> None:
    leader = Leader(tmp_path, 2, lambda text: None)
    for job in planned(tmp_path).jobs[:2]:
        assert leader.ready(job) == {}


def test_a_run_that_is_not_in_the_plan_is_refused(tmp_path: Path, led: Led) -> None:
    thread = aside(lambda: led.call(share(tmp_path, "elsewhere")) and None)
    with pytest.raises(RecordsError, match="called elsewhere, which is not in the plan of machine 1"):
        follower(tmp_path, share(tmp_path, "a")).run()
    thread.join()


HANGING = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def launcher_of(child: str, on_term: str, file: Path) -> str:
    """Code that starts a child in a session of its own, as torchrun does."""
    return (
        "import signal, subprocess, sys, pathlib;"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True);"
        f"signal.signal(signal.SIGTERM, {on_term});"
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid)); child.wait()"
    )


@pytest.mark.parametrize("on_term", ["lambda *_: child.kill()", "signal.SIG_IGN"])
def test_processes_that_hang_after_their_turn_are_killed(tmp_path: Path, led: Led, on_term: str) -> None:
    """By the launcher that started them, or with it."""
    file = tmp_path / "child.txt"
    job, told = share(tmp_path, "a", launcher_of(HANGING, on_term, file)), list[str]()

    def lead() -> None:
        led.call(job)
        wait_for(file.exists)
        led.running = False  # it has ended on machine 0
        wait_for(lambda: any("ended" in text for text in told))
        led.stop(1)

    thread = aside(lead)
    began = time.monotonic()
    assert follower(tmp_path, job, told=told).run() == 1
    assert time.monotonic() - began < 30, "it did not wait for the minute of sleep"
    wait_for(lambda: not alive(int(file.read_text())))
    assert not alive(int(file.read_text()))
    thread.join()


LEAVES = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (time.sleep({0}), open({1!r}, 'w'), "
    "sys.exit(3))); open({2!r}, 'w'); time.sleep(60)"
)


def leaving(root: Path, seconds: float) -> tuple[Job, Path, Path]:
    """A share that takes this long to leave when it is asked to, and the files of its start and its end."""
    began, left = root / "began.txt", root / "left.txt"
    return share(root, "a", LEAVES.format(seconds, str(left), str(began))), began, left


def test_the_exit_code_is_shared_however_long_the_share_here_takes_to_leave(
    tmp_path: Path, led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, began, left = leaving(tmp_path, seconds=1.0)

    def lead() -> None:
        led.call(job)
        wait_for(began.exists)
        monkeypatch.setattr(meeting, "ALIVE_SECONDS", 0.5)
        led.running = False
        led.stop(7)

    thread = aside(lead)
    assert follower(tmp_path, job).run() == 7
    assert left.exists(), "it was not killed"
    thread.join()


def test_an_error_of_the_follower_lets_its_share_leave(
    tmp_path: Path, led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, began, left = leaving(tmp_path, seconds=0.1)
    following = follower(tmp_path, job)
    mind = following._mind

    def failing() -> None:
        mind()
        if began.exists():
            raise ZeroDivisionError

    monkeypatch.setattr(following, "_mind", failing)
    thread = aside(lambda: led.call(job) and None)
    with pytest.raises(ZeroDivisionError):
        following.run()
    assert left.exists(), "it was killed without a checkpoint"
    thread.join()


def test_a_turn_that_is_seen_open_again_is_not_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(meeting.time, "monotonic", lambda: now)
    job, began, left = leaving(tmp_path, seconds=0.0)
    following = follower(tmp_path, job)
    turn = {"session": "s", "turn": 1, "run": "a"}
    following._leader.facts, following._leader._changed = turn, now
    following._join("a")
    while not began.exists():
        time.sleep(0.02)
    process = following._process
    assert process is not None
    for facts in (turn | {"run": ""}, turn, turn, turn | {"run": ""}):
        following._leader.facts, following._leader._changed = facts, now
        following._mind()
        assert not left.exists()
        now += 0.25
    now += 0.3
    following._mind()
    assert process.wait(10) == 3


def test_each_place_is_taken_once_and_free_again_afterwards(tmp_path: Path, led: Led) -> None:
    with pytest.raises(RecordsError, match="another launcher runs this sweep as machine 0"):
        Leader(tmp_path, 2, print)
    led.stop(0)
    Leader(tmp_path, 2, print).end(0)
    job = share(tmp_path, "a")
    with meeting.take_place(tmp_path, 1), pytest.raises(RecordsError, match="this sweep as machine 1"):
        follower(tmp_path, job).run()
    assert follower(tmp_path, job).run() == 1


def test_a_sign_that_cannot_be_written_for_a_while_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(meeting.time, "monotonic", lambda: now)
    sign = Sign(tmp_path / "1.json")
    sign.show(busy=True)

    def stale(path: Path, value: object) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr(meeting, "write_json", stale)
    for _ in range(3):
        now += 0.5
        sign.beat()
    now += 1.0
    with pytest.raises(OSError, match="stale"):
        sign.beat()


def test_a_machine_whose_runs_are_all_done_does_not_wait(tmp_path: Path) -> None:
    job = share(tmp_path, "a")
    (job.folder.path / "product").write_text("")
    job.folder.set_status("done")
    assert follower(tmp_path, job).run() == 0


def test_the_scheduler_starts_nothing_before_it_may_and_adds_to_the_environment(tmp_path: Path) -> None:
    asked, written = list[bool](), set[int]()

    def ready(job: Job) -> dict[str, str] | None:
        assert (job.folder.path / "launch.json").exists(), "others may read it once they are called"
        written.add((job.folder.path / "launch.json").stat().st_ino)
        asked.append((job.folder.path / "starts.txt").exists())
        return {"OMP_NUM_THREADS": "77"} if len(asked) > 3 else None

    assert Scheduler([fake_job(tmp_path, "a")], [()], ready=ready).run().exit_code == 0
    assert asked == [False] * 4
    assert len(written) == 1, "the file is not replaced while the job waits"
    assert (tmp_path / "a" / "starts.txt").read_text().startswith("77 ")


def test_a_signal_ends_a_scheduler_that_waits_for_machines(tmp_path: Path) -> None:
    scheduler = Scheduler([fake_job(tmp_path, "a")], [()], ready=lambda job: None)

    def interrupt(states: list[JobState]) -> None:
        scheduler._signals.append(time.monotonic())

    scheduler.on_tick = interrupt  # type: ignore[assignment]
    assert scheduler.run().exit_code == 130


def led_scheduler(root: Path, kind: Literal["tokenizer", "run"]) -> tuple[Path, int]:
    """A scheduler that is interrupted at once, as machine 0 of two; the sweep and its exit code."""
    made = planned(root, load_recipe("quickstart", TWO), NODE)
    scheduler = Scheduler([dataclasses.replace(fake_job(root, "a"), kind=kind)], [()])
    scheduler._signals.append(time.monotonic())
    result = commands._lead(made, scheduler, Console(file=io.StringIO()))
    return made.folders.sweep / "machines" / "0.json", result.exit_code


def test_the_others_are_told_the_code_that_machine_0_ends_with(tmp_path: Path) -> None:
    file, code = led_scheduler(tmp_path, "run")
    assert json.loads(file.read_text())["exit_code"] == code == 130


def test_tokenize_sends_nobody_home(tmp_path: Path) -> None:
    file, _ = led_scheduler(tmp_path, "tokenizer")
    assert not file.exists()


# -- plans ---------------------------------------------------------------------------------------

TWO = {("launch", "machines"): 2, ("launch", "main_address"): "first", ("launch", "processes"): 4}


def test_several_machines_change_the_command_and_nothing_that_names_a_run(tmp_path: Path) -> None:
    alone = planned(tmp_path)
    shared = planned(tmp_path, load_recipe("quickstart", TWO), NODE)
    assert [r.run for r in shared.runs] == [r.run for r in alone.runs]
    assert [content_hash(c) for c in shared.configs] == [content_hash(c) for c in alone.configs]
    assert shared.allotment.slots == (("0", "1", "2", "3"),), "one run at a time, on all GPUs of each"
    text = " ".join(shared.jobs[-1].command)
    assert "--num_processes 8 --num_machines 2 --machine_rank 0 --main_process_ip first" in text
    assert "--main_process_port 29500" in text
    for job in shared.jobs[:2]:
        assert "--num_processes 4 --num_machines 1" in " ".join(job.command), "machine 0 alone"


def test_machines_of_one_process_meet_too(tmp_path: Path) -> None:
    launch = LaunchConfig(machines=2, machine_rank=1, main_address="first", main_port=4000)
    text = " ".join(command("run", ["folder"], launch))
    assert "--num_processes 2 --num_machines 2 --machine_rank 1 --main_process_ip first" in text
    assert "--main_process_port 4000" in text
    made = planned(tmp_path)
    stages = [stage_of(job) for job in made.stage_jobs[:1]]
    assert "accelerate" not in " ".join(tokenizer_jobs(made.folders, stages, launch, 1)[0].command)


def test_memory_of_a_process_shrinks_with_its_share_of_the_batch(tmp_path: Path) -> None:
    one = planned(tmp_path)
    two = planned(tmp_path, load_recipe("quickstart", TWO | {("launch", "processes"): 1}), LAPTOP)
    assert two.runs[-1].memory < one.runs[-1].memory


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"machines": 0}, "launch.machines must be at least 1, got 0"),
        ({"machines": 2}, r"launch.main_address .* is needed for 2 machines"),
        ({"machines": 2, "main_address": "x", "machine_rank": 2}, "launch.machine_rank must be 0 to 1"),
        ({"machine_rank": 1}, "launch.machine_rank must be 0 to 0 with 1 machines, got 1"),
        ({"machines": 2, "main_address": "x", "runs_at_once": 2}, "launch.runs_at_once must be 1"),
        ({"main_port": 70000}, "launch.main_port must be 1 to 65535, got 70000"),
    ],
)
def test_machines_that_cannot_meet_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaunchConfig(**values)  # type: ignore[arg-type]
