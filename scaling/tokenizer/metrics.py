"""Image fidelity: PSNR and SSIM, per image, in [0, 1] pixel values.

SSIM is Wang et al. (2004): Gaussian window of 11 pixels, σ = 1.5, population statistics, K1 = 0.01,
K2 = 0.03, averaged over the positions where the whole window fits and over the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images in [0, 1]; infinite for equal ones."""
    return -10 * (x_BCHW - y_BCHW).double().square().flatten(1).mean(1).log10()


def ssim(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Structural similarity (B,) of images in [0, 1], at least 11 pixels on a side."""
    C = x_BCHW.shape[1]
    t_W = torch.arange(WINDOW, dtype=torch.float64, device=x_BCHW.device) - WINDOW // 2
    g_W = torch.exp(-0.5 * (t_W / SIGMA) ** 2)
    g_W = g_W / g_W.sum()

    def blurred(z_BCHW: Tensor) -> Tensor:
        z_BCHW = F.conv2d(z_BCHW, g_W.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)
        return F.conv2d(z_BCHW, g_W.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)

    # float64: variances are differences of means of squares.
    x, y = x_BCHW.double(), y_BCHW.double()
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    similarity = (2 * mx * my + C1) * (2 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return similarity.flatten(1).mean(1)


def at_size(images_BCHW: Tensor, like_BChw: Tensor) -> Tensor:
    """Images averaged over areas to the size of others: what a reconstruction of that size should show."""
    size = like_BChw.shape[2:]
    return images_BCHW if images_BCHW.shape[2:] == size else F.interpolate(images_BCHW, size, mode="area")
