"""PSNR and SSIM against scikit-image, and the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from scaling.pictures import TILE
from scaling.tokenizer.metrics import psnr, ssim
from scaling.tokenizer.pictures import reconstruction_sheet


def pair(side: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(side)
    x = torch.rand(3, 3, side, side, generator=generator)
    return x, (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("side", [11, 16, 33])
@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_as_scikit_image(side: int, noise: float) -> None:
    x, y = pair(side, noise)
    for i in range(3):
        a, b = (z[i].permute(1, 2, 0).numpy().astype(np.float64) for z in (x, y))
        expected = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
        )
        assert float(ssim(x, y)[i]) == pytest.approx(expected, abs=1e-9)
        assert float(psnr(x, y)[i]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)


def test_of_equal_images() -> None:
    x, _ = pair(16, 0.1)
    assert torch.equal(ssim(x, x), torch.ones(3, dtype=torch.float64))
    assert psnr(x, x).isposinf().all()


def test_the_picture_shows_pixels_unchanged() -> None:
    generator = np.random.default_rng(0)
    originals = generator.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    stages = [generator.integers(0, 256, (2, side, side, 3), dtype=np.uint8) for side in (4, 8, 16)]
    sheet = reconstruction_sheet(originals, originals[::-1], stages, (1, 2, 4), "a title", alone=True)
    pixels, enlarged = np.asarray(sheet), np.repeat(np.repeat(originals[0], TILE // 16, 0), TILE // 16, 1)
    # Originals in the first row; each staged image's row ends with its original.
    found = [
        (y, x)
        for y in range(pixels.shape[0] - TILE)
        for x in range(pixels.shape[1] - TILE)
        if np.array_equal(pixels[y, x], enlarged[0, 0])
        and np.array_equal(pixels[y : y + TILE, x : x + TILE], enlarged)
    ]
    assert len(found) == 3
