"""Zero-shot editing: what is known of a picture is forced at every step, the rest is drawn.

- In-painting, out-painting and drawing a box as another class (VAR section 5.3) differ in the mask and the
  class only; without a class the model is given the null class, as published. Every family can: VAR forces
  the residual tokens of the given image, FlexVAR each step's own tokens, raster those of its one map (it
  knows what stands before a token only).
- Refinement and expansion (FlexVAR section 4.3) need tokens of one size that mean the same whatever the other
  steps are, and positions of any size: flexible families only.
- What is kept is kept as the tokenizer makes it. How near that comes to the image is measured over the known
  pixels; ``masks.pasted`` brings the pixels themselves back.

Shapes: B images, N candidates of each, 3 colours, H W pixels, L tokens of all steps; sizes are (h, w) tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from scaling.config import FLEXIBLE, ConfigError, ModelConfig, SamplingConfig, require
from scaling.families.interface import FamilyModel
from scaling.generation import Forced, draw_tokens
from scaling.masks import drawn_tokens, filled
from scaling.steps import proportional_sizes
from scaling.tokenizer.quantizer import Size
from scaling.tokenizer.vqvae import Tokenizer


@dataclass(frozen=True)
class Edited:
    """What came of some images."""

    candidates: Tensor
    """(B, N, 3, H, W) in [−1, 1], as the tokenizer makes them; nothing is pasted."""
    tokens: Tensor
    """(B, N, L) of the candidates."""
    forced: Forced
    """What was given: tokens and kept (B, L)."""
    sizes: tuple[Size, ...]
    """The steps."""


def redraw(
    model: FamilyModel,
    tokenizer: Tokenizer,
    images_B3HW: Tensor,
    masks_BHW: Tensor,
    labels_B: Tensor | None,
    sampling: SamplingConfig,
    *,
    sizes: Sequence[Size] | None = None,
    peek: bool = False,
    batch: int = 16,
) -> Edited:
    """Paint the masked part of images anew, everything else being forced.

    Args:
        images_B3HW: in [−1, 1], of the size that the last step stands for.
        masks_BHW: bool, True where painted.
        labels_B: the class of each image; None for no class.
        sampling: ``images`` candidates of each image, seeds ``seed`` onwards, the same for every image.
        sizes: the steps; None for the model's own, which families other than the flexible must have.
        peek: encode the images as they are; otherwise with the masked pixels replaced (``masks.filled``).
        batch: candidates drawn at once.

    Raises:
        ConfigError: steps that the family cannot have, images of another size.
    """
    steps = check_sizes(model.config, sizes)
    seen_B3HW = images_B3HW if peek else filled(images_B3HW, masks_BHW)
    drawn_BL = drawn_tokens(masks_BHW, steps, tokenizer.config.quantizer)
    forced = Forced(tokenizer.encode(seen_B3HW, steps), ~drawn_BL)
    return _draw(model, tokenizer, forced, labels_B, sampling, steps, batch)


def refine(
    model: FamilyModel,
    tokenizer: Tokenizer,
    images_B3hw: Tensor,
    labels_B: Tensor | None,
    sampling: SamplingConfig,
    *,
    sizes: Sequence[Size] | None = None,
    batch: int = 16,
) -> Edited:
    """Draw images at twice their size: their tokens are forced up to their own size, larger steps are drawn.

    Args:
        images_B3hw: in [−1, 1], sides multiples of the tokenizer's downsampling.
        labels_B, sampling, batch: as ``redraw``.
        sizes: the steps, the images' own size among them; None for ``refining_sizes``.

    Raises:
        ConfigError: steps that the family cannot have, or without the images' own size.
    """
    h, w = (side // tokenizer.config.downsampling for side in images_B3hw.shape[2:])
    steps = check_sizes(model.config, refining_sizes((h, w), model.config.scales) if sizes is None else sizes)
    require(
        (h, w) in steps, f"refinement goes through the image's own size, {h} x {w} tokens; not in {steps}"
    )
    known = steps[: steps.index((h, w)) + 1]
    tokens_Bl = tokenizer.encode(images_B3hw, known)
    drawn = sum(rows * columns for rows, columns in steps) - tokens_Bl.shape[1]
    tokens_BL = F.pad(tokens_Bl, (0, drawn))
    keep_BL = F.pad(torch.ones_like(tokens_Bl, dtype=torch.bool), (0, drawn))
    return _draw(model, tokenizer, Forced(tokens_BL, keep_BL), labels_B, sampling, steps, batch)


def refining_sizes(size: Size, scales: Sequence[int]) -> tuple[Size, ...]:
    """Steps from the first through ``size`` to twice it.

    Raises:
        ConfigError: an image too small to be a step.
    """
    (h, w), first = size, scales[0]
    require(
        min(size) > first or size == (first, first),
        f"an image of {h} x {w} tokens is too small to be refined: no step but the first, {first} x {first}, "
        f"has a side of {first}",
    )
    return proportional_sizes((2 * h, 2 * w), scales, through=(min(size),))


def extended(images_B3hw: Tensor, height: int, width: int, grid: int = 1) -> tuple[Tensor, Tensor]:
    """Images in the middle of a larger canvas (B, 3, H, W), and the mask (B, H, W) of what is not known.

    ``redraw`` then expands them. The unknown part is mid-grey until it is filled.

    Args:
        grid: the images begin at a multiple of so many pixels, so that whole tokens of theirs are known.

    Raises:
        ConfigError: a canvas smaller than the images.
    """
    B, _, h, w = images_B3hw.shape
    if height < h or width < w:
        raise ConfigError(f"a canvas of {height} x {width} pixels does not hold an image of {h} x {w}")
    top, left = ((whole - part) // 2 // grid * grid for whole, part in ((height, h), (width, w)))
    canvas_B3HW = images_B3hw.new_zeros(B, 3, height, width)
    masks_BHW = torch.ones(B, height, width, dtype=torch.bool, device=images_B3hw.device)
    canvas_B3HW[:, :, top : top + h, left : left + w] = images_B3hw
    masks_BHW[:, top : top + h, left : left + w] = False
    return canvas_B3HW, masks_BHW


def reconstructed(tokenizer: Tokenizer, images_B3HW: Tensor) -> Tensor:
    """The tokenizer's own pictures of images whose sides are multiples of its downsampling."""
    sizes: tuple[Size, ...] | None = None
    if tokenizer.config.quantizer == "scalable":  # the picture is made of the last step alone, of any size
        h, w = (side // tokenizer.config.downsampling for side in images_B3HW.shape[2:])
        sizes = ((h, w),)
    return tokenizer.decode(tokenizer.encode(images_B3HW, sizes), sizes)


def check_sizes(config: ModelConfig, sizes: Sequence[Size] | None) -> tuple[Size, ...]:
    """The steps, the model's own for None.

    Raises:
        ConfigError: others than the model's own, of a family that has one size only; a first step of another
            size than the model's.
    """
    steps = config.sizes if sizes is None else tuple(sizes)
    require(
        config.family in FLEXIBLE or steps == config.sizes,
        f"{config.family} has steps of one size only; other sizes and shapes need {' or '.join(FLEXIBLE)}",
    )
    require(
        steps[0] == config.sizes[0], f"the first step must be {config.sizes[0]} as trained, got {steps[0]}"
    )
    return steps


@torch.no_grad()
def _draw(
    model: FamilyModel,
    tokenizer: Tokenizer,
    forced: Forced,
    labels_B: Tensor | None,
    sampling: SamplingConfig,
    steps: tuple[Size, ...],
    batch: int,
) -> Edited:
    """All candidates of all images, ``batch`` at a time."""
    B, N = len(forced.tokens_BL), sampling.images
    if labels_B is None:  # the null class has no other to be guided away from
        labels_B = torch.full((B,), model.config.num_classes, device=forced.tokens_BL.device)
        sampling = replace(sampling, guidance=0.0)
    images, tokens = [], []
    for start in range(0, B * N, batch):
        rows = torch.arange(start, min(start + batch, B * N), device=labels_B.device)
        which = rows // N
        tokens_bL, images_b3HW = draw_tokens(
            model, tokenizer, labels_B[which], [sampling.seed + int(row) % N for row in rows], sampling,
            sizes=steps, forced=Forced(forced.tokens_BL[which], forced.keep_BL[which]),
        )  # fmt: skip
        tokens.append(tokens_bL)
        images.append(images_b3HW)
    return Edited(
        candidates=torch.cat(images).unflatten(0, (B, N)),
        tokens=torch.cat(tokens).unflatten(0, (B, N)),
        forced=forced,
        sizes=steps,
    )
