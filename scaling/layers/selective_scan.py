"""The selective scan of Mamba (S6, 2312.00752, algorithm 2): plain torch, or fused where that is installed.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,      y_t = C_t · h_t + D u_t

- Every channel has a state of its own; Δ, B and C depend on the token, A and D do not.
- ``sequential_scan`` is this definition, token by token, for tests and as the yardstick of speed.
- ``selective_scan`` is what models call. It takes the images in groups and a group's tokens in segments of
  about ``SEGMENT_NUMBERS`` numbers of state. All decays and inputs of a segment are made at once, and a
  two-level scan runs over its chunks of about √segment tokens: all chunks side by side from a zero state,
  then the states from chunk to chunk, then every chunk is given the state before it. It only ever
  multiplies decays, each at most 1, and never divides by their products, so that a long decay becomes 0
  and not infinity.
- Memory: the backward pass computes the states again, segment by segment. A layer keeps its arguments and
  one state per segment; while it runs there are up to four tensors of ``SEGMENT_NUMBERS`` (or of eight
  tokens of one image, where that is more), instead of several of B · L · E · N.
- On the CPU the numbers of one token of a group fill the vector units, so a segment is scanned without
  chunks; the speed comes from making the decays of many tokens at once, in cache, and not keeping them.
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

SEGMENT_NUMBERS = {"cpu": 2**19, "other": 2**24}
"""Numbers in one temporary tensor: 2 MiB, near a core's caches, or 64 MiB, enough to fill a GPU."""
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
    images, segment, chunk = _plan(u.shape[0], u.shape[1], A.numel(), u.device)
    grouped = zip(*(x.split(images) for x in (u, delta, B, C, initial_BEN.to(dtype))), strict=True)
    groups = [_Scan.apply(*group[:2], A, *group[2:], segment, chunk) for group in grouped]
    y_BLE, last_BEN = (torch.cat(parts) for parts in zip(*groups, strict=True))
    return y_BLE + D * u, last_BEN


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
    for u, delta, B, C in zip(*(x.unbind(1) for x in (u_BLE, delta_BLE, B_BLN, C_BLN)), strict=True):
        state_BEN = torch.exp(delta[:, :, None] * A_EN) * state_BEN + (delta * u)[:, :, None] * B[:, None]
        outputs.append((C[:, None] * state_BEN).sum(2) + D_E * u)
    return torch.stack(outputs, dim=1), state_BEN


# -- in plain torch ------------------------------------------------------------------------------------------


