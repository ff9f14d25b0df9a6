"""Inception-v3 as the FID literature uses it: the 2015 graph with 1008 outputs, under its usual port's keys.

Design choices
- The file is pytorch-fid's ``pt_inception-2015-12-05-6726825d.pth``: torchvision's names, the graph's
  numbers. Against the published architecture (Szegedy et al. 2016), that graph has 1008 outputs, average
  pools that do not count the padding, and a max pool in its last block.
- The network is a table of branches. All convolutions are without bias, normalised, rectified; of the
  blocks' convolutions, those that halve the sides are without padding and all others keep them.
- Toolkits differ before the first layer. ``half-pixel`` is pytorch-fid: bilinear with half-pixel centres,
  pixels to [−1, 1]. ``tf1`` is the graph's own and the ADM toolkit's: bilinear from the top left corner,
  and (x − 128)/128. Neither smooths before it shrinks. A reference belongs to one of the two.
- Class probabilities are the softmax of the last layer without its bias, as in the toolkits that come from
  the graph (improved-gan, ADM) and in torch-fidelity.

Shapes: B images, C channels, V = 1008 classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, DIM, CLASSES = 299, 2048, 1008
Resize = Literal["half-pixel", "tf1"]

Step = tuple[str, int, int | tuple[int, int]]
"""A convolution of a branch: the end of its name, output channels, kernel."""
Branches = dict[str, tuple[Step | tuple[Step, Step], ...]]
"""Branches by name, each a chain of convolutions; a pair at the end of a chain reads the same input."""


def block_a(pool: int) -> Branches:
    """35 × 35; ``pool`` channels come from the pool."""
    return {
        "branch1x1": (("", 64, 1),),
        "branch5x5": (("_1", 48, 1), ("_2", 64, 5)),
        "branch3x3dbl": (("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)),
        "branch_pool": (("", pool, 1),),
    }


BLOCK_B: Branches = {
    "branch3x3": (("", 384, 3),),
    "branch3x3dbl": (("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)),
}


def block_c(inner: int) -> Branches:
    """17 × 17; ``inner`` channels within the 7 × 7 branches."""
    wide, tall = (1, 7), (7, 1)
    return {
        "branch1x1": (("", 192, 1),),
        "branch7x7": (("_1", inner, 1), ("_2", inner, wide), ("_3", 192, tall)),
        "branch7x7dbl": (
            ("_1", inner, 1), ("_2", inner, tall), ("_3", inner, wide),
            ("_4", inner, tall), ("_5", 192, wide),
        ),
        "branch_pool": (("", 192, 1),),
    }  # fmt: skip


BLOCK_D: Branches = {
    "branch3x3": (("_1", 192, 1), ("_2", 320, 3)),
    "branch7x7x3": (("_1", 192, 1), ("_2", 192, (1, 7)), ("_3", 192, (7, 1)), ("_4", 192, 3)),
}
BLOCK_E: Branches = {
    "branch1x1": (("", 320, 1),),
    "branch3x3": (("_1", 384, 1), (("_2a", 384, (1, 3)), ("_2b", 384, (3, 1)))),
    "branch3x3dbl": (("_1", 448, 1), ("_2", 384, 3), (("_3a", 384, (1, 3)), ("_3b", 384, (3, 1)))),
    "branch_pool": (("", 192, 1),),
}
MIXED: tuple[tuple[str, int, Branches, Literal["average", "max", "halve"]], ...] = (
    ("Mixed_5b", 192, block_a(32), "average"),
    ("Mixed_5c", 256, block_a(64), "average"),
    ("Mixed_5d", 288, block_a(64), "average"),
    ("Mixed_6a", 288, BLOCK_B, "halve"),
    ("Mixed_6b", 768, block_c(128), "average"),
    ("Mixed_6c", 768, block_c(160), "average"),
    ("Mixed_6d", 768, block_c(160), "average"),
    ("Mixed_6e", 768, block_c(192), "average"),
    ("Mixed_7a", 768, BLOCK_D, "halve"),
    ("Mixed_7b", 1280, BLOCK_E, "average"),
    ("Mixed_7c", 2048, BLOCK_E, "max"),
)
"""Name, input channels, branches, and what the pool is: ``halve`` is a max pool of stride 2."""


class Unit(nn.Module):
    """Convolution, batch norm with the statistics of the file, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = False
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


