"""The parts of ``benchmarks.gpu``: each measures some figures of the table, in a process of its own.

A part takes its ``Setting`` and gives rows. A bound says which FLOPs and bytes the figure cannot do without,
and how long they take at this device's own rates of a large matrix product and of a copy.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import startup
from benchmarks.loader import build as build_cache
from benchmarks.training import (
    IMAGES,
    Variant,
    matrix_rate,
    measure,
    our_step,
    paired,
    published_models,
    published_precision,
    repeated,
    seconds,
    variants,
)
from scaling import flops
from scaling.backends import CANDIDATES, Shape, calibrate, fastest, seconds_of
from scaling.config import LaunchConfig, ModelConfig, Precision, SamplingConfig, TokenizerConfig
from scaling.data.encode import encoder
from scaling.data.shards import UInt16
from scaling.families.graphed import graphed
from scaling.families.registry import build, family_model
from scaling.generation import draw_tokens
from scaling.layers.attention import Backend
from scaling.layers.linear import half_weights
from scaling.tokenizer.vqvae import Tokenizer
from scaling.training_step import Batches, MicroTokens

STATE_BYTES = 36
"""Of a parameter and step: Adam reads weight, gradient and two moments and writes three of them; the gradient
is written and read once more."""


@dataclass(frozen=True)
class Setting:
    """How much is measured, and on what."""

    device: torch.device
    tiny: bool
    published: Path | None

    def of(self, whole: Any, tiny: Any) -> Any:
        """The value for a GPU, or the one that only shows that the code runs."""
        return tiny if self.tiny else whole

    @property
    def precision(self) -> Precision:
        """Of training and sampling."""
        return "bf16"


@dataclass(frozen=True)
class Row:
    """One figure."""

    what: str
    value: float
    unit: str
    target: str = ""
    bound: str = ""


@dataclass(frozen=True)
class Rates:
    """What the device does at most."""

    flops: float
    """FLOP/s of a large product in bf16."""
    bytes: float
    """Bytes/s of a large copy, reading and writing counted."""

    def bound(self, work: float, moved: float, taken: float) -> str:
        """What ``work`` FLOPs and ``moved`` bytes take at these rates, of the seconds taken."""
        least = [1e3 * work / self.flops, 1e3 * moved / self.bytes]
        return (
            f"{work / 1e12:.3g} TFLOP, {moved / 1e9:.3g} GB: {least[0]:.3g} and {least[1]:.3g} of "
            f"{1e3 * taken:.3g} ms"
        )


def rates(device: torch.device) -> Rates:
    """Measured now."""
    count = 2**24 if device.type == "cpu" else 2**28
    given = torch.randn(count, device=device)
    target = torch.empty_like(given)
    copying = min(seconds(lambda: target.copy_(given), device)[0] for _ in range(4))
    return Rates(matrix_rate("bf16", device)(), 2 * given.nbytes / copying)


def attention(setting: Setting) -> list[Row]:
    """Every back end on depth 16's attention, forwards and backwards."""
    model = ModelConfig.from_depth(setting.of(16, 1))
    if setting.tiny:
        model = replace(model, scales=model.scales[:5])
    shape = _shape(setting, model, setting.of(32, 1))
    found, failed = calibrate(shape, seconds_of)
    limits, pairs = rates(setting.device), flops.attention_pairs(model.sizes)
    # q·k and weights·v, and in the backward pass five products instead of two.
    work = 7 / 2 * 4 * model.width * pairs * shape.images
    moved = 8 * 2 * model.width * model.seq_len * shape.images  # q, k, v, output, and their gradients
    rows = [
        Row(f"attention of one layer, {name}", 1e3 * taken, "ms", bound=limits.bound(work, moved, taken))
        for name, taken in found.items()
    ]
    for name, why in failed.items():
        print(f"attention, {name}: {why}", file=sys.stderr)
    rows.append(Row(f"of these the fastest: {fastest(found)}", len(found), f"of {len(CANDIDATES)} work"))
    return rows


