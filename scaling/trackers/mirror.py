"""Where the trainer's records go: to disk, and from there, by a process beside it, to trackers.

The trainer only starts that process and says at the end that it is done; it never waits for a tracker but
then, and not for long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from scaling.config import LaunchConfig
from scaling.records import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

FINISH_SECONDS = 30.0
"""The end of a run waits at most this long for its trackers; they go on for a while without it."""
DONE = b"done\n"
OF_A_JOB = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
"""Variables that would make the process a member of the job."""


class Mirror:
    """Only the main process writes."""

    def __init__(self, accelerator: Accelerator, launch: LaunchConfig, folder: RunFolder, start: int) -> None:
        """``start``: the steps already done; later lines of a run that was killed are dropped."""
        self._main, self._folder = accelerator.is_main_process, folder
        self._follower: subprocess.Popen[bytes] | None = None
        if self._main:
            folder.truncate(start)
            if launch.trackers:
                self._follower = _start_follower(folder)

    def log(self, record: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        if self._main:
            self._folder.append(record)

    def close(self) -> None:
        """The run is done: close the file, and give the trackers a moment for their end."""
        self._folder.close()
        if self._follower is None:
            return
        try:
            self._follower.communicate(DONE, timeout=FINISH_SECONDS)
        except subprocess.TimeoutExpired:
            _note(
                self._folder, f"trackers not done after {FINISH_SECONDS:.0f} s; the run goes on without them"
            )
        except OSError as error:
            _note(self._folder, f"trackers: {error}")


def _start_follower(folder: RunFolder) -> subprocess.Popen[bytes] | None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_JOB)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        with (folder.path / "trackers.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "scaling.trackers.follow", str(folder.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
    except OSError as error:
        _note(folder, f"no trackers: {error}")
        return None


def _note(folder: RunFolder, text: str) -> None:
    print(f"note: {folder.name}: {text}; 'run_sweep.py sync' completes their copies", file=sys.stderr)
