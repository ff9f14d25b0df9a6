"""From a mask of pixels to tokens of every step, and back: monotone, symmetric, whole at both ends."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scaling.masks import LEAST_MASKED, drawn_tokens, filled, known_psnr, pasted
from scaling.steps import proportional_sizes
from scaling.tokenizer.quantizer import Size

Quantizer = Literal["residual", "scalable"]
SQUARE: tuple[Size, ...] = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8))
WIDE: tuple[Size, ...] = ((1, 1), (2, 3), (3, 5), (4, 6), (8, 12))
PIXELS = 2
"""A token of the last step is so many pixels wide."""
QUANTIZERS = st.sampled_from(list(LEAST_MASKED))
masks = st.tuples(st.sampled_from([SQUARE, WIDE]), st.integers(0, 2**32), st.floats(0, 1)).map(
    lambda drawn: (drawn[0], random_mask(drawn[0], drawn[1], drawn[2]))
)


def random_mask(sizes: tuple[Size, ...], seed: int, share: float) -> Tensor:
    h, w = sizes[-1]
    noise = torch.rand(1, PIXELS * h, PIXELS * w, generator=torch.Generator().manual_seed(seed))
    return noise < share**3  # most masks with holes in both


def by_step(drawn_BL: Tensor, sizes: tuple[Size, ...]) -> list[Tensor]:
    parts = drawn_BL.split([h * w for h, w in sizes], dim=1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]


@given(masks, st.integers(0, 2**32), QUANTIZERS)
def test_a_larger_mask_draws_no_less(
    drawn: tuple[tuple[Size, ...], Tensor], seed: int, quantizer: Quantizer
) -> None:
    sizes, mask = drawn
    larger = mask | random_mask(sizes, seed, 0.5)
    assert not (drawn_tokens(mask, sizes, quantizer) & ~drawn_tokens(larger, sizes, quantizer)).any()


@pytest.mark.parametrize("quantizer", LEAST_MASKED)
@pytest.mark.parametrize("sizes", [SQUARE, WIDE])
def test_an_empty_mask_draws_nothing_and_a_full_one_everything(
    sizes: tuple[Size, ...], quantizer: Quantizer
) -> None:
    empty = torch.zeros_like(random_mask(sizes, 0, 0.0))
    assert not drawn_tokens(empty, sizes, quantizer).any()
    assert drawn_tokens(~empty, sizes, quantizer).all()


@given(masks, st.sampled_from([(1,), (2,), (1, 2)]), QUANTIZERS)
def test_a_mirrored_mask_draws_the_mirrored_tokens(
    drawn: tuple[tuple[Size, ...], Tensor], axes: tuple[int, ...], quantizer: Quantizer
) -> None:
    sizes, mask = drawn
    straight = by_step(drawn_tokens(mask, sizes, quantizer), sizes)
    mirrored = by_step(drawn_tokens(mask.flip(axes), sizes, quantizer), sizes)
    for one, other in zip(straight, mirrored, strict=True):
        assert torch.equal(one.flip(axes), other)


@given(masks, QUANTIZERS)
def test_no_masked_pixel_is_kept_by_the_last_step(
    drawn: tuple[tuple[Size, ...], Tensor], quantizer: Quantizer
) -> None:
    sizes, mask = drawn
    last = by_step(drawn_tokens(mask, sizes, quantizer), sizes)[-1]
    touched = mask.unflatten(1, (-1, PIXELS)).unflatten(3, (-1, PIXELS)).any(4).any(2)
    assert torch.equal(last, touched)


@given(masks)
def test_a_residual_token_is_drawn_if_all_that_it_stands_for_is(
    drawn: tuple[tuple[Size, ...], Tensor],
) -> None:
    sizes, mask = drawn
    *coarse, last = by_step(drawn_tokens(mask, sizes, "residual"), sizes)
    H, W = sizes[-1]
    for step in coarse:
        h, w = step.shape[1:]
        for i in range(h):
            for j in range(w):
                cell = last[0, i * H // h : -(-(i + 1) * H // h), j * W // w : -(-(j + 1) * W // w)]
                assert step[0, i, j] == cell.all()


def test_a_scalable_coarse_token_is_drawn_from_half_of_its_cell_on() -> None:
    for columns, expected in ((3, False), (4, True)):  # of 8: the 1×1 step, by the tokens of the last step
        mask = torch.zeros(1, 16, 16, dtype=torch.bool)
        mask[:, :, : PIXELS * columns] = True
        assert by_step(drawn_tokens(mask, SQUARE, "scalable"), SQUARE)[0].item() is expected
    quarter = torch.zeros(1, 16, 16, dtype=torch.bool)
    quarter[:, :8, :8] = True
    one, two, three, *_ = by_step(drawn_tokens(quarter, SQUARE, "scalable"), SQUARE)
    assert not one.any()
    assert two[0].tolist() == [[True, False], [False, False]]
    # Cells overlap where 8 is no multiple of 3: they are 0 to 2, 2 to 5 and 5 to 7.
    assert three[0].tolist() == [[True, True, False], [True, False, False], [False, False, False]]


@settings(max_examples=25)
@given(masks, st.integers(0, 2**32))
def test_what_is_under_the_mask_does_not_show_in_the_filled_image(
    drawn: tuple[tuple[Size, ...], Tensor], seed: int
) -> None:
    _, mask = drawn
    generator = torch.Generator().manual_seed(seed)
    image, other = torch.rand(2, 1, 3, *mask.shape[1:], generator=generator) * 2 - 1
    result = filled(image, mask)
    assert torch.equal(result, filled(torch.where(mask[:, None], other, image), mask))
    assert torch.equal(result[~mask[:, None].expand_as(result)], image[~mask[:, None].expand_as(image)])
    assert result.abs().max() <= 1
    torch.testing.assert_close(result.flip(2, 3), filled(image.flip(2, 3), mask.flip(1, 2)))


def test_filling_continues_what_is_known() -> None:
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    hole = torch.zeros(1, 16, 16, dtype=torch.bool)
    hole[:, 4:12, 6:10] = True
    assert (filled(ramp, hole) - ramp).abs().max() < 0.2
    assert torch.equal(filled(ramp, torch.ones_like(hole)), torch.zeros(1, 3, 16, 16))
    two = filled(torch.cat([ramp, ramp.flip(3)]), torch.cat([hole, ~hole]))
    assert torch.equal(two[:1], filled(ramp, hole))


@pytest.mark.parametrize("feather", [0, 1, 3])
def test_pasting_brings_known_pixels_back_and_fades_at_the_seam_only(feather: int) -> None:
    generator = torch.Generator().manual_seed(0)
    painted, original = torch.rand(2, 1, 3, 16, 16, generator=generator) * 2 - 1
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 5:9, 6:12] = True
    result = pasted(painted, original, mask, feather)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    away = torch.maximum(
        torch.maximum(5 - rows, rows - 8).clamp(min=0), torch.maximum(6 - columns, columns - 11).clamp(min=0)
    )
    assert torch.equal(result[..., away == 0], painted[..., away == 0])
    assert torch.equal(result[..., away > feather], original[..., away > feather])
    for distance in range(1, feather + 1):
        share = 1 - distance / (feather + 1)
        expected = share * painted + (1 - share) * original
        torch.testing.assert_close(result[..., away == distance], expected[..., away == distance])


def test_psnr_is_of_the_known_pixels() -> None:
    image = torch.zeros(2, 3, 4, 4)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    noisy = image + torch.where(mask[:, None], 2.0, 0.2)
    torch.testing.assert_close(known_psnr(noisy, image, mask), torch.full((2,), 20.0, dtype=torch.float64))
    assert known_psnr(image, image, mask).isposinf().all()
    assert known_psnr(noisy, image, torch.ones_like(mask)).isnan().all()


@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from([(1, 2, 3, 4, 6, 8), (1, 2, 4), (1, 2, 3)]))
def test_steps_of_any_shape_start_at_one_token_grow_and_end_at_the_target(
    h: int, w: int, scales: tuple[int, ...]
) -> None:
    sizes = proportional_sizes((h, w), scales)
    assert sizes[0] == (1, 1)
    assert sizes[-1] == (h, w)
    for (h0, w0), (h1, w1) in pairwise(sizes):
        assert h1 >= h0
        assert w1 >= w0
        assert h1 * w1 > h0 * w0
    for rows, columns in sizes[1:]:  # the shape is the target's, to the nearest token
        assert abs(rows * w - columns * h) <= max(h, w)
    assert [size[::-1] for size in sizes] == list(proportional_sizes((w, h), scales))


def test_steps_of_a_square_are_the_square_ones() -> None:
    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert proportional_sizes((16, 16), scales) == tuple((s, s) for s in scales)
    assert proportional_sizes((8, 8), scales) == tuple((s, s) for s in scales[:7])
    beyond = proportional_sizes((32, 32), scales)
    assert beyond[:10] == tuple((s, s) for s in scales)
    growth = [b / a for (a, _), (b, _) in pairwise(beyond[9:])]
    assert max(growth) < 16 / 13 + 0.05, "no step grows more than the last of the ladder, but for rounding"
    seven = proportional_sizes((10, 10), scales, through=(7,))
    assert seven == tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 7, 8, 10))
    assert proportional_sizes((16, 24), scales)[:4] == ((1, 1), (2, 3), (3, 5), (4, 6))
