"""What the harness costs over a bare training loop of the same model, data and steps.

    python -m benchmarks.overhead [--depth 2] [--batch 32] [--chunks 60] [--device cpu] [--trackers wandb ...]

- Harness: ``scaling.trainer.train``, logging every ten steps as by default, trackers off (and on, if named).
- Bare: the loop that one would write by hand, in ``bare_steps``: cached tokens, forward, loss, backward,
  clip, AdamW; it records nothing and draws its batches with numpy. Model, attention and loss are the same
  code in both: how fast they are is another question (``benchmarks.training``).
- Paired: ten steps of the harness, with one log point, then ten of the bare loop, in one process, over and
  over. The ratio of each pair is one measurement; its median and quartiles are printed, by the clock and by
  the processor's time, which other programs on the machine disturb less. On a GPU only the clock says
  something.
- Evaluations are left out: both would do them. A checkpoint's time is measured apart and spread over the
  default interval between two. The end of a run (weights, pictures) is no part of its steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import scaling.trainer as trainer
from benchmarks.loader import Blank
from scaling.config import (
    DataConfig,
    EvaluationConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
    to_dict,
)
from scaling.data.cache import TokenCache, build_cache, open_cache
from scaling.families.registry import FAMILIES, build, family_model
from scaling.objective import Objective
from scaling.records import RunFolder, write_json
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer, save_tokenizer

CHUNK, WARM_UP = 10, 3
"""Steps of one measurement, and measurements left out at the start."""
DATA = DataConfig(resolution=16, crop_margin=1.0, train_images=20_000, val_images=64, num_classes=10)
PARTS = {
    "Batches.micro_batches": "batch: indices, draws, cached tokens, to the device",
    "set_rates": "learning rate, weight decay",
    "step_scales": "token maps of the step",
    "training_record": "log point: losses leave the device",
    "Mirror.log": "log point: a line of metrics.jsonl",
    "JobProcess.beat": "log point: heartbeat",
    "JobProcess.should_stop": "asked to leave?",
    "Agreement.ask": "agreement of the processes",
}


@dataclass
class Measured:
    """Seconds of each chunk."""

    wall: list[tuple[float, float]] = field(default_factory=list)
    """Harness, bare."""
    cpu: list[tuple[float, float]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds in all, by name of the function."""
    save: float = 0.0
    tracker_cpu: float = 0.0


def config_of(args: argparse.Namespace) -> RunConfig:
    """The run."""
    tokenizer = TokenizerConfig(
        vocab=512, latent_channels=16, channels=32, multipliers=(1, 1, 1), res_blocks=1, scales=(1, 2, 3, 4)
    )
    model = ModelConfig.from_depth(
        args.depth, vocab=512, latent_channels=16, scales=tokenizer.scales, num_classes=10, drop_path=0.1
    )
    train = TrainConfig(steps=CHUNK * (args.chunks + 1), batch=args.batch, lr=1e-3, precision=args.precision)
    return RunConfig(
        model=model, data=DATA, tokenizer=tokenizer, tokenizer_train=TokenizerTrainConfig(), train=train,
        evaluation=EvaluationConfig(points=1, first=1.0),
    )  # fmt: skip


def make_tokens(root: Path, config: RunConfig) -> tuple[TokenCache, Tokenizer]:
    """An untrained tokenizer and a cache of random tokens: only their shapes matter."""
    torch.manual_seed(0)
    save_tokenizer(Tokenizer(config.tokenizer).eval(), root / "tokenizer", {})
    tokenizer = load_tokenizer(root / "tokenizer")
    generator = np.random.default_rng(0)
    seq_len = sum(side * side for side in config.tokenizer.scales)

    def encode(crops: np.ndarray) -> np.ndarray:
        return generator.integers(0, config.tokenizer.vocab, (len(crops), seq_len), dtype=np.uint16)

    folder, scales = root / "tokens", config.tokenizer.scales
    build_cache(
        folder, DATA, scales, config.tokenizer.vocab, Blank(DATA), encode, tokenizer.content_hash, batch=1024
    )
    return open_cache(folder, tokenizer.content_hash, scales), tokenizer


def bare_steps(
    config: RunConfig, cache: TokenCache, tokenizer: Tokenizer, device: torch.device
) -> Iterator[None]:
    """The loop without a harness; one step each time it is asked."""
    torch.manual_seed(0)
    generator, split = np.random.default_rng(0), cache.split("train")
    model, quantizer = (
        Objective(family_model(build(config.model, "auto"))).to(device).train(),
        tokenizer.quantize.to(device),
    )
    train, depth, batch = config.train, config.model.depth, config.train.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=train.betas, fused=True)
    inputs = FAMILIES[config.model.family].inputs
    sizes = tuple((side, side) for side in config.model.scales)
    keep = 1 - torch.linspace(0, config.model.drop_path, depth, device=device)[:, None, None]
    views = np.zeros(batch, dtype=np.int64)
    while True:
        rows = generator.integers(0, split.images, batch)
        tokens_BL = torch.from_numpy(split.tokens(rows, views).astype(np.int64)).to(device, non_blocking=True)
        labels_B = torch.from_numpy(split.labels[rows].astype(np.int64)).to(device, non_blocking=True)
        labels_B[torch.rand(batch, device=device) < config.model.label_drop] = config.model.num_classes
        path = torch.bernoulli(keep.expand(depth, 2, batch)) / keep
        with torch.no_grad():
            given = inputs(quantizer, tokens_BL, sizes)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            total, *_ = model(labels_B, given, tokens_BL, path, sizes, 1 / tokens_BL.numel())
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield


