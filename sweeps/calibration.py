"""How fast this machine was, to say how long a plan will take.

- Speeds belong to the machine, not to a sweep, and serve all roots and recipes (``sweeps.speed_store``).
- Every job that ran from start to end in one go leaves one entry in place of the last one of its kind: a run
  its FLOP/s while training and while evaluating, the seconds beside (starting, saving, sampling) and its peak
  memory; a tokenizer or token job its images per second, and the seconds beside.
- Before anything has run, ``plan --calibrate`` leaves entries of the same form from a minute of short real
  training (``sweeps.probes``), which replace all of the same kind at every depth: speeds from another day say
  less of today than one made now.
- An estimate takes entries of the same device, threads, processes and precision, and of the same family:
  one family's FLOP/s say little of another's. A depth that was finished here gives its own speed. Any other
  depth is told by its FLOPs: at a speed between those of the nearest depths on either side (a power law
  through both), or at the speed of the nearest one when all lie on one side. Without entries there is no
  estimate.
- Entries of a calibration say how long it waited for a core that others had, and so does an estimate from
  them: a calibration tells the machine as it is in that minute.
- What else decides a speed (``Settings``) is kept in the entry and is no part of its key: from an entry of
  other settings there still is an estimate, and it says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from scaling.config import DataConfig, Family, LaunchConfig, RunConfig, TokenizerRunConfig
from scaling.flops import forward_flops, spent, train_memory
from scaling.records import RunFolder, finite
from sweeps.machine import Allotment, Machine, gpu_groups


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
    recompute: bool = False
    shard: bool = False


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
    runs_per_gpu: int = 1
    """Runs that shared its GPUs, itself included."""
    evaluation_flops_per_second: float | None = None
    """None: taken to be training's."""
    checkpoint_seconds: float = 0.0
    """Of every checkpoint along the way; 0 where ``other_seconds`` has them."""
    closed_memory: int | None = None
    """``scaling.flops.train_memory`` of the run."""
    peak_memory: int | None = None
    """Bytes of one process: of a GPU's tensors, or of the process on the CPU."""
    waited: float | None = None
    """Of a calibration: share of the time in which there was no core for it, since others had them. None of
    finished runs, and where the system does not tell."""


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
    waited: float | None = None
    """As of a run."""
    host_memory: int | None = None
    """Peak bytes of one process in main memory."""


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
    waited: float = 0.0
    """``waited`` of the speeds that were used, the most of them."""