def training(setting: Setting, depth: int, target: float) -> list[Row]:
    """The published loop against ours at one depth."""
    batch = setting.of(32, 1)
    model = ModelConfig.from_depth(depth)
    options = _options(setting, batch, [depth], _chosen(setting, model, batch), setting.published)
    with tempfile.TemporaryDirectory() as name:
        split = build_cache(Path(name), IMAGES, model.scales, views=1)
        found = variants(options, split, Path(name), setting.device)
        measure(found, setting.of(5, 1), setting.device, setting.of(5, 1))
    limits, work = rates(setting.device), batch * flops.train_flops(model)
    activations = flops.train_memory(model, batch, "bf16") - 16 * flops.params_total(model)
    moved = STATE_BYTES * flops.params_total(model) + 2 * activations
    step = _variant(found, "published step")
    encoding = _variant(found, "published encoding")
    rows = []
    for variant in found:
        taken, title = statistics.median(variant.wall), f"depth {depth}, {variant.name}"
        bound = limits.bound(work, moved, taken) if variant.flops else ""
        rows.append(Row(title, batch / taken, "images/s", bound=bound))
        if variant.flops:
            wanted = f"≥ {target}" if variant.name.startswith("ours") else ""
            rows.append(Row(f"{title}: MFU", statistics.median(variant.share), "", wanted))
        if step is not None and encoding is not None and variant.name.startswith("ours"):
            both = [a + b for a, b in zip(step.wall, encoding.wall, strict=True)]
            rows.append(Row(f"{title}: end to end", paired(both, variant.wall), "×", "≥ 2 at depth 16"))
            rows.append(Row(f"{title}: the step alone", paired(step.wall, variant.wall), "×"))
    return rows


def _variant(found: Sequence[Variant], name: str) -> Variant | None:
    return next((variant for variant in found if variant.name == name), None)


def _options(
    setting: Setting, batch: int, depths: list[int], attention: Backend, published: Path | None
) -> argparse.Namespace:
    """As of ``benchmarks.training``."""
    return argparse.Namespace(
        published=published, depths=depths, precisions=[setting.precision], batch=batch,
        threads=torch.get_num_threads(), device=setting.device.type, attention=[attention],
        compile=not setting.tiny, without_encoding=False,
    )  # fmt: skip


def _chosen(setting: Setting, model: ModelConfig, batch: int) -> Backend:
    """The attention that a run would choose."""
    if setting.device.type == "cpu":
        return "blockwise"
    return fastest(calibrate(_shape(setting, model, batch), seconds_of)[0])


def _shape(setting: Setting, model: ModelConfig, batch: int) -> Shape:
    """Of one layer's attention."""
    head_width = model.width // model.heads
    return Shape(batch, model.heads, head_width, model.sizes, torch.bfloat16, setting.device)


def makespan(setting: Setting) -> list[Row]:
    """Depths 2 to 12, the same number of steps each, one after another and several at once."""
    depths = setting.of([12, 10, 8, 6, 4, 2], [2, 1])  # the heaviest first, as the scheduler does
    steps, batch = setting.of(40, 1), setting.of(32, 1)
    alone = _makespan(setting, depths, steps, batch, processes=1)
    limits = rates(setting.device)
    work = sum(flops.train_flops(ModelConfig.from_depth(depth)) for depth in depths) * steps * batch
    moved = sum(STATE_BYTES * flops.params_total(ModelConfig.from_depth(depth)) for depth in depths) * steps
    title = f"depths {depths[-1]} to {depths[0]}"
    rows = [Row(f"{title}, one after another", alone, "s", bound=limits.bound(work, moved, alone))]
    for processes in setting.of((2, 3), (2,)):
        packed = _makespan(setting, depths, steps, batch, processes)
        what = f"{title}, {processes} at once, by one after another"
        rows.append(Row(what, packed / alone, "", "≤ 0.6", limits.bound(work, moved, packed)))
    return rows


