"""The machine's part of a run: what must not change its result beyond rounding, and is no part of its id.

Micro-batch, processes, threads, compilation, trackers, the pictures left at the end. Imported by others from
``scaling.config``. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from scaling.schema import require

Device = Literal["auto", "cpu", "cuda"]
DrawnIn = Literal["fp32", "bf16"]
Tracker = Literal["wandb", "trackio", "tensorboard"]
WandbMode = Literal["auto", "offline", "online"]


@dataclass(frozen=True)
class SamplingConfig:
    """The pictures that a finished run leaves beside its numbers."""

    images: int = 16
    """0 for none."""
    guidance: float = 1.5
    """Classifier-free guidance t: logits + t·(logits − unconditional ones); 0 for none."""
    guidance_form: Literal["ramp", "constant"] = "ramp"
    """ramp: t rises linearly over the steps from 0 (VAR); constant: as it is (LlamaGen, whose cfg is 1 + t;
    raster always)."""
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    precision: DrawnIn = "fp32"
    """Of model and decoder. bf16 is faster and draws other, equally good pictures."""

    def __post_init__(self) -> None:
        require(self.images >= 0, f"sampling.images must not be negative, got {self.images}")
        require(self.guidance >= 0, f"sampling.guidance must not be negative, got {self.guidance}")
        require(self.top_k >= 0, f"sampling.top_k must not be negative, got {self.top_k}")
        require(0 <= self.top_p <= 1, f"sampling.top_p must be 0 to 1, got {self.top_p}")


@dataclass(frozen=True)
class LaunchConfig:
    """The machine's part: nothing here changes a result beyond rounding, or a run's id."""

    processes: int = 1
    """Processes (GPUs) per run, on each machine."""
    machines: int = 1
    """Machines that share every run: the same command is started on each, on one shared root."""
    machine_rank: int = 0
    """Which of them this one is; 0 leads, decides what runs next and keeps the records."""
    main_address: str | None = None
    """Host name or address of machine 0, as the others reach it."""
    main_port: int = 29500
    """A free port of machine 0."""
    micro_batch: int | None = None
    """Images per forward pass and process; None for the whole share of the global batch."""
    threads: int | None = None
    """CPU threads per process; None divides the cores among the runs at once."""
    runs_at_once: int | None = None
    """Runs trained side by side; None for as many as cores or GPUs, and memory, allow."""
    runs_per_gpu: int | None = None
    """Runs that share each GPU; None for what 'plan --calibrate' found to end the sweep soonest, else 1."""
    device: Device = "auto"
    compile: bool = False
    recompute_activations: bool = False
    """Activation checkpointing: training keeps only what goes into each layer, and computes the rest again
    in the backward pass. The same numbers from a fraction of the memory, for up to a third more work; the
    FLOPs in the records are the model's either way."""
    shard: bool = False
    """Divide a run's weights, gradients and moments among its processes (FSDP2), for models that do not fit
    one GPU; each needs all weights only while it evaluates. Checkpoints are the same with and without."""
    attention: Literal["auto", "masked", "blockwise", "flex"] = "auto"
    """masked: one fused call over all pairs of tokens; blockwise: step by step, without masked work; flex:
    FlexAttention, on GPUs; auto: blockwise on a CPU, on a GPU what is fastest there for the run's first step
    (``benchmarks.training`` shows the difference). A run keeps its choice: attention.json."""
    checkpoint_seconds: float = 120.0
    """At most this much work is lost to a kill."""
    retries: int = 2
    """How often a job that crashed, was killed or hung is started again without having got further since."""
    retry_seconds: float = 10.0
    """Pause before the first of these; it doubles each time. Other runs go on meanwhile."""
    retry_diverged: bool = False
    """Train a run whose loss diverged once more, from its last checkpoint but one. Only what is not
    deterministic (rounding on a GPU, a faulty device) can make it end otherwise: on a CPU nothing does."""
    hang_seconds: float = 1800.0
    """A job without any progress for so long is ended, with all its processes, and tried again."""
    log_every: int = 10
    """Steps between lines of training loss and speed."""
    trackers: tuple[Tracker, ...] = ()
    """Where a copy of the records goes while a run trains; 'run_sweep.py sync' makes one afterwards."""
    tracker_project: str = "varscale"
    """The project there, of every tracker."""
    wandb_mode: WandbMode = "auto"
    """auto: online with a key (WANDB_API_KEY or 'wandb login'), else offline files in the run's folder."""
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self) -> None:
        require(self.processes >= 1, f"launch.processes must be at least 1, got {self.processes}")
        require(self.machines >= 1, f"launch.machines must be at least 1, got {self.machines}")
        require(
            0 <= self.machine_rank < self.machines,
            f"launch.machine_rank must be 0 to {self.machines - 1} with {self.machines} machines, "
            f"got {self.machine_rank}",
        )
        require(
            self.machines == 1 or self.main_address is not None,
            f"launch.main_address (the host name of machine 0) is needed for {self.machines} machines",
        )
        require(
            self.machines == 1 or self.runs_at_once in (None, 1),
            f"launch.runs_at_once must be 1 when {self.machines} machines share a run, "
            f"got {self.runs_at_once}",
        )
        require(1 <= self.main_port <= 65535, f"launch.main_port must be 1 to 65535, got {self.main_port}")
        require(
            self.micro_batch is None or self.micro_batch >= 1,
            f"launch.micro_batch must be at least 1, got {self.micro_batch}",
        )
        for name in ("threads", "runs_at_once", "runs_per_gpu"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"launch.{name} must be at least 1, got {value}")
        require(self.retries >= 0, f"launch.retries must not be negative, got {self.retries}")
        require(
            self.retry_seconds >= 0, f"launch.retry_seconds must not be negative, got {self.retry_seconds}"
        )
        require(self.hang_seconds > 0, f"launch.hang_seconds must be positive, got {self.hang_seconds}")
        require(self.log_every >= 1, f"launch.log_every must be at least 1, got {self.log_every}")
        twice = sorted({name for name in self.trackers if self.trackers.count(name) > 1})
        require(not twice, f"launch.trackers names {', '.join(twice)} more than once")
        # It becomes part of addresses and of file names.
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.tracker_project) is not None,
            "launch.tracker_project must be of letters, digits, '.', '_' and '-', "
            f"got {self.tracker_project!r}",
        )
