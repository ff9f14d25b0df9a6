"""The job that trains the classifier of a study's images.

    python -m scaling.fidelity.train_classifier runs/classifiers/<id>

- ``run_sweep.py classifier`` makes the folder, with ``config.json`` (``ClassifierRun``), and starts it.
- Images are read once, resized as for the tokenizer, and stay in memory; every step cuts its batch out of
  them, at random and mirrored or not. Validation images are centre crops; they choose nothing, the accuracy
  is that of the last step.
- AdamW, the learning rate on half a cosine after a short warm-up. Which images step s sees, and how they are
  cut, follows from the seed and s: on one machine, the same config makes the same weights.
- One process, which starts from the beginning when it was stopped; on a CPU it takes minutes. The folder has
  a classifier at the end or none.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling.config import ConfigError, DataConfig, LaunchConfig, from_dict, identity, require
from scaling.data.images import ImageSource, Split, UnreadableImageError
from scaling.data.sampler import Int64, batch_indices
from scaling.data.sources import open_source
from scaling.data.transforms import UInt8, resize_shorter, square
from scaling.fidelity.classifier import Classifier, ClassifierConfig, save_classifier
from scaling.fidelity.collect import chosen
from scaling.process import Interrupted, JobProcess, recorded_failure, run_job
from scaling.records import RunFolder, read_json
from scaling.requests import ClassifierRun, ClassifierTraining

WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
VAL_BATCH = 256
MEMORY_SHARE = 0.5
"""Share of the machine's memory that the training images may fill."""


def squares(
    source: ImageSource, data: DataConfig, split: Split, indices: Int64, side: int
) -> tuple[UInt8, Int64]:
    """Squares from the middle of images, uint8 (N, side, side, 3), and their classes (N,).

    An unreadable image is named in the log and counted; the next readable one stands in, with its class.

    Args:
        side: at most the shorter side of the resized images, ``crop_margin`` × the resolution.
    """
    total = source.count(split)
    cut = dataclasses.replace(data, resolution=side)

    def one(index: int) -> tuple[UInt8, int]:
        for candidate in range(index, index + total):
            i = candidate % total
            try:
                image = source.image(split, i)
            except UnreadableImageError as error:
                source.skipped.add(split, i, error, total)
                continue
            return square(resize_shorter(image, shorter(data)), cut, None), source.label(split, i)
        raise AssertionError("unreachable: a wholly unreadable split passes the 1 % limit")

    pixels_NSS3 = np.empty((len(indices), side, side, 3), dtype=np.uint8)
    labels_N = np.empty(len(indices), dtype=np.int64)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for place, (pixels_SS3, label) in enumerate(pool.map(one, indices.tolist(), chunksize=64)):
            pixels_NSS3[place], labels_N[place] = pixels_SS3, label
    return pixels_NSS3, labels_N


def shorter(data: DataConfig) -> int:
    """The shorter side of a resized image."""
    return round(data.crop_margin * data.resolution)


def as_input(pixels_BHW3: Tensor, device: torch.device) -> Tensor:
    """(B, 3, H, W) in [−1, 1]; in memory the channels stay last."""
    return pixels_BHW3.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def cuts(pixels_NSS3: Tensor, indices: Int64, side: int, flip: bool, key: tuple[int, int]) -> Tensor:
    """A square of each image at a random place, mirrored half of the time, uint8 (B, side, side, 3).

    Args:
        key: seed and step, which decide all of it.
    """
    # Raw words, whose values NumPy promises to keep.
    words_3B = np.random.PCG64(np.random.SeedSequence(key)).random_raw(3 * len(indices)).reshape(3, -1)
    u_3B = (words_3B >> np.uint64(11)) / 2.0**53
    room = pixels_NSS3.shape[1] - side + 1
    top_B, left_B = (u_3B[:2] * room).astype(np.int64)
    along_S = np.arange(side)
    mirrored_B1 = (u_3B[2] < 0.5 if flip else np.zeros(len(indices), dtype=bool))[:, None]
    rows_BS = top_B[:, None] + along_S
    columns_BS = left_B[:, None] + np.where(mirrored_B1, along_S[::-1], along_S)
    image_B, row_BS, column_BS = map(torch.from_numpy, (indices, rows_BS, columns_BS))
    return pixels_NSS3[image_B[:, None, None], row_BS[:, :, None], column_BS[:, None, :]]


def learning_rate(training: ClassifierTraining, step: int) -> float:
    """Of step ``step``, counted from 0."""
    rising = min(1.0, (step + 1) / (WARMUP * training.steps))
    return training.lr * rising * 0.5 * (1 + math.cos(math.pi * step / training.steps))


