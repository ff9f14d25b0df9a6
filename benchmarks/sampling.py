"""How fast images are drawn on this machine, and how fast its matrix products alone would allow.

    python -m benchmarks.sampling [--families var flexvar raster] [--precision fp32] [--threads 2]
                                  [--repetitions 5]

Depth 6 with ten steps to 16 × 16 tokens (raster: 256 tokens), vocabulary 4096, 1000 classes, guidance 1.5,
batches of 8, tokens only; weights are random, which matters to nothing here.

'images/core s' are by processor time instead of the clock's, and hold on a machine that others use as well,
with one thread above all (waiting for the other threads counts). 'share' is the processor time of the same
matrix products by themselves, attention as two batched ones, through torch into memory made beforehand, by
that of sampling. 'limit' is what the exact forward FLOPs of both halves of guidance allow at the rate of one
large product, by processor time. Each repetition measures all one after another, so that quiet and busy
moments fall on all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from scaling import flops
from scaling.clock import device_name, peak_memory
from scaling.config import Family, ModelConfig, TokenizerConfig
from scaling.families.interface import FamilyModel
from scaling.families.registry import FAMILIES, build, family_model
from scaling.generation import sample_tokens
from scaling.layers.linear import half_weights
from scaling.tokenizer.quantizer import MultiScaleQuantizer, Quantizer
from scaling.tokenizer.scalable import ScalableQuantizer

DEPTH, BATCH, GUIDANCE = 6, 8, 1.5
FILTERS = {"all tokens": (0, 0.0), "top-k 900, top-p 0.96": (900, 0.96)}


@dataclass(frozen=True)
class Timing:
    """Of each repetition: images per second, images per core second, the products' time by sampling's."""

    speeds: list[float]
    core_speeds: list[float]
    shares: list[float]


@dataclass(frozen=True)
class Measured:
    """One family."""

    timings: dict[str, Timing]
    rate: float
    """FLOP per core second of one large product."""
    limit: float
    """Images per core second that this rate would allow."""
    memory: int
    """Peak bytes of the process."""


def model_and_quantizer(family: Family) -> tuple[FamilyModel, Quantizer]:
    """Both with random weights."""
    config = ModelConfig.from_depth(DEPTH, family=family)
    scalable = family != "var"
    tokens = TokenizerConfig(
        vocab=config.vocab, latent_channels=config.latent_channels, scales=config.scales,
        quantizer="scalable" if scalable else "residual",
    )  # fmt: skip
    torch.manual_seed(0)
    model = family_model(build(config).eval().requires_grad_(False))
    quantizer = ScalableQuantizer(tokens) if scalable else MultiScaleQuantizer(tokens)
    return model, quantizer.eval().requires_grad_(False)


def products(model: FamilyModel, kind: torch.dtype) -> Callable[[], None]:
    """The matrix products of sampling one batch, of an attention family, by themselves."""
    config, images = model.config, 2 * BATCH
    w, heads, hidden = config.width, config.heads, config.mlp_ratio * config.width
    matrices = [torch.randn(n, m, dtype=kind) for m, n in ((w, 3 * w), (w, w), (w, hidden), (hidden, w))]
    to_vocab = torch.randn(config.vocab, w, dtype=kind)
    chunks = model.chunks()
    rows = max(chunks) * images
    given, out = torch.randn(rows, hidden, dtype=kind), torch.empty(rows, config.vocab, dtype=kind)
    queries, keys = (
        torch.randn(images * heads, n, w // heads, dtype=kind) for n in (max(chunks), sum(chunks))
    )
    scores = torch.empty(images * heads, max(chunks), sum(chunks), dtype=kind)

    def by(weight_nm: Tensor, count: int) -> None:
        n, m = weight_nm.shape
        target = out.view(-1)[: count * n].view(count, n)
        torch.mm(given.view(-1)[: count * m].view(count, m), weight_nm.T, out=target)

    def run() -> None:
        for count, seen in zip(chunks, itertools.accumulate(chunks), strict=True):
            for _ in range(config.depth):
                for matrix in matrices:
                    by(matrix, count * images)
                some = scores.view(-1)[: images * heads * count * seen].view(-1, count, seen)
                torch.bmm(queries[:, :count], keys[:, :seen].mT, out=some)
                torch.bmm(some, keys[:, :seen])
            by(to_vocab, count * images)

    return run


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Of one call, by the clock and of processor time."""
    start, used = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - used


def large_product(kind: torch.dtype) -> float:
    """FLOP per core second of one large matrix product."""
    a_nn, out_nn = torch.randn(2048, 2048, dtype=kind), torch.empty(2048, 2048, dtype=kind)
    return 2 * 2048**3 / seconds(lambda: torch.mm(a_nn, a_nn, out=out_nn))[1]


def measure(family: Family, precision: str, threads: int, repetitions: int) -> Measured:
    """Measure one family, in a process of its own."""
    torch.set_num_threads(threads)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    model, quantizer = model_and_quantizer(family)
    labels_B = torch.arange(BATCH)
    bare = None if family == "flexvar-mamba" else products(model, kind)  # its scan is no matrix product

    def sample(filters: tuple[int, float]) -> Callable[[], object]:
        top_k, top_p = filters

        def draw() -> None:
            with half_weights(cast(nn.Module, model)) if precision == "bf16" else contextlib.nullcontext():
                sample_tokens(
                    model, quantizer, labels_B, range(BATCH), guidance=GUIDANCE, top_k=top_k, top_p=top_p
                )

        return draw

    actions = {name: sample(filters) for name, filters in FILTERS.items()}
    actions["all tokens"]()
    memory = peak_memory(torch.device("cpu"))
    timings = {name: Timing([], [], []) for name in FILTERS}
    rates = []
    for _ in range(repetitions):
        rates.append(large_product(kind))
        for name, action in actions.items():
            alone = None if bare is None else seconds(bare)[1]
            taken, used = seconds(action)
            timings[name].speeds.append(BATCH / taken)
            timings[name].core_speeds.append(BATCH / used)
            if alone is not None:
                timings[name].shares.append(alone / used)
    rate = float(np.median(rates))
    return Measured(timings, rate, rate / (2 * flops.forward_flops(model.config)), memory)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.sampling", description="Time sampling.")
    known = [family for family in get_args(Family) if family in FAMILIES]
    parser.add_argument("--families", nargs="+", choices=known, default=known)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    table = Table(
        "family", "drawn from", "images/s, median", "least", "most", "images/core s", "share", "limit",
        "memory, MiB",
    )  # fmt: skip
    for family in options.families:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(
                measure, (cast(Family, family), options.precision, options.threads, options.repetitions)
            )
        for name, timing in found.timings.items():
            table.add_row(
                family, name, f"{np.median(timing.speeds):.2f}", f"{min(timing.speeds):.2f}",
                f"{max(timing.speeds):.2f}", f"{np.median(timing.core_speeds):.2f}",
                f"{np.median(timing.shares):.2f}" if timing.shares else "-",
                f"{found.limit:.2f} at {found.rate / 1e9:.0f} GFLOP/s", f"{found.memory / 2**20:.0f}",
            )  # fmt: skip
    name = device_name(torch.device("cpu"))
    print(f"{name}, {options.threads} threads, torch {torch.__version__}, {options.precision}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
