"""Which attention back end a run uses: chosen once, by timing the run's own shapes on its GPU, and kept.

- ``launch.attention: auto`` on a GPU: the main process calls every back end, forwards and backwards, on noise
  of the run's micro-batch, steps and precision, and takes the fastest. ``attention.json`` in the run's
  folder keeps the choice: back ends round differently, and a run that goes on must round as it did before.
- Before it is timed, a back end must be as near to attention in fp64 as the reference is (``masked``),
  outputs and gradients. One that is not, or that fails on this machine (no compiler, an unknown device), is
  out, and the file says why.
- A run that was begun without a choice goes on with the rule of that time; one that branches off a trunk
  takes the trunk's.
- On a CPU the rule holds: ``blockwise``, faster at every size that was measured (docs/results/speed.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from scaling.clock import device_name
from scaling.config import ConfigError, LaunchConfig, RunConfig
from scaling.layers.attention import Backend, back_end, block_causal
from scaling.memory import out_of_memory, release
from scaling.records import RecordsError, RunFolder, read_json, write_json

FILE = "attention.json"
REFERENCE: Backend = "masked"
CANDIDATES: tuple[Backend, ...] = ("masked", "blockwise", "flex")
"""The reference first: of equally fast ones the earlier is taken."""
ROUNDS, CALLS = 5, 10
"""Timings of each, in turn, and calls of each timing."""
MARGIN = 0.97
"""A back end must take less than this share of the reference's time: less is noise."""
SLACK = 4.0
"""An error may be so many times the reference's: kernels add up in different orders."""
PROBES = 2
"""Images that errors are measured on."""
START_SCALE = 4.0
"""Of the scores, with normalised queries and keys (``SelfAttention``)."""


class NotExactError(RuntimeError):
    """A back end that does not compute what the reference does."""


@dataclass(frozen=True)
class Shape:
    """What is timed: a run's attention in one layer."""

    images: int
    heads: int
    head_width: int
    sizes: tuple[tuple[int, int], ...]
    kind: torch.dtype
    device: torch.device

    def draw(self, images: int) -> list[Tensor]:
        """q and k of unit length, q times a learned scale's start, v, and a gradient: (B, H, L, E) each."""
        shape = (4, images, self.heads, sum(h * w for h, w in self.sizes), self.head_width)
        generator = torch.Generator(self.device).manual_seed(0)
        drawn = torch.randn(shape, generator=generator, device=self.device)
        drawn[:2] = torch.nn.functional.normalize(drawn[:2], dim=-1)
        drawn[0] *= START_SCALE
        return list(drawn.to(self.kind))


Timer = Callable[[Shape, Backend], float]
"""Seconds of one call, forwards and backwards; any error if the back end cannot be used."""


def choose_attention(
    folder: RunFolder,
    config: RunConfig,
    launch: LaunchConfig,
    accelerator: Accelerator,
    trunk: RunFolder | None = None,
    timer: Timer | None = None,
) -> Backend:
    """The back end of a run, the same in all its processes, each of which calls this.

    Args:
        trunk: the run that this one may branch off.
        timer: in place of real timings.

    Raises:
        ConfigError: a back end was asked for that cannot train on this device.
        RecordsError: ``attention.json`` is not of its form.
    """
    device = accelerator.device
    if launch.attention == "flex" and device.type == "cpu":
        raise ConfigError(
            "launch.attention flex needs a GPU: torch's FlexAttention has no gradients on a CPU; use auto, "
            "masked or blockwise"
        )
    if launch.attention != "auto" or config.model.family in ("raster", "flexvar-mamba"):
        return back_end(launch.attention, device)
    if device.type == "cpu" and timer is None:
        return back_end("auto", device)
    index = 0
    if accelerator.is_main_process:
        kept = _kept(folder)
        if kept is None and trunk is not None and (kept := _kept(trunk)) is not None:
            # Of its own from now on: with a checkpoint and no choice it would be taken for an older run.
            write_json(folder.path / FILE, {"back_end": kept, "from": trunk.name})
        if kept is None:
            kept = _measured(folder, config, launch, accelerator, timer or seconds_of)
        index = CANDIDATES.index(kept)
    if accelerator.num_processes > 1:
        told = torch.tensor([index], device=device)
        index = int(accelerator.reduce(told, reduction="sum").item())  # the others add 0
    return CANDIDATES[index]


