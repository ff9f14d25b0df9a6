"""Laws of multi-scale residual quantisation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from scaling.config import TokenizerConfig
from scaling.tokenizer.quantizer import MultiScaleQuantizer, nearest_codes, nearest_tick
from tests.scaling.tokenizer import tiny

schedules = st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True).map(sorted).map(tuple)


def quantizer(scales: tuple[int, ...] = (1, 2, 4), phis: int = 4, seed: int = 0) -> MultiScaleQuantizer:
    made = MultiScaleQuantizer(dataclasses.replace(tiny.TOKENIZER, scales=scales, phis=phis))
    tiny.randomised(made, seed)
    return made


def features(side: int, batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 8, side, side, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 40))
def test_own_phis_serve_one_scale_each(scales: int) -> None:
    assert [nearest_tick(scales, k / (scales - 1)) for k in range(scales)] == list(range(scales))


def test_four_phis_share_ten_scales_as_published() -> None:
    # Ticks 1/12, 13/36, 23/36, 11/12; the third scale lies half-way between the first two.
    assert [nearest_tick(4, k / 9) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("phis", "key"),
    [(0, "quant_resi.2.weight"), (1, "quant_resi.qresi.weight"), (2, "quant_resi.qresi_ls.1.bias")],
)
def test_keys_of_phis(phis: int, key: str) -> None:
    names = list(quantizer(phis=phis).state_dict())
    assert key in names
    assert sum(name.endswith("weight") for name in names) == 1 + (phis or 3)


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_nearest_code_is_nearest(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors, book = torch.randn(50, 6, generator=generator), torch.randn(9, 6, generator=generator)
    distances = torch.cdist(vectors.double(), book.double())
    chosen = distances.gather(1, nearest_codes(vectors, book)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-5, atol=1e-5)


@given(schedules, st.sampled_from([0, 1, 3, 4]), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_tokens_determine_what_training_decodes(scales: tuple[int, ...], phis: int, seed: int) -> None:
    q, f = quantizer(scales, phis, seed), features(scales[-1])
    trained = q(f)
    assert torch.equal(trained.tokens, q.encode(f))
    torch.testing.assert_close(q.features(trained.tokens), trained.features, rtol=1e-4, atol=1e-4)


@given(schedules, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_sampling_sees_what_teacher_forcing_gave(scales: tuple[int, ...], seed: int) -> None:
    q, f = quantizer(scales, seed=seed), features(scales[-1])
    tokens = q.encode(f)
    f_hat, inputs = q.start(len(f)), []
    for k, part in enumerate(tokens.split([s * s for s in scales], dim=1)):
        f_hat, following = q.advance(k, f_hat, q.codes(part).mT.unflatten(2, (scales[k], scales[k])))
        assert (following is None) == (k == len(scales) - 1)
        if following is not None:
            inputs.append(following.flatten(2).mT)
    expected = torch.cat(inputs, 1) if inputs else torch.zeros(3, 0, 8)
    teacher = q.teacher_inputs(tokens)
    assert teacher.shape == (3, sum(s * s for s in scales[1:]), 8)
    assert torch.equal(teacher, expected)
    assert torch.equal(f_hat, q.features(tokens))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=3), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_other_steps_than_the_configs_obey_the_same_laws(first: list[tuple[int, int]], seed: int) -> None:
    sizes = [*first, (4, 5)]
    q, f = quantizer(seed=seed), torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(seed))
    tokens = q.encode(f, sizes)
    f_hat, inputs = q.start(2, sizes), [torch.zeros(2, 0, 8)]
    cumulative = q.cumulative_features(tokens, sizes)
    for k, part in enumerate(tokens.split([h * w for h, w in sizes], dim=1)):
        f_hat, following = q.advance(k, f_hat, q.codes(part).mT.unflatten(2, sizes[k]), sizes)
        assert torch.equal(f_hat, cumulative[k])
        if following is not None:
            assert following.shape[2:] == sizes[k + 1]
            inputs.append(following.flatten(2).mT)
    assert torch.equal(q.teacher_inputs(tokens, sizes), torch.cat(inputs, 1))
    assert torch.equal(q.features(tokens, sizes), f_hat)


def test_teacher_inputs_need_no_work_of_the_last_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantizer((1, 2, 4))
    tokens, asked = torch.zeros(2, 21, dtype=torch.int64), []
    advance = q.advance
    monkeypatch.setattr(q, "advance", lambda k, *rest: (asked.append(k), advance(k, *rest))[1])
    assert q.teacher_inputs(tokens).shape == (2, 20, 8)
    assert asked == [0, 1]
    with pytest.raises(ValueError, match="expected 21 tokens per image, got 20"):
        q.teacher_inputs(tokens[:, :20])


def test_loss_is_the_mean_over_scales_of_the_cumulative_error() -> None:
    q, f = quantizer(), features(4)
    trained = q(f)
    errors = [F.mse_loss(f_hat, f) for f_hat in q.cumulative_features(trained.tokens)]
    torch.testing.assert_close(trained.loss, 1.25 * torch.stack(errors).mean())


def test_gradients_go_straight_through() -> None:
    q, f = quantizer(), features(4).requires_grad_()
    trained = q(f)
    (straight,) = torch.autograd.grad(trained.features.sum(), f, retain_graph=True)
    assert torch.equal(straight, torch.ones_like(f))
    (commitment,) = torch.autograd.grad(trained.loss, f, retain_graph=True)
    mean_f_hat = torch.stack(q.cumulative_features(trained.tokens)).mean(0)
    torch.testing.assert_close(commitment, 0.25 * 2 * (f - mean_f_hat).detach() / f.numel())
    (codebook,) = torch.autograd.grad(trained.loss, q.embedding.weight)
    unused = torch.ones(32, dtype=torch.bool)
    unused[trained.tokens.unique()] = False
    assert unused.any()
    assert (codebook[unused] == 0).all()
    assert (codebook[~unused] != 0).any(1).all()


def test_residuals_are_what_was_quantised() -> None:
    q, f = quantizer(), features(4)
    trained = q(f)
    torch.testing.assert_close(trained.vectors[0], f.mean((2, 3)))
    for vectors, tokens in zip(trained.vectors, trained.tokens.split([1, 4, 16], 1), strict=True):
        assert torch.equal(nearest_codes(vectors, q.embedding.weight), tokens.flatten())
        assert not vectors.requires_grad


def test_quantisation_ignores_autocast() -> None:
    q, f = quantizer(), features(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q(f).tokens, q.encode(f))
        assert q(f).features.dtype == torch.float32


def test_a_schedule_that_does_not_end_at_the_latent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"last scale is \(4, 4\) but the features are \(5, 5\)"):
        quantizer().encode(features(5))
    with pytest.raises(ValueError, match="expected 21 tokens per image, got 20"):
        quantizer().features(torch.zeros(1, 20, dtype=torch.int64))


def test_the_published_size_has_680_tokens() -> None:
    assert TokenizerConfig().seq_len == 680
