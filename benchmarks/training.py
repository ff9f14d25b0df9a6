"""Training speed, end to end and step by step, against the published loop on the same machine.

    python -m benchmarks.training [--published FOLDER] [--depths 4 6] [--precisions fp32 bf16]
                                  [--batch 8] [--threads 2] [--repetitions 5] [--calls 1] [--device auto]
                                  [--attention masked blockwise] [--compile] [--without-encoding]

The paper's setting: 256 px, ten steps to 16 × 16 tokens, vocabulary 4096, 1000 classes. Weights and pictures
are random, which matters to no time. FOLDER is a checkout of VAR's published code
(github.com/FoundationVision/VAR); without it only this project is timed. Its models are taken as they are,
in the loop of its ``trainer.py``: encode the batch, forward, loss, backward, clip, fused AdamW, argmax.

'ours' is ``scaling.trainer.train_step``: cached tokens read from a memory map, teacher inputs, forward, loss,
backward, clip, fused AdamW, losses per scale. The published step without its encoding is timed by itself,
since encoding, which the token cache saves, is most of its time.

Every repetition times all variants one after another, so that quiet and busy moments of the machine fall on
all alike. 'images/core s' is by processor time and holds on a machine that others use as well (one thread
above all). 'MFU' is the exact training FLOPs by the rate of one large matrix product in the same precision,
timed in the same repetition.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.loader import build as build_cache
from scaling import flops
from scaling.clock import device_name
from scaling.config import (
    DataConfig,
    Device,
    EvaluationConfig,
    LaunchConfig,
    ModelConfig,
    Precision,
    RunConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
)
from scaling.data.cache import CachedSplit
from scaling.layers.attention import Backend
from scaling.records import RunFolder
from scaling.tokenizer.quantizer import MultiScaleQuantizer
from scaling.tokenizer.vqvae import Tokenizer
from scaling.trainer import State, accelerator_on, set_rates
from scaling.training_step import Batches, train_step

IMAGES = 2048
"""In the cache."""


@dataclass
class Variant:
    """Something that takes one training step when it is called."""

    name: str
    depth: int
    precision: Precision
    step: Callable[[], object]
    flops: float
    """Of a step; 0 where nothing is trained."""
    wall: list[float] = field(default_factory=list)
    core: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    """Of the matrix rate."""


def run_config(depth: int, batch: int, precision: Precision) -> RunConfig:
    """A run at the paper's setting."""
    tokenizer = TokenizerConfig()
    return RunConfig(
        model=ModelConfig.from_depth(depth),
        data=DataConfig(resolution=256, train_images=IMAGES, val_images=64, num_classes=1000),
        tokenizer=tokenizer,
        tokenizer_train=TokenizerTrainConfig(),
        train=TrainConfig(steps=1000, batch=batch, precision=precision),
        evaluation=EvaluationConfig(),
    )


def our_step(
    depth: int,
    precision: Precision,
    split: CachedSplit,
    folder: Path,
    options: argparse.Namespace,
    launch: LaunchConfig,
    feed: type[Batches] = Batches,
) -> Callable[[], object]:
    """This project's training step, its tokens from ``feed``."""
    config = run_config(depth, options.batch, precision)
    accelerator = accelerator_on(cast(Device, options.device), "fp32")
    if precision == "bf16":  # Accelerate knows one precision per process; this is what its own would enter
        kind = accelerator.device.type
        accelerator.autocast = lambda: torch.autocast(kind, dtype=torch.bfloat16)
    quantizer = MultiScaleQuantizer(config.tokenizer).eval().requires_grad_(False)
    tokenizer = SimpleNamespace(content_hash="benchmark", quantize=quantizer)
    state = State(config, launch, accelerator, cast(Tokenizer, tokenizer))
    batches, steps = feed(config, launch, accelerator, split, RunFolder(folder)), itertools.count()

    def step() -> None:
        number = next(steps)
        set_rates(state.optimizer, config, number)
        train_step(state, batches, number, config.model.scales)

    return step


@contextlib.contextmanager
def published_precision() -> Iterator[None]:
    """TF32 for what is in fp32, as the published trainer has it on a GPU by default."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def published_models(depth: int, device: torch.device) -> tuple[Any, Any]:
    """The published tokenizer and transformer, with random weights; their code must be in the search path."""
    from models import build_vae_var  # type: ignore[import-not-found]  # of --published

    torch.manual_seed(0)
    before = {kind: kind.reset_parameters for kind in (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Conv2d)}
    vae, var = build_vae_var(device=device, depth=depth, patch_nums=ModelConfig.from_depth(depth).scales)
    for kind, method in before.items():  # it switches them off for every module made afterwards
        kind.reset_parameters = method  # type: ignore[method-assign]
    vae.eval().requires_grad_(False)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return vae, var


def published_steps(
    depth: int, precision: Precision, options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """The published loop without its encoding, and its encoding of a batch."""
    vae, var = published_models(depth, device)
    var.train()
    decayed = [p for p in var.parameters() if p.ndim > 1]
    rest = [p for p in var.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = torch.rand(options.batch, 3, 256, 256, device=device) * 2 - 1
    labels = torch.randint(1000, (options.batch,), device=device)
    counts = [side * side for side in ModelConfig.from_depth(depth).scales]
    tokens = [torch.randint(4096, (options.batch, count), device=device) for count in counts]
    loss_of = torch.nn.CrossEntropyLoss(reduction="none")
    weight = torch.ones(1, sum(counts), device=device) / sum(counts)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    @published_precision()
    @torch.no_grad()
    def encode() -> None:
        vae.img_to_idxBl(images)

    @published_precision()
    def step() -> None:
        truth = torch.cat(tokens, dim=1)
        inputs = vae.quantize.idxBl_to_var_input(tokens)
        with autocast:
            logits = var(labels, inputs)
            losses = loss_of(logits.view(-1, 4096), truth.view(-1)).view(options.batch, -1)
            loss = losses.mul(weight).sum(dim=-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(var.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logits.data.argmax(dim=-1)

    return step, None if options.without_encoding else encode


def matrix_rate(precision: Precision, device: torch.device) -> Callable[[], float]:
    """Gives the FLOP/s of one large product, now."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=kind)

    def rate() -> float:
        return 2 * side**3 / min(seconds(lambda: torch.mm(a, a), device)[0] for _ in range(3))

    return rate


