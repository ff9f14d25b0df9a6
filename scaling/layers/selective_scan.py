"""The selective scan of Mamba (S6, 2312.00752, algorithm 2), in plain torch and fused where that is installed.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,      y_t = C_t · h_t + D u_t

- Every channel has a state of its own; Δ, B and C depend on the token, A and D do not.
- ``sequential_scan`` is this definition, token by token, for tests and as the yardstick of speed.
- ``selective_scan`` is what models call. It goes through the tokens in segments; within a segment all
  decays and inputs are made at once and a two-level scan runs over chunks of about √segment tokens: all
  chunks side by side from a zero state, then the states from chunk to chunk, then every chunk is given the
  state before it. It only ever multiplies decays, each at most 1, and never divides by their products,
  so that a long decay becomes 0 and not infinity.
- Memory: the backward pass computes the states again, segment by segment. A layer keeps Δ, Δu, B, C and
  one state per segment; while it runs there are up to six tensors of segment · B · N · E numbers,
  ``SEGMENT_NUMBERS`` each, instead of several of L · B · N · E.
- On the CPU a single token's numbers fill the vector units, so a segment there is as long as the cache
  holds and is scanned without chunks; the speed comes from making the decays of many tokens at once and
  from not keeping them.
- In fp32 whatever the autocast type, or in float64 if an argument is.

Shapes: B images, L tokens, E channels, N numbers of state per channel; T tokens of a segment.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SEGMENT_NUMBERS = {"cpu": 2**20, "other": 2**26}
"""Numbers in one temporary tensor: 4 MiB, near a core's caches, or 256 MiB, enough to fill a GPU."""
SHORTEST_SEGMENT = 8
"""Tokens: the states kept for the backward pass are at most N/8 times as large as u."""


def selective_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    initial_BEN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, L, E) and the state after the last token (B, E, N), in fp32 (float64 if an argument is).

    Args:
        u_BLE: the sequence.
        delta_BLE: step sizes Δ, not negative.
        A_EN: decay rates, not positive.
        B_BLN: what a token writes into the state.
        C_BLN: what a token reads of the state.
        D_E: the weight of the token itself.
        initial_BEN: the state before the first token; None for zeros.

    The fused kernel, used on a GPU where ``mamba_ssm`` is installed, knows no initial state and gives the
    last state no gradient; a scan with an initial state runs in plain torch.
    """
    arguments = (u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in arguments), torch.float32)
    u, delta, A, B, C, D = (x.to(dtype) for x in arguments)
    if initial_BEN is None:
        fused = _fused_kernel() if u.is_cuda and dtype == torch.float32 else None
        if fused is not None:
            return _fused_scan(fused, u, delta, A, B, C, D)
        initial_BEN = u.new_zeros(u.shape[0], *A.shape)
    y_LBE, last_BNE = _Scan.apply(
        delta.transpose(0, 1).contiguous(), (delta * u).transpose(0, 1).contiguous(), A.t().contiguous(),
        B.transpose(0, 1), C.transpose(0, 1), initial_BEN.to(dtype).transpose(1, 2).contiguous(), _plan,
    )  # fmt: skip
    return y_LBE.transpose(0, 1) + D * u, last_BNE.transpose(1, 2)


def sequential_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    initial_BEN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``selective_scan``, word for word as it is defined; autograd keeps the state of every token."""
    state_BEN = u_BLE.new_zeros(u_BLE.shape[0], *A_EN.shape) if initial_BEN is None else initial_BEN
    outputs = []
    for t in range(u_BLE.shape[1]):
        decay_BEN = torch.exp(delta_BLE[:, t, :, None] * A_EN)
        written_BEN = (delta_BLE[:, t] * u_BLE[:, t])[:, :, None] * B_BLN[:, t, None, :]
        state_BEN = decay_BEN * state_BEN + written_BEN
        outputs.append((C_BLN[:, t, None, :] * state_BEN).sum(2) + D_E * u_BLE[:, t])
    return torch.stack(outputs, dim=1), state_BEN


# -- in plain torch: tokens first, channels last, so that every operation runs along memory ------------------


