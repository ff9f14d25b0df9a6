"""Sampling in bf16: as near to fp32 as plain autocast is, for every family, and nothing is left behind."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from scaling.config import ModelConfig, SamplingConfig
from scaling.families.interface import FamilyModel
from scaling.families.registry import FAMILIES, build, family_model
from scaling.generation import Forced, draw_images, sample_tokens
from scaling.launch import DrawnIn
from scaling.layers.linear import half_weights
from scaling.tokenizer.quantizer import Quantizer
from scaling.tokenizer.vqvae import Tokenizer
from tests.scaling import tiny
from tests.scaling.test_families import FAMILY_NAMES, pair

LABELS = torch.tensor([0, 2])


def cached_logits(model: FamilyModel, quantizer: Quantizer, tokens_BL: Tensor) -> Tensor:
    """Of sampling step by step that is handed these tokens."""
    decoding = model.begin(LABELS)
    feed = FAMILIES[model.config.family].feed(quantizer, len(LABELS), model.config.sizes)
    inputs: Tensor | None = None
    logits, start = [], 0
    for chunk, count in enumerate(model.chunks()):
        logits.append(model.extend(decoding, inputs))
        ids_Bl = tokens_BL[:, start : start + count]
        inputs = feed.next(chunk, ids_Bl, quantizer.codes(ids_Bl))
        start += count
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_it_is_as_near_to_fp32_as_autocast(family: str) -> None:
    model, quantizer = pair(family)
    tokens_BL, _ = sample_tokens(model, quantizer, LABELS, range(2))
    exact = cached_logits(model, quantizer, tokens_BL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = cached_logits(model, quantizer, tokens_BL)
    with half_weights(cast(nn.Module, model)):
        half = cached_logits(model, quantizer, tokens_BL)
    assert half.dtype == torch.bfloat16
    assert 0 < (half - exact).norm() < 1.5 * (plain - exact).norm()
    torch.testing.assert_close(cached_logits(model, quantizer, tokens_BL), exact, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_seed_fixes_the_picture(family: str) -> None:
    model, quantizer = pair(family)
    with half_weights(cast(nn.Module, model)):
        first, _ = sample_tokens(model, quantizer, LABELS, range(2), guidance=1.5)
        again, _ = sample_tokens(model, quantizer, LABELS, range(2), guidance=1.5)
    assert torch.equal(first, again)


def test_the_weights_come_back_after_an_error() -> None:
    model = cast(nn.Module, pair("var")[0])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), half_weights(model):
        raise KeyError
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    assert not torch.is_autocast_enabled("cpu")


def test_pictures_in_bf16_are_of_the_same_tokens_nearly_the_same() -> None:
    """The decoder's part: what is drawn is forced, so that tokens cannot differ."""
    torch.manual_seed(2)
    tokenizer = Tokenizer(tiny.TOKENIZER).eval().requires_grad_(False)
    config = ModelConfig.from_depth(2, vocab=16, latent_channels=4, scales=(1, 2), num_classes=3)
    model = family_model(build(config).eval().requires_grad_(False))
    ids_BL = torch.arange(10).view(2, 5)
    known = Forced(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))

    def pictures(precision: DrawnIn) -> Tensor:
        sampling = SamplingConfig(2, precision=precision)
        return draw_images(model, tokenizer, [0, 2], [0, 1], sampling, forced=known)

    exact, half = pictures("fp32"), pictures("bf16")
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() < 0.1 * exact.norm()
    assert torch.equal(pictures("fp32"), exact)
