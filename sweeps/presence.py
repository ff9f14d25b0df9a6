"""Whether a launcher is at work on a sweep: each holds a shared lock, which the system frees on any death.

A job that waits says nothing about that: its launcher may be between two jobs, or gone.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

FILE = ".launchers"


@contextlib.contextmanager
def present(sweep: Path) -> Iterator[None]:
    """Hold the sweep as one of its launchers."""
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # whoever only looks has it for a moment
        yield


def anyone(sweep: Path) -> bool:
    """Whether a launcher holds the sweep."""
    try:
        with (sweep / FILE).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # somebody else's folder, or no locks there: nobody knows
        return True
