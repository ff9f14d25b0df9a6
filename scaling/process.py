"""The plumbing that every job shares: tokenizer training, token encoding, transformer training.

    def main() -> None:
        with JobProcess(folder, is_main=accelerator.is_main_process) as job:
            for step in range(start, total):
                ...
                job.beat(step=step + 1, total_steps=total, images_per_second=speed)
                if job.should_stop():
                    save_checkpoint(...)
                    raise Interrupted

    if __name__ == "__main__":
        sys.exit(run_job(main))

- A signal only sets a flag; the job looks at it where its state is whole, checkpoints and raises
  ``Interrupted``. A signal more than three seconds later ends the process at once; sooner ones are
  the same Ctrl-C, which reaches a process from the terminal, the launcher and the scheduler.
- ``beat`` only remembers; one thread writes ``status.json`` about once a second, so that a training
  step never waits for the disk and the heartbeat goes on through a long batch.
- The same thread watches the launcher (``VARSCALE_LAUNCHER_PID``): a job whose launcher was killed
  leaves as if it had been asked to, instead of holding the machine; one that stands still then ends itself,
  after the silence after which its launcher would have.
- A thread also beats while the work itself stands still, in a collective that a dead peer never joins, say.
  So the status says too when the job last called ``beat`` or ``should_stop`` (``progress_at``), which is what
  the scheduler looks at; a job that is about to be ended for its silence prints where its threads stand.
- ``should_stop`` is what *this* process knows. Processes that share a batch must agree on the step at
  which they leave (``scaling.agreement``), or one waits for the others for ever.
- No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar

from scaling.records import RecordsError, RunFolder
from scaling.schema import ConfigError

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 3
"""Exit codes: finished; unforeseen error; a cause the user can remove, told in one line; asked to leave."""

LAUNCHER = "VARSCALE_LAUNCHER_PID"
"""Environment variable with the process id of the launcher, set by the scheduler."""

HANG = "VARSCALE_HANG_SECONDS"
"""Environment variable with the silence after which the scheduler ends the job, or, once that is gone, the
job itself."""
DUMP_SHARE = 0.8
"""Of that silence, after which the job prints where its threads stand."""

BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 3.0
IDLE_SECONDS = 4.0
"""Longest silence of the heartbeat while nothing new was reported."""


class Interrupted(Exception):  # noqa: N818 - leaving when asked is no error
    """The job was asked to leave and has saved what it needs to go on."""


class DivergedError(RuntimeError):
    """The loss is no number any more, or far above what knowing nothing costs: nothing to be fitted."""

    cause: ClassVar[str] = "diverged"


class MemoryShortError(RuntimeError):
    """Memory ran out where the step cannot be taken back; started again, smaller micro-batches are used."""

    cause: ClassVar[str] = "memory"


class JobProcess:
    """One process of a job in its run folder: status, heartbeat, lock and the wish to leave.

    On entry the main process takes the folder's lock and sets status ``running`` with ``attempt`` + 1; a
    failure to meet the others is recorded like any later one.
    On exit the status becomes ``done``, ``interrupted`` (after ``Interrupted`` or Ctrl-C) or ``failed``
    with ``error``, one line. Other processes record their failure only, in a file that the main process
    does not write; only the first failure counts, since the others follow from it.

    Args:
        folder: of the job.
        is_main: whether this process has the lock and the status.
        wait: for several processes, returns when all of them have called it. The others enter after the
            main one, which would take a failure of theirs for one of the attempt before.

    Raises:
        FolderBusyError: (on entry) another process works in the folder; its status is left alone.
    """

    def __init__(
        self, folder: RunFolder, is_main: bool = True, wait: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = folder
        self.is_main = is_main
        self._wait = wait
        self._facts: dict[str, Any] = {}
        self._changed = False
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._asked: float | None = None
        self._moved = time.time()
        self._still, self._shown = time.monotonic(), False
        self._ended = threading.Event()
        self._thread_error: BaseException | None = None
        self._stack = contextlib.ExitStack()
        self.after_divergence = False
        """(main process) Whether the run diverged and no attempt has gone back since; one that has says
        ``beat(go_back=False)``."""

    # -- what a job calls ----------------------------------------------------------------------

    def should_stop(self) -> bool:
        """Whether this process was asked to leave (SIGTERM, SIGINT) or lost its launcher."""
        self._raise_thread_error()
        self._move()
        return self._stop.is_set()

    def beat(self, **facts: Any) -> None:
        """Report progress: ``step``, ``total_steps``, ``images_per_second``, ``loss``; cheap, at any rate."""
        self._raise_thread_error()
        self._move()
        # Without the guard, which is held while the disk is written: a step must not wait for that.
        self._facts = self._facts | facts
        self._changed = True

    def _move(self) -> None:
        self._moved, self._still, self._shown = time.time(), time.monotonic(), False

    # -- entry and exit ------------------------------------------------------------------------

    def __enter__(self) -> JobProcess:
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.signal(number, self._on_signal)
                stack.callback(signal.signal, number, previous)
            if self.is_main:
                stack.enter_context(self.folder.lock())
                self._begin()
            try:
                self._wait()
            except Exception as error:
                self._fail(error)
                raise
            thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(self._ended.set)
            self._stack = stack.pop_all()
        return self

    def _begin(self) -> None:
        before = self.folder.status()
        self.folder.set_status("running", attempt=before.get("attempt", 0) + 1, progress_at=self._moved)
        self.after_divergence = bool(self.folder.status().get("go_back", False))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The thread ends first (last in, first out) but the lock must outlive the last status.
        self._ended.set()
        try:
            if error is None:
                self._finish("done")
            elif isinstance(error, Interrupted | KeyboardInterrupt):
                self._finish("interrupted")
            else:
                self._fail(error)
        finally:
            self._stack.close()

    def _finish(self, state: str) -> None:
        if self.is_main:
            with self._guard:
                if not self._failed():
                    self.folder.update_status(state, **self._facts)

    def _fail(self, error: BaseException) -> None:
        with self._guard:
            try:
                self.folder.fail(one_line(error), exit_code(error), cause_of(error))
                if self.is_main:
                    self.folder.update_status("failed", **self._facts)
            except OSError as problem:
                if not disk_full(problem):  # of a full disk the one line on stderr tells already
                    print(f"{self.folder.path}: could not record the failure ({problem})", file=sys.stderr)

    def _failed(self) -> bool:
        """Whether a process of this job has failed: then there is nothing more to say about its state."""
        return bool(self.folder.status()["state"] == "failed")

    # -- the thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        launcher = int(os.environ.get(LAUNCHER, 0))
        born, orphan = _birth(launcher), False
        silent, limit = 0.0, float(os.environ.get(HANG, "inf"))
        while not self._ended.wait(BEAT_SECONDS):
            if launcher and not orphan and not (alive(launcher) and _birth(launcher) == born):
                orphan = True
                self._stop.set()
            silent += BEAT_SECONDS
            quiet = time.monotonic() - self._still
            if quiet >= DUMP_SHARE * limit and not self._shown:
                self._shown = True
                with contextlib.suppress(OSError, ValueError):  # a full disk, or no real stderr
                    print(f"no progress for {quiet:.0f} s; the threads stand here:", file=sys.stderr)
                    faulthandler.dump_traceback(all_threads=True)
            if orphan and quiet >= limit:
                self._end_now(quiet)
            try:
                with self._guard:
                    if not self.is_main or self._ended.is_set() or self._thread_error is not None:
                        continue
                    if (self._changed or silent >= IDLE_SECONDS) and not self._failed():
                        # First: what changes during the write is for the next one.
                        self._changed, silent = False, 0.0
                        self.folder.update_status("running", **self._facts, progress_at=self._moved)
            except (OSError, RecordsError) as error:
                self._thread_error = error

    def _end_now(self, quiet: float) -> None:
        """In place of the launcher that is gone; the main thread will never look at its flag."""
        with contextlib.suppress(OSError, RecordsError):  # without the guard: the main thread may hold it
            error = f"made no progress for {quiet:.0f} s, its launcher gone, and ended itself"
            self.folder.fail(error, FAILED, "hung")
        os._exit(FAILED)

    def _raise_thread_error(self) -> None:
        if self._thread_error is not None:
            raise self._thread_error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        if self._asked is None:
            self._asked = time.monotonic()
        elif time.monotonic() - self._asked > PATIENCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not yet collected by its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # no /proc on this system
        return True


def _birth(pid: int) -> str | None:
    """When a process began, in ticks since the system's start: an id may be another process's by now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # gone, or no /proc on this system
        return None


