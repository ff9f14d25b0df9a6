"""One display for a whole sweep: a live table on a terminal, a line every 15 seconds elsewhere.

- Everything shown is read from the jobs' ``status.json``; the display holds no state that a job needs.
- Time left is from the speed of the last minute, not since the start: a machine may slow down. For jobs that
  wait it is what the plan expects, times how much slower than expected the last job with a step was; where
  the plan knows nothing, from their FLOPs at that job's speed.
- A token cache that was whole before is looked through, not made: it is told as ``checking``, and has steps
  again only where a shard is damaged.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.live import Live
from rich.progress import MofNCompleteColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from sweeps.packing import makespan
from sweeps.scheduler import ENDED, JobState
from sweeps.tables import duration, number

LINE_SECONDS = 15.0
LIVE_SECONDS = 0.5
MOST_ROWS = 30
RECENT_SECONDS = 60.0
"""Of the past that a speed is told from."""
LEAST_MARKS = 3
"""Changes of the step that it is told from at least, however long ago: large models report rarely."""
WIDE = 100
"""Columns from which there is room for long bars."""
AT_WORK = ("running", "elsewhere", "checking")


@dataclass(frozen=True)
class Row:
    """What is known of one job at this moment."""

    name: str
    kind: str
    phase: str
    step: int | None
    total: int | None
    loss: float | None
    images_per_second: float | None
    left: float | None
    """Seconds."""


@dataclass
class Pace:
    """Steps per second lately, from when the step was seen to change."""

    marks: deque[tuple[float, int]] = field(default_factory=deque)
    """Seconds and step."""

    def see(self, now: float, step: int) -> None:
        """Take note of the step; one that was seen before says nothing new."""
        if self.marks and step < self.marks[-1][1]:  # started again, from an earlier checkpoint
            self.marks.clear()
        if not self.marks or step > self.marks[-1][1]:
            self.marks.append((now, step))
        while len(self.marks) > LEAST_MARKS and now - self.marks[1][0] > RECENT_SECONDS:
            self.marks.popleft()

    def seconds_left(self, now: float, total: int) -> float | None:
        """Until ``total`` steps; None before two changes, or a second, were seen.

        Between two reports time passes as expected; a report that is overdue slows the pace down.
        """
        (start, first), (last, step) = self.marks[0], self.marks[-1]
        if step <= first or last - start < 1.0:
            return None
        waited, usual = now - last, (last - start) / (len(self.marks) - 1)
        late = max(0.0, waited - usual)
        per_step = (last - start + late) / (step - first)
        return max(0.0, (total - step) * per_step - min(waited, usual))


class Progress:
    """The display; ``update`` is the scheduler's ``on_tick``."""

    def __init__(self, console: Console, places: int, quiet: bool = False) -> None:
        """``quiet``: leave nothing behind and say nothing of jobs that ended; whoever asks for it does."""
        self.console = console
        self.places = places
        self.quiet = quiet
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=quiet)
        self._shown = 0.0
        self._phases: dict[str, str] = {}
        self._paces: dict[str, Pace] = {}
        self._flops_per_second: float | None = None
        self._slowness: float | None = None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            with contextlib.suppress(OSError):
                self._live.stop()

    def update(self, states: Sequence[JobState]) -> None:
        """Show what has changed; cheap when it is too early to.

        A folder that cannot be read now, or an output that takes no more (a file on the disk that is full),
        is no reason to end a sweep.
        """
        with contextlib.suppress(OSError):
            self._update(states)

    def _update(self, states: Sequence[JobState]) -> None:
        now = time.monotonic()
        events = self._events(states)
        for event in events:
            self.console.print(event, highlight=False, markup=False)
        if now - self._shown < (LIVE_SECONDS if self._live else LINE_SECONDS) and not (self._live and events):
            return
        self._shown = now
        rows = [self.row(s) for s in states]
        left = self.time_left(states, rows)
        if self._live:
            self._live.update(_table(rows, left, self.console.width), refresh=True)
        elif any(r.phase in AT_WORK for r in rows):
            self.console.print(line(rows, left), highlight=False, markup=False, soft_wrap=True)

    def row(self, state: JobState) -> Row:
        """One job's present."""
        name, kind = state.job.name, state.job.kind
        if state.phase not in ("running", "elsewhere", "done"):
            return Row(name, kind, state.phase, None, None, None, None, None)
        status = state.job.folder.status()
        if state.phase == "done":
            return Row(name, kind, "done", None, None, status.get("loss"), None, 0.0)
        step, total = status.get("step"), status.get("total_steps")
        # Until the job itself has written, status.json speaks of an earlier attempt.
        if state.started is not None and status.get("heartbeat", 0) < state.started:
            step = None
        if state.checks and (step is None or step == total):
            return Row(name, kind, "checking", None, None, None, None, 0.0)
        left = self._time_left_of(state, step, total) if step is not None and total else None
        speed = status.get("images_per_second")
        return Row(name, kind, state.phase, step, total, status.get("loss"), speed, left)

    def time_left(self, states: Sequence[JobState], rows: Sequence[Row]) -> float | None:
        """Seconds until all is done; None while some job's time cannot be told."""
        alone, side_by_side = 0.0, []
        for state, row in sorted(zip(states, rows, strict=True), key=lambda p: -p[0].job.weight):
            if row.phase in ("done", "failed", "interrupted", "blocked"):
                continue
            seconds = 0.0 if state.checks and row.left is None else row.left
            if seconds is None and state.job.seconds is not None:
                seconds = state.job.seconds * (self._slowness or 1.0)
            if seconds is None and self._flops_per_second and state.job.weight:
                seconds = state.job.weight / self._flops_per_second
            if seconds is None:
                return None
            if state.job.kind == "run":
                side_by_side.append(seconds)
            else:
                alone += seconds
        return alone + makespan(side_by_side, self.places)

    def _time_left_of(self, state: JobState, step: int, total: int) -> float | None:
        now, pace = time.monotonic(), self._paces.setdefault(state.job.name, Pace())
        pace.see(now, step)
        left, job = pace.seconds_left(now, total), state.job
        if left and total > step:
            whole = left * (total - job.start) / (total - step)  # of what it does itself
            if job.weight:
                self._flops_per_second = job.weight / whole
            if job.seconds:
                self._slowness = whole / job.seconds
        return left

    def _events(self, states: Sequence[JobState]) -> list[str]:
        events = []
        for state in states:
            before = self._phases.get(state.job.name)
            self._phases[state.job.name] = state.phase
            if before in (None, state.phase):
                continue
            clock = time.strftime("%H:%M:%S")
            if self.quiet and state.phase in ENDED:
                continue
            if state.phase == "done":
                loss = state.job.folder.status().get("loss")
                at = f", loss {loss:.3f}" if isinstance(loss, float) else ""
                took = f" in {duration(state.seconds)}" if state.started else " by another launcher"
                what = "checked and whole" if state.checks else "done"
                events.append(f"{clock}  {what}: {state.job.name}{took}{at}")
            elif state.phase == "waiting":
                pause = max(0.0, state.not_before - time.monotonic())
                events.append(f"{clock}  {state.job.name}: {state.reason}; again in {duration(pause)}")
            elif state.phase == "failed":
                events.append(f"{clock}  FAILED: {state.job.name}: {state.reason}")
            elif state.phase == "elsewhere":
                events.append(
                    f"{clock}  {state.job.name} is being worked on by another process; waiting for it"
                )
        return events


