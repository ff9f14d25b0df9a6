"""Editing, for every family: what is known is kept at every step, a seed fixes an edit in any batch."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from scaling.config import FLEXIBLE, ConfigError, Family, ModelConfig, SamplingConfig, TokenizerConfig
from scaling.editing import extended, reconstructed, redraw, refine
from scaling.families.interface import FamilyModel
from scaling.families.registry import FAMILIES, build, family_model
from scaling.masks import drawn_tokens
from scaling.tokenizer.vqvae import Tokenizer

RESIDUAL = TokenizerConfig(
    vocab=16, latent_channels=4, channels=32, multipliers=(1, 1), res_blocks=1, scales=(1, 2, 3, 4)
)
SCALABLE = replace(RESIDUAL, quantizer="scalable")
SAMPLING = SamplingConfig(images=3, guidance=2.0, top_k=12, top_p=0.9, seed=5)


class Pair(NamedTuple):
    model: FamilyModel
    tokenizer: Tokenizer


def make_pair(family: Family) -> Pair:
    torch.manual_seed(3)
    tokenizer = Tokenizer(RESIDUAL if family == "var" else SCALABLE).eval().requires_grad_(False)
    options = {"vocab": 16, "latent_channels": 4, "scales": RESIDUAL.scales, "num_classes": 3}
    network = build(ModelConfig.from_depth(1, family=family, **options)).eval().requires_grad_(False)  # type: ignore[arg-type]
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return Pair(family_model(network), tokenizer)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param)


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family in FLEXIBLE])
def flexible(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param)


def images(count: int = 2, height: int = 8, width: int = 8) -> Tensor:
    """Smooth pictures: noise would be one code everywhere."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(count)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def left_half(count: int = 2) -> Tensor:
    mask = torch.zeros(count, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    return mask


LABELS = torch.tensor([0, 2])


def test_known_tokens_are_kept_at_every_step(pair: Pair) -> None:
    edited = redraw(*pair, images(), left_half(), LABELS, SAMPLING)
    keep_BL = edited.forced.keep_BL
    quantizer = pair.tokenizer.config.quantizer
    assert torch.equal(keep_BL, ~drawn_tokens(left_half(), edited.sizes, quantizer))
    assert edited.tokens.shape == (2, 3, sum(h * w for h, w in edited.sizes))
    for candidate in edited.tokens.unbind(1):
        assert torch.equal(candidate[keep_BL], edited.forced.tokens_BL[keep_BL])
    assert not torch.equal(edited.tokens[:, 0], edited.tokens[:, 1]), "another seed, another picture"
    assert edited.candidates.shape == (2, 3, 3, 8, 8)


def test_the_kept_tokens_are_those_of_the_image(pair: Pair) -> None:
    peeking = redraw(*pair, images(), left_half(), LABELS, SAMPLING, peek=True)
    assert torch.equal(peeking.forced.tokens_BL, pair.tokenizer.encode(images(), peeking.sizes))


def test_an_empty_mask_gives_the_reconstruction(pair: Pair) -> None:
    empty = torch.zeros(1, 8, 8, dtype=torch.bool)
    edited = redraw(*pair, images(1), empty, None, replace(SAMPLING, images=1))
    assert torch.equal(edited.candidates[:, 0], reconstructed(pair.tokenizer, images(1)))


def test_a_full_mask_knows_nothing_of_the_image(pair: Pair) -> None:
    full = torch.ones(2, 8, 8, dtype=torch.bool)
    edited = redraw(*pair, images(), full, LABELS[:1].expand(2), SAMPLING)
    assert torch.equal(edited.candidates[0], edited.candidates[1])


def test_what_is_under_the_mask_does_not_matter(pair: Pair) -> None:
    other = torch.where(left_half()[:, None], images().flip(0), images())
    one = redraw(*pair, images(), left_half(), LABELS, SAMPLING)
    assert torch.equal(one.candidates, redraw(*pair, other, left_half(), LABELS, SAMPLING).candidates)
    peeking = [redraw(*pair, x, left_half(), LABELS, SAMPLING, peek=True) for x in (images(), other)]
    assert not torch.equal(peeking[0].candidates, peeking[1].candidates)


def test_a_seed_fixes_an_edit_in_any_batch(pair: Pair) -> None:
    together = redraw(*pair, images(), left_half(), LABELS, SAMPLING)
    again = redraw(*pair, images(), left_half(), LABELS, SAMPLING)
    assert torch.equal(together.candidates, again.candidates)
    by_two = redraw(*pair, images(), left_half(), LABELS, SAMPLING, batch=2)
    assert torch.equal(together.tokens, by_two.tokens)
    alone = redraw(*pair, images()[1:], left_half(1), LABELS[1:], replace(SAMPLING, images=1, seed=6))
    assert torch.equal(together.tokens[1, 1], alone.tokens[0, 0])
    torch.testing.assert_close(together.candidates[1, 1], alone.candidates[0, 0], atol=1e-5, rtol=0)


def test_another_class_changes_what_is_drawn(pair: Pair) -> None:
    def draw(labels: Tensor | None, guidance: float) -> Tensor:
        sampling = replace(SAMPLING, guidance=guidance)
        return redraw(*pair, images(), left_half(), labels, sampling).tokens

    assert not torch.equal(draw(LABELS, 2.0), draw(LABELS.flip(0), 2.0))
    null = torch.full((2,), 3)
    assert torch.equal(draw(None, 2.0), draw(null, 0.0)), "without a class there is nothing to guide to"


def test_known_pixels_come_back_unchanged_up_to_the_tokenizer(flexible: Pair) -> None:
    """The decoder's attention and norms see the whole picture, so only without them are pixels local."""
    tokenizer = flexible.tokenizer
    mask = left_half(1)
    edited = redraw(flexible.model, tokenizer, images(1), mask, None, SAMPLING, peek=True)
    last = tokenizer.quantize.features(edited.forced.tokens_BL, edited.sizes)
    for candidate in edited.tokens[0]:
        latent = tokenizer.quantize.features(candidate[None], edited.sizes)
        assert torch.equal(latent[..., 2:], last[..., 2:]), "the known part of the decoder's input is exact"


def test_refinement_keeps_every_step_up_to_the_images_own(flexible: Pair) -> None:
    small = images(2, 4, 4)
    edited = refine(*flexible, small, LABELS, SAMPLING)
    assert edited.sizes == ((1, 1), (2, 2), (3, 3), (4, 4))
    assert edited.candidates.shape == (2, 3, 3, 8, 8)
    known = flexible.tokenizer.encode(small, edited.sizes[:2])
    assert torch.equal(edited.tokens[:, :, :5], known[:, None].expand(-1, 3, -1))
    assert not torch.equal(edited.tokens[:, 0], edited.tokens[:, 1])
    larger = refine(*flexible, images(1, 8, 12), None, SAMPLING)
    assert larger.sizes[-1] == (8, 12)
    assert (4, 6) in larger.sizes
    assert larger.candidates.shape == (1, 3, 3, 16, 24)
    with pytest.raises(ConfigError, match="goes through the image's own size, 2 x 2 tokens"):
        refine(*flexible, small, LABELS, SAMPLING, sizes=((1, 1), (4, 4)))


def test_expansion_keeps_the_image_and_draws_around_it(flexible: Pair) -> None:
    canvas, mask = extended(images(), 8, 16, grid=2)
    assert torch.equal(canvas[..., 4:12], images())
    assert not mask[..., 4:12].any()
    assert mask.sum() == 2 * 8 * 8
    sizes = ((1, 1), (2, 4), (4, 8))
    edited = redraw(*flexible, canvas, mask, LABELS, SAMPLING, sizes=sizes)
    assert edited.candidates.shape == (2, 3, 3, 8, 16)
    last = edited.tokens[:, :, -32:].unflatten(2, (4, 8))
    known = edited.forced.tokens_BL[:, -32:].unflatten(1, (4, 8))
    assert torch.equal(last[..., 2:6], known[:, None, :, 2:6].expand(-1, 3, -1, -1))
    assert not torch.equal(last[:, 0], last[:, 1])
    with pytest.raises(ConfigError, match="a canvas of 6 x 16 pixels does not hold an image of 8 x 8"):
        extended(images(), 6, 16)


def test_what_is_longer_in_one_direction_only_is_still_drawn(flexible: Pair) -> None:
    """FlexVAR takes the most likely token at steps finer than those it was trained on, and only there."""

    def candidates(h: int, w: int) -> Tensor:
        mask = torch.zeros(1, 2 * h, 2 * w, dtype=torch.bool)
        mask[:, :, :4] = True  # less than half: the first step is kept, so that only the last is drawn
        picture, sizes = images(1, 2 * h, 2 * w), ((1, 1), (h, w))
        return redraw(*flexible, picture, mask, None, SAMPLING, sizes=sizes).tokens[0]

    wide, finer = candidates(4, 8), candidates(8, 8)
    assert not torch.equal(wide[0], wide[1])
    assert torch.equal(finer[0], finer[1])


def test_steps_that_a_family_cannot_have_are_refused(pair: Pair) -> None:
    family = pair.model.config.family
    others = ((1, 1), (2, 2), (4, 4))
    if family in FLEXIBLE:
        with pytest.raises(ConfigError, match=r"the first step must be \(1, 1\) as trained, got \(2, 2\)"):
            redraw(*pair, images(), left_half(), LABELS, SAMPLING, sizes=others[1:])
    else:
        for act in (
            lambda: redraw(*pair, images(), left_half(), LABELS, SAMPLING, sizes=others),
            lambda: refine(*pair, images(), LABELS, SAMPLING),
        ):
            with pytest.raises(ConfigError, match=f"{family} has steps of one size only"):
                act()
