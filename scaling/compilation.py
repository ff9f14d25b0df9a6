"""Layers compiled by torch, each by itself: one small graph that serves all layers of a model (regional).

- Only a layer's teacher forcing is compiled. Names of parameters, and so checkpoints and weights, stay.
- A graph is compiled anew for the first change of a size, which from then on may take any value, so that
  random steps and smaller last batches need no more than a few. FlexAttention inside is padded to whole
  blocks, with one graph for each number of them. torch gives up at eight graphs; ``GRAPHS`` is room for all.
- Attention step by step and Mamba's scan are called from outside the graphs, which are then several to a
  layer. Nothing else breaks a layer's graph. Where activations are computed again such a layer has no graph
  at all: torch compiles nothing around a break inside of a checkpoint.
- Without CUDA graphs (``mode="reduce-overhead"``): see docs/results/speed.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from scaling.layers.mamba import Mamba

GRAPHS = 64
"""Graphs of a layer's code at most."""


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the layers of a family's model in place, when they are first called.

    Args:
        backend: torch's compiler.
    """
    allow_graphs()
    for module in model.modules():
        if isinstance(module, Mamba):
            module.keep_scan_from_compiler()
    for block in cast(nn.ModuleList, model.blocks):
        block.compile(backend=backend)


def allow_graphs() -> None:
    """Let torch compile the same code more than eight times before it gives up."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
