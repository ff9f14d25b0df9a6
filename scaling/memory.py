"""Memory that runs out: what it looks like, and the micro-batch that fitted, kept for the run.

- The global batch is the config's and stays; only how many images go through the model at once shrinks, by
  halves down to one. Losses are sums over images divided by the global batch, so only rounding changes.
- Processes that share a batch need not agree on it: gradients are exchanged on the last micro-batch only,
  however many each process has. Memory mostly runs out at the longest step, so several processes rehearse
  that one first, throw its gradient away, and then take the smallest micro-batch that any of them found.
- Out of memory in the exchange itself, or in the optimiser, cannot be taken back in place, nor anywhere in a
  run that is divided among its processes (``scaling.sharding``). Then the job ends with its cause, and
  started again it knows the smaller micro-batch.
- ``memory.json`` keeps what was found, for the device on which it was found: another may have more.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from scaling.config import ConfigError
from scaling.process import MemoryShortError
from scaling.records import RecordsError, read_json, write_json

FILE = "memory.json"
WORDS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of plain ``RuntimeError``: torch's CPU allocator, the CUDA driver, cuBLAS."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that an allocation failed, on a GPU or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def release() -> None:
    """Give back what a failed attempt held; not within its ``except`` block, whose error holds it too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class MicroBatch:
    """How many images this process sends through the model at once, and how it shrinks.

    Args:
        folder: of the run.
        device: the device's name.
        wanted: images at once as long as memory lasts; fewer when the run has run out of it before.

    Raises:
        RecordsError: ``memory.json`` is not of its form.
    """

    def __init__(self, folder: Path, device: str, wanted: int) -> None:
        self._file, self._device = folder / FILE, device
        self.size = min(wanted, self._remembered() or wanted)

    def halve(self) -> None:
        """Go on with half as many, and remember that for the next start.

        Raises:
            ConfigError: there is nothing to halve.
        """
        if self.size == 1:
            raise ConfigError(
                f"out of memory on {self._device} with one image at a time; use a device with more memory, "
                "or fewer runs on it at once (--launch.runs-at-once)"
            )
        print(f"out of memory with {self.size} images at a time: now {self.size // 2}", file=sys.stderr)
        self.size //= 2
        known = self._remembered()
        if known is None or self.size < known:  # a process beside this one may have found less
            write_json(self._file, {"device": self._device, "micro_batch": self.size})

    @contextlib.contextmanager
    def final(self) -> Iterator[None]:
        """Around what cannot be taken back: out of memory there, the job ends, and the next starts smaller.

        Raises:
            MemoryShortError: out of memory.
            ConfigError: out of memory with one image at a time.
        """
        try:
            yield
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.end_smaller()

    def end_smaller(self) -> NoReturn:
        """End the job, whose next start takes half as many images. Raises as ``final``."""
        size = self.size
        self.halve()
        raise MemoryShortError(
            f"out of memory on {self._device} with {size} images at a time; to go on with {self.size}"
        ) from None

    def _remembered(self) -> int | None:
        if not self._file.exists():
            return None
        value = read_json(self._file)
        if not isinstance(value, dict) or not isinstance(value.get("micro_batch"), int):
            raise RecordsError(
                f"{self._file}: expected an object with a micro_batch; remove it to start anew"
            )
        return max(1, value["micro_batch"]) if value.get("device") == self._device else None