def _makespan(setting: Setting, depths: list[int], steps: int, batch: int, processes: int) -> float:
    """Seconds until the last of the depths has trained; making models and the first steps are not counted."""
    context = multiprocessing.get_context("spawn")
    jobs, done, ready = context.Queue(), context.Queue(), context.Barrier(processes)
    for depth in depths:
        jobs.put(depth)
    for _ in range(processes):
        jobs.put(None)
    workers = [
        context.Process(target=_work, args=(setting, depths, steps, batch, jobs, done, ready))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        spans = [done.get(timeout=300) for _ in workers]
    finally:
        for worker in workers:
            worker.join(timeout=10)
            worker.kill()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _work(
    setting: Setting, depths: list[int], steps: int, batch: int, jobs: Any, done: Any, ready: Any
) -> None:
    """One process: train whichever depth is next."""
    if setting.tiny:
        torch.set_num_threads(1)
    options = _options(setting, batch, depths, "auto", None)
    launch = LaunchConfig(attention=setting.of("masked", "auto"))
    with tempfile.TemporaryDirectory() as name:
        split = build_cache(Path(name), setting.of(IMAGES, 64), ModelConfig.from_depth(1).scales, views=1)
        made = {
            depth: our_step(depth, setting.precision, split, Path(name), options, launch) for depth in depths
        }
        for step in made.values():
            step()
        ready.wait(timeout=240)
        start = time.monotonic()  # of the machine: the same in all processes
        while (depth := jobs.get()) is not None:
            for _ in range(steps):
                made[depth]()
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
        done.put((start, time.monotonic()))


def sampling(setting: Setting) -> list[Row]:
    """Pictures of depth 16 with guidance and filters, decoder included."""
    depth, batch = setting.of(16, 1), setting.of(64, 1)
    config = ModelConfig.from_depth(depth)
    torch.manual_seed(0)
    model = family_model(build(config).to(setting.device).eval().requires_grad_(False))
    tokenizer = _tokenizer(setting)
    label_B = torch.arange(batch, device=setting.device) % config.num_classes
    asked = SamplingConfig(guidance=1.5, top_k=900, top_p=0.96, precision="bf16")
    replayed = graphed(model)

    def ours() -> None:
        draw_tokens(model, tokenizer, label_B, range(batch), asked)

    def as_graphs() -> None:
        draw_tokens(replayed, tokenizer, label_B, range(batch), asked)

    actions: dict[str, Callable[[], object]] = {"ours": ours, "ours as graphs": as_graphs}
    if setting.published is not None:
        _, var = published_models(depth, setting.device)
        var.eval()

        @published_precision()
        @torch.inference_mode()
        def published() -> None:
            with torch.autocast(setting.device.type, dtype=torch.bfloat16):
                var.autoregressive_infer_cfg(batch, label_B, g_seed=0, cfg=1.5, top_k=900, top_p=0.96)

        actions["published"] = published
    with half_weights(cast(nn.Module, model)):
        as_graphs()  # as usual; the next one is recorded
        times = _in_turn(actions, setting.of(5, 1), setting.device)
    limits = rates(setting.device)
    latent = torch.zeros(1, config.latent_channels, 16, 16, device=setting.device)
    decoding, passed = _counted(lambda: tokenizer.decode_features(latent), tokenizer)
    work = batch * (2 * flops.forward_flops(config) + decoding)
    # Every step reads the weights, and the keys and values of all steps so far.
    cache = 2 * 2 * config.depth * config.width * 2 * batch
    seen = sum(sum(side * side for side in config.scales[: k + 1]) for k in range(len(config.scales)))
    moved = 2 * flops.params_total(config) * len(config.scales) + cache * seen + batch * passed / 2
    rows = [
        Row(
            f"sampling, depth {depth}, batch {batch}, {name}", batch / statistics.median(taken), "images/s",
            bound=limits.bound(work, moved, statistics.median(taken)),
        )
        for name, taken in times.items()
    ]  # fmt: skip
    for name in [name for name in times if name != "published" and "published" in times]:
        what = f"sampling: {name} by published"
        rows.append(Row(what, paired(times["published"], times[name]), "×", "≥ 3"))
    return rows


def _tokenizer(setting: Setting, precision: Literal["fp32", "bf16"] = "fp32") -> Tokenizer:
    """The published size, untrained."""
    config = TokenizerConfig(channels=setting.of(160, 32), encode_precision=precision)
    return Tokenizer(config).to(setting.device).eval().requires_grad_(False)


def encoding(setting: Setting) -> list[Row]:
    """A batch of images to tokens, by the function that fills the token cache, in fp32 and in bf16."""
    batch = setting.of(64, 1)
    torch.backends.cudnn.allow_tf32 = False  # as where tokens are made
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), dtype=np.uint8)
    tokens, actions = dict[str, UInt16](), dict[str, Callable[[], object]]()

    def encode_in(precision: Literal["fp32", "bf16"]) -> None:
        torch.manual_seed(0)
        encode = encoder(_tokenizer(setting, precision), setting.device)
        actions[precision] = lambda: tokens.update({precision: encode(pixels)})

    encode_in("fp32")
    encode_in("bf16")
    times = _in_turn(actions, setting.of(5, 1), setting.device)
    limits, tokenizer = rates(setting.device), _tokenizer(setting)
    image = torch.rand(1, 3, 256, 256, device=setting.device)
    work, moved = _counted(lambda: tokenizer.encode_features(image), tokenizer)
    rows = []
    for name, taken in times.items():
        least, median = batch * moved / (2 if name == "bf16" else 1), statistics.median(taken)
        bound = limits.bound(batch * work, least, median)
        rows.append(Row(f"encoding in {name}", batch / median, "images/s", bound=bound))
    rows.append(Row("encoding: bf16 by fp32", paired(times["fp32"], times["bf16"]), "×", "≥ 2.5"))
    same = float((tokens["fp32"] == tokens["bf16"]).mean())
    rows.append(Row("encoding: the same tokens (of an untrained tokenizer)", 100 * same, "%"))
    return rows


