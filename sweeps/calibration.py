"""How fast this machine was, to say how long a plan will take.

- Speeds belong to the machine, not to a sweep: ``calibration.json`` lies in ``VARSCALE_CACHE``, by default
  ``varscale`` in ``XDG_CACHE_HOME`` or ``~/.cache``, so that every root and every recipe can use it. A home
  shared by several machines is no trouble: every speed is kept under its device's name.
- Every job that ran from start to end in one go leaves one entry in place of the last one of its kind: a run
  its FLOP/s while training, and the seconds beside training and evaluating (starting, saving, sampling); a
  tokenizer or token job its images per second, and the seconds beside. Evaluation is taken to run at
  training's FLOP/s. A job too short for a sound speed (few log points) replaces no better one.
- An estimate takes entries of the same device, threads, processes and precision, and of the same family:
  one family's FLOP/s say little of another's. A depth that was finished
  here gives its own speed. Any other depth is told by its FLOPs: at a speed between those of the nearest
  depths on either side (a power law through both), or at the speed of the nearest one when all lie on one
  side. Without entries there is no estimate.
- What else decides a speed (``Settings``) is kept in the entry and is no part of its key: from an entry of
  other settings there still is an estimate, and it says so.
"""

from __future__ import annotations

import fcntl
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaling.config import (
    ConfigError,
    DataConfig,
    Family,
    LaunchConfig,
    RunConfig,
    TokenizerRunConfig,
    from_dict,
    to_dict,
)
from scaling.flops import spent, train_flops
from scaling.records import RecordsError, RunFolder, finite, read_json, write_json
from sweeps.machine import Allotment, Machine

FILE = "calibration.json"
FORWARD = 1 / 3
"""Share of a training step's FLOPs that an evaluation needs."""
LOG_POINTS = 5
"""A speed from fewer lines than this is kept only for want of a better one."""


@dataclass(frozen=True)
class Settings:
    """What decides a job's speed beside what an entry is found by."""

    batch: int = 0
    """Images per step; 0 where there are no steps."""
    micro_batch: int = 0
    """Images per forward pass and process."""
    compile: bool = False
    attention: str = ""
    runs_at_once: int = 1
    lpips: bool = False
    adversarial: bool = False
    random_sizes: int = 0
    """Of a scalable tokenizer's training."""


@dataclass(frozen=True)
class RunSpeed:
    """One finished run."""

    device: str
    threads: int
    processes: int
    """On each machine."""
    machines: int
    precision: str
    depth: int
    seq_len: int
    flops_per_second: float
    """All processes together."""
    other_seconds: float
    points: int = 0
    """Lines of the log that the speed is the median of."""
    settings: Settings | None = None
    """Not known of entries from before they were kept."""
    family: Family = "var"
    """Entries from before there were others are of this one."""


@dataclass(frozen=True)
class ImageSpeed:
    """One finished tokenizer training or token cache."""

    job: Literal["tokenizer", "tokens"]
    device: str
    threads: int
    processes: int
    precision: str
    shape: tuple[int, ...]
    images_per_second: float
    other_seconds: float = 0.0
    points: int = 0
    settings: Settings | None = None
    quantizer: Literal["residual", "scalable"] = "residual"


@dataclass(frozen=True)
class Estimate:
    """How long a job is expected to take by itself, and what that was learnt from."""

    seconds: float
    depths: tuple[int, ...] = ()
    """Depths of the finished runs whose speed was used; none for tokenizer and tokens."""
    measured: bool = True
    """Whether a job of just this kind (of a run: its depth and tokens per image) with these settings was
    finished here."""
    same_settings: bool = True


@dataclass(frozen=True)
class Calibration:
    """All that was measured."""

    runs: tuple[RunSpeed, ...] = ()
    images: tuple[ImageSpeed, ...] = ()

    def run(
        self, run: RunConfig, machine: Machine, allotment: Allotment, launch: LaunchConfig, start: int = 0
    ) -> Estimate | None:
        """Expected time of one run from step ``start`` on, or None when nothing like it was measured."""
        wanted = (
            *(machine.name, allotment.threads, launch.processes, launch.machines),
            *(run.train.precision, run.model.family),
        )
        like = [
            r
            for r in self.runs
            if (r.device, r.threads, r.processes, r.machines, r.precision, r.family) == wanted
        ]
        if not like:
            return None
        depth, length = run.model.depth, run.model.seq_len
        nearest = min((r.seq_len for r in like), key=lambda n: (abs(math.log(n / length)), n))
        like = sorted((r for r in like if r.seq_len == nearest), key=lambda r: r.depth)
        below = [r for r in like if r.depth <= depth][-1:] or like[:1]
        above = [r for r in like if r.depth >= depth][:1] or like[-1:]
        low, high = below[0], above[0]
        share = math.log(depth / low.depth) / math.log(high.depth / low.depth) if high != low else 0.0

        speed = math.exp(
            (1 - share) * math.log(low.flops_per_second) + share * math.log(high.flops_per_second)
        )
        other = (1 - share) * low.other_seconds + share * high.other_seconds
        seconds = run_flops(run, start) / speed + other
        depths = tuple(sorted({low.depth, high.depth}))
        same = {low.settings, high.settings} == {run_settings(run, allotment, launch)}
        return Estimate(seconds, depths, depths == (depth,) and nearest == length and same, same)

    def image_job(
        self, job: str, config: TokenizerRunConfig, machine: Machine, threads: int, launch: LaunchConfig
    ) -> Estimate | None:
        """Expected time of a tokenizer or token job, or None when its shape was never measured."""
        precision, shape = image_precision(job, config), image_shape(config)
        key = (job, machine.name, threads, launch.processes, precision, shape, config.tokenizer.quantizer)
        for known in self.images:
            found = (known.job, known.device, known.threads, known.processes, known.precision, known.shape)
            if (*found, known.quantizer) == key:
                seconds = job_images(job, config) / known.images_per_second + known.other_seconds
                same = known.settings == image_settings(job, config, launch)
                return Estimate(seconds, (), same, same)
        return None


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

    def kind(entry: RunSpeed | ImageSpeed) -> tuple[Any, ...]:
        measured = ("flops_per_second", "other_seconds", "images_per_second", "points", "settings")
        return (type(entry), *(v for k, v in vars(entry).items() if k not in measured))

    file = speeds_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = load()
        entries: list[RunSpeed | ImageSpeed] = [*known.runs, *known.images]
        alike = [old for old in entries if kind(old) == kind(speed)]
        if speed.points < LOG_POINTS and any(old.points > speed.points for old in alike):
            return
        if isinstance(speed, RunSpeed):
            known = Calibration((*(r for r in known.runs if kind(r) != kind(speed)), speed), known.images)
        else:
            known = Calibration(known.runs, (*(i for i in known.images if kind(i) != kind(speed)), speed))
        write_json(file, to_dict(known))


