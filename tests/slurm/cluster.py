"""The Slurm that ``up.sh`` brings up: questions to it, and the death of one of its nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
NOT_POSSIBLE = 77
"""Exit code of ``up.sh`` where no Slurm can be had."""
PATIENCE_SECONDS = 400.0


@dataclass(frozen=True)
class Cluster:
    """A running one."""

    folder: Path

    @property
    def config(self) -> str:
        """For ``SLURM_CONF``."""
        return str(self.folder / "slurm.conf")

    def ask(self, *command: str, script: str | None = None) -> str:
        """What one of Slurm's commands prints."""
        environment = os.environ | {"SLURM_CONF": self.config}
        done = subprocess.run(command, input=script, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def jobs(self, shape: str, *which: str) -> list[str]:
        """One line of ``squeue`` per job that waits or runs."""
        return self.ask("squeue", "--noheader", "--array", f"--format={shape}", *which).splitlines()

    def node_of(self, job: str) -> str:
        """Where it runs."""
        return self.ask("squeue", "--noheader", "--format=%N", "--jobs", job)

    def preempt(self, job: str) -> None:
        """Have something more urgent run where this job does."""
        script = "#!/bin/sh\nsleep 1\n"
        where = (f"--nodelist={self.node_of(job)}", "--exclusive")
        self.ask("sbatch", "--partition=urgent", *where, "--output=/dev/null", script=script)

    def kill_node(self, name: str) -> None:
        """SIGKILL for its daemon and for all that it has started; the controller is told at once."""
        log = self.folder / "log" / f"slurmd.{name}.log"  # open in the daemon and the keepers of its steps
        mark = {f"SLURMD_NODENAME={name}", f"SLURM_CONF={self.config}"}  # and these are in all tasks
        keepers, tasks = list[int](), list[int]()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if log in [f.readlink() for f in (process / "fd").iterdir()]:
                    keepers.append(int(process.name))
                elif mark <= set((process / "environ").read_text().split("\0")):
                    tasks.append(int(process.name))
        # A keeper that outlived its task would tell the controller that the job had failed.
        for number in keepers + tasks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.ask("scontrol", "update", f"nodename={name}", "state=down", "reason=died")

    def revive_node(self, name: str) -> None:
        """A machine that was started again."""
        environment = os.environ | {"SLURM_CONF": self.config}
        subprocess.run(["/usr/sbin/slurmd", "-c", "-N", name], check=True, env=environment)
        wait_for(lambda: "idle" in self.ask("sinfo", "-h", "-n", name, "-p", "main", "-o", "%t"))


def trainers(run: Path) -> list[int]:
    """Processes that train this run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[1:4] == [b"-m", b"scaling.trainer", bytes(run)]:
                found.append(int(process.name))
    return found


def freeze(run: Path) -> None:
    """Stop its trainer where it stands: a test then has all the time it needs. Slurm's signals wake it."""
    for pid in trainers(run):
        os.kill(pid, signal.SIGSTOP)


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
