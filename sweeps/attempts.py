"""One launcher's attempts at one job: whether it gets on, how an attempt ended, and whether another follows.

- The launcher on this machine (``sweeps.scheduler``) and the one inside a Slurm job (``sweeps.slurm_job``)
  look after their jobs by this, so that a run is treated alike wherever it is trained.
- What a job has recorded itself counts. What it could not say (it was killed, was ended for its silence, met
  a full disk, left without its product) is recorded for it.
- A status that an attempt has not touched says nothing about this attempt, and one that cannot be read
  nothing about the job.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scaling.records import RunFolder
from sweeps.patience import Patience, Pulse, Tries

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 3
"""Exit codes of a job: finished; unforeseen error; a cause that a person can remove, told in one line; asked
to leave."""
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_BYTES = 2**16
"""With less room than this a job cannot even say that the disk is full."""
DISK_FULL = "the disk is full: free some space and start again; everything finished so far is kept"
UNREAD_SECONDS = 60.0
"""How long the folder of a job that is to start or has ended may be unreadable until that is a failure."""
TAIL_LINES = 12


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    kind: Literal["done", "interrupted", "elsewhere", "failed"]
    """elsewhere: another process works in the folder."""
    code: int
    """The exit code: the job's own where it recorded one, the negative signal where one killed it."""
    reason: str = ""
    cause: str | None = None
    """Of a failure, in the words of ``docs/failures.md``; None when there is none to name."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """As this attempt has recorded it; state ``silent`` when it recorded nothing."""


@dataclass
class Attempts:
    """Of one job, by this launcher: ``begin``, ``hangs`` while it runs, ``ended``, then ``again`` or not."""

    folder: RunFolder
    product: str
    """What a finished job has left in its folder."""
    aside: tuple[str, ...] = ()
    """How lines of the log begin that are not the job's own."""
    tries: Tries = field(default_factory=Tries)
    hung: float | None = None
    """Seconds of silence after which this attempt was to be ended."""
    _heartbeat: float | None = None
    _before: int = 0
    """Tries that counted before the last failure."""
    _log_start: int = 0
    _pulse: Pulse = field(default_factory=Pulse)

    @property
    def log(self) -> Path:
        """Everything that the job has printed."""
        return self.folder.path / "log.txt"

    def log_tail(self) -> list[str]:
        """The last lines of this attempt."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._log_start)
                text = file.read().decode("utf-8", "replace")
        except OSError:  # none yet, or none that can be read now
            return []
        return [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]

    def begin(self, status: Mapping[str, Any]) -> None:
        """An attempt starts now: what is in the status, as it is read now, and the log is of those before."""
        self._heartbeat = status.get("heartbeat")
        self._before = self.tries.count
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._pulse, self.hung = Pulse(), None

    def hangs(self, patience: Patience) -> bool:
        """Whether the attempt has not got on for too long and is to be ended; told once."""
        if self.hung is not None or not self._pulse.due(patience.hang_seconds):
            return False
        try:
            silence = self._pulse.silent(self.folder.status())
        except OSError:  # which says nothing about the job
            return False
        self.hung = silence if silence > patience.hang_seconds else None
        return self.hung is not None

    def ended(self, code: int, asked: bool) -> End:
        """How the attempt ended, with a leave recorded that the job could not record itself.

        Args:
            code: its exit code, or the negative number of the signal that killed it.
            asked: it was asked to leave.

        Raises:
            OSError: its folder cannot be read; nothing was changed.
        """
        status = self.folder.status()
        fresh = status.get("heartbeat") != self._heartbeat
        recorded = str(status["state"]) if fresh else "silent"
        if recorded == "failed" and "exit_code" in status:
            code = int(status["exit_code"])  # several processes end with their launcher's own code
        if recorded == "done" and (self.folder.path / self.product).exists():
            return End("done", code, status=status)
        while_starting = asked and code in (-signal.SIGTERM, -signal.SIGINT)
        if code == INTERRUPTED or recorded == "interrupted" or while_starting:
            if recorded != "interrupted":
                self._record("interrupted")
            return End("interrupted", code, "was asked to leave", status=status)
        if code == REFUSED and self.folder.busy():
            return End("elsewhere", code)
        return self._failed(code, recorded, status if fresh else {"state": recorded})

    def unread(self, code: int, seconds: float) -> End:
        """Of an attempt whose folder could not be read for so long after it."""
        if code == INTERRUPTED:
            return End("interrupted", code, "was asked to leave")
        return End(
            "failed", code or FAILED, f"its folder could not be read for {seconds:.0f} s after it ended",
            status={"state": "silent"},
        )  # fmt: skip

    def recorded(self, status: Mapping[str, Any]) -> End:
        """Of an attempt that another launcher began and did not live to see fail."""
        self.hung = None
        return self._failed(int(status.get("exit_code", FAILED)), "failed", status)

    def _failed(self, code: int, recorded: str, status: Mapping[str, Any]) -> End:
        cause = str(status["cause"]) if recorded == "failed" and "cause" in status else None
        reason = self._why(code, recorded, status)
        if cause is None and _full(self.folder.path):
            cause, reason, code = "disk", DISK_FULL, REFUSED
        if cause is None:
            cause = "hung" if self.hung else "killed" if code < 0 else None
        return End("failed", code, reason, cause, status)

    def again(self, end: End, patience: Patience) -> float | None:
        """Seconds until another try after a failure, which is recorded then; None if there is to be none."""
        self._before = self.tries.count
        pause = self.tries.pause(end.cause, end.code == REFUSED, end.status, patience)
        if pause is not None and end.cause != "diverged":  # which the next attempt is to find in its status
            self._record("waiting", error=f"{end.reason}; to be tried again")
        return pause

    def give_up(self, end: End) -> str:
        """Record a failure for good, unless the job has; the reason, with how often it was tried."""
        reason, often = end.reason, self.tries.count > max(1, self._before)  # not failures before this one
        if often:
            reason += f" ({self.tries.count} times, no further each time)"
        if end.status.get("state") != "failed" or often:
            more = {} if end.cause is None else {"cause": end.cause}
            self._record("failed", error=reason, exit_code=end.code, **more)
        return reason

    def _record(self, state: str, **more: Any) -> None:
        """For a job that could not say it itself."""
        with contextlib.suppress(OSError):  # a full disk: the reason is printed all the same
            self.folder.set_status(state, **more)

    def _why(self, code: int, recorded: str, status: Mapping[str, Any]) -> str:
        if self.hung is not None:
            return f"made no progress for {self.hung:.0f} s and was ended"
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        if recorded == "failed":
            return str(status.get("error", f"exit code {code}"))
        if code == DONE:
            return f"ended without leaving {self.product}"
        lines = self.log_tail()
        tail = [line for line in lines if not line.startswith(self.aside)] or lines
        return tail[-1] if tail else f"exit code {code}, and nothing in the log"


def _full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:  # the folder was moved away
        return False
