"""Runs jobs to their end: several at once, in order of need and weight, through kills and restarts.

- Each job is a process in a session of its own, so that a Ctrl-C at the terminal reaches the launcher
  alone, which passes on SIGTERM and waits for the checkpoints. A second Ctrl-C, at least three seconds
  later, kills.
- Nothing is kept in memory that matters: a launcher that was killed is replaced by starting the same
  command. Its orphans notice that it is gone and leave; the new launcher waits for their locks.
- Two locks. The job itself holds its folder's lock while it works. The launcher holds ``.launcher`` beside
  it from before the start until after the end, so that two launchers never start the same job and never
  probe a lock that a job is about to take.
- A job that fails takes down only what needs it; the others go on. It is started again where that may help
  (``sweeps.patience``), after a pause; a silent one is ended first. A branch needs a checkpoint of its trunk,
  which may fail or go on once it has left that.
- A job that is ``alone`` (tokenizers and token caches, which use every core) goes before all others and
  beside none. While it waits for those that run, only what is expected to end before them is started.
- What cannot be written (a full disk) or read (a shared file system that stumbles) fails the job concerned,
  which may be tried again, and never the launcher. A job that has ended is left for a while until its folder
  can be read again, since what it has done would be told wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from scaling.records import write_json
from sweeps.attempts import DISK_FULL, FAILED, FULL, REFUSED, UNREAD_SECONDS, Attempts, End
from sweeps.jobs import HANG, Job, kill
from sweeps.patience import Patience

Phase = Literal["waiting", "running", "elsewhere", "done", "failed", "interrupted", "blocked"]
ENDED = ("done", "failed", "interrupted", "blocked")
TICK_SECONDS = 0.1
SAME_SIGNAL_SECONDS = 3.0


@dataclass
class JobState:
    """Where one job stands, for the scheduler and for the display."""

    job: Job
    phase: Phase = "waiting"
    reason: str = ""
    """Why it failed, in one line."""
    code: int | None = None
    started: float | None = None
    """Unix time of the start by this launcher."""
    seconds: float = 0.0
    """From start to end, once it has ended."""
    checks: bool = False
    """Was done before this launcher: it is started to look through what is there."""
    from_scratch: bool = False
    """Started by this launcher with nothing done before."""
    slot: int | None = None
    process: subprocess.Popen[bytes] | None = None
    unread: float | None = None
    """Since when, by the monotonic clock, its folder could not be read when something hung on it."""
    not_before: float = 0.0
    """Of the next try, by the monotonic clock."""
    claim: IO[str] | None = None
    orphan: bool = False
    """While it is elsewhere: no launcher has it, which would try it again."""
    prepared: bool = False
    """Whether ``launch.json`` was written: once, however long the job then waits for other machines."""
    attempts: Attempts = field(init=False)

    def __post_init__(self) -> None:
        self.attempts = Attempts(self.job.folder, self.job.product)

    @property
    def log(self) -> Path:
        """Everything that the job has printed."""
        return self.attempts.log

    def log_tail(self) -> list[str]:
        """The last lines of its last attempt."""
        return self.attempts.log_tail()


@dataclass(frozen=True)
class Result:
    """How a launch ended."""

    states: tuple[JobState, ...]
    interrupted: bool

    @property
    def failed(self) -> list[JobState]:
        """The jobs that failed or left early, but not those that only waited for them."""
        return [s for s in self.states if s.phase in ("failed", "interrupted")]

    @property
    def missing(self) -> list[JobState]:
        """All jobs that are not done."""
        return [s for s in self.states if s.phase != "done"]

    @property
    def started(self) -> int:
        """Jobs that this launcher started."""
        return sum(s.started is not None for s in self.states)

    @property
    def exit_code(self) -> int:
        """0 all done; 130 stopped by a signal; 2 when every failure was a plain refusal; else 1."""
        if self.interrupted:
            return 130
        if not self.missing:
            return 0
        return REFUSED if self.failed and all(s.code == REFUSED for s in self.failed) else 1


@dataclass
class Scheduler:
    """Runs ``jobs`` on ``slots``; ``run`` returns when nothing is left that could be done."""

    jobs: Sequence[Job]
    slots: Sequence[tuple[str, ...]]
    """The GPUs of each place where a job can run; empty tuples on the CPU."""
    on_tick: Callable[[Sequence[JobState]], None] = lambda states: None
    on_done: Callable[[JobState], None] = lambda state: None
    ready: Callable[[Job], dict[str, str] | None] = lambda job: {}
    """Asked right before a start: what the environment needs besides, or None for not yet."""
    patience: Patience = field(default_factory=Patience)
    """With jobs that fail or fall silent."""
    states: list[JobState] = field(init=False)
    _signals: list[float] = field(init=False, default_factory=list)
    _stopping: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.states = [
            JobState(job, "done" if done and not job.recheck else "waiting", checks=done)
            for job, done in ((job, job.state == "done") for job in self.jobs)
        ]

    def run(self) -> Result:
        """Start, watch and collect until the end.

        SIGINT, SIGTERM and SIGHUP stop the launch: running jobs checkpoint and leave first.
        """
        with self._handlers():
            try:
                while True:
                    self._reap()
                    if self._signals:
                        self._stop()
                    else:
                        self._start_what_can()
                    self.on_tick(self.states)
                    busy = any(s.process for s in self.states)
                    if not busy and (self._signals or all(s.phase in ENDED for s in self.states)):
                        return Result(tuple(self.states), bool(self._signals))
                    time.sleep(TICK_SECONDS)
            finally:
                self._leave_nothing_behind()

    # -- starting ------------------------------------------------------------------------------

    def _start_what_can(self) -> None:
        phases = {s.job.folder.path: s.phase for s in self.states}
        held = False
        for state in sorted(self.states, key=lambda s: (not s.job.alone, -s.job.weight - s.job.behind)):
            if state.phase not in ("waiting", "elsewhere") or state.not_before > time.monotonic():
                continue
            if held and state.job.weight > self._longest_left():
                continue
            try:
                held |= self._start_if_ready(state, phases)
                state.unread = None
            except OSError as error:  # a launcher that cannot look into a folder goes on with the other jobs
                if error.errno in FULL or self._unreadable(state):
                    self._not_started(state, error)

    def _start_if_ready(self, state: JobState, phases: Mapping[Path, Phase]) -> bool:
        """As ``_start_if_free``, once all that it needs is done."""
        needs = [phases.get(path, "done") for path in state.job.needs]
        trunk = state.job.lacks
        if trunk is not None:
            needs.append(phases.get(trunk.path, "done"))
        if any(phase in ENDED and phase != "done" for phase in needs):
            if trunk is not None and needs[-1] in ENDED:
                state.reason = f"needs step {state.job.start} of {trunk.name}, which is {needs[-1]}"
            self._end(state, "blocked")
            return False
        return all(phase == "done" for phase in needs) and self._start_if_free(state)

    def _start_if_free(self, state: JobState) -> bool:
        """Start the job unless all places are taken or another process works on it; whether it waits, as one
        that needs the machine for itself, for those that run."""
        recorded = state.job.state
        if recorded == "done" and not state.job.recheck:
            self._end(state, "done")
            return False
        running = [s for s in self.states if s.process is not None]
        free = [i for i in range(len(self.slots)) if i not in {s.slot for s in running}]
        if not free or any(s.job.alone for s in running):
            return False
        status = state.job.folder.status()
        if state.claim is None:
            state.claim = claim(state.job.folder.path / ".launcher")
        elsewhere = state.phase == "elsewhere"
        if state.claim is None or state.job.folder.busy():
            state.phase, state.orphan = "elsewhere", state.claim is not None
        elif self.patience.given_up(status) or (elsewhere and not state.orphan and recorded == "failed"):
            state.reason = str(status.get("error", "failed under another launcher"))
            state.code = int(status.get("exit_code", 1))
            self._end(state, "failed")
        elif elsewhere and recorded == "failed":
            self._failed(state, state.attempts.recorded(status))
        elif state.job.alone and running:
            return True
        else:
            try:
                self._start(state, min(free, key=self._crowd), status)
            except OSError as error:
                self._not_started(state, error)
        return False

    def _crowd(self, place: int) -> int:
        """How many running jobs have a device of this place."""
        mine = set(self.slots[place])
        return sum(not mine.isdisjoint(self.slots[s.slot]) for s in self.states if s.slot is not None)

    def _not_started(self, state: JobState, error: OSError) -> None:
        full = error.errno in FULL
        reason = DISK_FULL if full else f"could not be started: {error}"
        self._failed(state, End("failed", REFUSED if full else FAILED, reason))

    @staticmethod
    def _unreadable(state: JobState) -> bool:
        """Whether the job's folder, which cannot be read now, could not for too long."""
        now = time.monotonic()
        state.unread = state.unread or now
        return now - state.unread >= UNREAD_SECONDS

    def _longest_left(self) -> float:
        """The most FLOPs that a running job has still to do."""
        return max((_left(s.job) for s in self.states if s.process is not None), default=0.0)

    def _start(self, state: JobState, slot: int, status: Mapping[str, Any]) -> None:
        job = state.job
        if not state.prepared:
            write_json(job.folder.path / "launch.json", job.launch)  # before other machines are called
            state.prepared = True
        more = self.ready(job)
        if more is None:
            return
        environment = os.environ | job.environment | more | {HANG: str(self.patience.hang_seconds)}
        if self.slots[slot]:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.slots[slot])
        state.from_scratch = status.get("attempt", 0) == 0
        with state.log.open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(job.command)}\n".encode())
            log.flush()
            state.attempts.begin(status)
            state.process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        state.slot, state.phase, state.started = slot, "running", time.time()
        state.unread = None

    # -- ending --------------------------------------------------------------------------------

    def _reap(self) -> None:
        for state in self.states:
            if state.process is None:
                continue
            if state.process.poll() is not None:
                self._collect(state, state.process.returncode)
            elif state.attempts.hangs(self.patience):
                kill(state.process)

    def _collect(self, state: JobState, code: int) -> None:
        try:
            end = state.attempts.ended(code, self._stopping)
        except OSError:
            if not self._unreadable(state):
                return
            end = state.attempts.unread(code, UNREAD_SECONDS)
        state.unread = None
        state.seconds = time.time() - (state.started or time.time())
        state.process, state.slot = None, None
        state.code, state.reason = end.code, end.reason
        if end.kind == "elsewhere":
            state.phase, state.orphan = "elsewhere", True  # the claim is ours: no other launcher has it
        elif end.kind == "failed":
            self._failed(state, end)
        else:
            self._end(state, end.kind)
        if end.kind == "done":
            self.on_done(state)

    def _failed(self, state: JobState, end: End) -> None:
        """Mark it failed, or to be tried again."""
        state.code, state.reason = end.code, end.reason
        if not self._again(state, end):
            state.reason = state.attempts.give_up(end)
            self._end(state, "failed")

    def _again(self, state: JobState, end: End) -> bool:
        """Let it wait for another try after a failure; False when there is to be none."""
        pause = None if self._stopping else state.attempts.again(end, self.patience)
        if pause is not None:
            state.not_before, state.phase, state.unread = time.monotonic() + pause, "waiting", None
        return pause is not None

    def _end(self, state: JobState, phase: Phase) -> None:
        state.phase = phase
        if state.claim is not None:
            state.claim.close()
            state.claim = None

    # -- leaving -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        def remember(number: int, frame: FrameType | None) -> None:
            self._signals.append(time.monotonic())

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, remember) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        """Ask once; a signal clearly later than the first one (no echo of it) kills."""
        if self._signals[-1] - self._signals[0] > SAME_SIGNAL_SECONDS:
            for state in self.states:
                if state.process is not None and state.process.poll() is None:
                    kill(state.process)
        elif not self._stopping:
            self._ask_all_to_leave()
        self._stopping = True

    def _ask_all_to_leave(self) -> None:
        for state in self.states:
            if state.process is not None and state.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(state.process.pid, signal.SIGTERM)

    def _leave_nothing_behind(self) -> None:
        self._ask_all_to_leave()
        for state in self.states:
            if state.process is not None:
                state.process.wait()
            if state.claim is not None:
                state.claim.close()


def _left(job: Job) -> float:
    """FLOPs that it has still to do, as far as its status says."""
    try:
        status = job.folder.status()
    except OSError:
        return job.weight
    total = status.get("total_steps")
    if not total or total <= job.start:
        return job.weight
    # Its weight is of the steps after those that its trunk did.
    return job.weight * min(1.0, (total - status.get("step", 0)) / (total - job.start))


def claim(file: Path) -> IO[str] | None:
    """An open, locked file, or None when another launcher has it; the system frees it on any death."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = file.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle
