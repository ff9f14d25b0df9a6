"""The file of this machine's speeds.

``calibration.json`` lies in ``VARSCALE_CACHE``, by default ``varscale`` in ``XDG_CACHE_HOME`` or
``~/.cache``, so that every root and every recipe can use it. A home shared by several machines is no trouble:
every speed is kept under its device's name. A job too short for a sound speed (few log points) replaces no
better one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling.config import ConfigError, from_dict, to_dict
from scaling.records import RecordsError, read_json, write_json
from sweeps.calibration import Calibration, ImageSpeed, RunSpeed, runs_key

FILE = "calibration.json"
LOG_POINTS = 5
"""A speed from fewer lines than this is kept only for want of a better one."""


def speeds_file() -> Path:
    """Where this machine's speeds are kept."""
    chosen = os.environ.get("VARSCALE_CACHE")
    if chosen:
        return Path(chosen) / FILE
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG standard: a relative path is to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "varscale" / FILE


def load() -> Calibration:
    """What was measured on this machine; empty before the first finished job.

    Raises:
        RecordsError: the file is damaged (it may be removed: it holds speeds, no results).
    """
    file = speeds_file()
    if not file.exists():
        return Calibration()
    try:
        return from_dict(Calibration, read_json(file))
    except ConfigError as error:
        raise RecordsError(f"{file}: {error}; remove the file, it holds only measured speeds") from None


def add(speed: RunSpeed | ImageSpeed) -> None:
    """Remember a speed in place of an older one of the same kind of job; several launchers may do so.

    A speed from few log points does not replace one from more.
    """
    with _changing() as known:
        entries: list[RunSpeed | ImageSpeed] = [*known.runs, *known.images]
        alike = [old for old in entries if _kind(old) == _kind(speed)]
        if speed.points < LOG_POINTS and any(old.points > speed.points for old in alike):
            return
        _write(known, [speed], lambda old: _kind(old) == _kind(speed))


def replace_all(speeds: Sequence[RunSpeed | ImageSpeed]) -> None:
    """Remember the speeds of one calibration in place of all older ones, of whatever depth, that an estimate
    would take beside them."""
    keys = {runs_key(s) for s in speeds if isinstance(s, RunSpeed)}
    kinds = {_kind(s) for s in speeds}
    with _changing() as known:
        _write(
            known,
            speeds,
            lambda old: (isinstance(old, RunSpeed) and runs_key(old) in keys) or _kind(old) in kinds,
        )


MEASURED = (
    *("flops_per_second", "evaluation_flops_per_second", "images_per_second", "other_seconds"),
    *("checkpoint_seconds", "closed_memory", "peak_memory", "host_memory"),
    *("points", "settings", "waited"),
)
"""Fields of an entry that say what was measured, not of what."""


def _kind(entry: RunSpeed | ImageSpeed) -> tuple[Any, ...]:
    return (type(entry), *(v for k, v in vars(entry).items() if k not in MEASURED))


@contextlib.contextmanager
def _changing() -> Iterator[Calibration]:
    """What is known, while nobody else changes it."""
    file = speeds_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield load()


def _write(
    known: Calibration,
    new: Sequence[RunSpeed | ImageSpeed],
    gone: Callable[[RunSpeed | ImageSpeed], bool],
) -> None:
    runs = [*(r for r in known.runs if not gone(r)), *(s for s in new if isinstance(s, RunSpeed))]
    images = [*(i for i in known.images if not gone(i)), *(s for s in new if isinstance(s, ImageSpeed))]
    write_json(speeds_file(), to_dict(Calibration(tuple(runs), tuple(images))))
