"""Jobs: what a sweep starts as processes, and the folders that they work in.

- A sweep has three kinds: tokenizers, their token caches, runs. Measuring pictures, training a classifier
  (``sweeps.fidelity``), evaluating a model (``sweeps.evaluation``) and timing a machine (``sweeps.probes``)
  are jobs by themselves. Each reads
  ``config.json`` and ``launch.json`` of its folder, so a command line holds paths only. A run needs its own
  tokens, and no other tokenizer's.
- One process per run is started plainly; several through ``accelerate launch --multi_gpu``, which is also
  what starts several on a machine without GPUs (``--cpu --num_processes 2`` silently runs one). Port 0
  lets two such runs live on one machine.
- Several machines share runs only: tokenizers and tokens are machine 0's alone. Each machine starts its share
  of the processes, which meet at ``launch.main_address``.
- A job is done when its status says so *and* what it leaves is there: a removed tokenizer is trained again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scaling.config import (
    ConfigError,
    LaunchConfig,
    RunConfig,
    TokenizerRunConfig,
    content_hash,
    from_dict,
    to_dict,
)
from scaling.records import RecordsError, RunFolder, read_json, write_json

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = "VARSCALE_LAUNCHER_PID"
"""Tells a job its launcher, so that it leaves when the launcher is gone."""
HANG = "VARSCALE_HANG_SECONDS"
"""Tells a job after which silence it is ended, so that it can show before where it stands."""
PRODUCTS = {
    "tokenizer": "tokenizer/tokenizer.json",
    "tokens": "manifest.json",
    "run": "final/weights.safetensors",
    "fidelity": "measured.json",
    "classifier": "classifier.json",
    "evaluation": "evaluated.json",
    "probe": "speed.json",
}
MODULES = {
    "tokenizer": "scaling.tokenizer.training",
    "tokens": "scaling.data.encode",
    "run": "scaling.trainer",
    "fidelity": "scaling.fidelity.job",
    "classifier": "scaling.fidelity.train_classifier",
    "evaluation": "scaling.evaluate_job",
    "probe": "scaling.probe",
}
Kind = Literal["tokenizer", "tokens", "run", "fidelity", "classifier", "evaluation", "probe"]


@dataclass(frozen=True)
class Job:
    """One process (or group of processes) to run to its end."""

    name: str
    """How a person finds it: a run's id, else its kind, with the tokenizer's id where there are several."""
    kind: Kind
    folder: RunFolder
    command: tuple[str, ...]
    product: str
    """What a finished job has left in its folder."""
    needs: tuple[Path, ...] = ()
    """Folders of the jobs that must be done before."""
    environment: dict[str, str] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    """Written to ``launch.json`` before the start."""
    weight: float = 0.0
    """Training FLOPs; the heaviest job that can start, with what waits for it, is started first."""
    behind: float = 0.0
    """Training FLOPs of the runs that branch off this one."""
    trunk: RunFolder | None = None
    """The run whose checkpoint this one starts from: it waits for that, not for the trunk's end."""
    start: int = 0
    """The step of that checkpoint."""
    leave: tuple[int, ...] = ()
    """Steps after which this job leaves such checkpoints."""
    seconds: float | None = None
    """Expected, when the machine was measured."""
    config: RunConfig | TokenizerRunConfig | None = None
    """What ``config.json`` of the folder is to hold."""
    alone: bool = False
    """Has all places of the machine to itself."""
    recheck: bool = False
    """Started even when it is done: it looks through what it has left and mends it."""

    @property
    def lacks(self) -> RunFolder | None:
        """Its trunk, while that has not left what this job, which has done nothing yet, starts from."""
        if self.trunk is None or self.trunk.branch(self.start).exists():
            return None
        return None if any(self.folder.checkpoints.glob("step-*")) else self.trunk

    @property
    def arguments(self) -> tuple[str, ...]:
        """What its module is given: ``command`` without what starts it here."""
        return self.command[self.command.index(MODULES[self.kind]) + 1 :]

    @property
    def state(self) -> str:
        """The recorded state, but never ``done`` without the product."""
        state = str(self.folder.status()["state"])
        return "waiting" if state == "done" and not (self.folder.path / self.product).exists() else state


@dataclass(frozen=True)
class Folders:
    """Where everything of one sweep lies; tokenizers and tokens are shared by all sweeps under the root."""

    root: Path
    sweep: Path

    def tokenizer(self, stage: TokenizerRunConfig) -> Path:
        """The folder of a tokenizer's training."""
        return self.root / "tokenizers" / stage.run_id

    def tokens(self, stage: TokenizerRunConfig) -> Path:
        """The folder of the token cache made with it."""
        return self.root / "tokens" / stage.run_id


def stage_name(kind: str, run_id: str, tokenizers: int) -> str:
    """The name of a tokenizer or token job of a sweep with so many tokenizers."""
    return kind if tokenizers == 1 else f"{kind} {run_id}"


