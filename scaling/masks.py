"""What of an image is painted anew: from pixels to the tokens of every step, and back to pixels.

Which tokens are drawn
- The last step is the picture's own grid: a token is drawn if *any* of its pixels is masked, so nothing that
  should go stays. Known pixels of such tokens come back when the original is pasted (``pasted``).
- Of the coarser steps' tokens those are drawn whose cell, over which the quantiser averages, is masked to a
  share of at least ``LEAST_MASKED``. For residual tokens that is all of it: a coarse token spreads over all
  that it stands for, and the known pixels' finer tokens mend what is left of *the given image's* coarse ones,
  not of new ones. With a half, known pixels of pictures of which half was masked fell from 28 to 16 dB of the
  plain reconstruction; were one masked pixel enough, those of every picture (docs/LOG.md). Scalable tokens of
  one step take nothing from another's, and the picture is made of the last step alone: there a half leaves
  the model more freedom at no cost.
- VAR's notebook keeps a token if more than half is known, by the four tokens in the middle of a cell, and the
  1×1 step always. Here a mask of everything draws everything.

What is under the mask
- A kept token next to the hole, or around it at a coarse step, would still tell of the pixels that should not
  be known. ``filled`` replaces them by a smooth continuation of the known ones before the image is encoded.

Shapes: B images, 3 colours, H W pixels, h w the tokens of one step, L = Σ h·w; masks are True where painted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scaling.tokenizer.quantizer import Size

LEAST_MASKED = {"residual": 1.0, "scalable": 0.5}
"""By quantiser: how much of what a coarse token stands for must be masked for it to be drawn."""


def drawn_tokens(
    masks_BHW: Tensor, sizes: Sequence[Size], quantizer: Literal["residual", "scalable"]
) -> Tensor:
    """Which tokens of every step are drawn, bool (B, L), coarse to fine.

    Args:
        masks_BHW: bool; the sides are multiples of the last step's.
        sizes: the steps (h, w).
    """
    # On the CPU in float64, where the shares are exact: a half of a cell is a half.
    least = LEAST_MASKED[quantizer]
    finest_B1hw = F.adaptive_max_pool2d(masks_BHW.cpu().double()[:, None], sizes[-1])
    steps = [F.interpolate(finest_B1hw, size, mode="area") >= least for size in sizes[:-1]]
    drawn_BL = torch.cat([step_B1hw.flatten(1) for step_B1hw in (*steps, finest_B1hw > 0)], dim=1)
    return drawn_BL.to(masks_BHW.device)


def filled(images_B3HW: Tensor, masks_BHW: Tensor) -> Tensor:
    """The images with the masked pixels continued smoothly from the known ones; mid-grey if none is known.

    Pull and push (Gortler et al., The Lumigraph, 1996): averages of known pixels over ever larger areas,
    until there is one everywhere; then each gap takes the enlarged average of the next coarser level.
    """
    known_B1HW = (~masks_BHW)[:, None].to(images_B3HW.dtype)
    smooth_B3HW = _pull_push(images_B3HW * known_B1HW, known_B1HW)
    return torch.where(masks_BHW[:, None], smooth_B3HW, images_B3HW)


def _pull_push(sums_B3HW: Tensor, weights_B1HW: Tensor) -> Tensor:
    """Weighted averages (B, 3, H, W) where there is a weight, and continued from coarser ones where not."""
    H, W = sums_B3HW.shape[2:]
    own_B3HW = sums_B3HW / weights_B1HW.clamp(min=torch.finfo(weights_B1HW.dtype).tiny)
    if (H, W) == (1, 1):
        return own_B3HW
    half = (-(-H // 2), -(-W // 2))
    coarse_B3hw = _pull_push(
        F.adaptive_avg_pool2d(sums_B3HW, half), F.adaptive_avg_pool2d(weights_B1HW, half)
    )
    enlarged_B3HW = F.interpolate(coarse_B3hw, (H, W), mode="bilinear")
    return torch.where(weights_B1HW > 0, own_B3HW, enlarged_B3HW)


def pasted(painted_B3HW: Tensor, originals_B3HW: Tensor, masks_BHW: Tensor, feather: int) -> Tensor:
    """The original's known pixels on the painted picture, faded into it at the seam.

    Masked pixels are the painted ones; those further than ``feather`` pixels from the mask the original's;
    the share of the painted picture falls linearly between them.
    """
    reached_B1HW = masks_BHW[:, None].to(painted_B3HW.dtype)
    share_B1HW = reached_B1HW.clone()
    for step in range(1, feather + 1):
        wider_B1HW = F.max_pool2d(reached_B1HW, 3, stride=1, padding=1)
        share_B1HW += (wider_B1HW - reached_B1HW) * (1 - step / (feather + 1))
        reached_B1HW = wider_B1HW
    mixed_B3HW = share_B1HW * painted_B3HW + (1 - share_B1HW) * originals_B3HW
    # Not by arithmetic where the share is 0: known pixels are to come back bit for bit.
    return torch.where(share_B1HW == 0, originals_B3HW, mixed_B3HW)


def known_psnr(x_B3HW: Tensor, y_B3HW: Tensor, masks_BHW: Tensor) -> Tensor:
    """PSNR (B,) in dB over the known pixels of images in [−1, 1]; infinite for equal ones, NaN if none is."""
    squares_B1HW = ((x_B3HW - y_B3HW) / 2).double().square().mean(1, keepdim=True)
    known_B1HW = (~masks_BHW)[:, None]
    error_B = (squares_B1HW * known_B1HW).sum((1, 2, 3)) / known_B1HW.sum((1, 2, 3))
    return -10 * error_B.log10()