class Mixed(nn.Module):
    """Branches beside each other, channels one after another; in ``halve`` blocks the pool comes last."""

    def __init__(self, inputs: int, branches: Branches, pool: Literal["average", "max", "halve"]) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch, chain in branches.items():
            channels = inputs
            for position, step in enumerate(chain):
                last = position == len(chain) - 1
                for name, outputs, kernel in _alternatives(step):
                    halves = pool == "halve" and last
                    unit = Unit(channels, outputs, kernel, stride=2 if halves else 1, same=not halves)
                    self.add_module(branch + name, unit)
                channels = _alternatives(step)[0][1]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        outputs = []
        for branch, chain in self.branches.items():
            heads = [self.pooled(x_BCHW) if branch == "branch_pool" else x_BCHW]
            for step in chain:
                heads = [self.get_submodule(branch + name)(heads[0]) for name, _, _ in _alternatives(step)]
            outputs += heads
        if self.pool == "halve":
            outputs.append(self.pooled(x_BCHW))
        return torch.cat(outputs, dim=1)

    def pooled(self, x_BCHW: Tensor) -> Tensor:
        """The block's 3 × 3 pool."""
        if self.pool == "halve":
            return F.max_pool2d(x_BCHW, 3, stride=2)
        if self.pool == "max":
            return F.max_pool2d(x_BCHW, 3, stride=1, padding=1)
        return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


def _alternatives(step: Step | tuple[Step, Step]) -> tuple[Step, ...]:
    return (step,) if isinstance(step[0], str) else step


class Inception(nn.Module):
    """The network, without gradients, in evaluation mode; an ``Extractor`` of pool features (2048).

    Args:
        resize: what comes before the first layer.
    """

    def __init__(self, resize: Resize = "half-pixel") -> None:
        super().__init__()
        self.resize: Resize = resize
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        for name, inputs, branches, pool in MIXED:
            self.add_module(name, Mixed(inputs, branches, pool))
        self.fc = nn.Linear(DIM, CLASSES)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Pool features (B, 2048) of images in [−1, 1] of any size."""
        x_BCHW = network_input(images_B3HW.float(), self.resize)
        x_BCHW = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_BCHW)))
        x_BCHW = F.max_pool2d(x_BCHW, 3, stride=2)
        x_BCHW = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x_BCHW)), 3, stride=2)
        for name, *_ in MIXED:
            x_BCHW = self.get_submodule(name)(x_BCHW)
        return x_BCHW.mean(dim=(2, 3))

    def features(self, images_B3HW: Tensor) -> Tensor:
        """As ``forward``."""
        features_BD: Tensor = self(images_B3HW)
        return features_BD

    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        """Class probabilities (B, 1008)."""
        return self.features_and_probabilities(images_B3HW)[1]

    def features_and_probabilities(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for one pass through the network."""
        features_BD = self.features(images_B3HW)
        return features_BD, (features_BD @ self.fc.weight.T).softmax(dim=1)


def network_input(images_B3HW: Tensor, resize: Resize) -> Tensor:
    """Images in [−1, 1] as the toolkit feeds them to the first layer, (B, 3, 299, 299)."""
    if resize == "half-pixel":
        return F.interpolate(images_B3HW, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)
    rows, columns = (corner_weights(side).to(images_B3HW) for side in images_B3HW.shape[-2:])
    pixels_B3HW = (images_B3HW + 1) * 127.5
    return (rows @ pixels_B3HW @ columns.T - 128) / 128


def corner_weights(side: int, outputs: int = SIDE) -> Tensor:
    """Linear interpolation (outputs, side) from the first pixel on: output i reads position i·side/outputs.

    Beyond the last pixel there is nothing to lean towards: it is repeated.
    """
    position = torch.arange(outputs, dtype=torch.float64) * side / outputs
    low = position.long()
    high = (low + 1).clamp(max=side - 1)
    weights = torch.zeros(outputs, side, dtype=torch.float64)
    weights.scatter_add_(1, low[:, None], (1 - (position - low))[:, None])
    weights.scatter_add_(1, high[:, None], (position - low)[:, None])
    return weights
