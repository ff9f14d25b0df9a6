"""How fast this machine was, to say how long a plan will take.

Every job that ran from start to end in one go leaves one line of ``calibration.json`` in the root:
a run its FLOP/s while training and the seconds around it (starting, evaluating, sampling), a tokenizer or
token job its images per second. An estimate takes the nearest depth measured on the same device with the
same threads, processes and precision; without one there is no estimate.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaling.config import ConfigError, DataConfig, RunConfig, TokenizerRunConfig, from_dict, to_dict
from scaling.flops import train_flops
from scaling.records import RecordsError, RunFolder, read_json, write_json
from sweeps.machine import Allotment, Machine

FILE = "calibration.json"


@dataclass(frozen=True)
class RunSpeed:
    """One finished run."""

    device: str
    threads: int
    processes: int
    precision: str
    depth: int
    seq_len: int
    flops_per_second: float
    other_seconds: float


@dataclass(frozen=True)
class ImageSpeed:
    """One finished tokenizer training or token cache."""

    job: Literal["tokenizer", "tokens"]
    device: str
    threads: int
    shape: tuple[int, ...]
    images_per_second: float


@dataclass(frozen=True)
class Calibration:
    """All that was measured."""

    runs: tuple[RunSpeed, ...] = ()
    images: tuple[ImageSpeed, ...] = ()

    def run_seconds(
        self, run: RunConfig, machine: Machine, allotment: Allotment, processes: int
    ) -> float | None:
        """Expected seconds of one run, or None when nothing like it was measured."""
        wanted = (machine.name, allotment.threads, processes, run.train.precision)
        like = [r for r in self.runs if (r.device, r.threads, r.processes, r.precision) == wanted]
        if not like:
            return None
        near = min(
            like, key=lambda r: (abs(r.depth - run.model.depth), abs(r.seq_len - run.model.seq_len), r.depth)
        )
        flops = train_flops(run.model) * run.train.batch * run.total_steps
        return flops / near.flops_per_second + near.other_seconds

    def image_seconds(self, job: str, config: TokenizerRunConfig, machine: Machine) -> float | None:
        """Expected seconds of a tokenizer or token job, or None when its shape was never measured."""
        key = (job, machine.name, machine.cores, image_shape(config))
        speeds = [i.images_per_second for i in self.images if (i.job, i.device, i.threads, i.shape) == key]
        return job_images(job, config) / speeds[0] if speeds else None


def load(root: Path) -> Calibration:
    """What was measured under this root; empty before the first finished job.

    Raises:
        RecordsError: the file is damaged (it may be removed: it holds speeds, no results).
    """
    file = root / FILE
    if not file.exists():
        return Calibration()
    try:
        return from_dict(Calibration, read_json(file))
    except ConfigError as error:
        raise RecordsError(f"{file}: {error}; remove the file, it holds only measured speeds") from None


def add(root: Path, speed: RunSpeed | ImageSpeed) -> None:
    """Remember a speed in place of an older one of the same kind of job."""
    known = load(root)

    def kind(entry: RunSpeed | ImageSpeed) -> tuple[Any, ...]:
        measured = ("flops_per_second", "other_seconds", "images_per_second")
        return tuple(v for k, v in vars(entry).items() if k not in measured)

    if isinstance(speed, RunSpeed):
        known = Calibration((*(r for r in known.runs if kind(r) != kind(speed)), speed), known.images)
    else:
        known = Calibration(known.runs, (*(i for i in known.images if kind(i) != kind(speed)), speed))
    write_json(root / FILE, to_dict(known))


def measure_run(
    folder: RunFolder, run: RunConfig, machine: Machine, allotment: Allotment, processes: int, seconds: float
) -> RunSpeed | None:
    """The speed of a run that took ``seconds`` from start to end; None when it logged no speed."""
    logged = [r["images_per_second"] for r in folder.metrics("train") if r.get("images_per_second", 0) > 0]
    if not logged:
        return None
    speed = statistics.median(logged) * train_flops(run.model)
    training = train_flops(run.model) * run.train.batch * run.total_steps / speed
    return RunSpeed(
        machine.name,
        allotment.threads,
        processes,
        run.train.precision,
        run.model.depth,
        run.model.seq_len,
        speed,
        max(0.0, seconds - training),
    )


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
