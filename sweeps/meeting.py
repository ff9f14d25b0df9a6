"""How the launchers of several machines agree on what runs next, through files on the shared root.

- Machine 0 leads. It has the scheduler, the locks, the records and the report, trains the tokenizer and
  caches the tokens alone, and then calls the runs one after another. The others follow: each starts its
  share of the processes of the run that was called; Accelerate's rendezvous makes the processes meet.
- One small file per machine in ``<sweep>/machines``, written by that machine alone and replaced atomically.
  A beat in it counts up about every second. Clocks of machines differ, so no time is compared: a machine
  is alive when its beat was *seen to change* lately, by the reader's own clock. A file that a dead launcher
  left behind never changes and is never believed.
- A turn is called only when every follower is there and has nothing running. A follower that joins late
  (it was started again) takes part in the turn that is open.
- Each machine's place is locked for as long as its launcher lives: a second one on the same machine (a second
  leader would seem to close the first one's turn) is refused.
- A follower knows its runs from its own plan and takes nothing but a folder's name from the file.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from scaling.records import RecordsError, read_json, write_json
from sweeps.jobs import Job, kill
from sweeps.scheduler import claim

FOLDER = "machines"
BEAT_SECONDS = 1.0
ALIVE_SECONDS = 15.0
"""A beat older than this is taken for a machine that is not there (yet)."""
SILENT_SECONDS = 300.0
"""A follower that has heard nothing from machine 0 for this long gives up. File systems may show a file's
change to another machine as late as a minute after."""
GRACE_SECONDS = 60.0
"""How long processes may take to leave by themselves once their turn is over."""
KILL_SECONDS = 40.0
"""From SIGTERM to SIGKILL. torchrun itself kills what has not left 30 seconds after its own SIGTERM."""
TICK_SECONDS = 0.5


@dataclass
class Sign:
    """This machine's file, and how it is kept fresh."""

    file: Path
    facts: dict[str, Any] = field(default_factory=dict)
    _beat: int = 0
    _tried: float = 0.0
    _written: float = field(default_factory=time.monotonic)

    def show(self, **facts: Any) -> None:
        """Write these facts now."""
        self.facts = facts
        self._beat += 1
        self._tried = time.monotonic()
        write_json(self.file, self.facts | {"beat": self._beat})
        self._written = time.monotonic()

    def beat(self) -> None:
        """Write again when it is time to.

        Raises:
            OSError: it could not be written for as long as the other machines would believe it.
        """
        if time.monotonic() - self._tried >= BEAT_SECONDS:
            try:
                self.show(**self.facts)
            except OSError:
                if time.monotonic() - self._written > SILENT_SECONDS:
                    raise


@dataclass
class Watch:
    """Another machine's file, and when its beat was last seen to change."""

    file: Path
    facts: dict[str, Any] = field(default_factory=dict)
    _changed: float | None = None

    def look(self) -> None:
        """Read it; a file that is not there yet, or that a file system is just replacing, is no sign."""
        try:
            found = read_json(self.file)
        except (RecordsError, OSError):
            return
        if self.facts and found != self.facts:
            self._changed = time.monotonic()
        self.facts = found

    @property
    def silent(self) -> float | None:
        """Seconds since the last change; None when none was seen yet."""
        return None if self._changed is None else time.monotonic() - self._changed

    @property
    def alive(self) -> bool:
        """Whether it changed lately."""
        return self.silent is not None and self.silent < ALIVE_SECONDS


class Leader:
    """Machine 0's part: ``ready`` before each run, ``tick`` all the time, ``end`` once.

    Raises:
        RecordsError: another launcher leads this sweep.
    """

    def __init__(self, sweep: Path, machines: int, say: Callable[[str], None]) -> None:
        self._place = take_place(sweep, 0)
        self._session = uuid.uuid4().hex
        self._turn, self._run = 0, ""
        self._sign = Sign(sweep / FOLDER / "0.json")
        self._others = {r: Watch(sweep / FOLDER / f"{r}.json") for r in range(1, machines)}
        self._say = say
        self._asked_for: list[int] = []
        self._show()

    def ready(self, job: Job) -> dict[str, str] | None:
        """Calls the run when every other machine is there and free; what its environment needs then.

        Returns:
            None while machines are missing.
        """
        if job.kind != "run":
            return {}
        absent = [
            rank
            for rank, other in self._others.items()
            if not (other.alive and other.facts["leader"] == self._session and not other.facts["busy"])
        ]
        if absent and absent != self._asked_for:
            self._say(
                f"waiting for machine {', '.join(map(str, absent))} before {job.name}: "
                "start the same command there (again, if it has ended), or stop here with Ctrl-C"
            )
        self._asked_for = absent
        if absent:
            return None
        self._turn, self._run = self._turn + 1, job.folder.name
        self._show()
        return meeting_place(self._session, self._turn)

    def tick(self, running: bool) -> None:
        """Show that this machine is alive, close the turn when its run has ended, look at the others."""
        if self._run and not running:
            self._run = ""
            self._sign.facts = self._facts
        self._sign.beat()
        for other in self._others.values():
            other.look()

    def end(self, exit_code: int) -> None:
        """Send the others home."""
        self._run = ""
        with (
            self._place,
            contextlib.suppress(OSError),
        ):  # then they hear nothing more
            self._show(exit_code=exit_code)

    @property
    def _facts(self) -> dict[str, Any]:
        return {"session": self._session, "turn": self._turn, "run": self._run}

    def _show(self, **more: Any) -> None:
        self._sign.show(**self._facts, **more)


