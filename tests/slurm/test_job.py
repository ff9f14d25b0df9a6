"""Inside an allocation: attempts, their ends and what is asked of Slurm then; stand-ins for its commands."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.config import LaunchConfig, to_dict
from scaling.records import RunFolder, read_json, write_json
from sweeps import slurm_branches, slurm_job
from sweeps.attempts import FAILED, INTERRUPTED, REFUSED
from sweeps.patience import Patience
from sweeps.scheduler import Scheduler, claim
from sweeps.slurm_branches import Branches
from sweeps.slurm_job import own_id, seconds_left
from tests.slurm.stand_ins import fake
from tests.sweeps.fake_sweep import HERE, REPOSITORY, fake_job

QUICK = LaunchConfig(retries=2, retry_seconds=0.05)


@pytest.mark.parametrize(
    ("shown", "seconds"),
    [
        ("59", 59),
        ("1:30\n", 90),
        ("2:00:00", 7200),
        ("1-00:00:01", 86401),
        ("UNLIMITED", math.inf),
        ("", None),
        ("1:00\n2:00", None),
    ],
)
def test_the_time_that_is_left(shown: str, seconds: float | None) -> None:
    assert seconds_left(shown) == seconds


def test_the_last_of_an_array_does_not_speak_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "5"), ("ARRAY_JOB_ID", "5"), ("ARRAY_TASK_ID", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert own_id() == "5_4"


@pytest.fixture
def entry(commands: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> slurm_job.Entry:
    """One in an allocation that Slurm has not begun to end; its task does nothing."""
    for name, value in (
        *(("ARRAY_JOB_ID", "5"), ("ARRAY_TASK_ID", "0"), ("JOB_NUM_NODES", "1"), ("CPUS_ON_NODE", "1")),
    ):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    for name, seconds in (("RETRY", 0.01), ("TICK", 0.05), ("REQUEUED", 0.0)):
        monkeypatch.setattr(slurm_job, f"{name}_SECONDS", seconds)
    file = tmp_path / "tiny" / "slurm" / "1-a.json"
    made: dict[str, Any] = {"name": "run", "kind": "run", "folder": "tiny/run", "product": "product"}
    made |= {"arguments": [], "recheck": False, "leaves": False, "trunk": None, "start": 0}
    plan = {"machine": "Slurm", "places": 1, "threads": 1}
    facts = {"leave_seconds": 9, "launch": to_dict(QUICK), "plan": plan}
    write_json(file, {"id": "5", "name": "tiny", "jobs": [made]} | facts)
    RunFolder(tmp_path / "tiny" / "run").set_status("waiting", step=0)
    fake(commands, "scontrol", f"echo $* >> {tmp_path}/asked; echo 'NodeAddr=n1 JobState=RUNNING '")
    fake(commands, "squeue", "echo UNLIMITED")
    fake(commands, "srun", "exit 143")
    return slurm_job.Entry(file)


@pytest.fixture
def keep_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in slurm_job.ASKED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("keep_signals")
def test_a_job_is_not_lost_while_the_controller_is_silent(
    entry: slurm_job.Entry, commands: Path, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    fake(
        commands,
        "scontrol",
        f"echo $* >> {asked}; [ $(wc -l < {asked}) -gt 4 ] || exit 1; echo ' JobState=RUNNING '",
    )
    assert slurm_job.lead(entry) == INTERRUPTED
    assert asked.read_text().splitlines()[-1] == "requeue 5_0"


@pytest.mark.usefixtures("keep_signals")
def test_a_cancelled_job_neither_starts_nor_comes_back(entry: slurm_job.Entry, tmp_path: Path) -> None:
    before = entry.folder.status()
    write_json(entry.file, read_json(entry.file) | {"cancelled": True})
    assert slurm_job._again(entry, before, "asked") == INTERRUPTED
    assert slurm_job.lead(entry) == INTERRUPTED
    assert "requeue" not in (tmp_path / "asked").read_text()
    assert entry.folder.status() == before


@pytest.mark.usefixtures("keep_signals")
def test_what_another_process_works_on_is_left_to_it(
    entry: slurm_job.Entry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_job, "BUSY_SECONDS", 0.05)
    for held in (claim(entry.folder.path / ".launcher"), None):
        with entry.folder.lock() if held is None else contextlib.closing(held):
            entry.folder.set_status("running")
            before = entry.folder.status()
            assert slurm_job.lead(entry) == REFUSED
            assert "waiting for it" in capsys.readouterr().out
            assert entry.folder.status() == before


@pytest.mark.usefixtures("keep_signals")
def test_a_run_that_never_gets_on_fails(entry: slurm_job.Entry) -> None:
    codes = [slurm_job.lead(entry) for _ in range(slurm_job.MOST_FRUITLESS)]
    assert codes == [INTERRUPTED] * (slurm_job.MOST_FRUITLESS - 1) + [FAILED]
    assert "without a step done in between" in entry.folder.status()["error"]


# -- attempts ------------------------------------------------------------------------------------


def srun_is(commands: Path, tmp_path: Path, steps: int, behaviour: str) -> None:
    """srun runs a job that counts, in a session of its own; scancel ends what is in it."""
    words = [sys.executable, HERE / "fake_job.py", tmp_path / "tiny" / "run", steps, behaviour]
    pid = tmp_path / "pid"
    environment = f"export PYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1 VARSCALE_LAUNCHER_PID={os.getpid()}"
    # As in a step, what is killed ends with 128 and the signal's number.
    task = f"echo $$ > {pid}; {' '.join(map(str, words))}; exit $?"
    fake(commands, "srun", f"{environment}\nexec setsid sh -c '{task}'")
    fake(commands, "squeue", 'case "$*" in *--steps*) echo 5_0.batch; echo 5_0.0;; *) echo UNLIMITED;; esac')
    deaf = f"[ -e {tmp_path}/called ] || {{ touch {tmp_path}/called; exit 1; }}"  # the first time
    fake(commands, "scancel", f"{deaf}\n[ \"$*\" = '--signal=KILL 5_0.0' ] && kill -9 -$(cat {pid})")


def told(folder: RunFolder) -> dict[str, Any]:
    """How a job ended and how often it was started, without times."""
    status = {k: v for k, v in folder.status().items() if k not in ("heartbeat", "progress_at")}
    status["error"] = re.sub(r"\d+ s ", "N s ", status.get("error", ""))
    return status | {"starts": len((folder.path / "starts.txt").read_text().splitlines())}


def begun(folder: RunFolder) -> bool:
    return folder.status().get("step") == 1


def when(condition: Callable[[], bool], then: Callable[[], None]) -> Callable[[], None]:
    """For a thread: waits for the one, does the other."""

    def wait() -> None:
        while not condition():
            threading.Event().wait(0.02)
        then()

    return wait


@pytest.mark.usefixtures("keep_signals")
@pytest.mark.parametrize(
    ("behaviour", "code", "starts", "cause"),
    [
        ("", 0, 1, None),
        ("--flaky", 0, 4, None),
        ("--short", 0, 5, None),
        ("--refuse", 2, 1, None),
        ("--fail", 1, 3, None),
        ("--diverge", 1, 1, "diverged"),
        ("--die", 1, 3, "killed"),
        ("--empty", 1, 3, None),
        ("--hang", 1, 1, "hung"),
    ],
)
def test_a_job_is_looked_after_as_on_this_machine(
    entry: slurm_job.Entry,
    commands: Path,
    tmp_path: Path,
    behaviour: str,
    code: int,
    starts: int,
    cause: str | None,
) -> None:
    here = fake_job(tmp_path / "here", "run", 5, behaviour)
    srun_is(commands, tmp_path, 5, behaviour)
    here.folder.set_status("waiting", step=0)  # as the other
    local = Scheduler([here], [()], patience=entry.patience)
    # However slowly it starts, only then is there anything to be silent about.
    hasty = Patience(hang_seconds=0.5)
    if behaviour == "--hang":
        local.on_tick = lambda states: setattr(local, "patience", hasty) if begun(here.folder) else None
        threading.Thread(
            target=when(lambda: begun(entry.folder), lambda: setattr(entry, "patience", hasty))
        ).start()
    assert local.run().exit_code == code
    assert slurm_job.lead(entry) == code
    assert told(entry.folder) == told(here.folder)
    assert (told(here.folder)["starts"], told(here.folder).get("cause")) == (starts, cause)
    assert "requeue" not in (tmp_path / "asked").read_text()
    found = subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout
    assert str(entry.folder.path) not in found


@pytest.mark.usefixtures("keep_signals")
def test_pauses_between_attempts_double(
    entry: slurm_job.Entry, commands: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    srun_is(commands, tmp_path, 5, "--die")
    slurm_job.lead(entry)
    killed = "run: killed by SIGKILL (out of memory?)"
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("run: ")] == [
        *(f"{killed}; tried again in 0.05 s", f"{killed}; tried again in 0.1 s"),
        f"{killed} (3 times, no further each time)",
    ]


@pytest.mark.usefixtures("keep_signals")
def test_a_diverged_run_that_is_queued_all_the_same_is_not_trained_again(
    entry: slurm_job.Entry, commands: Path, tmp_path: Path
) -> None:
    srun_is(commands, tmp_path, 5, "--diverge")
    assert [slurm_job.lead(entry) for _ in range(2)] == [FAILED] * 2
    assert told(entry.folder)["starts"] == 1
    entry.patience = replace(entry.patience, retry_diverged=True)
    assert [slurm_job.lead(entry) for _ in range(2)] == [FAILED] * 2
    assert told(entry.folder)["starts"] == 2
    assert entry.folder.status()["cause"] == "diverged"


@pytest.mark.usefixtures("keep_signals")
def test_a_job_that_is_asked_to_leave_between_two_attempts_does_not_start_again(
    entry: slurm_job.Entry, commands: Path, tmp_path: Path
) -> None:
    entry.patience = replace(entry.patience, retry_seconds=600.0)
    srun_is(commands, tmp_path, 5, "--die")
    asked = threading.Thread(
        target=when(
            lambda: "tried again" in entry.folder.status().get("error", ""),
            lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
    )
    asked.start()
    assert slurm_job.lead(entry) == INTERRUPTED
    asked.join()
    assert told(entry.folder)["starts"] == 1
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 5_0"


# -- branches ------------------------------------------------------------------------------------


@pytest.fixture
def branches(entry: slurm_job.Entry, monkeypatch: pytest.MonkeyPatch, commands: Path) -> Branches:
    """Those of two submissions that wait for the entry's job: 7_0 and 7_1 for steps 3 and 6, and 8_0 for 6
    in a lane."""
    monkeypatch.setattr(slurm_branches, "LOOK_SECONDS", 0.0)
    for number, steps, turn in (("7", (3, 6), ""), ("8", (6,), "singleton")):
        jobs = [{"folder": f"tiny/{number}-{s}", "trunk": "tiny/run", "start": s} for s in steps]
        file = entry.file.with_name(f"{number}-b.json")
        write_json(file, {"id": number, "name": "tiny", "jobs": jobs, "turn": turn})
    queue(commands, "7|0", "7|1", "8|0")
    return Branches(entry.folder, print)


def queue(commands: Path, *waiting: str) -> None:
    """What squeue says: these wait, 5_0 runs, and somebody else's job has the id 9."""
    lines = [f"{job}|PENDING|Dependency|tiny|varscale:{job[0]}-b" for job in waiting]
    fake(
        commands, "squeue", f"cat <<END\n{chr(10).join([*lines, '5|0|RUNNING|None|tiny|varscale:1-a'])}\nEND"
    )


