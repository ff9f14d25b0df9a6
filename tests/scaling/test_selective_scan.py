"""The parallel scan is the definition, token by token: values, gradients, continuation, long decays."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.layers import selective_scan as scans
from scaling.layers.selective_scan import selective_scan, sequential_scan


def arguments(
    length: int, images: int = 2, channels: int = 3, states: int = 4, seed: int = 0
) -> list[Tensor]:
    """u, Δ, A, B, C, D and an initial state, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        normal(images, length, channels), normal(images, length, channels).exp(),
        -normal(channels, states).exp(), normal(images, length, states), normal(images, length, states),
        normal(channels), normal(images, channels, states),
    ]  # fmt: skip


def gradients(scan: object, given: list[Tensor]) -> list[Tensor]:
    """y, the last state, and the gradients of a fixed function of both."""
    assert callable(scan)
    leaves = [x.clone().requires_grad_() for x in given]
    y, last = scan(*leaves)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, last)]
    ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
    return [y.detach(), last.detach(), *(x.grad for x in leaves if x.grad is not None)]


@given(
    length=st.integers(1, 40),
    images=st.integers(1, 3),
    segment=st.integers(1, 40),
    chunk=st.integers(1, 12),
    start=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_the_definitions(
    length: int, images: int, segment: int, chunk: int, start: bool
) -> None:
    given_ = arguments(length, images=3)[: 7 if start else 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "_plan", lambda *_: (images, segment, chunk))
        found = gradients(selective_scan, given_)
    for one, other in zip(found, gradients(sequential_scan, given_), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("plan", [(2, 7, 7), (1, 9, 3), (2, 4, 2)])
def test_gradients_are_those_of_finite_differences(
    plan: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "_plan", lambda *_: plan)
    given_ = [x.requires_grad_() for x in arguments(7, channels=2, states=2)]
    assert torch.autograd.gradcheck(selective_scan, given_)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_devices_plans_agree_in_fp32(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = scans._plan
    monkeypatch.setattr(scans, "SEGMENT_NUMBERS", {"cpu": 2 * 64 * 16 * 21, "other": 2 * 64 * 16 * 100})
    monkeypatch.setattr(scans, "_plan", lambda *given, **_: plan(*given[:3], torch.device(device)))
    exact = arguments(155, channels=64, states=16)
    exact[1] *= 0.1
    y, last = selective_scan(*(x.float() for x in exact))
    expected_y, expected_last = sequential_scan(*exact)
    assert y.dtype == last.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected_y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last.double(), expected_last, atol=1e-5, rtol=1e-5)


def test_a_plan_covers_what_it_is_given() -> None:
    for device, numbers in scans.SEGMENT_NUMBERS.items():
        kind = torch.device("cpu" if device == "cpu" else "cuda")
        for images, length, per_token in itertools.product(
            (1, 7, 64), (1, 2, 9, 680), (1, 300, 2**14, 2**20)
        ):
            group, segment, chunk = scans._plan(images, length, per_token, kind)
            assert 1 <= group <= images
            assert 1 <= chunk <= segment <= length
            assert segment >= min(length, scans.SHORTEST_SEGMENT)
            # A temporary tensor is of the size wanted, unless eight tokens of one image are more.
            assert group * segment * per_token <= max(numbers, scans.SHORTEST_SEGMENT * per_token)


def test_two_halves_are_the_whole() -> None:
    u, delta, A, B, C, D, start = arguments(19)
    y, last = selective_scan(u, delta, A, B, C, D, start)
    first, middle = selective_scan(u[:, :8], delta[:, :8], A, B[:, :8], C[:, :8], D, start)
    second, end = selective_scan(u[:, 8:], delta[:, 8:], A, B[:, 8:], C[:, 8:], D, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("chunk", [3, 200])
def test_decays_far_below_the_smallest_float_are_zero_and_stay_finite(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "_plan", lambda *_: (2, 200, chunk))
    given_ = [x.float() for x in arguments(200)]
    given_[1] = given_[1] * 50 + 20  # one token's decay is e^-20 to e^-1000s, that of 200 tokens beyond fp32
    given_[2] = given_[2] - 1
    leaves = [x.clone().requires_grad_() for x in given_]
    y, last = selective_scan(*leaves)
    (y.sum() + last.sum()).backward()
    expected, _ = sequential_scan(*given_)
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-4)
    assert all(bool(x.grad.isfinite().all()) for x in leaves if x.grad is not None)


def test_no_decay_sums_without_loss() -> None:
    """With A = 0 and C = 1 the scan is a cumulative sum of Δ B u."""
    u, delta, A, B, C, D, _ = arguments(50)
    y, _ = selective_scan(u, delta, 0 * A, B, torch.ones_like(C), 0 * D)
    torch.testing.assert_close(y, ((delta * u)[..., None] * B[:, :, None]).sum(3).cumsum(1))


def test_autocast_does_not_reach_the_scan() -> None:
    given_ = [x.float() for x in arguments(30)]
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(*given_)
    assert torch.equal(y, selective_scan(*given_)[0])
    assert y.dtype == last.dtype == torch.float32


def test_a_later_token_changes_nothing_before_it() -> None:
    given_ = arguments(20)
    before, _ = selective_scan(*given_)
    for index in (0, 1, 3, 4):
        given_[index] = given_[index].clone()
        given_[index][:, 12] += 0.5
    after, _ = selective_scan(*given_)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_the_fused_kernel_is_given_what_its_interface_says() -> None:
    """A stand-in with the shapes of ``mamba_ssm``: u, Δ (B, E, L), A (E, N), B, C (B, N, L), D (E)."""
    given_ = arguments(6)[:6]

    def kernel(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, return_last_state: bool
    ) -> tuple[Tensor, Tensor]:
        assert return_last_state
        assert all(x.is_contiguous() for x in (u, delta, B, C))
        y, last = sequential_scan(*(x.transpose(1, 2) for x in (u, delta)), A, B.mT, C.mT, D)
        return y.transpose(1, 2), last

    for one, other in zip(scans._fused_scan(kernel, *given_), sequential_scan(*given_), strict=True):
        assert torch.equal(one, other)


class Arithmetic(TorchDispatchMode):
    """Counts additions and multiplications as they are dispatched; exp is pointwise and not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mul", "add"):
            self.count += out.numel()
        elif name == "sum":  # with the multiplication before it a multiply-add per number
            self.count += args[0].numel()
        return out


def test_the_closed_form_of_its_arithmetic_is_that_of_the_definition() -> None:
    from scaling.flops import scan_flops

    length, channels, states = 7, 5, 3
    given_ = arguments(length, images=1, channels=channels, states=states)
    with Arithmetic() as arithmetic:
        sequential_scan(*given_)
    assert arithmetic.count == scan_flops(length, channels, states)
