"""What the data costs a training step: reading cached tokens, and making them.

    python -m benchmarks.loader [--device auto] [--batch 32] [--steps 60] [--threads 1] [--only-waiting]

Builds token caches of random tokens in a temporary folder (as large as CIFAR-10 at 30 tokens, and
100,000 images at the paper's 680), reads shuffled batches of 256 as the trainer does, and prints the
time per batch beside the time for drawing the batch's indices. The files are in the page cache, as
they are in training once an epoch has passed. Then images read and cropped per second by one thread, which
is what encoding waits for at most.

The last table is the share of a training step that waits for its data: the time until the batch is on the
device (its draws, labels and tokens) over the time of the step. VAR of depths 1 to 4 on 30 tokens, fp32 on a
CPU and bf16 on a GPU; drawn by the loop itself, by a thread, and by a thread with all tokens on the device,
step by step in turn; medians, by the clock and by the processor's time of the loop's own thread. A GPU works
on while the host draws, so there the speeds say more than the shares.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from scaling import feeding
from scaling.config import (
    PAPER_SCALES,
    DataConfig,
    EvaluationConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
)
from scaling.data.cache import CachedSplit, build_cache, open_cache
from scaling.data.images import Skipped, Split
from scaling.data.sampler import batch_indices, batch_views
from scaling.data.shards import UInt16
from scaling.data.sources import open_source
from scaling.data.transforms import UInt8, view_array
from scaling.records import RunFolder
from scaling.tokenizer.quantizer import MultiScaleQuantizer
from scaling.tokenizer.vqvae import Tokenizer
from scaling.trainer import State, accelerator_on, set_rates
from scaling.training_step import Batches, train_step

BATCH, STEPS = 256, 400
WARM_UP = 5


class Blank:
    """Many equal images: only the tokens' shape matters here."""

    num_classes = 1
    class_names = ("blank",)

    def __init__(self, data: DataConfig) -> None:
        self.skipped = Skipped()
        self._counts: dict[Split, int] = {"train": data.train_images or 0, "val": data.val_images or 0}
        self._image = Image.new("RGB", (data.resolution, data.resolution))

    def count(self, split: Split) -> int:
        """As configured."""
        return self._counts[split]

    def label(self, split: Split, i: int) -> int:
        """One class."""
        return 0

    def image(self, split: Split, i: int) -> Image.Image:
        """One picture."""
        return self._image

    def fingerprint(self) -> str:
        """One data set."""
        return "blank"


def build(folder: Path, images: int, scales: tuple[int, ...], views: int) -> CachedSplit:
    """A cache of random tokens, open for reading."""
    data = DataConfig(
        resolution=4, crop_margin=1.0, train_images=images, val_images=64, num_classes=1, views=views
    )
    seq_len = sum(side * side for side in scales)
    generator = np.random.default_rng(0)

    def encode(crops: UInt8) -> UInt16:
        return generator.integers(0, 4096, (len(crops), seq_len), dtype=np.uint16)

    build_cache(folder, data, scales, 4096, Blank(data), encode, "benchmark", batch=1024)
    return open_cache(folder).split("train")


def microseconds(action: object, steps: int) -> tuple[float, float]:
    """Median and 99th percentile of the time of ``action(step)``."""
    assert callable(action)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        action(step)
        times.append(1e6 * (time.perf_counter() - start))
    return float(np.median(times)), float(np.percentile(times, 99))