def _kept(folder: RunFolder) -> Backend | None:
    """What was chosen when the run began; None for one that is to begin."""
    file = folder.path / FILE
    if not file.exists():
        return REFERENCE if folder.checkpoints.exists() and any(folder.checkpoints.iterdir()) else None
    value = read_json(file)
    if not isinstance(value, dict) or value.get("back_end") not in CANDIDATES:
        raise RecordsError(
            f"{file}: expected an object with a back_end ({', '.join(CANDIDATES)}); remove it to choose anew"
        )
    return cast(Backend, value["back_end"])


def _measured(
    folder: RunFolder, config: RunConfig, launch: LaunchConfig, accelerator: Accelerator, timer: Timer
) -> Backend:
    """Time all, record the choice."""
    share = -(-config.train.batch // accelerator.num_processes)
    model = config.model
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    shape = Shape(
        images=min(launch.micro_batch or share, share), heads=model.heads,
        head_width=model.width // model.heads, sizes=model.sizes, kind=kinds[config.train.precision],
        device=accelerator.device,
    )  # fmt: skip
    seconds, failed = calibrate(shape, timer)
    chosen = fastest(seconds)
    facts: dict[str, Any] = {
        "back_end": chosen,
        "seconds": seconds,
        "failed": failed,
        "device": device_name(accelerator.device),
        "torch": torch.__version__,
        "images": shape.images,
        "precision": config.train.precision,
    }
    write_json(folder.path / FILE, facts)
    return chosen


def calibrate(shape: Shape, timer: Timer) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of every back end that works here, and why the others do not.

    Raises:
        Exception: of the reference, unless it ran out of memory.
    """
    seconds, failed = dict[str, float](), dict[str, str]()
    rounds: dict[Backend, list[float]] = {name: [] for name in CANDIDATES}
    for turn in range(ROUNDS):
        for name in [name for name in CANDIDATES if name not in failed]:
            try:
                if turn == 0:
                    check(shape, name)
                rounds[name].append(timer(shape, name))
            except Exception as error:  # whatever a compiler may raise: the run can do without this one
                if name == REFERENCE and not out_of_memory(error):
                    raise
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    release()
    for name, found in rounds.items():
        if name not in failed:
            seconds[name] = statistics.median(found)
    return seconds, failed


def fastest(seconds: Mapping[str, float]) -> Backend:
    """The reference, unless another takes clearly less time; also if none could be timed."""
    best = min(seconds, key=lambda name: seconds[name], default=REFERENCE)
    bound = MARGIN * seconds.get(REFERENCE, float("inf"))
    return cast(Backend, best) if seconds.get(best, float("inf")) < bound else REFERENCE


def check(shape: Shape, name: Backend) -> None:
    """Compare with attention in fp64.

    Raises:
        NotExactError: the error of the output or of a gradient is more than ``SLACK`` times the reference's.
    """
    given = shape.draw(min(PROBES, shape.images))
    exact = _results(shape, REFERENCE, [x.double() for x in given])
    found = _results(shape, name, given)
    reference = _results(shape, REFERENCE, given)
    least = torch.finfo(shape.kind).eps
    what_of = ("outputs", "gradients of q", "gradients of k", "gradients of v")
    for what, one, other, true in zip(what_of, found, reference, exact, strict=True):
        size = float(true.norm())
        error, usual = (float((x - true).norm()) / size for x in (one, other))
        if not error <= SLACK * max(usual, least):
            raise NotExactError(f"{what} are off by {error:.1e}, those of {REFERENCE} by {usual:.1e}")


def _results(shape: Shape, name: Backend, given: list[Tensor]) -> list[Tensor]:
    """Output and gradients, in fp64."""
    q, k, v = (x.detach().requires_grad_() for x in given[:3])
    attend = block_causal(shape.sizes, name, shape.device)
    out = attend(q, k, v, 1.0)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, (q, k, v), given[3]))]


def seconds_of(shape: Shape, name: Backend) -> float:
    """Seconds of one call, forwards and backwards; the first call of all compiles."""
    *given, grad = shape.draw(shape.images)
    q, k, v = (x.requires_grad_() for x in given)
    attend = block_causal(shape.sizes, name, shape.device)

    def calls(count: int) -> float:
        _wait(shape.device)
        start = time.perf_counter()
        for _ in range(count):
            torch.autograd.grad(attend(q, k, v, 1.0), (q, k, v), grad)
        _wait(shape.device)
        return (time.perf_counter() - start) / count

    calls(1)
    return calls(CALLS)


def _wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
