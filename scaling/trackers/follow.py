"""A run's trackers while it trains: a process that reads ``metrics.jsonl`` as it grows.

    python -m scaling.trackers.follow RUN_FOLDER        started by scaling.trackers.mirror

- Its standard input is the trainer's word: "done" when the run is; its end, when the trainer has gone,
  however it went. Nothing else passes between them, so nothing here can hold the trainer up.
- A tracker that fails is left out from then on, with a note in ``trackers.json``; ``sync`` makes its copy.
- What does not come to an end a minute after the trainer is given up: a network that is down must not leave
  processes behind. A thread of its own listens for the trainer's end, since a tracker may hang before it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.config import ConfigError, LaunchConfig, from_dict
from scaling.launch import Tracker
from scaling.process import one_line
from scaling.records import RunFolder, read_json
from scaling.trackers.copies import Copy, Subject, open_copy
from scaling.trackers.ledger import SAMPLES, held, remember, run_digest
from scaling.trackers.mirror import DONE
from scaling.trackers.points import Point, point_of
from scaling.trackers.targets import check, online

LOOK_SECONDS = 1.0
GIVE_UP_SECONDS = 60.0
"""After the trainer's end."""
ORDER: tuple[Tracker, ...] = ("tensorboard", "trackio", "wandb")
"""Those on this machine first: one that waits for a network holds up what comes after it."""


class Lines:
    """The whole lines of a file that grows, and that may be replaced by a shorter one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._inode, self._offset = 0, 0

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether it was replaced since the last look, and what is new in it (all, if it was)."""
        if not self._file.exists():
            return False, []
        with self._file.open("rb") as file:
            facts = os.fstat(file.fileno())
            replaced = self._inode not in (0, facts.st_ino) or facts.st_size < self._offset
            if replaced:
                self._offset = 0
            self._inode = facts.st_ino
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole + newline)
        return replaced, [json.loads(line) for line in whole.split(b"\n") if line.strip()]


@dataclass
class Feed:
    """One tracker of the run: its copy, until it fails."""

    tracker: Tracker
    subject: Subject
    copy: Copy | None = None
    note: str | None = None
    points: int = 0
    told: bool = False
    """Whether its end is in ``trackers.json``."""

    def begin(self) -> None:
        """Begin the copy, or begin it again."""
        self._try(self._open)

    def add(self, points: list[Point]) -> None:
        """Log these lines."""
        copy = self.copy
        if copy is not None and points and self._try(lambda: copy.add(points)):
            self.points += len(points)

    def end(self, state: str, samples: Path | None, axes: dict[str, float]) -> None:
        """The pictures of a finished run, and the end."""
        copy = self.copy
        if copy is not None:
            if samples is not None:
                self._try(lambda: copy.image("samples", samples, axes))
            self._try(lambda: copy.close(state))

    def _open(self) -> None:
        if self.copy is not None:
            self.copy.close("interrupted")
        check([self.tracker], self.subject.wandb_mode)
        self.copy, self.points = open_copy(self.tracker, self.subject), 0

    def _try(self, do: Callable[[], None]) -> bool:
        if self.note is not None:
            return False
        try:
            do()
        except Exception as error:  # whatever a tracker raises, the others go on
            self.copy, self.note = None, one_line(error)
            print(f"{self.tracker}: {self.note}", flush=True)
            return False
        return True


def feeds_of(folder: RunFolder, launch: LaunchConfig) -> list[Feed]:
    """The trackers of a run, none begun."""
    return [
        Feed(name, Subject(folder.path.parent, folder.name, folder.config(), launch.tracker_project,
                           launch.wandb_mode))
        for name in ORDER if name in launch.trackers
    ]  # fmt: skip


def follow(folder: RunFolder, feeds: list[Feed], listen: Callable[[float], str | None]) -> None:
    """Copy the run's lines until ``listen`` tells its end.

    Args:
        listen: waits so many seconds at most; the run's state once it has ended, else None.
    """
    lines = Lines(folder.path / "metrics.jsonl")
    last: Point | None = None
    for feed in feeds:
        feed.begin()
    while True:
        state = listen(LOOK_SECONDS)
        replaced, records = lines.new()  # after listening: what is there now is all, if it has ended
        points = [point_of(record) for record in records]
        last = points[-1] if points else last
        for feed in feeds:
            if replaced:
                feed.begin()
            feed.add(points)
        if state is not None:
            break
    samples = folder.path / SAMPLES
    for feed in feeds:
        over_network = feed.tracker == "wandb" and online(feed.subject.wandb_mode)
        mark = run_digest(folder, feed.subject.project, over_network, state)  # as sync makes it
        drawn = samples if state == "done" and samples.exists() else None
        feed.end(state, drawn, last.axes if last else {})
        _tell(folder, feed, {"digest": mark, "points": feed.points})


def _tell(folder: RunFolder, feed: Feed, entry: dict[str, Any]) -> None:
    remember(folder.path, feed.tracker, entry if feed.note is None else {"note": feed.note})
    feed.told = True


def _give_up(folder: RunFolder, feeds: list[Feed]) -> None:
    for feed in feeds:
        if not feed.told:
            feed.note = feed.note or f"was not done {GIVE_UP_SECONDS:.0f} s after the run"
            _tell(folder, feed, {})


class Trainer:
    """The trainer's word, from standard input, and what follows from it."""

    def __init__(self, folder: RunFolder, feeds: list[Feed]) -> None:
        """Begins to listen."""
        self._folder, self._feeds = folder, feeds
        self._state: str | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._hear, daemon=True).start()

    def listen(self, seconds: float) -> str | None:
        """The run's state when the trainer has spoken or gone."""
        self._ended.wait(seconds)
        return self._state

    def _hear(self) -> None:
        try:
            heard = b""
            while heard != DONE and (more := os.read(sys.stdin.fileno(), 100)):
                heard += more
            self._state = "done" if heard == DONE else str(self._folder.status()["state"])
            self._ended.set()
            time.sleep(GIVE_UP_SECONDS)
            _give_up(self._folder, self._feeds)
        finally:
            os._exit(1)  # not sys.exit: what hangs would hang on


def main() -> None:
    """Follow the run named on the command line."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, signal.SIG_IGN
        )  # a whole group is told to leave: the trainer does, this follows
    os.nice(10)
    folder = RunFolder(sys.argv[1])
    launch = from_dict(LaunchConfig, read_json(folder.path / "launch.json"))
    with held(folder.path, GIVE_UP_SECONDS + 10) as mine:
        if not mine:
            raise ConfigError("another process has the trackers of this run")
        feeds = feeds_of(folder, launch)
        follow(folder, feeds, Trainer(folder, feeds).listen)


if __name__ == "__main__":
    main()