def measure(
    root: Path, config: RunConfig, launch: LaunchConfig, cache: TokenCache, tokenizer: Tokenizer
) -> Measured:
    """Train once, with the bare loop's steps in between."""
    device = torch.device("cuda" if launch.device == "cuda" else "cpu")
    found, bare = Measured(), bare_steps(config, cache, tokenizer, device)
    step_of_trainer = trainer.train_step
    mark: tuple[float, float] | None = None

    def now() -> tuple[float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def stepped(state: Any, batches: Any, step: int, scales: tuple[int, ...]) -> Any:
        nonlocal mark
        if step % CHUNK == 0:
            start = now()
            for _ in range(CHUNK):
                next(bare)
            end = now()
            if mark is not None and step > WARM_UP * CHUNK:
                found.wall.append((start[0] - mark[0], end[0] - start[0]))
                found.cpu.append((start[1] - mark[1], end[1] - start[1]))
            mark = now()
        return step_of_trainer(state, batches, step, scales)

    folder = RunFolder(root / "sweep" / "run")
    folder.create(to_dict(config))
    write_json(folder.path / "launch.json", to_dict(launch))
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    with timed_parts(found.parts), patched(trainer, "train_step", stepped):
        trainer.train(folder, config, launch, cache, tokenizer)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found.tracker_cpu = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    found.save = found.parts.pop("State.save")
    return found


class patched:  # noqa: N801 - reads as a statement
    """``owner.name`` is ``value`` inside."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value, self._before = owner, name, value, getattr(owner, name)

    def __enter__(self) -> None:
        setattr(self._owner, self._name, self._value)

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, self._before)


class timed_parts:  # noqa: N801 - reads as a statement
    """The trainer's own functions add their seconds to ``parts`` inside."""

    def __init__(self, parts: dict[str, float]) -> None:
        self._patches = []
        for name in (*PARTS, "State.save"):
            owner: Any = trainer
            *way, last = name.split(".")
            for part in way:
                owner = getattr(owner, part)
            self._patches.append(patched(owner, last, _timed(getattr(owner, last), name, parts)))

    def __enter__(self) -> None:
        for patch in self._patches:
            patch.__enter__()

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.__exit__()


def _timed(function: Callable[..., Any], name: str, parts: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            parts[name] += time.perf_counter() - start

    return call


def quartiles(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Of the harness's time over the bare loop's, less one, in per cent: first, median, third."""
    ratios = 100 * (np.array([harness / bare for harness, bare in pairs]) - 1)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(low), float(middle), float(high)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=60, help="pairs of ten steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trackers", nargs="*", default=[], help="measured a second time with these on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = config_of(args)
    off = LaunchConfig(
        device=args.device, threads=args.threads, sampling=SamplingConfig(images=0), wandb_mode="offline",
        checkpoint_seconds=1e9,  # the pauses of the pairing would bring it about too often
    )  # fmt: skip
    runs = {"trackers off": off}
    if args.trackers:
        runs[", ".join(args.trackers)] = dataclasses.replace(off, trackers=tuple(args.trackers))
    console = Console(width=120)
    table = Table(
        "harness", "bare ms/step", "clock %", "quartiles", "processor %", "quartiles", "+ checkpoints %"
    )
    interval = LaunchConfig().checkpoint_seconds
    for name, launch in runs.items():
        with tempfile.TemporaryDirectory() as place:
            cache, tokenizer = make_tokens(Path(place), config)
            found = measure(Path(place), config, launch, cache, tokenizer)
        cells = [f"{1e3 * np.median([bare for _, bare in found.wall]) / CHUNK:.1f}"]
        for pairs in (found.wall, found.cpu):
            low, middle, high = quartiles(pairs)
            cells += [f"{middle:+.2f}", f"{low:+.2f} … {high:+.2f}"]
        table.add_row(name, *cells, f"{100 * found.save / interval:+.2f}")
        if name == "trackers off":
            parts = Table("of a step of the harness", "µs")
            for part, words in PARTS.items():
                parts.add_row(words, f"{1e6 * found.parts[part] / config.total_steps:.0f}")
        else:
            console.print(
                f"{name}: the process beside the run took {found.tracker_cpu:.1f} s of processor time"
            )
    console.print(
        f"depth {args.depth}, batch {args.batch}, {args.precision} on {args.device}, {args.threads} threads"
    )
    console.print(table, parts)


if __name__ == "__main__":
    main()