def train_classifier(
    source: ImageSource,
    data: DataConfig,
    training: ClassifierTraining,
    device: torch.device,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Classifier, dict[str, Any]]:
    """Train, then look at every validation image.

    Args:
        progress: called after every step with the steps done and the loss in nats.

    Returns:
        The classifier and the facts about it: ``val_accuracy``, ``chance`` (what always naming the most
        frequent class would get), ``val_images``, ``train_images``, the training, the data's identity.

    Raises:
        ConfigError: the images do not fit into memory, or there are fewer than asked for.
    """
    config = ClassifierConfig(data.resolution, source.num_classes, training.width)
    pixels_NSS3, labels_N = _training_images(source, data, training)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = Classifier(config)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    for step in range(training.steps):
        indices = batch_indices(training.seed, step, training.batch, len(labels_N))
        pixels_BHW3 = cuts(pixels_NSS3, indices, data.resolution, training.flip, (training.seed, step))
        loss = F.cross_entropy(model(as_input(pixels_BHW3, device)), labels_N[indices].to(device))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, loss.item())
    model.eval()
    right, seen = 0, np.zeros(config.num_classes, dtype=np.int64)
    for guess_B, label_B in _guesses(model, source, data, device):
        right += int((guess_B == label_B).sum())
        seen += np.bincount(label_B, minlength=config.num_classes)
    facts = {
        "val_accuracy": right / int(seen.sum()),
        "chance": int(seen.max()) / int(seen.sum()),
        "val_images": int(seen.sum()),
        "train_images": len(labels_N),
        "training": dataclasses.asdict(training),
        "data": identity(data),
        "fingerprint": source.fingerprint(),
    }
    return model.requires_grad_(False).to(memory_format=torch.contiguous_format), facts


def _training_images(
    source: ImageSource, data: DataConfig, training: ClassifierTraining
) -> tuple[Tensor, Tensor]:
    """All of them, uint8 (N, S, S, 3), and their classes (N,)."""
    there, side = source.count("train"), shorter(data)
    count = there if training.images is None else training.images
    require(count <= there, f"--images asks for {count}, the data has {there} training images")
    needed, memory = count * side * side * 3, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(
        needed <= MEMORY_SHARE * memory,
        f"{count} training images of {side} px are {needed / 2**30:.0f} GiB, this machine has "
        f"{memory / 2**30:.0f} GiB; --images {int(MEMORY_SHARE * memory / (side * side * 3))} would fit",
    )
    pixels_NSS3, labels_N = squares(source, data, "train", chosen(there, count), side)
    return torch.from_numpy(pixels_NSS3), torch.from_numpy(labels_N)


def _guesses(
    model: Classifier, source: ImageSource, data: DataConfig, device: torch.device
) -> Iterator[tuple[Int64, Int64]]:
    """Guessed and true classes (B,) of the validation images."""
    total = source.count("val")
    for begin in range(0, total, VAL_BATCH):
        indices = np.arange(begin, min(begin + VAL_BATCH, total))
        pixels_BHW3, label_B = squares(source, data, "val", indices, data.resolution)
        with torch.no_grad():
            logits_BV = model(as_input(torch.from_numpy(pixels_BHW3), device))
        yield logits_BV.argmax(dim=1).cpu().numpy(), label_B


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the classifier of a folder; raises what ``run_job`` turns into exit codes."""
    parser = argparse.ArgumentParser(
        prog="python -m scaling.fidelity.train_classifier", description="Train a classifier of images."
    )
    parser.add_argument("folder", type=Path, help="the classifier's folder, with config.json and launch.json")
    folder = RunFolder(parser.parse_args(arguments).folder)
    with recorded_failure(folder):
        run = from_dict(ClassifierRun, folder.config())
        launch = from_dict(LaunchConfig, read_json(folder.path / "launch.json"))
        cuda = torch.cuda.is_available()
        if launch.device == "cuda" and not cuda:
            raise ConfigError("launch.device is 'cuda', but torch sees no GPU here; use 'auto' or 'cpu'")
        device = torch.device("cuda" if cuda and launch.device != "cpu" else "cpu")
        if launch.threads is not None:
            torch.set_num_threads(launch.threads)
    with JobProcess(folder) as job:
        source, total = open_source(run.data), run.training.steps
        folder.claim_data(source.fingerprint())
        job.beat(step=0, total_steps=total)
        started: float | None = None

        def progress(step: int, loss: float) -> None:
            nonlocal started
            if started is None:  # the first step waits for the images to be read
                started = time.monotonic()
            elif job.should_stop():
                raise Interrupted
            else:
                speed = (step - 1) * run.training.batch / (time.monotonic() - started)
                job.beat(step=step, total_steps=total, loss=loss, images_per_second=round(speed, 1))

        classifier, facts = train_classifier(source, run.data, run.training, device, progress)
        save_classifier(classifier, folder.path, facts)


if __name__ == "__main__":
    sys.exit(run_job(main))