def tokenizer_jobs(
    folders: Folders, stages: Sequence[TokenizerRunConfig], launch: LaunchConfig, threads: int
) -> list[Job]:
    """Two jobs per tokenizer, which its runs wait for; each has one whole machine to itself."""
    launch = replace(launch, machines=1, machine_rank=0)
    plain = to_dict(replace(launch, threads=threads))
    environment = process_environment(launch, threads)
    jobs = []
    for stage in stages:
        tokenizer, tokens = folders.tokenizer(stage), folders.tokens(stage)
        trained = Job(
            stage_name("tokenizer", stage.run_id, len(stages)),
            "tokenizer",
            RunFolder(tokenizer),
            command("tokenizer", [str(tokenizer)], launch),
            PRODUCTS["tokenizer"],
            environment=environment,
            launch=plain,
            config=stage,
            alone=True,
        )
        cached = replace(
            trained,
            name=stage_name("tokens", stage.run_id, len(stages)),
            kind="tokens",
            folder=RunFolder(tokens),
            command=command("tokens", [str(tokens), "--tokenizer", str(tokenizer)], launch),
            product=PRODUCTS["tokens"],
            needs=(tokenizer,),
        )
        jobs += [trained, cached]
    return jobs


def run_job(
    folders: Folders,
    run: RunConfig,
    launch: LaunchConfig,
    threads: int,
    weight: float,
    trunk: str | None = None,
    start: int = 0,
    leave: Sequence[int] = (),
) -> Job:
    """The job that trains one run.

    Args:
        trunk: the run that it branches off, after ``start`` steps.
        leave: steps after which runs branch off this one.
    """
    folder, stage = folders.sweep / run.run_id, run.tokenizer_run
    tokenizer, tokens = folders.tokenizer(stage), folders.tokens(stage)
    arguments = [str(folder), "--tokens", str(tokens), "--tokenizer", str(tokenizer)]
    if trunk is not None:
        arguments += ["--trunk", str(folders.sweep / trunk)]
    if leave:
        arguments += ["--leave", *map(str, leave)]
    return Job(
        run.run_id,
        "run",
        RunFolder(folder),
        command("run", arguments, launch),
        PRODUCTS["run"],
        needs=(tokens,),
        environment=process_environment(launch, threads),
        launch=to_dict(replace(launch, threads=threads)),
        weight=weight,
        trunk=None if trunk is None else RunFolder(folders.sweep / trunk),
        start=start,
        leave=tuple(leave),
        config=run,
    )


def command(kind: Kind, arguments: Sequence[str], launch: LaunchConfig) -> tuple[str, ...]:
    """The command line of a job."""
    module = ("-m", MODULES[kind], *arguments)
    if launch.machines == launch.processes == 1:
        return (sys.executable, *module)
    place: tuple[str, ...] = ("--main_process_port", "0")
    if launch.machines > 1:
        assert launch.main_address is not None  # LaunchConfig has checked it
        place = (
            *("--machine_rank", str(launch.machine_rank), "--main_process_ip", launch.main_address),
            *("--main_process_port", str(launch.main_port)),
        )
    return (
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", str(launch.machines * launch.processes)),
        *("--num_machines", str(launch.machines), *place),
        *("--mixed_precision", "no", "--dynamo_backend", "no", *module),
    )


def process_environment(launch: LaunchConfig, threads: int) -> dict[str, str]:
    """What a job's environment has beside the launcher's own.

    Precision and compilation are the job's to set from its config, so a person's Accelerate defaults are
    overruled here.
    """
    path = os.pathsep.join(p for p in (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        LAUNCHER: str(os.getpid()),
    }
    if launch.device == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    # Threads that spin long while they wait stall each other once anything else runs; threads that never
    # spin halve the speed of small convolutions on a quiet machine. In between (docs/LOG.md).
    environment["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "10000")
    return environment


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a job now, with all that it has started: torchrun gives its processes sessions of their own, which
    a signal to the job's process group does not reach."""
    for pid in _started_by(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _started_by(pid: int) -> list[int]:
    """Its children and theirs (Linux; elsewhere none is found)."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in map(int, file.read_text().split()):
                found += [*_started_by(child), child]
    return found


def prepare(folder: RunFolder, config: Any) -> None:
    """Make a job's folder, or check that it is of the same config, a dataclass.

    Data that was moved keeps its identity: then only its path in ``config.json`` is brought up to date.

    Raises:
        RecordsError: the folder holds another config.
    """
    file, wanted = folder.path / "config.json", to_dict(config)
    if file.exists():
        found = read_json(file)
        try:
            same = content_hash(from_dict(type(config), found)) == content_hash(config)
        except ConfigError as error:
            raise RecordsError(f"{file}: {error}; choose another sweep name or remove the folder") from None
        if same:
            if found != wanted:
                write_json(file, wanted)
            return
    folder.create(wanted)