def set_free(tmp_path: Path) -> list[str]:
    asked = tmp_path / "asked"
    lines = asked.read_text().splitlines() if asked.exists() else []
    asked.unlink(missing_ok=True)
    return lines


def test_a_branch_is_set_free_when_its_checkpoint_is_there(branches: Branches, tmp_path: Path) -> None:
    branches.set_free()
    assert set_free(tmp_path) == []
    branches.trunk.branch(3).mkdir(parents=True)
    for expected in (["update JobId=7_0 Dependency="], []):  # once
        branches.set_free()
        assert set_free(tmp_path) == expected
    branches.trunk.branch(6).mkdir()
    branches.set_free()
    assert set_free(tmp_path) == ["update JobId=7_1 Dependency=", "update JobId=8_0 Dependency=singleton"]


def test_what_does_not_wait_any_more_is_let_be(branches: Branches, commands: Path, tmp_path: Path) -> None:
    """After a trunk was queued again, say; also where somebody else's job has the id of a branch."""
    for step in (3, 6):
        branches.trunk.branch(step).mkdir(parents=True)
    file = branches.trunk.path.parent / "slurm" / "8-b.json"
    write_json(file, read_json(file) | {"name": "other"})
    fake(
        commands, "squeue", "echo '7|0|RUNNING|None|tiny|varscale:7-b'; echo '8|0|PENDING|None|x|varscale:x'"
    )
    branches.set_free()
    assert set_free(tmp_path) == []


