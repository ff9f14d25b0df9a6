"""Inside a Slurm allocation: start a job's processes on its nodes, and say how the job has ended.

    python -m sweeps.slurm_job lead SUBMISSION                  once, on the first node: the batch script
    python -m sweeps.slurm_job node SUBMISSION ADDRESS PORT     on each node, started by the lead through srun

- One task per node starts all processes of that node, through Accelerate where a run has several in all;
  they meet at the first node, on a port that was free there at the start.
- Slurm's SIGTERM, be it for a pre-emption, a requeue or a cancellation, reaches every process that the tasks
  have started, so nobody passes it on: a second one would end a job that is checkpointing. (Of a pre-emption
  the batch script hears nothing.) The job leaves with a checkpoint.
- Ahead of a time limit the lead sends the same. Slurm could (``sbatch --signal``), but Slurm 22.05 does so
  only in a job's first life, not after it was queued again.
- Then the lead asks Slurm to queue the job again, unless Slurm is already ending it: then it was
  cancelled, or is being queued again. A job that fails by itself is not queued again.
- A node that dies takes the job with it, and Slurm queues it again (``--requeue``). If the processes of the
  other nodes fail first, for want of their peer, the lead finds out that a node does not answer.
- A job that is sent away ``MOST_FRUITLESS`` times in a row without a step done in between has a time limit
  that is too short, or nodes that never answer: it fails, and says so.
- The lead holds the folder's ``.launcher`` as a local launcher does, so that the two never start one job.
- A job that ran in one go on one node leaves its speed, as one does that ran here: so the next plan for Slurm
  knows times, and can ask for them.
- A controller that is started again while a job asks it something is asked again for a minute: a job must not
  be lost because Slurm was silent at the wrong moment.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from scaling.config import ConfigError, LaunchConfig, RunConfig, TokenizerRunConfig, from_dict, to_dict
from scaling.records import RecordsError, RunFolder, read_json, write_json
from sweeps import calibration, speed_store
from sweeps.jobs import command, process_environment
from sweeps.machine import Allotment, Machine
from sweeps.scheduler import claim
from sweeps.slurm_queue import words

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 3
"""Exit codes, as a job's own."""
MOST_FRUITLESS = 5
RETRY_SECONDS = 5.0
BUSY_SECONDS = 600.0
"""How long an allocation is kept waiting for another process that works in the folder. The lock of a process
whose node died is given back by a shared file system within about two minutes."""
ANSWER_SECONDS = 60.0
"""Within which every node must start a trivial task to count as alive, and the controller answer."""
LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 5.0, 300.0
"""Between two looks at the time that is left; limits may be changed while a job runs."""
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Entry:
    """This job, as the submission has it."""

    def __init__(self, file: Path) -> None:
        value, root = read_json(file), file.parents[2]
        self.index = int(os.environ["SLURM_ARRAY_TASK_ID"])
        self.file = file
        self.job: dict[str, Any] = value["jobs"][self.index]
        self.folder = RunFolder(os.path.normpath(root / self.job["folder"]))
        self.nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        self.leave_seconds: int = value["leave_seconds"]
        self.plan: dict[str, Any] = value["plan"]
        self._launch = from_dict(LaunchConfig, value["launch"])

    def launch(self, rank: int, address: str, port: int) -> LaunchConfig:
        """For this node of the allocation."""
        launch = self._launch
        cores = int(os.environ["SLURM_CPUS_ON_NODE"])
        return dataclasses.replace(
            launch,
            threads=launch.threads or max(1, cores // launch.processes),
            machines=self.nodes,
            machine_rank=rank,
            main_address=address if self.nodes > 1 else None,
            main_port=port,
        )

    @property
    def withdrawn(self) -> bool:
        """Whether it was cancelled, or nobody knows of this submission any more."""
        return not self.file.exists() or bool(read_json(self.file).get("cancelled"))

    @property
    def done(self) -> bool:
        """Whether the job has left all that it should."""
        finished = self.folder.status()["state"] == "done"
        return finished and (self.folder.path / self.job["product"]).exists()


def own_id() -> str:
    """This element's, which is never taken for the whole array's: SLURM_JOB_ID of one of them is."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def lead(entry: Entry) -> int:
    """Run the job until it has ended, for now or for good; the exit code."""
    asked: list[int] = []
    for number in ASKED:  # the nodes' tasks get them too, and their end is this one's
        signal.signal(number, lambda number, frame: asked.append(number))
    if entry.withdrawn:
        print(f"{entry.job['name']}: cancelled before it started")
        return INTERRUPTED
    folder, before = entry.folder, entry.folder.status()
    place = _place(entry, asked)  # held until this process ends
    if place is None:
        if asked:
            return _again(entry, before, "it was asked to leave while it waited")
        print(f"{entry.job['name']}: {folder.path} is still in use by another process; gives up")
        return REFUSED
    if entry.done and not entry.job["recheck"]:
        print(f"{entry.job['name']}: done already")
        return DONE
    before = folder.status()
    address, port = _meeting_point()
    write_json(folder.path / "launch.json", to_dict(entry.launch(0, address, port)))
    start = time.monotonic()
    code = _srun(entry, ["node", str(entry.file), address, str(port)])
    status = folder.status()
    fresh = status.get("heartbeat") != before.get("heartbeat")
    state = str(status["state"]) if fresh else "silent"
    if state == "done" and entry.done:
        if before.get("attempt", 0) == 0:
            _remember(entry, time.monotonic() - start)
        return DONE
    # A task that is still starting is ended by a SIGTERM, which comes from Slurm alone.
    if state == "interrupted" or (state != "failed" and code in (INTERRUPTED, 128 + signal.SIGTERM)):
        return _again(entry, before, "it was asked to leave")
    if entry.nodes > 1 and code != REFUSED and not _all_nodes_answer(entry):
        return _again(entry, before, "a node does not answer")
    if state != "failed" and not _running():
        return INTERRUPTED  # ended by Slurm before it could say so
    if folder.busy():
        return REFUSED  # somebody else's, who says how it goes
    return _failed(folder, state, code)


def _remember(entry: Entry, seconds: float) -> None:
    """The speed of a job that ran from start to end in one go.

    Of several nodes none is kept: the plan tells times as of one.
    """
    launch, kind = entry.launch(0, "", 1), entry.job["kind"]
    machine = Machine(entry.plan["machine"], 0, 0, ())
    allotment = Allotment(((),) * entry.plan["places"], entry.plan["threads"])
    if launch.machines > 1:
        return
    try:
        speed: calibration.RunSpeed | calibration.ImageSpeed | None
        if kind == "run":
            config = from_dict(RunConfig, entry.folder.config())
            speed = calibration.measure_run(entry.folder, config, machine, allotment, launch, seconds)
        else:
            stage = from_dict(TokenizerRunConfig, entry.folder.config())
            speed = calibration.measure_images(
                kind, entry.folder, stage, machine, allotment.threads, launch, seconds
            )
        if speed is not None:
            speed_store.add(speed)
    except (OSError, ConfigError, RecordsError) as error:
        print(f"{entry.job['name']}: this speed is not remembered: {error}", flush=True)


def _place(entry: Entry, asked: list[int]) -> IO[str] | None:
    """The claim of the job's folder, once nobody works there any more; None: asked to leave, or too long."""
    path, until, told = entry.folder.path, time.monotonic() + BUSY_SECONDS, False
    place = claim(path / ".launcher")
    while place is None or entry.folder.busy():
        if asked or time.monotonic() > until:
            return None
        if not told:
            print(f"{entry.job['name']}: another process is working on it; waiting for it", flush=True)
            told = True
        time.sleep(RETRY_SECONDS)
        place = place or claim(path / ".launcher")
    return place


def _failed(folder: RunFolder, state: str, code: int) -> int:
    """The exit code; what could not say itself why it has ended is told for it."""
    if state == "failed":
        return int(folder.status().get("exit_code", FAILED)) or FAILED
    killed = f"killed by {signal.Signals(code - 128).name}" if 128 < code < 128 + signal.NSIG else ""
    hint = " (out of memory?)" if code == 128 + signal.SIGKILL else ""
    error = killed + hint or f"ended with exit code {code} and left no reason; see its log.txt"
    folder.set_status("failed", error=error)
    return FAILED


def _again(entry: Entry, before: dict[str, Any], why: str) -> int:
    """Have Slurm queue this job again; the exit code, if it is not ended by that."""
    if not _running():
        return INTERRUPTED  # cancelled, or queued again by Slurm itself
    note = entry.file.with_suffix("") / f"{entry.index}.json"
    step = entry.folder.status().get("step")
    fruitless = int(read_json(note)["fruitless"]) if note.exists() else 0
    fruitless = fruitless + 1 if step == before.get("step") else 0
    if fruitless >= MOST_FRUITLESS:
        error = f"left {fruitless} times without a step done in between ({why}); give it more --time"
        entry.folder.set_status("failed", error=error)
        return FAILED
    write_json(note, {"fruitless": fruitless})
    if entry.withdrawn:
        return INTERRUPTED
    print(f"{entry.job['name']}: {why}; queued again", flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # comes in answer; Slurm would wait before it kills

    def requeued() -> bool | None:
        asked = _run(["scontrol", "requeue", own_id()])
        if asked.returncode != 0:
            print(f"{entry.job['name']}: Slurm does not queue it again: {words(asked.stderr)}", flush=True)
        return True if asked.returncode == 0 else None

    if _insist(requeued):
        time.sleep(60)  # SIGTERM comes within a moment
    return INTERRUPTED


def _running() -> bool:
    """Whether Slurm has not begun to end this job."""

    def state() -> str | None:
        return next(
            (
                w
                for w in _run(["scontrol", "show", "job", "-o", own_id()]).stdout.split()
                if w.startswith("JobState=")
            ),
            None,
        )

    return _insist(state) in ("JobState=RUNNING", None)


def _insist(ask: Callable[[], Any]) -> Any:
    """The first answer, for a minute; None when there was none."""
    until = time.monotonic() + ANSWER_SECONDS
    while (answer := ask()) is None and time.monotonic() < until:
        time.sleep(RETRY_SECONDS)
    return answer


def _meeting_point() -> tuple[str, int]:
    """Where the processes of several nodes meet: this node, as Slurm reaches it, and a port free now."""
    shown = _run(["scontrol", "show", "node", "-o", os.environ["SLURMD_NODENAME"]]).stdout
    facts = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    with socket.socket() as probe:
        probe.bind(("", 0))
        return facts.get("NodeAddr", socket.gethostname()), probe.getsockname()[1]


def _srun(entry: Entry, arguments: list[str]) -> int:
    """One task on every node with all that the job has there, told to leave in time; the highest exit
    code."""
    process = subprocess.Popen(
        [
            *(*_on_every_node(entry), "--kill-on-bad-exit=1", "--unbuffered"),
            *(sys.executable, "-m", "sweeps.slurm_job", *arguments),
        ],
        env=_step_environment(),
    )
    told = False
    while process.poll() is None:
        left = math.inf if told else seconds_left(_squeue("%L"))
        pause = LEAST_PAUSE_SECONDS if left is None else left - entry.leave_seconds
        if pause <= 0 and _step_is_there():  # else its tasks would not hear it
            _run(["scancel", "--signal=TERM", own_id()])  # not to this process
            told = True
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(max(pause, LEAST_PAUSE_SECONDS), MOST_PAUSE_SECONDS))
    return process.returncode


def _step_is_there() -> bool:
    """Beside the one that is the batch script's."""
    return any(step.rpartition(".")[2].isdigit() for step in _squeue("%i", "--steps").splitlines())


def _squeue(shape: str, *more: str) -> str:
    """About this job."""
    return _run(["squeue", "--noheader", f"--format={shape}", f"--jobs={own_id()}", *more]).stdout


def seconds_left(shown: str) -> float | None:
    """What squeue's ``%L`` says, [days-][[hours:]minutes:]seconds; infinite without a limit, None without an
    answer."""
    days, _, clock = shown.strip().rpartition("-")
    parts = clock.split(":")
    if shown.strip().isalpha():  # UNLIMITED, NOT_SET
        return math.inf
    if not all(part.isdigit() for part in (days or "0", *parts)):
        return None
    return int(days or 0) * 86400.0 + sum(int(p) * 60.0**i for i, p in enumerate(reversed(parts)))


def _all_nodes_answer(entry: Entry) -> bool:
    return _run([*_on_every_node(entry), "true"]).returncode == 0


def _on_every_node(entry: Entry) -> list[str]:
    return ["srun", f"--nodes={entry.nodes}", f"--ntasks={entry.nodes}", "--cpu-bind=none"]


def _step_environment() -> dict[str, str]:
    """A task gets all of the job's cores on its node; asked for a number, srun would give it that share."""
    return {name: value for name, value in os.environ.items() if name != "SLURM_CPUS_PER_TASK"}


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands, which fails when it takes too long."""
    try:
        return subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWER_SECONDS,
            env=_step_environment(),
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, FAILED, "", f"no answer in {ANSWER_SECONDS:.0f} s")


def node(entry: Entry, address: str, port: int) -> int:
    """Start this node's processes and wait for them; the exit code.

    Only the first node says that it was asked to leave, when its main process has recorded it: an exit code
    other than 0 ends the other nodes' tasks at once.
    """
    rank = int(os.environ["SLURM_NODEID"])
    launch = entry.launch(rank, address, port)
    line = command(entry.job["kind"], entry.job["arguments"], launch)
    assert launch.threads is not None  # the entry has filled it in
    where = f"Slurm {own_id()} on {os.environ['SLURMD_NODENAME']}"
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {where}: {shlex.join(line)}", flush=True)
    asked: list[int] = []
    for number in ASKED:
        signal.signal(number, lambda number, frame: asked.append(number))
    code = DONE
    if not asked:
        environment = os.environ | process_environment(launch, launch.threads)
        # Of this task's process group, so that Slurm's signals reach it whatever it finds processes by.
        code = subprocess.Popen(line, stdin=subprocess.DEVNULL, env=environment).wait()
    told = bool(asked)
    for number in ASKED:  # Slurm sends some of them twice; Python would die of one while it ends
        signal.signal(number, signal.SIG_IGN)
    if told:
        return INTERRUPTED if rank == 0 else DONE
    return code if code >= 0 else 128 - code


def main(role: str, file: str, *place: str) -> int:
    """One of the two roles; see above."""
    try:
        entry = Entry(Path(file))
        return lead(entry) if role == "lead" else node(entry, place[0], int(place[1]))
    except RecordsError as error:
        print(error, file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
