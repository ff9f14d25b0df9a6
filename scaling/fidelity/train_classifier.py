"""The job that trains the classifier of a study's images.

    python -m scaling.fidelity.train_classifier runs/tokenizers/<id> --out runs/classifiers/<name>

- The data is that of the folder's config (a run's or a tokenizer's): its random crops for training, its
  centre crops for validation. The validation images choose nothing; the accuracy is that of the last step.
- AdamW, the learning rate on half a cosine. Which images step s sees, and how they are cropped, follows from
  the seed and s: on one machine, the same command makes the same weights.
- One process; on a CPU a small image set takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling.config import DataConfig, from_dict, identity, require
from scaling.data.images import ImageSource, Split, UnreadableImageError
from scaling.data.sampler import Int64, batch_indices, batch_views
from scaling.data.sources import open_source
from scaling.data.transforms import UInt8, view_array
from scaling.fidelity.classifier import Classifier, ClassifierConfig, save_classifier
from scaling.process import run_job
from scaling.records import RecordsError, RunFolder


@dataclass(frozen=True)
class ClassifierTraining:
    """How a classifier is trained."""

    steps: int = 3000
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr"):
            require(getattr(self, name) > 0, f"--{name} must be positive, got {getattr(self, name)}")


def labelled(
    source: ImageSource, data: DataConfig, split: Split, indices: Int64, views: Int64 | None, pool: Executor
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [−1, 1] and their classes (B,); of an unreadable one, the next and its class.

    Args:
        indices: (B,) images of the split.
        views: (B,) which random crop of each; None for centre crops.
    """
    total = source.count(split)

    def one(index: int, view: int | None) -> tuple[UInt8, int]:
        for candidate in range(index, index + total):
            i = candidate % total
            try:
                image = source.image(split, i)
            except UnreadableImageError as error:
                source.skipped.add(split, i, error, total)
                continue
            return view_array(image, data, None if view is None else (i, view)), source.label(split, i)
        raise AssertionError("unreachable: a wholly unreadable split passes the 1 % limit")

    wanted = [None] * len(indices) if views is None else views.tolist()
    pairs = list(pool.map(one, indices.tolist(), wanted))
    images_BHW3 = torch.from_numpy(np.stack([image for image, _ in pairs]))
    labels_B = torch.tensor([label for _, label in pairs])
    return images_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1, labels_B


def train_classifier(
    source: ImageSource,
    data: DataConfig,
    config: ClassifierConfig,
    training: ClassifierTraining,
    device: torch.device,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Classifier, dict[str, Any]]:
    """Train, then look at every validation image.

    Args:
        progress: called after every step with the steps done and the loss in nats.

    Returns:
        The classifier and the facts about it: ``val_accuracy``, ``chance`` (what always naming the most
        frequent class would get), ``val_images``, the training's numbers, the data's identity.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = Classifier(config)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    count, batch = source.count("train"), training.batch
    epochs = -(-training.steps * batch // count) + 1
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        for step in range(training.steps):
            indices = batch_indices(training.seed, step, batch, count)
            views = batch_views(step, batch, count, epochs)  # a new crop every epoch
            images_B3HW, labels_B = labelled(source, data, "train", indices, views, pool)
            for group in optimizer.param_groups:
                group["lr"] = training.lr * 0.5 * (1 + math.cos(math.pi * step / training.steps))
            loss = F.cross_entropy(model(images_B3HW.to(device)), labels_B.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress(step + 1, loss.item())
        model.eval()
        right, seen = 0, np.zeros(config.num_classes, dtype=np.int64)
        for begin in range(0, source.count("val"), batch):
            indices = np.arange(begin, min(begin + batch, source.count("val")))
            images_B3HW, labels_B = labelled(source, data, "val", indices, None, pool)
            with torch.no_grad():
                guess_B = model(images_B3HW.to(device)).argmax(dim=1).cpu()
            right += int((guess_B == labels_B).sum())
            seen += np.bincount(labels_B.numpy(), minlength=config.num_classes)
    facts = {
        "val_accuracy": right / int(seen.sum()),
        "chance": int(seen.max()) / int(seen.sum()),
        "val_images": int(seen.sum()),
        "train_images": count,
        "training": dataclasses.asdict(training),
        "data": identity(data),
        "fingerprint": source.fingerprint(),
    }
    return model.requires_grad_(False), facts


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save; raises what ``run_job`` turns into exit codes."""
    parser = argparse.ArgumentParser(
        prog="python -m scaling.fidelity.train_classifier",
        description="Train a classifier of a study's images, as extractor for image metrics.",
    )
    parser.add_argument("folder", type=Path, help="a run or tokenizer whose data it is for")
    parser.add_argument("--out", type=Path, required=True, help="folder for the classifier")
    parser.add_argument("--data-path", help="where the images lie now, if elsewhere")
    parser.add_argument("--width", type=int, default=ClassifierConfig.width)
    parser.add_argument("--blocks", type=int, default=ClassifierConfig.blocks)
    for field in dataclasses.fields(ClassifierTraining):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    given = parser.parse_args(arguments)
    folder = RunFolder(given.folder)
    described = folder.config().get("data")
    if described is None:
        raise RecordsError(f"{folder.path / 'config.json'}: no data in it")
    data = from_dict(DataConfig, described)
    if given.data_path is not None:
        data = dataclasses.replace(data, path=given.data_path)
    training = ClassifierTraining(
        **{field.name: getattr(given, field.name) for field in dataclasses.fields(ClassifierTraining)}
    )
    source = open_source(data)
    config = ClassifierConfig(data.resolution, source.num_classes, given.width, given.blocks)

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0 or step == training.steps:
            end = "\n" if step == training.steps else "\r"
            print(f"step {step} of {training.steps}, loss {loss:.3f}", end=end, file=sys.stderr)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier, facts = train_classifier(source, data, config, training, device, progress)
    save_classifier(classifier, given.out, facts)
    print(
        f"{given.out}: {facts['val_accuracy']:.1%} of {facts['val_images']} validation images right; "
        f"naming the most frequent class gets {facts['chance']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(run_job(main))
