"""Choosing tokens: filters by their definitions, the race by its probabilities, noise by where it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scaling import drawing
from scaling.drawing import draw, keep_top
from scaling.noise import gumbel, gumbel_rows

CPU = torch.device("cpu")


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(1, 20_000, 4)
    ids = draw(logits, [0])
    shares = torch.bincount(ids.flatten(), minlength=4) / ids.numel()
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), atol=0.012, rtol=0)


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12, unique=True),
    st.integers(1, 12),
    st.floats(0.01, 1),
)
def test_filters_keep_the_most_likely(values: list[float], top_k: int, top_p: float) -> None:
    logits = torch.tensor(values)[None, None]
    kept_k = keep_top(logits, top_k=top_k)[0, 0].isfinite()
    assert kept_k.sum() == min(top_k, len(values))
    assert (
        logits[0, 0][kept_k].min() >= logits[0, 0].sort(descending=True).values[min(top_k, len(values)) - 1]
    )
    kept_p = keep_top(logits, top_p=top_p)[0, 0].isfinite()
    probabilities = logits[0, 0].softmax(-1)
    assert kept_p.any()
    assert probabilities[kept_p].sum() >= top_p - 1e-5
    assert probabilities[kept_p].sum() - probabilities[kept_p].min() <= top_p + 1e-5
    assert torch.equal(keep_top(logits), logits)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.05, 1), st.integers(2, 40))
def test_the_nucleus_is_sought_among_the_top_k(seed: int, top_k: int, top_p: float, vocab: int) -> None:
    """Against the definition: sort everything, cut at k, renormalise, cut at p."""
    logits = torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(seed))
    kept = keep_top(logits, top_k, top_p)
    ordered, order = logits.sort(dim=-1, descending=True)
    within = ordered[..., :top_k].double().softmax(-1)
    before = within.cumsum(-1) - within
    for row in range(6):
        ids = order.view(6, -1)[row][:top_k]
        certain = ids[before.view(6, -1)[row] < top_p - 1e-5]
        possible = ids[before.view(6, -1)[row] < top_p + 1e-5]
        found = set(kept.view(6, -1)[row].isfinite().nonzero().flatten().tolist())
        assert set(certain.tolist()) <= found <= set(possible.tolist())
    finite = kept.isfinite()
    assert torch.equal(kept[finite], logits[finite])


def test_equal_logits_stay_together() -> None:
    logits = torch.tensor([[[1.0, 0.0, 1.0, 1.0]]])
    assert keep_top(logits, top_k=2).isfinite().tolist() == [[[True, False, True, True]]]


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.sampled_from([0.0, 0.3, 0.9, 1.0]))
@settings(deadline=None)
def test_what_is_drawn_is_what_wins_among_the_kept(seed: int, top_k: int, top_p: float) -> None:
    """Portions, threads and bits against the definition, in whole tensors."""
    logits = 3 * torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(seed))
    for given_BlV in (logits, logits.bfloat16(), logits.double()):
        noise = gumbel([5, 6, 7], drawing.RACE, 4, 7, 11, CPU)
        wanted = (keep_top(given_BlV, top_k, top_p).float() + noise).argmax(dim=-1)
        assert torch.equal(draw(given_BlV, [5, 6, 7], 4, top_k, top_p), wanted)


def test_portions_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 50, 30)
    wanted = draw(logits, [1, 2], 0, 9, 0.8)
    for portion, threads in ((1, 1), (90, 3), (700, 2), (10**6, 2)):
        monkeypatch.setattr(drawing, "PORTION", portion)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(draw(logits, [1, 2], 0, 9, 0.8), wanted)


def test_a_token_depends_on_its_image_and_place_alone() -> None:
    logits = torch.randn(3, 6, 40)
    together = draw(logits, [7, 8, 9], 10)
    assert torch.equal(draw(logits[1:2, 2:], [8], 12), together[1:2, 2:])
    assert not torch.equal(draw(logits[1:2], [7], 10), together[1:2])
    assert not torch.equal(draw(logits[1:2], [8], 11), together[1:2])


def test_one_token_left_is_drawn_whatever_its_noise() -> None:
    logits = torch.full((1, 5000, 3), -math.inf)
    logits[..., 1] = -50.0
    assert (draw(logits, [2]) == 1).all()
    assert (draw(torch.randn(1, 5000, 3).sort(dim=-1).values, [3], 0, top_k=1) == 2).all()


def plain(seed: int, use: int, first: int, count: int, vocab: int) -> np.ndarray:
    return gumbel_rows(seed, use, first, count, vocab)


def by_torch(seed: int, use: int, first: int, count: int, vocab: int) -> np.ndarray:
    both: Tensor = gumbel([seed + 1, seed], use, first, count, vocab, CPU)
    return both[1].numpy()


@pytest.mark.parametrize("noise", [plain, by_torch])
def test_noise_is_gumbel(noise: Callable[..., np.ndarray]) -> None:
    drawn = noise(1, 0, 0, 1000, 200).astype(float)
    assert drawn.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert drawn.var() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert np.isfinite(drawn).all()
    # Its distribution function makes it even, here and between neighbours of every kind.
    even = np.exp(-np.exp(-drawn))
    assert np.abs(np.histogram(even, 20, (0, 1))[0] / even.size - 0.05).max() < 0.002
    for other in (noise(2, 0, 0, 1000, 200), noise(1, 1, 0, 1000, 200), noise(1, 0, 1000, 1000, 200)):
        assert abs(np.corrcoef(even.ravel(), np.exp(-np.exp(-other)).ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(even[1:].ravel(), even[:-1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(even[:, 1:].ravel(), even[:, :-1].ravel())[0, 1]) < 0.01


@given(
    seed=st.one_of(st.integers(0, 10), st.integers(-(2**63), 2**64 - 2)),
    use=st.integers(0, 1),
    first=st.integers(0, 5000),
    count=st.integers(1, 9),
    vocab=st.integers(1, 40),
)
@settings(deadline=None)
def test_torch_makes_the_noise_that_numpy_makes(
    seed: int, use: int, first: int, count: int, vocab: int
) -> None:
    wanted = plain(seed, use, first, count, vocab)
    np.testing.assert_allclose(by_torch(seed, use, first, count, vocab), wanted, rtol=2e-6, atol=2e-6)
    if count > 1:
        np.testing.assert_array_equal(wanted[1:], plain(seed, use, first + 1, count - 1, vocab))