def measure_run(
    folder: RunFolder,
    run: RunConfig,
    machine: Machine,
    allotment: Allotment,
    launch: LaunchConfig,
    seconds: float,
) -> RunSpeed | None:
    """The speed of a run that took ``seconds`` from start to end; None when it logged no speed."""
    logged = logged_speeds(folder)
    if not logged:
        return None
    images = run.train.batch * run.total_steps
    speed = statistics.median(logged) * spent(run, run.total_steps).flops / images
    return RunSpeed(
        machine.name,
        allotment.threads,
        launch.processes,
        launch.machines,
        run.train.precision,
        run.model.depth,
        run.model.seq_len,
        speed,
        max(0.0, seconds - run_flops(run, int(folder.shared()["step"])) / speed),
        len(logged),
        run_settings(run, allotment, launch),
        run.model.family,
    )


def measure_images(
    job: Literal["tokenizer", "tokens"],
    folder: RunFolder,
    config: TokenizerRunConfig,
    machine: Machine,
    threads: int,
    launch: LaunchConfig,
    seconds: float,
) -> ImageSpeed | None:
    """The speed of a tokenizer or token job that took ``seconds`` from start to end; None when it told none.

    A token job logs no lines; it tells one speed of all its images at the end.
    """
    logged = logged_speeds(folder)
    speed = statistics.median(logged) if logged else folder.status().get("images_per_second")
    if speed is None or not speed > 0:
        return None
    return ImageSpeed(
        job,
        machine.name,
        threads,
        launch.processes,
        image_precision(job, config),
        image_shape(config),
        speed,
        max(0.0, seconds - job_images(job, config) / speed),
        len(logged),
        image_settings(job, config, launch),
        config.tokenizer.quantizer,
    )


def logged_speeds(folder: RunFolder) -> list[float]:
    """Images per second of every line of training."""
    found = [r.get("images_per_second") for r in folder.metrics("train")]
    return [speed for speed in found if speed is not None and finite(speed) and speed > 0]


def run_settings(run: RunConfig, allotment: Allotment, launch: LaunchConfig) -> Settings:
    """Of a run."""
    return Settings(
        run.train.batch,
        _micro_batch(run.train.batch, launch.machines * launch.processes, launch),
        launch.compile,
        launch.attention,
        len(allotment.slots),
    )


def image_settings(job: str, config: TokenizerRunConfig, launch: LaunchConfig) -> Settings:
    """Of a tokenizer or token job. The encoder's batch follows from the resolution."""
    train = config.train
    if job == "tokens":
        return Settings()
    return Settings(
        train.batch,
        _micro_batch(train.batch, launch.processes, launch),
        lpips=train.lpips_weights is not None and train.perceptual > 0,
        adversarial=train.adversarial.weight > 0,
        random_sizes=train.random_sizes if config.tokenizer.quantizer == "scalable" else 0,
    )


def _micro_batch(batch: int, processes: int, launch: LaunchConfig) -> int:
    share = -(-batch // processes)
    return min(launch.micro_batch or share, share)


def run_flops(run: RunConfig, start: int = 0) -> float:
    """FLOPs of a run's training and evaluations after the first ``start`` steps."""
    assert run.data.val_images is not None  # RunConfig has checked it
    evaluations = sum(step > start for step in run.eval_steps)
    evaluated = evaluations * min(run.evaluation.images or run.data.val_images, run.data.val_images)
    trained = spent(run, run.total_steps).flops - spent(run, start).flops
    return trained + FORWARD * train_flops(run.model) * evaluated


def image_precision(job: str, config: TokenizerRunConfig) -> str:
    """What a tokenizer or token job computes in: tokens are always encoded in fp32."""
    return config.train.precision if job == "tokenizer" else "fp32"


def image_shape(config: TokenizerRunConfig) -> tuple[int, ...]:
    """What decides a tokenizer's cost per image."""
    tok = config.tokenizer
    return (config.data.resolution, tok.channels, *tok.multipliers, tok.res_blocks, tok.vocab, tok.seq_len)


def job_images(job: str, config: TokenizerRunConfig) -> int:
    """Images that a tokenizer or token job goes through."""
    return config.train.steps * config.train.batch if job == "tokenizer" else cached_images(config.data)


def cached_images(data: DataConfig) -> int:
    """Token sequences of a whole cache: every view of the training images, and the validation images."""
    return (data.train_images or 0) * data.views + (data.val_images or 0)