@dataclass(frozen=True)
class Calibration:
    """All that was measured."""

    runs: tuple[RunSpeed, ...] = ()
    images: tuple[ImageSpeed, ...] = ()

    def run(
        self, run: RunConfig, machine: Machine, allotment: Allotment, launch: LaunchConfig, start: int = 0
    ) -> Estimate | None:
        """Expected time of one run from step ``start`` on, or None when nothing like it was measured."""
        like = [
            r for r in self.runs if runs_key(r) == run_key(run, machine, allotment.threads, launch)
            and r.runs_per_gpu == allotment.per_gpu
        ]  # fmt: skip
        found = _nearest(like, run)
        if found is None:
            return None
        low, high, share = found
        between = _between(low, high, share)
        speed = between(lambda r: r.flops_per_second)
        training = training_flops(run, start) / speed
        evaluating = evaluation_flops(run, start) / between(_evaluation_speed)
        checkpoints = int(training / launch.checkpoint_seconds) if launch.checkpoint_seconds else 0
        other, one_more = (
            (1 - share) * low_seconds + share * high_seconds
            for low_seconds, high_seconds in (
                (low.other_seconds, high.other_seconds),
                (low.checkpoint_seconds, high.checkpoint_seconds),
            )
        )
        seconds = training + evaluating + other + checkpoints * one_more
        depths, depth = tuple(sorted({low.depth, high.depth})), run.model.depth
        same = {low.settings, high.settings} == {run_settings(run, allotment, launch)}
        exact = depths == (depth,) and low.seq_len == run.model.seq_len and same
        return Estimate(seconds, depths, exact, same, max(low.waited or 0.0, high.waited or 0.0))

    def memory(
        self, run: RunConfig, closed: int, machine: Machine, threads: int, launch: LaunchConfig
    ) -> int | None:
        """Peak bytes of one of the run's processes as measured here, or None when nothing like it was.

        What the closed form lacks (libraries, what the allocator keeps) at the nearest depths, on a line
        through two of them, is added to it.

        Args:
            closed: ``train_memory`` of the run.
        """
        measured: list[tuple[RunSpeed, int, int]] = [
            (r, r.closed_memory, r.peak_memory)
            for r in self.runs
            if runs_key(r) == run_key(run, machine, threads, launch)
            and r.closed_memory is not None
            and r.peak_memory is not None
        ]
        found = _nearest([r for r, _, _ in measured], run)
        if found is None:
            return None
        lacks = {id(r): peak - form for r, form, peak in measured}
        low, high, share = found
        return round(closed + (1 - share) * lacks[id(low)] + share * lacks[id(high)])

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
                return Estimate(seconds, (), same, same, known.waited or 0.0)
        return None

    def image_memory(
        self, job: str, config: TokenizerRunConfig, machine: Machine, launch: LaunchConfig
    ) -> int | None:
        """Peak bytes in main memory of one process of a tokenizer or token job; None when none just like it
        was measured on this device."""
        wanted = (job, machine.name, launch.processes, image_precision(job, config), image_shape(config))
        settings = image_settings(job, config, launch)
        for known in self.images:
            found = (known.job, known.device, known.processes, known.precision, known.shape)
            if (*found, known.quantizer, known.settings) == (*wanted, config.tokenizer.quantizer, settings):
                return known.host_memory
        return None


RunKey = tuple[str, int, int, int, str, str]


def run_key(run: RunConfig, machine: Machine, threads: int, launch: LaunchConfig) -> RunKey:
    """What an entry must agree on with a run to say anything of it."""
    return (
        *(machine.name, threads, launch.processes, launch.machines),
        *(run.train.precision, run.model.family),
    )


def runs_key(speed: RunSpeed) -> RunKey:
    return (
        *(speed.device, speed.threads, speed.processes, speed.machines),
        *(speed.precision, speed.family),
    )


def _nearest(like: Sequence[RunSpeed], run: RunConfig) -> tuple[RunSpeed, RunSpeed, float] | None:
    """The entries of the nearest depths on either side, and where the run lies between: 0 at the first, 1 at
    the second, in log depth. One entry twice where there is none on a side."""
    if not like:
        return None
    depth, length = run.model.depth, run.model.seq_len
    nearest = min((r.seq_len for r in like), key=lambda n: (abs(math.log(n / length)), n))
    ordered = sorted((r for r in like if r.seq_len == nearest), key=lambda r: r.depth)
    low = ([r for r in ordered if r.depth <= depth][-1:] or ordered[:1])[0]
    high = ([r for r in ordered if r.depth >= depth][:1] or ordered[-1:])[0]
    share = math.log(depth / low.depth) / math.log(high.depth / low.depth) if high != low else 0.0
    return low, high, share


def _between(low: RunSpeed, high: RunSpeed, share: float) -> Callable[[Callable[[RunSpeed], float]], float]:
    """A rate between two entries: a power law of the depth through both."""
    return lambda rate: math.exp((1 - share) * math.log(rate(low)) + share * math.log(rate(high)))


def _evaluation_speed(speed: RunSpeed) -> float:
    return speed.evaluation_flops_per_second or speed.flops_per_second


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
    start, status = int(folder.shared()["step"]), folder.status()
    per_image = spent(run, run.total_steps).flops / (run.train.batch * run.total_steps)
    speed = statistics.median(logged) * per_image
    flops, evaluated = training_flops(run, start), evaluation_flops(run, start)
    evaluating = status.get("seconds", {}).get("evaluation") or evaluated / speed
    return run_speed(
        run, machine, allotment, launch,
        flops_per_second=speed,
        evaluation_flops_per_second=evaluated / evaluating,
        other_seconds=max(0.0, seconds - flops / speed - evaluating),
        points=len(logged),
        peak_memory=status.get("peak_memory"),
    )  # fmt: skip


