"""One optimiser step of a run: its micro-batches, its gradient, and what happens when memory runs out.

- Process r of W takes its share of the global batch's rows and splits it into micro-batches; the loss is
  divided by the global token count, so accumulation changes only rounding.
- Gradients are exchanged during the backward pass of the last micro-batch. Out of memory before that, a
  process begins its step anew with smaller ones, and the others wait for it in the exchange; out of memory
  there or in the optimiser, the job ends and starts again (``scaling.memory``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from scaling.clock import device_name
from scaling.config import ConfigError, LaunchConfig, RunConfig
from scaling.evaluation import per_scale
from scaling.families.registry import FAMILIES
from scaling.feeding import Drawn, Feed, KeptSplit, Split
from scaling.memory import MicroBatch, out_of_memory, release
from scaling.records import RunFolder

if TYPE_CHECKING:
    from scaling.trainer import State

MicroTokens = tuple[Tensor, Tensor, Tensor | None]
"""Tokens (b, L), labels (b,) after label drop, and drop-path factors (depth, 2, b)."""


class Batches:
    """This process's micro-batches of each global batch; to be closed.

    Args:
        kept: the split, if all its tokens are to be kept on the device.
    """

    def __init__(
        self,
        config: RunConfig,
        launch: LaunchConfig,
        accelerator: Accelerator,
        split: Split,
        folder: RunFolder,
        kept: KeptSplit | None = None,
    ) -> None:
        batch, world = config.train.batch, accelerator.num_processes
        if batch < world:
            raise ConfigError(f"train.batch {batch} is smaller than the {world} processes that share it")
        if launch.shard and batch % world:
            raise ConfigError(
                f"launch.shard needs as many images for each process: train.batch {batch} is not a multiple "
                f"of {world}"
            )
        shares = np.array_split(np.arange(batch), world)
        share, self._largest = shares[accelerator.process_index], len(shares[0])
        self._images = len(share)
        wanted = min(launch.micro_batch or self._largest, self._largest)
        self.micro = MicroBatch(folder.path, device_name(accelerator.device), wanted)
        self._feed = Feed(config, split, slice(share[0], share[-1] + 1), accelerator.device, kept)
        self._now: tuple[int, tuple[int, ...], Drawn] | None = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.close()

    @property
    def _counts(self) -> list[int]:
        """Images of each micro-batch."""
        # As many as the process with most rows takes, so that none waits long for the others.
        micros = min(-(-self._largest // self.micro.size), self._images)
        each, more = divmod(self._images, micros)
        return [each + 1] * more + [each] * (micros - more)

    def micro_batches(self, step: int, scales: tuple[int, ...]) -> list[MicroTokens]:
        """Tokens (b, L) of these scales, labels (b,) after label drop, and drop-path factors (depth, 2, b),
        on the device."""
        if self._now is None or self._now[:2] != (step, scales):
            self._now = (step, scales, self._feed.share(step, scales))
        counts, share = self._counts, self._now[2]
        if len(counts) == 1:
            return [(share.tokens, share.labels_b, share.path_scale)]
        paths: list[Tensor | None] = [None] * len(counts)
        if share.path_scale is not None:
            paths = [path.contiguous() for path in share.path_scale.split(counts, dim=2)]
        return list(zip(share.tokens.split(counts), share.labels_b.split(counts), paths, strict=True))


def train_step(state: State, batches: Batches, step: int, scales: tuple[int, ...]) -> dict[str, Tensor]:
    """One optimiser step on token maps of these sides; returns sums over this process's images, on the
    device. Out of memory, it begins anew with half as many images at a time."""
    accelerator = state.accelerator
    while (sums := _gradients(state, batches, step, scales)) is None:
        _give_way(state, batches)
    with batches.micro.final():
        norm = accelerator.clip_grad_norm_(state.model.parameters(), state.config.train.clip)
        sums["grad_norm"] = state.whole(norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
    return sums


def rehearse(state: State, batches: Batches) -> None:
    """Find out whether memory suffices for the longest step, before the processes depend on each other.

    A first micro-batch is trained on beside room for the optimiser's moments, and its gradient thrown away.
    Afterwards all processes take as few images at a time as the one that could take fewest.
    """
    accelerator, scales = state.accelerator, state.config.model.scales
    if state.sharded:  # they gather each layer together, so as many times
        _take_the_smallest(accelerator, batches)
    moments = 0 if state.optimizer.state else 2
    while not _fits(state, batches.micro_batches(0, scales)[0], scales, moments):
        _give_way(state, batches)
    state.bare.zero_grad()
    _take_the_smallest(accelerator, batches)


def _take_the_smallest(accelerator: Accelerator, batches: Batches) -> None:
    mine = torch.tensor([batches.micro.size], device=accelerator.device)
    batches.micro.size = int(accelerator.gather(mine).min())


def _fits(state: State, part: MicroTokens, scales: tuple[int, ...], moments: int) -> bool:
    """Whether a micro-batch can be trained on beside so many further copies of the weights."""
    try:
        room = [torch.empty_like(p) for p in state.names.values() for _ in range(moments)]
        with state.accelerator.no_sync(state.model):
            _loss(state, part, scales)[0].backward()
        del room
        return True
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False


def _gradients(
    state: State, batches: Batches, step: int, scales: tuple[int, ...]
) -> dict[str, Tensor] | None:
    """The gradient of the global batch; the sums. None when memory ran out, with an unknown part of the
    gradient there."""
    accelerator = state.accelerator
    shared = accelerator.num_processes > 1
    sums: dict[str, Tensor] = {}
    try:
        micro = batches.micro_batches(step, scales)
        for index, part in enumerate(micro):
            # Never forward with the exchange switched on: given up afterwards, it would begin in the next
            # backward pass, of whatever micro-batch.
            # (Sharded, every backward pass adds up where the slices belong: both contexts do nothing.)
            with accelerator.no_sync(state.model):
                loss, found = _loss(state, part, scales)
                if index < len(micro) - 1 or not shared:
                    accelerator.backward(loss)
            if index == len(micro) - 1 and shared:
                # The others wait in this exchange: it can be neither left nor begun again.
                with batches.micro.final(), accelerator.trigger_sync_in_backward(state.model):
                    accelerator.backward(loss)
            for key, value in found.items():
                sums[key] = sums[key] + value if key in sums else value
        return sums
    except Exception as error:
        if not out_of_memory(error):
            raise
        return None


def _give_way(state: State, batches: Batches) -> None:
    """After memory ran out: nothing of the attempt stays, and the next one is smaller. Not called while an
    error is handled, whose frames hold the tensors."""
    if state.sharded:  # the others wait for this process's part of a layer
        batches.micro.end_smaller()
    batches.micro.halve()
    state.bare.zero_grad()
    release()


def _loss(state: State, part: MicroTokens, scales: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, scaled so that gradients add up to the global mean's; sums over images."""
    accelerator, config = state.accelerator, state.config
    inputs, sizes = FAMILIES[config.model.family].inputs, tuple((side, side) for side in scales)
    tokens_BL, labels_B, path_scale = part
    with torch.no_grad():
        given = inputs(state.quantizer, tokens_BL, sizes)
    global_tokens = config.train.batch * sum(side * side for side in scales)
    # DDP averages gradients over processes, so each contributes its sum times their number.
    weight = accelerator.num_processes / global_tokens
    with accelerator.autocast():
        total, loss_BL, wrong_BL = state.model(labels_B, given, tokens_BL, path_scale, sizes, weight)
    sums: dict[str, Tensor] = {}
    for name, values_BL in (("loss", loss_BL), ("error", wrong_BL)):
        by_scale = per_scale(values_BL, scales).sum(dim=0)
        for which, value in (("avg", values_BL.mean(dim=1).sum()), ("last", by_scale[-1])):
            sums[f"{name}_{which}"] = value
    return total, sums
