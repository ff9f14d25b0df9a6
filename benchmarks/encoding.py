"""How fast images become tokens: the published tokenizer's encoder in fp32 and in bf16.

    python -m benchmarks.encoding [--images 8] [--batch 2] [--threads 2] [--device cpu] [--repetitions 3]

The published tokenizer (160 channels, 16-fold downsampling, 680 tokens) with random weights, on images of
256 px in memory, through the very function that fills the token cache. Both in turn, in every repetition.
How many tokens bf16 changes depends on the weights; docs/results/speed.md has it for trained ones.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from scaling.clock import device_name
from scaling.config import TokenizerConfig
from scaling.data.encode import encoder
from scaling.tokenizer.vqvae import Tokenizer

SIDE = 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.encoding", description="Time the encoding of images.")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # as where tokens are made
    device = torch.device(options.device)
    encoders = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        tokenizer = Tokenizer(TokenizerConfig(encode_precision=precision)).requires_grad_(False)
        encoders[precision] = encoder(tokenizer, device)
    pixels = np.random.default_rng(0).integers(0, 256, (options.batch, SIDE, SIDE, 3), dtype=np.uint8)
    batches = max(1, options.images // options.batch)
    speeds: dict[str, list[float]] = {precision: [] for precision in encoders}
    for repetition in range(options.repetitions + 1):
        for precision, encode in encoders.items():
            start = time.perf_counter()
            for _ in range(batches if repetition else 1):
                encode(pixels)
            if repetition:  # the first warms up
                speeds[precision].append(batches * options.batch / (time.perf_counter() - start))
    table = Table("encoder in", "images/s, median", "least", "most", "× fp32")
    for precision, found in speeds.items():
        gain = float(np.median(found) / np.median(speeds["fp32"]))
        table.add_row(
            precision, f"{np.median(found):.3g}", f"{min(found):.3g}", f"{max(found):.3g}", f"{gain:.2f}"
        )
    print(f"{device_name(device)}, {options.threads} threads, batches of {options.batch}, {SIDE} px")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
