"""LPIPS, the learned perceptual distance, with weights that the user brings.

Design choices
- VGG-16's convolutions and LPIPS's linear heads are written out here: torchvision is not needed.
- The weights are torchvision's ``vgg16`` (``features.0.weight`` …) and the LPIPS heads
  (``lin0.model.1.weight`` …, version 0.1), in one file or as the two published files in one folder.
  Both .safetensors and .pth are read; a .pth with ``weights_only``, so it cannot run code.
- Frozen: it has no part in checkpoints or in the tokenizer's folder.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from scaling.config import ConfigError
from scaling.tokenizer.config import LPIPS_KEY, lpips_digest, lpips_files

STAGES: tuple[tuple[int, ...], ...] = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)
"""Output channels of VGG-16's convolutions; a stage ends where LPIPS reads, then the sides are halved."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation, for images in [−1, 1]."""


class LPIPS(nn.Module):
    """Perceptual distance of two image batches in [−1, 1]: a mean over the batch.

    Per stage, features are scaled to unit length per position, squared differences weighed by the
    stage's head and averaged over positions; the stages are summed.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []
        channels = 3
        for stage in STAGES:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.ends.append(len(layers))
            layers.append(nn.MaxPool2d(2))
        # The last pooling is read by nobody, and at 16 px there would be nothing left to pool.
        self.features = nn.Sequential(*layers[:-1])
        for i, stage in enumerate(STAGES):
            # "model.1" because the published heads put a dropout first.
            self.add_module(f"lin{i}", _Head(stage[-1]))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        batch = len(x_B3HW)
        h_BCHW = (torch.cat([x_B3HW, y_B3HW]) - self.get_buffer("shift")) / self.get_buffer("scale")
        distance, begin = torch.zeros((), device=x_B3HW.device), 0
        for i, end in enumerate(self.ends):
            h_BCHW = self.features[begin:end](h_BCHW)
            unit_BCHW = F.normalize(h_BCHW.float(), dim=1, eps=1e-10)
            difference_BCHW = (unit_BCHW[:batch] - unit_BCHW[batch:]).square()
            distance = distance + self.get_submodule(f"lin{i}")(difference_BCHW).float().mean()
            begin = end
        return distance


class _Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_B1HW: Tensor = self.model(x_BCHW)
        return out_B1HW


def load_lpips(path: str, sha256: str | None) -> LPIPS:
    """LPIPS with weights from a file, or from all .safetensors and .pth files of a folder.

    Args:
        path: where they lie.
        sha256: what they must be (``TokenizerTrainConfig.lpips_sha256``).

    Raises:
        ConfigError: no such path, a file that is no such thing, other weights than these, or weights that
            are missing or misshapen.
    """
    files = lpips_files(Path(path))
    found = lpips_digest(files)
    if found != sha256:
        raise ConfigError(
            f"{LPIPS_KEY}: {path} holds other weights than the tokenizer was planned with "
            f"(SHA-256 {found[:12]}…, not {(sha256 or 'unknown')[:12]}…); put those back, or plan again"
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= _read(file)
    model = LPIPS()
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ConfigError(
            f"{LPIPS_KEY}: {path} lacks {len(missing)} of {len(wanted)} weights, such as "
            f"'{missing[0]}' (expected torchvision's vgg16 'features.*' and LPIPS's 'lin0.model.1.weight' …)"
        )
    for name, value in wanted.items():
        if weights[name].shape != value.shape:
            raise ConfigError(
                f"{LPIPS_KEY}: {path}: '{name}' has shape {tuple(weights[name].shape)}, "
                f"expected {tuple(value.shape)}"
            )
    model.load_state_dict({name: weights[name] for name in wanted})
    return model.eval()


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{LPIPS_KEY}: {file}: not a readable file of weights ({reason})") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConfigError(
            f"{LPIPS_KEY}: {file}: expected a state dict of tensors, got a {type(found).__name__}"
        )
    return found
