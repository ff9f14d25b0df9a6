"""How fast cached images are evaluated, against the forward pass alone.

    python -m benchmarks.evaluation [--depths 2 4] [--images 64] [--threads 1] [--precision fp32]

Random tokens at 256 px (680 of them, vocabulary 4096) in a token cache on disk. 'evaluate' is what a run
does: tokens from the cache, labels, teacher-forcing inputs, losses and errors by scale, to the host; and
'forward' the model's forward pass with its loss on one batch that lies on the device already. Both in turn,
in every repetition; 'share' is evaluate by forward.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from benchmarks.loader import Blank
from scaling import flops
from scaling.clock import device_name
from scaling.config import PAPER_SCALES, DataConfig, ModelConfig, Precision, TokenizerConfig
from scaling.data.cache import CachedSplit, build_cache, open_cache
from scaling.data.shards import UInt16
from scaling.data.transforms import UInt8
from scaling.evaluation import evaluate
from scaling.families.registry import FAMILIES, build, family_model
from scaling.objective import Objective
from scaling.tokenizer.quantizer import MultiScaleQuantizer

BATCH = 16
VOCAB = 4096


def tokens_of(images: int, folder: Path) -> CachedSplit:
    """Random tokens of so many images."""
    data = DataConfig(source="photos", resolution=16, train_images=1, val_images=images, num_classes=1)
    length = sum(side * side for side in PAPER_SCALES)
    random = np.random.default_rng(0)

    def encode(crops: UInt8) -> UInt16:
        return random.integers(0, VOCAB, (len(crops), length)).astype(np.uint16)

    build_cache(folder, data, PAPER_SCALES, VOCAB, Blank(data), encode, "none")
    return open_cache(folder).split("val")


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Of one call, whatever it left to do on the device included."""
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    depth: int, split: CachedSplit, accelerator: Accelerator, repetitions: int
) -> tuple[float, float, float]:
    """Images per second of ``evaluate``; of forward passes; FLOP per second of the former."""
    config = ModelConfig.from_depth(depth, num_classes=1)
    device = accelerator.device
    torch.manual_seed(0)
    model = build(config).to(device)
    quantizer = MultiScaleQuantizer(TokenizerConfig(scales=config.scales)).to(device).requires_grad_(False)
    rows_BL = split.tokens(np.arange(BATCH), np.zeros(BATCH, np.int64)).astype(np.int64)
    tokens_BL, labels_B = (
        torch.from_numpy(rows_BL).to(device),
        torch.zeros(BATCH, dtype=torch.long, device=device),
    )
    objective = Objective(family_model(model))

    def forward() -> None:
        with torch.no_grad(), accelerator.autocast():
            objective(labels_B, given, tokens_BL, sizes=config.sizes)

    def whole() -> None:
        evaluate(model, config, quantizer, split, accelerator, cached=config.scales, images=None, batch=BATCH)

    with torch.no_grad():
        given = FAMILIES[config.family].inputs(quantizer, tokens_BL, config.sizes)
    model.eval()
    forward()
    passes = split.images // BATCH
    alone, evaluated = [], []
    for _ in range(repetitions):
        alone.append(seconds(lambda: [forward() for _ in range(passes)], device))
        evaluated.append(seconds(whole, device))
    speed, bare = (split.images / float(np.median(times)) for times in (evaluated, alone))
    return speed, bare, speed * flops.forward_flops(config)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.evaluation", description="Time evaluation.")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    precision = cast(Precision, options.precision)
    accelerator = Accelerator(
        cpu=options.device == "cpu", mixed_precision="no" if precision == "fp32" else precision
    )
    table = Table("depth", "evaluate, images/s", "forward, images/s", "share", "GFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        split = tokens_of(-(-options.images // BATCH) * BATCH, Path(folder))
        for depth in options.depths:
            speed, bare, rate = measure(depth, split, accelerator, options.repetitions)
            table.add_row(
                str(depth), f"{speed:.2f}", f"{bare:.2f}", f"{speed / bare:.2f}", f"{rate / 1e9:.0f}"
            )
    name = device_name(accelerator.device)
    print(f"{name}, {options.threads} threads, torch {torch.__version__}, {precision}, batches of {BATCH}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
