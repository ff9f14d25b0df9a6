"""Rejection sampling: of many drawn images the ones that a classifier is surest of (as VQ-VAE-2 and VQGAN).

- Any object with ``probabilities(images) -> (B, classes)`` over images in [−1, 1] is a classifier.
- Candidate i has the seed ``seed + i``, so that a kept image can be drawn again by itself; which ones are
  kept depends neither on the batch nor on the order.
- Images stream: no more are in memory than are kept, and one batch.
"""

from __future__ import annotations

import heapq
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from scaling.config import ConfigError, require
from scaling.fidelity import classifier as trained

Sample = Callable[[Sequence[int], Sequence[int]], Tensor]
"""From classes and seeds to images (B, 3, H, W) in [−1, 1]."""


class Classifier(Protocol):
    """Judges images."""

    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        """(B, classes) of images in [−1, 1]; columns are the model's class ids."""
        ...


@dataclass(frozen=True)
class Kept:
    """One image."""

    label: int
    seed: int
    probability: float
    """Of the wanted class."""
    image_3HW: Tensor
    """On the CPU."""


@dataclass(frozen=True)
class Acceptance:
    """What became of the candidates of one class."""

    candidates: int
    kept: int
    threshold: float
    """The least probability of the wanted class that was kept."""
    mean: float
    """Of all candidates' probabilities."""
    mean_kept: float


@dataclass(frozen=True)
class Rejection:
    """The images kept, class by class in the order of the labels, the surest first."""

    kept: tuple[Kept, ...]
    acceptance: dict[int, Acceptance]
    """By class."""


@torch.no_grad()
def reject(
    sample: Sample,
    classifier: Classifier,
    labels: Sequence[int],
    *,
    keep: float | int,
    seed: int = 0,
    batch: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> Rejection:
    """Draw a candidate per label, and keep of each class those with the highest probability of it.

    Args:
        labels: the candidates' classes.
        keep: how many of each class (int), or which share of its candidates (float, at least one image).
        batch: candidates drawn at once; it changes nothing.
        progress: called with the number of candidates drawn.

    Raises:
        ConfigError: more are to be kept than drawn; probabilities that are none, or not of all classes.
    """
    counts = Counter(labels)
    places = {label: _places(keep, count, label) for label, count in counts.items()}
    # By probability; of equals the first seed is kept.
    best: dict[int, list[tuple[float, int, Tensor]]] = {label: [] for label in counts}
    sums = dict.fromkeys(counts, 0.0)
    for start in range(0, len(labels), batch):
        some = labels[start : start + batch]
        images_B3HW = sample(some, [seed + start + i for i in range(len(some))])
        wanted = _wanted(classifier.probabilities(images_B3HW), some)
        for i, (label, probability) in enumerate(zip(some, wanted, strict=True)):
            sums[label] += probability
            mine, order = best[label], -(start + i)
            if len(mine) < places[label]:
                heapq.heappush(mine, (probability, order, _own(images_B3HW[i])))
            elif (probability, order) > mine[0][:2]:
                heapq.heapreplace(mine, (probability, order, _own(images_B3HW[i])))
        progress(start + len(some))
    kept, acceptance = [], {}
    for label, mine in best.items():
        ordered = sorted(mine, key=lambda entry: entry[:2], reverse=True)
        kept += [Kept(label, seed - order, probability, image) for probability, order, image in ordered]
        acceptance[label] = Acceptance(
            candidates=counts[label], kept=len(mine), threshold=ordered[-1][0],
            mean=sums[label] / counts[label], mean_kept=sum(entry[0] for entry in mine) / len(mine),
        )  # fmt: skip
    return Rejection(tuple(kept), acceptance)


def candidates_for(wanted: int, share: float) -> int:
    """The fewest candidates of which a share keeps ``wanted``."""
    count = wanted
    while _whole(share, count) < wanted:  # without the one that is kept at least: one of one is no choice
        count = max(count + 1, int(wanted / share))
    return count


def load_classifier(name: str, device: str | torch.device) -> Classifier:
    """A classifier that the command ``classifier`` trained, by its folder, or what ``MODULE:FUNCTION`` makes,
    on a device if it is a module.

    Raises:
        ConfigError: no such function, or what it returns has no ``probabilities``.
        RecordsError: a folder without a classifier.
    """
    if ":" not in name:
        return trained.load_classifier(Path(name))[0].to(device)
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"classifier {name}: {error}; it must be importable as MODULE:FUNCTION") from None
    classifier = factory()
    require(
        hasattr(classifier, "probabilities"),
        f"classifier {name}: {function}() returned an object without probabilities(images)",
    )
    if isinstance(classifier, nn.Module):
        classifier.to(device).eval()
    found: Classifier = classifier
    return found


def _own(image_3HW: Tensor) -> Tensor:
    """The image on the CPU, without the batch that it is a part of."""
    return image_3HW.to("cpu", copy=True)


def _places(keep: float | int, count: int, label: int) -> int:
    if isinstance(keep, int):
        require(1 <= keep <= count, f"keep {keep} of class {label}, of which {count} are drawn")
        return keep
    require(0 < keep <= 1, f"keep is a share of the candidates, 0 to 1, or a whole number, got {keep}")
    return _share(keep, count)


def _share(share: float, count: int) -> int:
    return max(1, _whole(share, count))


def _whole(share: float, count: int) -> int:
    return int(share * count + 1e-9)


def _wanted(probabilities_BV: Tensor, labels: Sequence[int]) -> list[float]:
    """Each image's probability of its label."""
    shape = tuple(probabilities_BV.shape)
    require(
        len(shape) == 2 and shape[0] == len(labels) and shape[1] > max(labels),
        f"the classifier's probabilities of {len(labels)} images have shape {shape}; expected "
        f"({len(labels)}, classes) with class {max(labels)} among them",
    )
    rows = torch.arange(len(labels), device=probabilities_BV.device)
    wanted_B = probabilities_BV[rows, torch.tensor(labels, device=rows.device)].double()
    require(bool(wanted_B.isfinite().all()), "some of the classifier's probabilities are not finite numbers")
    return [float(value) for value in wanted_B]
