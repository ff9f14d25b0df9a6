"""Slurm's own commands, called: sbatch, squeue, sacct, scancel, scontrol.

- squeue knows every job that has not ended, and for some minutes those that have; sacct, where the cluster
  keeps accounts, knows the rest. Neither is needed to know what a run has done: that its folder tells.
- An error is Slurm's own last line.
- A person's defaults for squeue and sacct are left out, since they choose and shape the answer. So is what an
  allocation has set, in case the sweep is started inside of one: a new job would take it for its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling.config import ConfigError
from scaling.records import RecordsError

QUEUED = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}
RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
"""COMPLETING is leaving its nodes, to end or to be queued again."""
COMMENT = "varscale:"
"""Begins the comment by which a submission is found whose id was never recorded."""
COMMAND_SECONDS = 120
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Of the variables that begin like those of an allocation: these say where Slurm is."""


@dataclass(frozen=True)
class Seen:
    """One job as Slurm sees it."""

    id: str
    """Of the array, and its element: 1234_0."""
    state: str = "UNKNOWN"
    """Slurm's own word; UNKNOWN when Slurm has forgotten the job."""
    reason: str = ""
    """Why it waits or has ended."""
    name: str = ""
    comment: str = ""

    @property
    def queued(self) -> bool:
        """Whether it waits for nodes, or for other jobs."""
        return self.state in QUEUED

    @property
    def active(self) -> bool:
        """Whether it runs or is still going to."""
        return self.state in QUEUED | RUNNING

    def __str__(self) -> str:
        return f"{self.id} {self.state}" + (f" ({self.reason})" if self.reason else "")


def standing(recorded: str, seen: Seen | None, beats: bool = False) -> tuple[str, str]:
    """Where a job stands, and why, from what its folder records and what Slurm says.

    Queued, starting, running, done, failed, interrupted, cancelled, or blocked by one that failed; waiting
    when nobody has it in hand.

    Args:
        beats: its heartbeat is fresh: what Slurm has ended goes on without it, on this machine perhaps.
    """
    if recorded == "done" or seen is None or (recorded == "running" and beats and not seen.active):
        return recorded, ""
    if seen.queued:
        return "queued", seen.reason
    if seen.active:
        return ("running" if recorded == "running" else "starting"), ""
    if recorded == "failed":
        return recorded, ""
    if seen.reason == "DependencyNeverSatisfied":
        return "blocked", "a job that it needs has failed or was cancelled"
    if seen.state == "CANCELLED":
        return "cancelled", ""
    if recorded == "running":  # it could not say how it ended
        hint = " (with more --leave-seconds it would have checkpointed)" if seen.state == "TIMEOUT" else ""
        return "failed", f"ended by Slurm: {seen.state}{hint}"
    return recorded, f"Slurm: {seen.state}"


def submit(arguments: Sequence[str], script: str, keep_open: int | None = None) -> str:
    """The id of the new job.

    Args:
        keep_open: a file that stays open until sbatch has ended, even when this process dies meanwhile.

    Raises:
        ConfigError: there is no sbatch here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--executor slurm: there is no sbatch on this machine; start the sweep where Slurm's commands "
            "are (a login node), or without --executor slurm on this machine"
        )
    done = _call(["sbatch", "--parsable", *arguments], script, keep_open)
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused: {words(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def look(ids: Iterable[str]) -> dict[str, Seen]:
    """Every element of these array jobs that Slurm still knows, by ``Seen.id``; elements that were cancelled
    while they waited may be one entry without an index.

    Raises:
        RecordsError: Slurm does not answer.
    """
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    found = _squeue(["--jobs", ",".join(wanted)])
    gone = [i for i in wanted if not any(key.partition("_")[0] == i for key in found)]
    return (_sacct(gone) if gone else {}) | found


def named(name: str) -> dict[str, Seen]:
    """Every element that squeue knows of the jobs of this name.

    Raises:
        RecordsError: Slurm does not answer.
    """
    return _squeue(["--name", name])


def cancel(ids: Iterable[str]) -> None:
    """End these jobs, waiting or running; they get SIGTERM, and some seconds to checkpoint.

    Raises:
        RecordsError: Slurm refuses.
    """
    done = _call(["scancel", *ids])
    # Those that have ended since Slurm was asked are no trouble.
    said = [line for line in done.stderr.splitlines() if "Invalid job id" not in line]
    if done.returncode != 0 and said:
        raise RecordsError(f"scancel refused: {words(done.stderr)}")


def wait_for(job: str, what: str) -> bool:
    """Have a job that is queued wait for this instead; whether Slurm has done so.

    Args:
        what: in the words of sbatch's ``--dependency``; nothing: it waits for nodes alone.
    """
    return _call(["scontrol", "update", f"JobId={job}", f"Dependency={what}"]).returncode == 0


def words(stderr: str) -> str:
    """What one of the commands says, without its name: the last line, and that before if it says why."""
    lines = [line.partition("error: ")[2] or line for line in stderr.splitlines() if line.strip()]
    return ": ".join(line.strip() for line in lines[-2:]) if lines else "it did not say why"


def _squeue(which: Sequence[str]) -> dict[str, Seen]:
    shape = "%F|%K|%T|%r|%j|%k"
    done = _call(["squeue", "--noheader", "--array", "--states=all", f"--format={shape}", *which])
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:  # it has forgotten all of them
            return {}
        raise RecordsError(f"Slurm does not answer: {words(done.stderr)}")
    found = {}
    for line in done.stdout.splitlines():
        parts = line.split("|", 5)
        if len(parts) < 6:  # a cluster's heading, or the rest of a comment of several lines: none of ours
            continue
        job, index, state, reason, name, comment = parts
        reason = "" if reason == "None" else reason
        key = job if index == "N/A" else f"{job}_{index}"
        found[key] = Seen(key, state, reason, name, comment)
    return found


def _sacct(ids: Sequence[str]) -> dict[str, Seen]:
    """Nothing on a cluster without accounts."""
    if shutil.which("sacct") is None:
        return {}
    shape = "JobID,State,Reason,JobName"
    done = _call(["sacct", "-X", "-n", "-P", f"--format={shape}", "--jobs", ",".join(ids)])
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        job, state, reason, name = line.split("|", 3)
        state, _, by = state.partition(" ")  # "CANCELLED by 1000"
        key = job.partition("_[")[0]
        found[key] = Seen(key, state, by or ("" if reason == "None" else reason), name)
    return found


def environment() -> dict[str, str]:
    """For Slurm's commands; see above."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or not name.startswith(("SLURM_", "SQUEUE_", "SACCT_"))
    }


def _call(
    command: Sequence[str], script: str | None = None, keep_open: int | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=script,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
            pass_fds=() if keep_open is None else (keep_open,),
            env=environment(),
        )
    except FileNotFoundError:
        raise RecordsError(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise RecordsError(f"{command[0]} did not answer within {COMMAND_SECONDS} seconds") from None
