"""A small residual network trained on a study's own images: an extractor where no Inception weights are.

Design choices
- FID on its features says how a study's models compare with each other. It is no FID of the literature,
  and only as good as the classifier, so its accuracy is part of its identity.
- Group norms: an image's features depend on that image alone, in training too.
- Halved until 8 pixels or less are left on a side, at twice the channels each time, up to eight times the
  first. At full resolution there is one convolution and no block, which would cost more than any other.
- It judges samples as well: ``probabilities`` is what rejection sampling takes the best of.

Shapes: B images, C channels, D features, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from scaling.config import ConfigError, DataConfig, from_dict, identity, require, to_dict
from scaling.fidelity.weights import digest
from scaling.records import RecordsError, read_json, write_json
from scaling.requests import same_images

FORMAT = "varscale-classifier-1"
SMALLEST, WIDEST, GROUPS = 8, 8, 8


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier looks like."""

    resolution: int
    num_classes: int
    width: int = 32
    """Channels at full resolution."""
    blocks: int = 1
    """Residual blocks at each resolution but the full one."""

    def __post_init__(self) -> None:
        require(
            self.width % GROUPS == 0, f"classifier width must be a multiple of {GROUPS}, got {self.width}"
        )
        require(self.blocks >= 1, f"classifier blocks must be at least 1, got {self.blocks}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels at each resolution; the last are the features."""
        found, side = [self.width], self.resolution
        while side > SMALLEST:
            side = -(-side // 2)
            found.append(min(2 * found[-1], WIDEST * self.width))
        return tuple(found)


class _Block(nn.Module):
    """x + two convolutions, each after norm and ReLU; the way round them is 1 × 1 where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, inputs), nn.GroupNorm(GROUPS, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner_BCHW = self.conv1(F.relu(self.norm1(x_BCHW)))
        out_BCHW: Tensor = self.around(x_BCHW) + self.conv2(F.relu(self.norm2(inner_BCHW)))
        return out_BCHW


class Classifier(nn.Module):
    """Logits of images; an ``Extractor`` with probabilities."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for stage, width in enumerate(channels):
            for block in range(config.blocks if stage > 0 or len(channels) == 1 else 0):
                first = block == 0 and stage > 0
                inputs = channels[stage - 1] if first else width
                blocks.append(_Block(inputs, width, stride=2 if first else 1))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(GROUPS, channels[-1])
        self.head = nn.Linear(channels[-1], config.num_classes)

    def features(self, images_B3HW: Tensor) -> Tensor:
        """What the last layer sees, (B, D), of images in [−1, 1].

        Raises:
            ConfigError: images of another size than it was trained on.
        """
        side = self.config.resolution
        if images_B3HW.shape[1:] != (3, side, side):
            raise ConfigError(
                f"this classifier takes images of shape (3, {side}, {side}), "
                f"got {tuple(images_B3HW.shape[1:])}"
            )
        features_BD: Tensor = F.relu(self.norm(self.blocks(self.stem(images_B3HW)))).mean(dim=(2, 3))
        return features_BD

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, V)."""
        logits_BV: Tensor = self.head(self.features(images_B3HW))
        return logits_BV

    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        """Class probabilities (B, V)."""
        return self(images_B3HW).softmax(dim=1)

    def features_and_probabilities(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for one pass through the network."""
        features_BD = self.features(images_B3HW)
        return features_BD, self.head(features_BD).softmax(dim=1)


def save_classifier(classifier: Classifier, folder: Path, facts: dict[str, Any]) -> None:
    """Write ``weights.safetensors`` and ``classifier.json``.

    Args:
        facts: how it was trained; ``val_accuracy`` must be among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in classifier.state_dict().items()}
    aside = folder / ".weights.partial"
    save_file(state, aside)
    aside.replace(folder / "weights.safetensors")
    description = {"format": FORMAT, "config": to_dict(classifier.config), "content_hash": digest(state)}
    write_json(folder / "classifier.json", description | {"facts": facts})


def load_classifier(folder: Path) -> tuple[Classifier, str]:
    """The classifier of a folder, in evaluation mode and without gradients, and its identity.

    Raises:
        RecordsError: a file is missing or damaged, or they do not belong together.
    """
    file, weights = folder / "classifier.json", folder / "weights.safetensors"
    description = read_json(file)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise RecordsError(f"{file}: expected a classifier of format {FORMAT!r}")
    try:
        classifier = Classifier(from_dict(ClassifierConfig, description.get("config")))
        classifier.load_state_dict(load_file(weights))
    except FileNotFoundError:
        raise RecordsError(f"{weights}: no such file") from None
    except (ConfigError, SafetensorError, RuntimeError) as error:
        raise RecordsError(f"{folder}: not a classifier ({' '.join(str(error).split())})") from None
    found = digest(classifier.state_dict())
    if found != description.get("content_hash"):
        raise RecordsError(f"{folder}: classifier.json and weights.safetensors do not belong together")
    accuracy = float(description["facts"]["val_accuracy"])
    return classifier.eval().requires_grad_(False), f"classifier:{found[:12]}@{accuracy:.3f}"


def find_classifier(root: Path, data: DataConfig) -> Path:
    """The folder of the classifier in ``root`` that was trained on the images of ``data``.

    Raises:
        ConfigError: there is none, or there are several.
    """
    wanted = identity(same_images(data))
    found = []
    for file in sorted(root.glob("*/classifier.json")):
        if read_json(file).get("facts", {}).get("data") == wanted:
            found.append(file.parent)
    if not found:
        raise ConfigError(
            f"extractor classifier: {root} has none of these images; 'run_sweep.py classifier RECIPE' trains "
            "one, --weights FOLDER names one"
        )
    if len(found) > 1:
        raise ConfigError(
            f"extractor classifier: {root} has several of these images, {', '.join(f.name for f in found)}; "
            "--weights FOLDER says which"
        )
    return found[0]