@contextlib.contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while something is counted, called with the number done and of how many."""
    columns = (*rich.progress.Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    out = Console(stderr=True)
    # Elsewhere than on a terminal a bar would leave an empty line, where an error is to be the only one.
    with rich.progress.Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def line(rows: Sequence[Row], left: float | None) -> str:
    """The sweep in one line."""
    runs = [r for r in rows if r.kind == "run"]
    done = f"{sum(r.phase == 'done' for r in runs)}/{len(runs)} runs done"
    parts = [f"{time.strftime('%H:%M:%S')}  {done}"] if runs else [time.strftime("%H:%M:%S")]
    for row in rows:
        if row.phase not in AT_WORK:
            continue
        if row.phase == "checking":
            parts.append(f"{row.name}: checking what is there")
            continue
        text = f"{row.name} {row.step if row.step is not None else '-'}/{row.total or '-'}"
        text += f" loss {row.loss:.3f}" if row.loss is not None else ""
        text += f" {number(row.images_per_second)} img/s" if row.images_per_second else ""
        parts.append(text)
    if left is not None:
        parts.append(f"about {duration(left)} left")
    return " · ".join(parts)


def _table(rows: Sequence[Row], left: float | None, width: int) -> Table:
    done, total = sum(r.phase == "done" for r in rows), len(rows)
    title = f"{done} of {total} jobs done" + (f", about {duration(left)} left" if left is not None else "")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("job", no_wrap=True)
    bar_width = 24 if width >= WIDE else 10
    table.add_column("", width=bar_width)
    for heading in ("step", "train loss", "images/s", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = rows if total <= MOST_ROWS else [r for r in rows if r.phase not in ("done", "waiting")]
    for row in shown:
        if row.phase in ("running", "elsewhere") and row.step is not None and row.total:
            bar: ProgressBar | str = ProgressBar(total=row.total, completed=row.step, width=bar_width)
        elif row.phase == "done":
            bar = ProgressBar(total=1, completed=1, width=bar_width)
        else:
            bar = "starting" if row.phase == "running" else row.phase
        table.add_row(
            row.name,
            bar,
            f"{row.step}/{row.total}" if row.step is not None else "",
            f"{row.loss:.3f}" if row.loss is not None else "",
            number(row.images_per_second) if row.images_per_second else "",
            duration(row.left) if row.left else "",
        )
    return table