class OneBatch(Batches):
    """The first step's batch, again and again: a loader that takes no time."""

    kept: list[MicroTokens] | None = None

    def micro_batches(self, step: int, scales: tuple[int, ...]) -> list[MicroTokens]:
        """On the device already."""
        if self.kept is None:
            self.kept = super().micro_batches(step, scales)
        return self.kept


def loader(setting: Setting) -> list[Row]:
    """What a step takes longer with the token cache than with one batch that stays on the device."""
    batch, rows = setting.of(32, 1), []
    for depth in setting.of((2, 8), (1,)):
        options = _options(setting, batch, [depth], "auto", None)
        launch = LaunchConfig(attention=setting.of("masked", "auto"))
        with tempfile.TemporaryDirectory() as name:
            split = build_cache(Path(name), IMAGES, ModelConfig.from_depth(1).scales, views=1)
            actions = {
                kind.__name__: our_step(
                    depth, setting.precision, split, Path(name), options, launch, feed=kind
                )
                for kind in (Batches, OneBatch)
            }
            times = _in_turn(actions, setting.of(7, 2), setting.device, calls=setting.of(10, 1))
        share = 1 - 1 / paired(times["Batches"], times["OneBatch"])
        moved = 2 * batch * split.seq_len
        what = f"loader: share of a step of depth {depth}"
        rows.append(Row(what, 100 * share, "%", "≤ 1", f"{moved / 1e3:.3g} kB of tokens a step"))
    return rows


def start(setting: Setting) -> list[Row]:
    """From a command to the first step of the quickstart, and what imports take of it."""
    rows = [Row("imports of the trainer", startup.imports(), "s")]
    if not setting.tiny:
        startup.first_steps(4)  # reads the files from the disk, and builds what is built once
        for name, taken in startup.first_steps(4).items():
            rows.append(Row(f"start-up to the first step, {name}", taken, "s", "≤ 6 on a CPU"))
    return rows


def _in_turn(
    actions: dict[str, Callable[[], object]], repetitions: int, device: torch.device, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of one call, so many called together, all warmed up once and then timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repetitions):
        for name, action in actions.items():
            taken = seconds(repeated(action, calls), device)[0]
            times[name].append(taken / calls)
    return times


def _counted(action: Callable[[], object], module: nn.Module) -> tuple[float, float]:
    """FLOPs of the module, and the bytes that its parts write in fp32 and the next ones read."""
    passed = 0

    def count(part: nn.Module, given: Any, result: Any) -> None:
        nonlocal passed
        passed += 2 * 4 * result.numel() if isinstance(result, Tensor) else 0

    leaves = [part for part in module.modules() if not list(part.children())]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        action()
    for hook in hooks:
        hook.remove()
    return float(counter.get_total_flops()), float(passed)


PARTS: dict[str, Callable[[Setting], list[Row]]] = {
    "attention": attention,
    "train16": lambda setting: training(setting, setting.of(16, 1), 0.5),
    "train8": lambda setting: training(setting, setting.of(8, 1), 0.35),
    "makespan": makespan,
    "sampling": sampling,
    "encoding": encoding,
    "loader": loader,
    "startup": start,
}