class Timed(Batches):
    """Batches that know how long each was waited for."""

    seconds = core = 0.0

    def micro_batches(self, step: int, scales: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:  # type: ignore[override]
        """As ever, timed."""
        start, core = time.perf_counter(), time.thread_time()
        micro = super().micro_batches(step, scales)
        self.seconds, self.core = time.perf_counter() - start, time.thread_time() - core
        return micro  # type: ignore[return-value]


WAYS = {"loop": (False, False), "thread": (True, False), "thread, kept": (True, True)}
"""Whether a thread draws, and whether all tokens are on the device."""


def waiting(
    depth: int, split: CachedSplit, folder: Path, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Medians of each way: milliseconds until the batch is there and of the whole step, by the clock and by
    the thread's processor time."""
    tokenizer = TokenizerConfig(scales=(1, 2, 3, 4))
    accelerator = accelerator_on(options.device, "bf16" if torch.cuda.is_available() else "fp32")
    config = RunConfig(
        model=ModelConfig.from_depth(depth, scales=tokenizer.scales),
        data=DataConfig(resolution=64, train_images=split.images, val_images=64, num_classes=1000),
        tokenizer=tokenizer, tokenizer_train=TokenizerTrainConfig(), evaluation=EvaluationConfig(),
        train=TrainConfig(steps=10**6, batch=options.batch, precision="fp32"),
    )  # fmt: skip
    quantizer = MultiScaleQuantizer(tokenizer).eval().requires_grad_(False)
    fake = cast(Tokenizer, SimpleNamespace(content_hash="benchmark", quantize=quantizer))
    launch = LaunchConfig(threads=options.threads)
    state, ways = State(config, launch, accelerator, fake), dict[str, Timed]()
    for name, (thread, kept) in WAYS.items():
        feeding.draws_ahead = lambda device, thread=thread: thread  # type: ignore[misc]
        ways[name] = Timed(config, launch, accelerator, split, RunFolder(folder), split if kept else None)
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for step in range(options.steps + WARM_UP):
        for name, batches in ways.items():
            set_rates(state.optimizer, config, step)
            start, core = time.perf_counter(), time.thread_time()
            float(train_step(state, batches, step, tokenizer.scales)["loss_avg"])
            took = (batches.seconds, time.perf_counter() - start, batches.core, time.thread_time() - core)
            times[name].append(tuple(1e3 * seconds for seconds in took))
    for batches in ways.values():
        batches.__exit__()
    return {name: np.median(found[WARM_UP:], axis=0).tolist() for name, found in times.items()}


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-waiting", action="store_true", help="the last table alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    if not options.only_waiting:
        reading(console)
    table = Table("depth", "drawn", "waiting, ms", "step, ms", "share", "core, ms", "of", "share")
    with tempfile.TemporaryDirectory() as name:
        split = build(Path(name), 50_000, (1, 2, 3, 4), 1)
        for depth in (1, 2, 3, 4):
            for way, (wait, step, core, of) in waiting(depth, split, Path(name), options).items():
                clock = (f"{wait:.2f}", f"{step:.1f}", f"{wait / step:.2%}")
                table.add_row(str(depth), way, *clock, f"{core:.2f}", f"{of:.1f}", f"{core / of:.2%}")
    console.print(table)


def reading(console: Console) -> None:
    """What reading tokens and pictures takes."""
    table = Table("tokens per image", "images", "views", "shards", "action", "median µs", "99 % µs")
    for scales, images, views in (
        ((1, 2, 3, 4), 50_000, 1),
        ((1, 2, 3, 4), 50_000, 4),
        (PAPER_SCALES, 100_000, 1),
    ):
        with tempfile.TemporaryDirectory() as name:
            split = build(Path(name), images, scales, views)
            shape = [
                str(split.seq_len),
                f"{images:,}",
                str(views),
                str(len(list(Path(name).glob("train-*.bin")))),
            ]

            def indices(step: int) -> tuple[np.ndarray, np.ndarray]:
                return batch_indices(0, step, BATCH, images), batch_views(step, BATCH, images, views)  # noqa: B023

            drawn = [indices(step) for step in range(STEPS)]
            table.add_row(*shape, "draw indices", *(f"{v:.0f}" for v in microseconds(indices, STEPS)))
            read = microseconds(lambda step: split.tokens(*drawn[step]), STEPS)  # noqa: B023
            table.add_row(*shape, f"read {BATCH} images", *(f"{v:.0f}" for v in read))
    console.print(table)

    table = Table("source", "resolution", "images/s, one thread")
    for resolution in (32, 256):
        data = DataConfig(resolution=resolution)
        source = open_source(data)
        source.image("train", 0)
        median, _ = microseconds(lambda i: view_array(source.image("train", i), data, (i, 0)), STEPS)  # noqa: B023
        table.add_row("photos", str(resolution), f"{1e6 / median:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