def seconds(action: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Of one call: by the clock and of processor time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start, used = time.perf_counter(), time.process_time()
    action()
    wait()
    return time.perf_counter() - start, time.process_time() - used


def repeated(action: Callable[[], object], calls: int) -> Callable[[], None]:
    """So many calls as one."""

    def run() -> None:
        for _ in range(calls):
            action()

    return run


def variants(
    options: argparse.Namespace, split: CachedSplit, folder: Path, device: torch.device
) -> list[Variant]:
    """All that is to be timed."""
    found = []
    for depth, precision in itertools.product(options.depths, options.precisions):
        cost = flops.train_flops(ModelConfig.from_depth(depth)) * options.batch
        if options.published is not None:
            step, encode = published_steps(depth, precision, options, device)
            found.append(Variant("published step", depth, precision, step, cost))
            if encode is not None and precision == options.precisions[0] and depth == options.depths[0]:
                found.append(Variant("published encoding", depth, precision, encode, 0.0))
        compiled = (False, True) if options.compile else (False,)
        for attention, compile_it in itertools.product(options.attention, compiled):
            launch = LaunchConfig(threads=options.threads, attention=attention, compile=compile_it)
            name = f"ours, {attention}" + (", compiled" if compile_it else "")
            step = our_step(depth, precision, split, folder, options, launch)
            found.append(Variant(name, depth, precision, step, cost))
    return found


def measure(found: Sequence[Variant], repetitions: int, device: torch.device, calls: int = 1) -> None:
    """Warm each up once, then time all in turn, so many calls together: on a GPU the next step is prepared
    while one runs."""
    rates = {precision: matrix_rate(precision, device) for precision in {v.precision for v in found}}
    for variant in found:
        variant.step()
    for _ in range(repetitions):
        for variant in found:
            rate = rates[variant.precision]()
            wall, core = seconds(repeated(variant.step, calls), device)
            variant.wall.append(wall / calls)
            variant.core.append(core / calls)
            variant.share.append(variant.flops * calls / wall / rate)


def table(found: Sequence[Variant], batch: int) -> Table:
    """Speeds, and by how much ours exceeds the published ones."""
    out = Table(
        "depth", "precision", "variant", "s/step", "least", "most", "images/s", "images/core s", "MFU",
        "× step", "× end to end",
    )  # fmt: skip
    encoding = next((v for v in found if v.name == "published encoding"), None)
    for variant in found:
        step = next(
            (v for v in found if v.name == "published step" and v.depth == variant.depth
             and v.precision == variant.precision), None,
        )  # fmt: skip
        median = statistics.median(variant.wall)
        ratio = whole = "-"
        if step is not None and variant.name.startswith("ours"):
            ratio = f"{paired(step.wall, variant.wall):.2f}"
            if encoding is not None:
                both = [a + b for a, b in zip(step.wall, encoding.wall, strict=True)]
                whole = f"{paired(both, variant.wall):.2f}"
        out.add_row(
            str(variant.depth), variant.precision, variant.name, f"{median:.3f}", f"{min(variant.wall):.3f}",
            f"{max(variant.wall):.3f}", f"{batch / median:.2f}",
            f"{batch / statistics.median(variant.core):.2f}",
            f"{statistics.median(variant.share):.2f}" if variant.flops else "-", ratio, whole,
        )  # fmt: skip
    return out


def paired(of: Sequence[float], by: Sequence[float]) -> float:
    """Median of the ratios within each repetition."""
    return statistics.median(a / b for a, b in zip(of, by, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.training", description="Time training.")
    parser.add_argument("--published", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1, help="steps to a timing; more than one on a GPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--attention", nargs="+", choices=Backend.__args__, default=["masked"])  # type: ignore[attr-defined]
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    parser.add_argument("--without-encoding", action="store_true", help="skip the published encoding")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.published is not None:
        sys.path.insert(0, str(options.published))
    device = accelerator_on(cast(Device, options.device), "fp32").device
    with tempfile.TemporaryDirectory() as name:
        split = build_cache(Path(name), IMAGES, ModelConfig.from_depth(1).scales, views=1)
        found = variants(options, split, Path(name), device)
        measure(found, options.repetitions, device, options.calls)
    print(f"{device_name(device)}, {options.threads} threads, torch {torch.__version__}")
    Console(width=150).print(table(found, options.batch))


if __name__ == "__main__":
    main()
