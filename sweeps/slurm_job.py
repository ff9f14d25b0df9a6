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
  cancelled, or is being queued again.
- A job that fails by itself, or falls silent, is started again within the allocation as the launcher of a
  machine would start it (``sweeps.attempts``, ``sweeps.patience``): after a pause, as often as the recipe
  says, and not at all where that cannot help. What fails for good is not queued again.
- A silent job is ended by Slurm, which alone reaches its processes on all nodes.
- A trunk's lead sets its branches free (``sweeps.slurm_branches``).
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
from sweeps.attempts import DONE, FAILED, INTERRUPTED, REFUSED, UNREAD_SECONDS, Attempts, End
from sweeps.jobs import HANG, command, process_environment
from sweeps.machine import Allotment, Machine
from sweeps.patience import Patience
from sweeps.scheduler import claim
from sweeps.slurm_branches import Branches
from sweeps.slurm_queue import words

MOST_FRUITLESS = 5
RETRY_SECONDS = 5.0
TICK_SECONDS = 1.0
NOT_THE_JOBS = ("--- ", "srun: ", "slurmstepd: ")
"""How lines of the log begin that the job did not print."""
BUSY_SECONDS = 600.0
"""How long an allocation is kept waiting for another process that works in the folder. The lock of a process
whose node died is given back by a shared file system within about two minutes."""
ANSWER_SECONDS = 60.0
"""Within which every node must start a trivial task to count as alive, and the controller answer."""
REQUEUED_SECONDS = 60.0
"""Within which SIGTERM comes in answer to a request to be queued again; a moment, usually."""
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
        self.patience = Patience.of(self._launch)

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

    def say(self, text: str) -> None:
        """In the job's log."""
        print(f"{self.job['name']}: {text}", flush=True)

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
        entry.say("cancelled before it started")
        return INTERRUPTED
    folder, place, before = entry.folder, None, None
    attempts = Attempts(folder, entry.job["product"], NOT_THE_JOBS)
    while True:
        place = _place(entry, asked, place)  # held until this process ends
        if asked:
            return _again(entry, before or folder.status(), "it was asked to leave while it waited")
        if place is None:
            entry.say(f"{folder.path} is still in use by another process; gives up")
            return REFUSED
        if entry.done and not entry.job["recheck"]:
            entry.say("done already")
            return DONE
        if entry.patience.given_up(status := folder.status()):
            entry.say(f"not trained again: {status.get('error')}")
            return FAILED
        before = before or status
        end = _attempt(entry, attempts)
        if end.kind == "done":
            return DONE
        if end.kind == "interrupted":  # a task that is still starting is ended by a SIGTERM, from Slurm alone
            return _again(entry, before, "it was asked to leave")
        if end.kind == "elsewhere":
            return REFUSED  # somebody else's, who says how it goes
        if entry.nodes > 1 and end.code != REFUSED and not _all_nodes_answer(entry):
            return _again(entry, before, "a node does not answer")
        if end.status["state"] != "failed" and not _running():
            return INTERRUPTED  # ended by Slurm before it could say so
        pause = None if asked else attempts.again(end, entry.patience)
        if pause is None:
            entry.say(attempts.give_up(end))
            return REFUSED if end.code == REFUSED else FAILED
        entry.say(f"{end.reason}; tried again in {pause:g} s")
        until = time.monotonic() + pause
        while time.monotonic() < until and not asked:
            time.sleep(TICK_SECONDS)


def _ended(attempts: Attempts, code: int) -> End:
    """How it ended, once its folder can be read."""
    until = time.monotonic() + UNREAD_SECONDS
    while True:
        try:
            return attempts.ended(code, asked=True)
        except OSError:
            if time.monotonic() >= until:
                return attempts.unread(code, UNREAD_SECONDS)
            time.sleep(TICK_SECONDS)


def _attempt(entry: Entry, attempts: Attempts) -> End:
    """One start of the job on its nodes, to its end."""
    fresh = entry.folder.status().get("attempt", 0) == 0
    address, port = _meeting_point()
    write_json(entry.folder.path / "launch.json", to_dict(entry.launch(0, address, port)))
    attempts.begin(attempts.folder.status())
    start = time.monotonic()
    code = _srun(entry, ["node", str(entry.file), address, str(port)], attempts)
    end = _ended(attempts, 128 - code if 128 < code < 128 + signal.NSIG else code)
    if end.kind == "done" and fresh:
        _remember(entry, time.monotonic() - start)
    return end


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
        entry.say(f"this speed is not remembered: {error}")


def _place(entry: Entry, asked: list[int], place: IO[str] | None) -> IO[str] | None:
    """The claim of the job's folder, once nobody works there any more; None: asked to leave, or too long."""
    path, until, told = entry.folder.path, time.monotonic() + BUSY_SECONDS, False
    place = place or claim(path / ".launcher")
    while place is None or entry.folder.busy():
        if asked or time.monotonic() > until:
            return None
        if not told:
            entry.say("another process is working on it; waiting for it")
            told = True
        time.sleep(RETRY_SECONDS)
        place = place or claim(path / ".launcher")
    return place


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
    entry.say(f"{why}; queued again")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # comes in answer; Slurm would wait before it kills

    def requeued() -> bool | None:
        asked = _run(["scontrol", "requeue", own_id()])
        if asked.returncode != 0:
            entry.say(f"Slurm does not queue it again: {words(asked.stderr)}")
        return True if asked.returncode == 0 else None

    if _insist(requeued):
        time.sleep(REQUEUED_SECONDS)
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


def _srun(entry: Entry, arguments: list[str], attempts: Attempts) -> int:
    """One task on every node with all that the job has there, told to leave in time and ended when it is
    silent; the highest exit code."""
    process = subprocess.Popen(
        [
            *(*_on_every_node(entry), "--kill-on-bad-exit=1", "--unbuffered"),
            *(sys.executable, "-m", "sweeps.slurm_job", *arguments),
        ],
        env=_step_environment(),
    )
    branches, leaves = Branches(entry.folder, entry.say), entry.job.get("leaves", False)
    ask = end = time.monotonic()
    while process.poll() is None:
        if time.monotonic() >= ask:
            left = seconds_left(_squeue("%L"))
            pause = LEAST_PAUSE_SECONDS if left is None else left - entry.leave_seconds
            if pause <= 0 and _steps():  # else its tasks would not hear it
                _run(["scancel", "--signal=TERM", own_id()])  # not to this process
                ask = math.inf
            else:
                ask = time.monotonic() + min(max(pause, LEAST_PAUSE_SECONDS), MOST_PAUSE_SECONDS)
        attempts.hangs(entry.patience)
        if attempts.hung is not None and time.monotonic() >= end:
            _end(process)
            end = time.monotonic() + RETRY_SECONDS  # should Slurm not have heard it
        if leaves:
            branches.set_free()
        with suppress(subprocess.TimeoutExpired):
            process.wait(TICK_SECONDS)
    if leaves:
        branches.set_free(now=True)  # before Slurm cancels them, should this job fail
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """End all tasks of this job, on all nodes, and all that they have started."""
    if steps := _steps():
        _run(["scancel", "--signal=KILL", *steps])  # of the whole job it would be this process's end
    else:
        process.kill()


def _steps() -> list[str]:
    """Ids of what runs beside the batch script."""
    shown = _squeue("%i", "--steps").splitlines()
    return [step for step in shown if step.rpartition(".")[2].isdigit()]


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
        environment[HANG] = str(entry.patience.hang_seconds)
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