def run_speed(
    run: RunConfig, machine: Machine, allotment: Allotment, launch: LaunchConfig, **measured: Any
) -> RunSpeed:
    """An entry of a run on a machine.

    Args:
        measured: fields of the entry that say what was measured.
    """
    return RunSpeed(
        machine.name, allotment.threads, launch.processes, launch.machines, run.train.precision,
        run.model.depth, run.model.seq_len,
        settings=run_settings(run, allotment, launch),
        family=run.model.family,
        runs_per_gpu=allotment.per_gpu,
        closed_memory=closed_memory(run, machine, launch),
        **measured,
    )  # fmt: skip


def closed_memory(run: RunConfig, machine: Machine, launch: LaunchConfig) -> int:
    """``train_memory`` of one of a run's processes."""
    micro = micro_batch(run.train.batch, launch.machines * launch.processes, launch)
    device = "cuda" if gpu_groups(machine, launch) else "cpu"
    return train_memory(
        run.model, micro, run.train.precision, device, launch.attention, launch.recompute_activations,
        launch.machines * launch.processes if launch.shard else 1,
    )  # fmt: skip


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

    A token job logs no lines; it tells one speed of all its images at the end, each with all its views.
    """
    logged = logged_speeds(folder)
    speed = statistics.median(logged) if logged else folder.status().get("images_per_second")
    if speed is None or not speed > 0:
        return None
    if job == "tokens":
        speed *= cached_images(config.data) / cached_images(replace(config.data, views=1))
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
        host_memory=folder.status().get("host_memory"),
    )


def logged_speeds(folder: RunFolder) -> list[float]:
    """Images per second of every line of training."""
    found = [r.get("images_per_second") for r in folder.metrics("train")]
    return [speed for speed in found if speed is not None and finite(speed) and speed > 0]


def run_settings(run: RunConfig, allotment: Allotment, launch: LaunchConfig) -> Settings:
    """Of a run."""
    return Settings(
        run.train.batch,
        micro_batch(run.train.batch, launch.machines * launch.processes, launch),
        launch.compile,
        launch.attention,
        len(allotment.slots),
        recompute=launch.recompute_activations,
        shard=launch.shard,
    )


def image_settings(job: str, config: TokenizerRunConfig, launch: LaunchConfig) -> Settings:
    """Of a tokenizer or token job. The encoder's batch follows from the resolution."""
    train = config.train
    if job == "tokens":
        return Settings()
    return Settings(
        train.batch,
        micro_batch(train.batch, launch.processes, launch),
        lpips=train.lpips_weights is not None and train.perceptual > 0,
        adversarial=train.adversarial.weight > 0,
        random_sizes=train.random_sizes if config.tokenizer.quantizer == "scalable" else 0,
    )


def micro_batch(batch: int, processes: int, launch: LaunchConfig) -> int:
    """Images per forward pass and process."""
    share = -(-batch // processes)
    return min(launch.micro_batch or share, share)


def training_flops(run: RunConfig, start: int = 0) -> int:
    """FLOPs of a run's training after the first ``start`` steps."""
    return spent(run, run.total_steps).flops - spent(run, start).flops


def evaluation_flops(run: RunConfig, start: int = 0) -> float:
    """FLOPs of a run's evaluations after the first ``start`` steps."""
    assert run.data.val_images is not None  # RunConfig has checked it
    evaluations = sum(step > start for step in run.eval_steps)
    evaluated = evaluations * min(run.evaluation.images or run.data.val_images, run.data.val_images)
    return float(forward_flops(run.model) * evaluated)


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