class Follower:
    """Another machine's part: ``run`` starts this machine's share of every run that machine 0 calls.

    Args:
        jobs: the runs of this machine's own plan.
        devices: GPUs of this machine for its processes; empty on the CPU.
        say: tells a person what happens.
    """

    def __init__(
        self, sweep: Path, rank: int, jobs: Sequence[Job], devices: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self._rank, self._devices = rank, devices
        self._say = lambda text: say(f"machine {rank}: {text}")
        self._jobs = {job.folder.name: job for job in jobs}
        self._sign = Sign(sweep / FOLDER / f"{rank}.json")
        self._leader = Watch(sweep / FOLDER / "0.json")
        self._joined: tuple[str, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._over: float | None = None
        self._asked: float | None = None
        self._signals: list[int] = []

    def run(self) -> int:
        """Follow until machine 0 ends; its exit code, 130 after a signal, 1 when it is not heard of any more.

        SIGINT, SIGTERM and SIGHUP ask the processes here to leave; they agree with those elsewhere, so that
        the whole run is checkpointed and stops.

        Raises:
            RecordsError: machine 0 has called a run that is not in this machine's plan; another launcher
                follows as this machine.
        """
        with take_place(self._sign.file.parent.parent, self._rank), self._handlers():
            began = time.monotonic()
            self._say("waiting for machine 0 to call a run")
            try:
                while True:
                    self._leader.look()
                    if self._process is not None:
                        self._mind()
                    elif self._signals:
                        return 130
                    elif all(job.state == "done" for job in self._jobs.values()):
                        return 0
                    elif self._leader.silent is not None and "exit_code" in self._leader.facts:
                        return int(self._leader.facts["exit_code"])
                    elif self._leader.alive and self._leader.facts["run"] and self._turn != self._joined:
                        self._join(str(self._leader.facts["run"]))
                    elif self._unheard(began):
                        self._say(f"no sign of machine 0 in {self._sign.file.parent} any more")
                        return 1
                    self._sign.facts = {
                        "leader": self._leader.facts.get("session"),
                        "busy": self._process is not None,
                    }
                    self._sign.beat()
                    time.sleep(TICK_SECONDS)
            finally:
                if self._process is not None:
                    self._end_now(self._process)

    @property
    def _turn(self) -> tuple[str, int]:
        return str(self._leader.facts["session"]), int(self._leader.facts["turn"])

    def _unheard(self, since: float) -> bool:
        silent = self._leader.silent
        return (time.monotonic() - since if silent is None else silent) > SILENT_SECONDS

    def _join(self, run: str) -> None:
        job = self._jobs.get(run)
        if job is None:
            raise RecordsError(
                f"machine 0 has called {run}, which is not in the plan of machine {self._rank}; "
                "start the same command with the same recipe on every machine"
            )
        self._joined = self._turn
        environment = os.environ | job.environment | meeting_place(*self._joined)
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices)
        with (job.folder.path / f"log-machine{self._rank}.txt").open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(job.command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._over = self._asked = None
        self._say(f"joins {run}")

    def _mind(self) -> None:
        """Collect the processes here, or make them leave: when asked to, or when their turn is over."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            self._say("its part has ended" + ("" if code == 0 else f" (exit code {code})"))
            self._process = None
            return
        lost = self._leader.silent is None or self._leader.silent > SILENT_SECONDS
        closed = self._turn != self._joined or not self._leader.facts["run"]
        now = time.monotonic()
        if not (lost or closed):
            self._over = None
        elif self._over is None:
            self._over = now
        if self._asked is not None:
            if now - self._asked > KILL_SECONDS:
                kill(self._process)
        elif self._signals or (self._over is not None and now - self._over > GRACE_SECONDS):
            self._asked = now
            ask_to_leave(self._process)

    def _end_now(self, process: subprocess.Popen[bytes]) -> None:
        if self._asked is None:
            ask_to_leave(process)
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            kill(process)
            process.wait()

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {n: signal.signal(n, lambda number, frame: self._signals.append(number)) for n in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def take_place(sweep: Path, rank: int) -> IO[str]:
    """This machine's place among the machines of a sweep, until it is closed or the process ends.

    Raises:
        RecordsError: another launcher has it.
    """
    place = claim(sweep / FOLDER / f".{rank}")
    if place is None:
        raise RecordsError(
            f"{sweep}: another launcher runs this sweep as machine {rank}; let it end, or give every machine "
            "its own --launch.machine-rank"
        )
    return place


def ask_to_leave(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the processes of a job, which torchrun passes on to its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def meeting_place(session: str, turn: int) -> dict[str, str]:
    """The name of a turn's rendezvous (torchrun's option ``--rdzv_id``, for which Accelerate has none): the
    processes of an earlier turn that are still leaving cannot get into this one."""
    return {"PET_RDZV_ID": f"{session}-{turn}"}
