"""Drawing tokens: filters, noise, guidance; the laws of all families are in ``test_families``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import ModelConfig, SamplingConfig
from scaling.families.registry import family_model
from scaling.families.var import VAR
from scaling.generation import draw, gumbel_noise, keep_top, sample_images, sample_tokens
from scaling.layers.linear import Linear
from scaling.tokenizer.vqvae import Tokenizer
from tests.scaling import tiny


@pytest.fixture(scope="module")
def pair() -> tuple[VAR, Tokenizer]:
    torch.manual_seed(3)
    model = VAR(ModelConfig.from_depth(2, vocab=16, latent_channels=4, scales=(1, 2), num_classes=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, Tokenizer(tiny.TOKENIZER).eval().requires_grad_(False)


LABELS = torch.tensor([0, 1, 2, 0])


def test_greedy_tokens_are_the_teacher_forced_argmax(pair: tuple[VAR, Tokenizer]) -> None:
    model, tokenizer = pair
    tokens, f_hat = sample_tokens(model, tokenizer.quantize, LABELS, range(4), guidance=0, top_k=1)
    with torch.no_grad():
        logits = model(LABELS, tokenizer.quantize.teacher_inputs(tokens))
    assert torch.equal(logits.argmax(-1), tokens)
    torch.testing.assert_close(f_hat, tokenizer.quantize.features(tokens), atol=1e-5, rtol=0)


def test_guidance_moves_logits_away_from_the_unconditional(pair: tuple[VAR, Tokenizer]) -> None:
    model, tokenizer = pair
    quantizer = tokenizer.quantize
    free, _ = sample_tokens(model, quantizer, LABELS, range(4), guidance=0, top_k=1)
    tiny_guidance, _ = sample_tokens(model, quantizer, LABELS, range(4), guidance=1e-9, top_k=1)
    assert torch.equal(free, tiny_guidance)
    strong, _ = sample_tokens(model, quantizer, LABELS, range(4), guidance=8, top_k=1)
    assert torch.equal(free[:, :1], strong[:, :1])  # no guidance at the first scale
    with torch.no_grad():
        inputs = quantizer.teacher_inputs(strong)
        conditional, null = model(LABELS, inputs), model(torch.full_like(LABELS, 3), inputs)
    assert torch.equal((9 * conditional - 8 * null)[:, 1:].argmax(-1), strong[:, 1:])


def test_a_seed_fixes_the_picture_in_any_batch(pair: tuple[VAR, Tokenizer]) -> None:
    model, tokenizer = pair
    together, _ = sample_tokens(model, tokenizer.quantize, LABELS, [5, 6, 7, 8])
    alone, _ = sample_tokens(model, tokenizer.quantize, LABELS[2:3], [7])
    assert torch.equal(together[2:3], alone)
    other, _ = sample_tokens(model, tokenizer.quantize, LABELS.repeat(8), range(32))
    assert not torch.equal(other[0::4], other[0:1].expand(8, -1))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(1, 20_000, 4)
    ids = draw(logits, [torch.Generator().manual_seed(0)])
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


def test_noise_is_gumbel_and_never_decides_for_what_was_taken_out() -> None:
    noise = gumbel_noise(torch.empty(1, 1000, 200), [torch.Generator().manual_seed(1)]).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert not noise.isnan().any()
    assert noise.max() < math.inf
    logits = torch.full((1, 5000, 3), -math.inf)
    logits[..., 1] = -50.0
    assert (draw(logits, [torch.Generator().manual_seed(2)]) == 1).all()


def test_an_images_noise_is_its_generators_whatever_is_beside_it() -> None:
    like = torch.empty(3, 4, 5)
    together = gumbel_noise(like, [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)])
    alone = gumbel_noise(like[:1], [torch.Generator().manual_seed(8)])
    assert torch.equal(together[1], alone[0])


def test_images_are_the_same_in_any_batch(pair: tuple[VAR, Tokenizer]) -> None:
    model, tokenizer = pair
    sampling = SamplingConfig(top_k=5, seed=4)
    together = sample_images(family_model(model), tokenizer, [0, 1, 2, 1, 0], sampling)
    apart = sample_images(family_model(model), tokenizer, [0, 1, 2, 1, 0], sampling, batch=2)
    assert together.shape == (5, 3, 8, 8)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)
    assert together.abs().max() <= 1


def test_the_layers_products_are_torchs_with_and_without_gradients() -> None:
    torch.manual_seed(0)
    for gelu in (False, True):
        layer = Linear(24, 40, gelu)
        x = torch.randn(3, 5, 24)
        wanted = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer(x[:, ::2]), wanted[:, ::2], atol=1e-5, rtol=1e-5)
            half = layer.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert wanted.requires_grad