def test_while_slurm_is_silent_branches_go_on_waiting(
    branches: Branches, commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    branches.trunk.branch(3).mkdir(parents=True)
    fake(commands, "squeue", "echo 'error: Unable to contact slurm controller' >&2; exit 1")
    branches.set_free()
    assert "its branches still wait: Slurm does not answer" in capsys.readouterr().out
    queue(commands, "7|0")
    fake(commands, "scontrol", f"echo refused >> {tmp_path}/asked; exit 1")
    for _ in range(2):
        branches.set_free()
        assert set_free(tmp_path) == ["refused"]
    fake(commands, "scontrol", f"echo $* >> {tmp_path}/asked")
    branches.set_free()
    assert set_free(tmp_path) == ["update JobId=7_0 Dependency="]


@pytest.mark.usefixtures("keep_signals")
def test_a_trunk_that_fails_sets_free_what_can_start_before_it_ends(
    entry: slurm_job.Entry, branches: Branches, commands: Path, tmp_path: Path
) -> None:
    entry.job["leaves"] = True
    branch = entry.folder.branch(3)
    fake(commands, "srun", f"mkdir -p {branch}; exit 1")
    entry.patience = Patience()
    assert slurm_job.lead(entry) == FAILED
    assert "update JobId=7_0 Dependency=" in set_free(tmp_path)