def disk_full(error: BaseException) -> bool:
    """Whether the error says that no more can be written (no space, or over quota)."""
    if isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"(os error {errno.ENOSPC})" in str(error)  # how safetensors tells it


def one_line(error: BaseException) -> str:
    """What went wrong, for a status file or a terminal: never more than one line."""
    if disk_full(error):
        error = error.__cause__ if isinstance(error.__cause__, OSError) else error
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"the disk is full{where}: free some space and start again; everything finished so far is kept"
    # Names from tables and folders may hold anything, escape sequences of a terminal too.
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    if isinstance(error, ConfigError | RecordsError | DivergedError | MemoryShortError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def exit_code(error: BaseException) -> int:
    """``REFUSED`` for what a person can remove, else ``FAILED``: then another try may end otherwise."""
    if disk_full(error):
        return REFUSED
    # Records that the system could not read or write just now are not wrong.
    refused = isinstance(error, ConfigError | RecordsError) and not isinstance(error.__cause__, OSError)
    return REFUSED if refused else FAILED


def cause_of(error: BaseException) -> str:
    """The failure for a machine: ``diverged``, ``memory``, ``disk``, ``refused`` or ``error``.

    The scheduler adds ``killed`` and ``hung``, of which a job cannot tell while its launcher lives.
    """
    if isinstance(error, DivergedError | MemoryShortError):
        return error.cause
    if disk_full(error):
        return "disk"
    return "refused" if exit_code(error) == REFUSED else "error"


@contextlib.contextmanager
def recorded_failure(folder: RunFolder) -> Iterator[None]:
    """Write into ``status.json`` what goes wrong before ``JobProcess`` is entered, and what it means.

    The exit code of a job that several processes share is their launcher's own, and its output ends with
    that launcher's summary, so the reason must not be looked for there.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(
            OSError, RecordsError
        ):  # a full disk, or no folder: stderr has it all the same
            folder.set_status(
                "failed", error=one_line(error), exit_code=exit_code(error), cause=cause_of(error)
            )
        raise


def run_job(main: Callable[[], None]) -> int:
    """Run ``main`` and turn how it ended into the exit code, for ``sys.exit``.

    One line on stderr for what has a name (``ConfigError``, ``RecordsError``, a full disk, a loss that
    diverged); the traceback, also on stderr, for anything unforeseen.
    """
    try:
        main()
    except (Interrupted, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        with contextlib.suppress(OSError):  # stderr is a file, perhaps on the disk that is full
            if cause_of(error) == "error":
                traceback.print_exc()
            else:
                print(one_line(error), file=sys.stderr)
        return exit_code(error)
    return DONE
