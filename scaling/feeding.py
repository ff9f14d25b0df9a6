"""What each training step feeds the model, brought to the device without making it wait.

- A step's images, label drops and drop paths are a pure function of the step, so on a GPU a thread draws
  those of the next step while this one is computed; in particular while a log point waits for the device.
- They lie in pinned memory: a copy from any other makes the host wait until the device has done all that was
  asked of it before, in every step.
- Tokens travel as 16 bits and are widened on the device.
- Where they are small beside the device's memory all tokens of the run are kept there, and only the numbers
  of the images travel (``kept_on_device``).
- On a CPU nothing is gained by any of that (``benchmarks.loader``): there the loop draws its batch itself.
- What is drawn is the process's whole share of the batch: a step that is taken again in smaller micro-batches
  has nothing to draw again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from scaling.config import LaunchConfig, RunConfig
from scaling.data.sampler import Int64, batch_indices, batch_views
from scaling.data.shards import UInt16
from scaling.draws import step_draws
from scaling.steps import step_scales, token_columns

DEVICE_SHARE = 0.04
"""Of a GPU's memory that the tokens of all runs on it may take. 1.3 million images of 680 are 1.7 GB."""


class Split(Protocol):
    """Tokens and labels of images."""

    images: int
    labels: Int64

    def tokens(self, indices: Int64, views: Int64 | int = 0) -> UInt16:
        """Token ids (B, L)."""
        ...


class KeptSplit(Split, Protocol):
    """Tokens that can be had all at once."""

    @property
    def nbytes(self) -> int:
        """Of all tokens."""
        ...

    def rows(self, indices: Int64, views: Int64 | int = 0) -> Int64:
        """Where the tokens of these images stand in ``everything``."""
        ...

    def everything(self) -> Sequence[UInt16]:
        """All tokens, in parts (n, L)."""
        ...


class Drawn(NamedTuple):
    """A process's share of one step, b images."""

    tokens: Tensor
    """int16 (b, L), the bits of unsigned ones; or, of tokens kept on the device, int64 (b,) row numbers."""
    labels_b: Tensor
    """After label drop."""
    path_scale: Tensor | None
    """Factors of drop path (depth, 2, b)."""


def draws_ahead(device: torch.device) -> bool:
    """Whether a thread draws the next step's share on this kind of device."""
    return device.type == "cuda"


def kept_on_device(config: RunConfig, launch: LaunchConfig, split: KeptSplit, device: torch.device) -> bool:
    """Whether all training tokens go to the device before the first step.

    They do on a GPU that has room for them (``DEVICE_SHARE``, divided among the runs that share it), in a run
    that reads them all at least once: a shorter one would wait for tokens that it never sees.
    """
    if device.type != "cuda":
        return False
    room = DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return worth_keeping(config, split, room / (launch.runs_per_gpu or 1))


def worth_keeping(config: RunConfig, split: KeptSplit, room: float) -> bool:
    """``kept_on_device``, with so many bytes of room."""
    return split.nbytes <= room and config.total_steps * config.train.batch >= split.images


class Feed:
    """Draws steps for one process; ``close`` it, or its thread lives on.

    Args:
        share: the process's rows of the global batch.
        kept: the split whose tokens are all copied to the device now; None to read each step's.
    """

    def __init__(
        self, config: RunConfig, split: Split, share: slice, device: torch.device, kept: KeptSplit | None
    ) -> None:
        self._config, self._split, self._share, self._device = config, split, share, device
        self._kept = kept
        self._whole = None if kept is None else _all_tokens(kept, device)
        # A thread pins its memory for the device that is current in it.
        enter = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "feed", enter) if draws_ahead(device) else None
        self._next: tuple[int, tuple[int, ...], Future[Drawn]] | None = None

    def share(self, step: int, scales: tuple[int, ...]) -> Drawn:
        """This process's images of a step, tokens (b, L) of these scales, on the device.

        Raises what went wrong in the thread.
        """
        ahead, self._next = self._next, None
        if ahead is not None and ahead[:2] == (step, scales):
            drawn = ahead[2].result()
        else:
            drawn = self._drawn(step, scales)
        if self._pool is not None and step + 1 < self._config.total_steps:
            following = step_scales(self._config.model, self._config.seed, step + 1)
            self._next = (step + 1, following, self._pool.submit(self._drawn, step + 1, following))
        if self._device.type == "cpu" and self._whole is None:
            return drawn._replace(tokens=_widened(drawn.tokens))
        send = partial(Tensor.to, device=self._device, non_blocking=True)
        tokens = send(drawn.tokens)
        if self._whole is not None:
            tokens = self._whole.index_select(0, tokens)
            if (columns := self._columns(scales)) is not None:
                tokens = tokens.index_select(1, send(self._pinned(columns)))
        path_scale = None if drawn.path_scale is None else send(drawn.path_scale)
        return Drawn(_widened(tokens), send(drawn.labels_b), path_scale)

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _drawn(self, step: int, scales: tuple[int, ...]) -> Drawn:
        """In main memory; a pure function."""
        config, n, share = self._config, self._split.images, self._share
        batch, seed = config.train.batch, config.seed
        indices_b = batch_indices(seed, step, batch, n)[share]
        views_b = batch_views(step, batch, n, config.data.views)[share]
        draws = step_draws(config.model, seed, step, batch)
        labels_b = np.where(draws.drop_label[share], config.model.num_classes, self._split.labels[indices_b])
        tokens: np.ndarray
        if self._kept is not None:
            tokens = self._kept.rows(indices_b, views_b)
        else:
            tokens = self._split.tokens(indices_b, views_b)
            if (columns := self._columns(scales)) is not None:
                tokens = tokens[:, columns]
            tokens = tokens.view(np.int16)
        path_scale = None if draws.path_scale is None else self._pinned(draws.path_scale[:, :, share])
        return Drawn(self._pinned(tokens), self._pinned(labels_b), path_scale)

    def _columns(self, scales: tuple[int, ...]) -> Int64 | None:
        cached = self._config.tokenizer.scales
        return None if scales == cached else token_columns(cached, scales)

    def _pinned(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _widened(tokens: Tensor) -> Tensor:
    """16 bits without a sign as int64, by operations that every device has."""
    return tokens.long().bitwise_and_(0xFFFF)


def _all_tokens(split: KeptSplit, device: torch.device) -> Tensor:
    """int16 (rows, L) on the device; beside it main memory holds one part at a time."""
    parts = split.everything()
    whole = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=torch.int16, device=device)
    start = 0
    for part in parts:
        whole[start : start + len(part)] = torch.from_numpy(part.view(np.int16).copy())
        start += len(part)
    return whole
