"""The PatchGAN discriminator of stage 1.

Design choices
- Strided 4×4 convolutions and leaky ReLU; every output position judges one patch of the image.
- Group norm in place of the original's batch norm: statistics over a batch would depend on how it is
  divided into micro-batches and processes, which must not change a result.
"""

from __future__ import annotations

from torch import Tensor, nn

from scaling.config import AdversarialConfig, require


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] to logits (B, 1, h, w), positive for real patches.

    Args:
        config: first convolution's channels, and the number of halvings.
        resolution: side of the images in pixels.

    Raises:
        ConfigError: the images are too small for so many halvings.
    """

    def __init__(self, config: AdversarialConfig, resolution: int) -> None:
        super().__init__()
        require(
            resolution // 2**config.layers >= 3,
            f"adversarial.layers {config.layers} is too many for {resolution} px images: "
            f"{resolution} / 2^{config.layers} must be at least 3",
        )
        channels, layers = config.channels, [nn.Conv2d(3, config.channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            wider = config.channels * min(2**i, 8)
            stride = 2 if i < config.layers else 1
            layers += [nn.Conv2d(channels, wider, 4, stride, 1, bias=False), _norm(wider), nn.LeakyReLU(0.2)]
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        logits_B1hw: Tensor = self.layers(images_B3HW)
        return logits_B1hw


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels)
