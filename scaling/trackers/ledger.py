"""What each tracker's copy of a run holds, in ``trackers.json`` beside the run, and who may change it. No
torch.

{"wandb": {"digest": of what was copied, "points": lines}, "trackio": {"note": what went wrong}}
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.launch import Tracker
from scaling.records import RecordsError, RunFolder, read_json, write_json

SAMPLES = "samples.png"


def entries(place: Path) -> dict[str, dict[str, Any]]:
    """What is written down, by tracker."""
    file = place / "trackers.json"
    try:
        value = read_json(file) if file.exists() else {}
    except RecordsError:
        return {}  # then nothing is known of any copy, and each is made again
    return value if isinstance(value, dict) else {}


def notes(sweep: Path) -> dict[str, tuple[int, str]]:
    """Of each tracker that failed: how many runs it lacks, and what it said last."""
    found: dict[str, tuple[int, str]] = {}
    for file in sorted(sweep.glob("*/trackers.json")):
        for tracker, entry in entries(file.parent).items():
            if "note" in entry:
                found[tracker] = (found.get(tracker, (0, ""))[0] + 1, str(entry["note"]))
    return found


def remember(place: Path, tracker: Tracker, entry: dict[str, Any]) -> None:
    """Replace a tracker's entry; for the holder of ``held``."""
    write_json(place / "trackers.json", entries(place) | {tracker: entry})


def digest(*parts: Any) -> str:
    """Of values that JSON knows, and of files by their bytes."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            found.update(part.read_bytes() if part.exists() else b"")
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
        found.update(b"\0")
    return found.hexdigest()


def run_digest(folder: RunFolder, project: str, online: bool, state: str) -> str:
    """Of all that a copy of the run is made from."""
    path = folder.path
    return digest(path / "metrics.jsonl", path / "config.json", path / SAMPLES, project, online, state)


@contextlib.contextmanager
def held(place: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold a run's copies for this process; False when another has them for ``patience`` seconds more."""
    place.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (place / ".trackers.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                yield False
                return
            yield True
            return