def _plan(numbers_per_token: int, length: int, device: torch.device) -> tuple[int, int]:
    """(tokens of a segment, tokens of a chunk) on this device."""
    numbers = SEGMENT_NUMBERS["cpu" if device.type == "cpu" else "other"]
    segment = min(length, max(SHORTEST_SEGMENT, numbers // numbers_per_token))
    return segment, segment if device.type == "cpu" else math.isqrt(segment - 1) + 1


def _scan_(x: Tensor, factor: Tensor, carry: Tensor, chunk: int, reverse: bool = False) -> Tensor:
    """In place along the first axis x_t ← x_t + factor_t · x_{t-1}, from ``carry``; returns the last x.

    Args:
        chunk: tokens scanned one after another, side by side with those of the other chunks; what is
            left over, or fewer tokens than two chunks, is scanned token by token.
        reverse: from the last token to the first, x_t ← x_t + factor_t · x_{t+1}.
    """

    def in_order(views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return views[::-1] if reverse else views

    length = len(x)
    whole = length // chunk * chunk if length >= 2 * chunk else 0
    if whole:
        part = slice(length - whole, length) if reverse else slice(0, whole)
        steps = in_order(x[part].unflatten(0, (-1, chunk)).unbind(1))
        factors = in_order(factor[part].unflatten(0, (-1, chunk)).unbind(1))
        products = [factors[0]]
        for i in range(1, chunk):
            steps[i].addcmul_(factors[i], steps[i - 1])
            products.append(factors[i] * products[-1])
        first = carry
        for end, product in zip(in_order(steps[-1].unbind(0)), in_order(products[-1].unbind(0)), strict=True):
            carry = end.addcmul_(product, carry)
        ends = steps[-1]
        before = torch.cat([ends[1:], first[None]] if reverse else [first[None], ends[:-1]])
        for step, product in zip(steps[:-1], products[:-1], strict=True):
            step.addcmul_(product, before)
    rest = slice(0, length - whole) if reverse else slice(whole, length)
    for token, token_factor in zip(in_order(x[rest].unbind(0)), in_order(factor[rest].unbind(0)), strict=True):
        carry = token.addcmul_(token_factor, carry)
    return carry


class _Scan(torch.autograd.Function):
    """C_t · h_t (L, B, E) and the last state (B, N, E) from Δ and Δu (L, B, E), A (N, E), B and C (L, B, N).

    Backward, with g_t the gradient of h_t: g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}, a scan from the end;
    then dC_t = h_t dy_t, dB_t = g_t Δu_t, d(Δu)_t = B_t · g_t, and with q_t = g_t exp(Δ_t A) h_{t-1}
    dΔ_t = Σ_n q_t A, dA = Σ_t q_t Δ_t.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Segment by segment, from the first; keeps the state before each."""
        delta_LBE, written_LBE, A_NE, B_LBN, C_LBN, carry_BNE, plan = arguments
        length = len(delta_LBE)
        ctx.segment, ctx.chunk = plan(carry_BNE.numel(), length, carry_BNE.device)
        y_LBE, carries = torch.empty_like(delta_LBE), []
        for start in range(0, length, ctx.segment):
            part = slice(start, start + ctx.segment)
            carries.append(carry_BNE)
            factor_TBNE = (delta_LBE[part, :, None] * A_NE).exp_()
            state_TBNE = written_LBE[part, :, None] * B_LBN[part, :, :, None]
            carry_BNE = _scan_(state_TBNE, factor_TBNE, carry_BNE, ctx.chunk).clone()
            torch.sum(state_TBNE.mul_(C_LBN[part, :, :, None]), 2, out=y_LBE[part])
        ctx.save_for_backward(delta_LBE, written_LBE, A_NE, B_LBN, C_LBN, *carries)
        return y_LBE, carry_BNE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Segment by segment, from the last; computes each one's states again."""
        dy_LBE, carry_BNE = gradients
        delta_LBE, written_LBE, A_NE, B_LBN, C_LBN, *carries = ctx.saved_tensors
        d_delta, d_written = torch.empty_like(delta_LBE), torch.empty_like(written_LBE)
        d_A, d_B, d_C = torch.zeros_like(A_NE), torch.empty_like(B_LBN), torch.empty_like(C_LBN)
        # The decay of the token after the segment carries its gradient in; after the last token that is 1.
        factor_after = torch.ones_like(carry_BNE)
        for index in reversed(range(len(carries))):
            part = slice(index * ctx.segment, (index + 1) * ctx.segment)
            delta, written, dy, before = delta_LBE[part], written_LBE[part], dy_LBE[part], carries[index]
            factor = torch.empty(len(delta) + 1, *before.shape, dtype=before.dtype, device=before.device)
            torch.mul(delta[:, :, None], A_NE, out=factor[:-1]).exp_()
            factor[-1] = factor_after
            state = written[:, :, None] * B_LBN[part, :, :, None]
            _scan_(state, factor[:-1], before, ctx.chunk)
            torch.sum(state * dy[:, :, None], 3, out=d_C[part])
            grad = C_LBN[part, :, :, None] * dy[:, :, None]
            carry_BNE = _scan_(grad, factor[1:], carry_BNE, ctx.chunk, reverse=True).clone()
            torch.sum(grad * written[:, :, None], 3, out=d_B[part])
            torch.sum(grad * B_LBN[part, :, :, None], 2, out=d_written[part])
            factor_after = factor[0].clone()
            grad.mul_(factor[:-1])
            grad[0].mul_(before)
            grad[1:].mul_(state[:-1])
            torch.sum(grad * A_NE, 2, out=d_delta[part])
            d_A += grad.mul_(delta[:, :, None]).sum((0, 1))
        return d_delta, d_written, d_A, d_B, d_C, factor_after * carry_BNE, None


# -- fused ---------------------------------------------------------------------------------------------------


@functools.cache
def _fused_kernel() -> Callable[..., Any] | None:
    """``selective_scan_fn`` of mamba_ssm, or None where that is not installed."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


def _fused_scan(
    kernel: Callable[..., Any], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """The kernel takes tokens last. Written from its interface; no GPU was at hand to run it on."""
    tokens_last = [x.transpose(1, 2).contiguous() for x in (u, delta, B, C)]
    y_BEL, last_BEN = kernel(*tokens_last[:2], A, *tokens_last[2:], D, return_last_state=True)
    return y_BEL.transpose(1, 2), last_BEN