def _plan(images: int, length: int, per_token: int, device: torch.device) -> tuple[int, int, int]:
    """(images of a group, tokens of a segment, tokens of a chunk) on this device.

    Args:
        per_token: numbers of state of one image's token, N · E.
    """
    numbers = SEGMENT_NUMBERS["cpu" if device.type == "cpu" else "other"]
    group = min(images, max(1, numbers // (SHORTEST_SEGMENT * per_token)))
    segment = min(length, max(SHORTEST_SEGMENT, numbers // (group * per_token)))
    return group, segment, segment if device.type == "cpu" else math.isqrt(segment - 1) + 1


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
    for token, token_factor in zip(
        in_order(x[rest].unbind(0)), in_order(factor[rest].unbind(0)), strict=True
    ):
        carry = token.addcmul_(token_factor, carry)
    return carry


class _Scan(torch.autograd.Function):
    """C_t · h_t (B, L, E) and the last state (B, E, N) from u, Δ, A, B, C and the first state.

    Backward, with g_t the gradient of h_t: g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}, a scan from the end;
    then dC_t = h_t dy_t, dB_t = g_t Δ_t u_t, d(Δu)_t = B_t · g_t, and with q_t = g_t exp(Δ_t A) h_{t-1}
    dΔ_t = A · q_t + u_t d(Δu)_t, dA = Σ_t q_t Δ_t.

    Inside, tensors are (T, B, N, E): a token's numbers lie together, and channels run along memory.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        """Segment by segment, from the first; keeps the state before each."""
        *arguments, initial_BEN, ctx.segment, ctx.chunk = given
        u, delta, B, C = (arguments[i].transpose(0, 1) for i in (0, 1, 3, 4))
        A_NE, carry = arguments[2].t().contiguous(), initial_BEN.transpose(1, 2).contiguous()
        y_BLE, carries = torch.empty_like(arguments[0]), []
        factors, states = carry.new_empty(2, ctx.segment, *carry.shape)
        for start in range(0, len(u), ctx.segment):
            part = slice(start, start + ctx.segment)
            carries.append(carry)
            written = delta[part] * u[part]
            factor, state = factors[: len(written)], states[: len(written)]
            torch.mul(delta[part, :, None], A_NE, out=factor).exp_()
            torch.mul(written[:, :, None], B[part, :, :, None], out=state)
            carry = _scan_(state, factor, carry, ctx.chunk).clone()
            torch.sum(state.mul_(C[part, :, :, None]), 2, out=y_BLE.transpose(0, 1)[part])
        ctx.save_for_backward(*arguments, *carries)
        return y_BLE, carry.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Segment by segment, from the last; computes each one's states again."""
        saved = ctx.saved_tensors  # once: recomputed tensors can be asked for only once
        arguments, carries = saved[:5], saved[5:]
        results = [torch.empty_like(x) for x in arguments]
        u, delta, B, C, dy = (x.transpose(0, 1) for x in (*arguments[:2], *arguments[3:], gradients[0]))
        d_u, d_delta, d_B, d_C = (results[i].transpose(0, 1) for i in (0, 1, 3, 4))
        A_NE, carry = arguments[2].t().contiguous(), gradients[1].transpose(1, 2).contiguous()
        d_A_NE = torch.zeros_like(A_NE)
        # The decay of the token after a segment carries its gradient in; after the last token that is 1.
        factor_after = torch.ones_like(carry)
        factors, states, grads, products = carry.new_empty(4, ctx.segment + 1, *carry.shape)
        for index in reversed(range(len(carries))):
            part = slice(index * ctx.segment, (index + 1) * ctx.segment)
            written, before = delta[part] * u[part], carries[index]
            factor = factors[: len(written) + 1]
            state, grad, product = (x[: len(written)] for x in (states, grads, products))
            torch.mul(delta[part, :, None], A_NE, out=factor[:-1]).exp_()
            factor[-1] = factor_after
            torch.mul(written[:, :, None], B[part, :, :, None], out=state)
            _scan_(state, factor[:-1], before, ctx.chunk)
            torch.sum(torch.mul(state, dy[part, :, None], out=product), 3, out=d_C[part])
            torch.mul(C[part, :, :, None], dy[part, :, None], out=grad)
            carry = _scan_(grad, factor[1:], carry, ctx.chunk, reverse=True).clone()
            torch.sum(torch.mul(grad, written[:, :, None], out=product), 3, out=d_B[part])
            d_written = torch.mul(grad, B[part, :, :, None], out=product).sum(2)
            torch.mul(d_written, delta[part], out=d_u[part])
            factor_after = factor[0].clone()
            grad.mul_(factor[:-1])
            grad[0].mul_(before)
            grad[1:].mul_(state[:-1])
            through_A = torch.mul(grad, A_NE, out=product).sum(2)
            torch.addcmul(through_A, d_written, u[part], out=d_delta[part])
            d_A_NE += grad.mul_(delta[part, :, None]).sum((0, 1))
        d_u_BLE, d_delta_BLE, _, d_B_BLN, d_C_BLN = results
        d_initial_BEN = (factor_after * carry).transpose(1, 2)
        return d_u_BLE, d_delta_BLE, d_A_NE.t(), d_B_BLN, d_C_BLN, d_initial_BEN, None, None


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
