"""Sampling as CUDA graphs: one per step of an image, replayed for every batch of the same shape.

Small models and small steps leave a GPU waiting for the next kernel to be asked for; a graph asks for all
kernels of a step at once. Not run on a GPU yet (docs/results/speed.md); on a CPU the same code runs without
graphs, through the same buffers.

- ``graphed(model)`` stands for the model where ``sample_tokens`` takes one. The first batch of a shape is
  sampled as usual, which makes all that is made once; the second is recorded; then graphs are replayed.
- What changes from batch to batch lies in buffers that stay: labels, each step's inputs and weight of
  guidance. Everything else, keys and values too, is made inside the first graph, in the graphs' own memory,
  which they share: they are only ever replayed in their order.
- A graph reads the weights where they were. Weights that have moved (another device or type, or
  ``half_weights`` entered anew) are recorded anew, so enter it once for many batches.
- Logits are overwritten by the next batch, and one batch must end before the next begins.

Shapes: B images, l tokens of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from scaling.config import require
from scaling.families.interface import Decoding, FamilyModel
from scaling.tokenizer.quantizer import Size

MOST = 2
"""Shapes that are kept: the batches' and that of a smaller last one."""


@dataclass
class _Step:
    """One step of a shape."""

    inputs: Tensor | None
    weight: Tensor
    """Of guidance, () in fp32."""
    run: Callable[[], Tensor]
    """Logits (B, l, V)."""


@dataclass
class _Record:
    """One shape: its buffers and, once recorded, its graphs."""

    labels_B: Tensor
    steps: list[_Step] = field(default_factory=list)
    made: Decoding | None = None
    """By the first step, of which it is a part."""
    pool: Any = None
    """The graphs' memory."""


@dataclass
class _Replayed(Decoding):
    """Where the sampling of a batch stands whose steps are recorded."""

    record: _Record = field(kw_only=True)


def graphed(model: FamilyModel) -> FamilyModel:
    """The model for ``sample_tokens``, on one device.

    Raises:
        ConfigError: a family whose steps make tensors on the CPU.
    """
    require(
        model.config.family != "flexvar-mamba",
        "flexvar-mamba cannot be sampled as CUDA graphs: its paths are made on the CPU",
    )
    return cast(FamilyModel, _Graphed(model))


class _Graphed:
    """The model with another ``begin`` and ``extend``."""

    def __init__(self, model: FamilyModel) -> None:
        self.model, self._records = model, dict[tuple[Any, ...], _Record]()

    def __getattr__(self, name: str) -> Any:
        """All else is the model's."""
        return getattr(self.model, name)

    def begin(self, labels_B: Tensor, sizes: Sequence[Size] | None = None, guided: bool = False) -> Decoding:
        """As the model's, for the first batch of a shape."""
        steps = self.config.sizes if sizes is None else tuple(sizes)
        places = tuple((p.data_ptr(), p.dtype) for p in cast(nn.Module, self.model).parameters())
        key = (len(labels_B), steps, guided, torch.is_autocast_enabled(labels_B.device.type), places)
        record = self._records.get(key)
        if record is None:
            while len(self._records) >= MOST:
                self._records.pop(next(iter(self._records)))
            self._records[key] = _Record(labels_B.clone())
            return self.model.begin(labels_B, steps, guided)
        record.labels_B.copy_(labels_B)
        empty = labels_B.new_empty(0)
        return _Replayed(steps, empty, [], [], guided, record=record)

    def extend(self, decoding: Decoding, inputs: Tensor | None, guidance: float = 0.0) -> Tensor:
        """As the model's."""
        if not isinstance(decoding, _Replayed):
            return self.model.extend(decoding, inputs, guidance)
        record, index = decoding.record, decoding.step
        decoding.step += 1
        if index == len(record.steps):
            record.steps.append(self._recorded(decoding, index, inputs, guidance))
        step = record.steps[index]
        if step.inputs is not None and inputs is not None:
            step.inputs.copy_(inputs)
        step.weight.fill_(guidance)
        return step.run()

    def _recorded(self, decoding: _Replayed, index: int, inputs: Tensor | None, guidance: float) -> _Step:
        record = decoding.record
        kept = None if inputs is None else inputs.clone()
        weight = torch.tensor(guidance, dtype=torch.float32, device=record.labels_B.device)

        def run() -> Tensor:
            if index == 0:
                record.made = self.model.begin(record.labels_B, decoding.sizes, decoding.guided)
            assert record.made is not None
            return self.model.extend(record.made, kept, cast(float, weight))

        if record.labels_B.device.type != "cuda":
            return _Step(kept, weight, run)
        graph = torch.cuda.CUDAGraph()
        with _without_cached_casts(), torch.cuda.graph(graph, pool=record.pool):
            logits_BlV = run()
        record.pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits_BlV

        return _Step(kept, weight, replay)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast casts anew inside: what it had cast before lies outside of the graphs' memory, and what it
    casts here must not be used outside."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
