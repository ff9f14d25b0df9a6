"""Sampling: guidance, seeds; the laws of all families are in ``test_families``."""

from __future__ import annotations

import pytest
import torch

from scaling.config import ModelConfig, SamplingConfig
from scaling.families.registry import family_model
from scaling.families.var import VAR
from scaling.generation import sample_images, sample_tokens
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
