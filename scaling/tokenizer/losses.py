"""The terms of stage 1's compound loss, as pure functions (VQGAN eqs. 4 to 7 with a pixel term beside).

    L = l1·|x − x̂| + l2·(x − x̂)² + codebook·L_vq + perceptual·LPIPS(x, x̂) + adversarial·λ·L_G

A scalable tokenizer adds entropy·L_entropy, and its pixel terms are over the pixels of all reconstructions of
a step, each against the image at its size; LPIPS and the adversarial term see the full size.

Images are in [−1, 1]; every term is a mean, so terms of micro-batches average to the batch's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from scaling.config import TokenizerTrainConfig


def learning_rate(train: TokenizerTrainConfig, step: int) -> float:
    """Learning rate of 0-based ``step``: linear warm-up, then half a cosine to ``lr_end`` of the peak."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    progress = (step - train.warmup) / max(1, train.steps - 1 - train.warmup)
    return train.lr * (train.lr_end + (1 - train.lr_end) * 0.5 * (1 + math.cos(math.pi * progress)))


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """½·(mean(relu(1 − D(x))) + mean(relu(1 + D(x̂))))."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """−mean(D(x̂))."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """λ = |∇L_rec| / (|∇L_G| + 1e-4), at most 1e4 (VQGAN eq. 7).

    Args:
        reconstruction_gradient: of the pixel and perceptual terms, at the decoder's last layer.
        adversarial_gradient: of L_G, there too.
    """
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return torch.clamp(ratio, max=1e4).detach()
