"""The Mamba mixer (2312.00752, figure 3), which takes the place of attention and goes along a zigzag path.

    x, z = W_in input;   u = SiLU(causal depthwise convolution of x);   Δ low, B, C = W_x u
    Δ = softplus(W_Δ Δlow + bias);   y = selective scan of u;   output = W_out (y · SiLU(z))

- Tokens are brought into the order of the path before the first matrix and back after the last, where they
  are narrowest; convolution and scan both run along the path, over the ends of steps.
- What goes on from step to step is the convolution's last inputs and the state of the scan. Every step has
  the same path in both cases, so that a step after the others is what it is among them.
- As in Mamba, Δ has rank ⌈w/16⌉, A starts at −1, −2, …, −N in every channel (S4D-real), D at 1, and the
  bias of Δ so that Δ starts between 0.001 and 0.1, evenly on a log scale. Scan and Δ are in fp32.

Shapes: B images, L tokens (l of one step), W width, E = expand·W channels, N numbers of state per channel,
R rank of Δ, K taps of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.flops import delta_rank
from scaling.layers.selective_scan import selective_scan

DELTA_RANGE = (1e-3, 1e-1)
"""Of Δ at the start."""


@dataclass
class ScanPlace:
    """How a mixer's tokens follow each other, and where its scan stands."""

    order_L: Tensor
    """Indices in the order of the path (``scaling.layers.zigzag``)."""
    inverse_L: Tensor
    tail_BEK: Tensor | None = None
    """The convolution's last K − 1 inputs; None before the first token."""
    state_BEN: Tensor | None = None
    """The state of the scan; None before the first token."""
    goes_on: bool = False
    """Whether a step follows that starts from where this one ends. Else nothing is written here, and a layer
    can be computed a second time."""


class Mamba(nn.Module):
    """The mixer. It writes into its place what the next step starts from, if there is one.

    Args:
        width: of the tokens, W.
        state: numbers of state per channel, N.
        expand: channels per width.
        taps: of the convolution, K.
    """

    NO_DECAY = ("A_log",)

    def __init__(self, width: int, state: int = 16, expand: int = 2, taps: int = 4) -> None:
        super().__init__()
        channels, self.rank = expand * width, delta_rank(width)
        self.input = nn.Linear(width, 2 * channels, bias=False)
        self.taps = nn.Parameter(torch.empty(channels, 1, taps))
        self.taps_bias = nn.Parameter(torch.zeros(channels))
        self.selection = nn.Linear(channels, self.rank + 2 * state, bias=False)
        self.delta = nn.Linear(self.rank, channels, bias=False)
        self.delta_bias = nn.Parameter(torch.empty(channels))  # apart, so that it is added in fp32
        self.A_log = nn.Parameter(torch.empty(channels, state))
        self.D = nn.Parameter(torch.ones(channels))
        self.out = nn.Linear(channels, width, bias=False)
        self.scan = selective_scan
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """What is Mamba's own; the other matrices start as those of every layer."""
        channels, states = self.A_log.shape
        bound = 1 / math.sqrt(self.taps.shape[-1])
        self.taps.uniform_(-bound, bound)
        self.delta.weight.uniform_(-1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))
        low, high = (math.log(delta) for delta in DELTA_RANGE)
        start_E = torch.rand(channels, device=self.D.device).mul_(high - low).add_(low).exp_()
        self.delta_bias.copy_(start_E + torch.log(-torch.expm1(-start_E)))  # softplus of it is start_E
        self.A_log.copy_(torch.arange(1, states + 1, device=self.D.device).log().expand(channels, states))

    def forward(self, x_BLW: Tensor, place: ScanPlace) -> Tensor:
        """What every token gets of those before it on the path, (B, L, W)."""
        x_BLE, z_BLE = self.input(x_BLW.index_select(1, place.order_L)).chunk(2, dim=-1)
        u_BLE = F.silu(self._convolved(x_BLE, place))
        low_BLR, B_BLN, C_BLN = self.selection(u_BLE).split([self.rank, *2 * self.A_log.shape[1:]], dim=-1)
        delta_BLE = F.softplus(self.delta(low_BLR).float() + self.delta_bias)
        y_BLE, state_BEN = self.scan(
            u_BLE, delta_BLE, -self.A_log.float().exp(), B_BLN, C_BLN, self.D, place.state_BEN
        )
        if place.goes_on:
            place.state_BEN = state_BEN
        mixed_BLW: Tensor = self.out(y_BLE.to(z_BLE.dtype) * F.silu(z_BLE))
        return mixed_BLW.index_select(1, place.inverse_L)

    def keep_scan_from_compiler(self) -> None:
        """Unrolled, its loops would be compiled for minutes; the layer is compiled around them.

        Not a decorator of the scan: that imports the compiler, a second, in every command that draws.
        """
        self.scan = torch.compiler.disable(selective_scan)

    def _convolved(self, x_BLE: Tensor, place: ScanPlace) -> Tensor:
        """Each channel with its own K taps, over the token itself and the K − 1 before it."""
        before, x_BEL = self.taps.shape[-1] - 1, x_BLE.transpose(1, 2)
        if place.tail_BEK is None:
            x_BEL = F.pad(x_BEL, (before, 0))
        else:
            x_BEL = torch.cat([place.tail_BEK, x_BEL], dim=2)
        if place.goes_on:
            place.tail_BEK = x_BEL[:, :, x_BEL.shape[2] - before :]
        return F.conv1d(x_BEL, self.taps, self.taps_bias, groups=len(self.taps)).transpose(1, 2)
