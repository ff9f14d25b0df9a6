"""A few seconds of real work, timed: what a plan's hours are told from.

    python -m scaling.probe run FOLDER --seconds 5      training, evaluation, saving and pictures of one depth
    python -m scaling.probe stage FOLDER --seconds 5    tokenizer training and token encoding

FOLDER holds ``config.json`` and ``launch.json`` as the job's own folder would; what was measured is left in
``speed.json``.

- Everything that takes time is the trainers' own code: model, optimiser, micro-batches, evaluation,
  checkpoint, pictures. Only the loop is another, since it goes by the clock.
- A run's tokens are noise and its tokenizer is untrained: neither changes a speed. Images are the recipe's
  where they are at hand, since reading them is part of the speed, and noise where they are not.
- One step of one micro-batch comes first: it pays what only the first step pays, and says how many
  micro-batches a measured step can have. A step of fewer than the recipe's counts the optimiser too often.
- Several processes follow the first one's clock.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image

from scaling import flops
from scaling.backends import choose_attention
from scaling.checkpoint import save_checkpoint
from scaling.clock import host_memory, peak_memory
from scaling.config import ConfigError, DataConfig, LaunchConfig, RunConfig, TokenizerRunConfig, from_dict
from scaling.data.cache import CachedSplit, build_cache
from scaling.data.encode import batch_size, encoder
from scaling.data.images import ImageSource, Skipped, Split
from scaling.data.sampler import Int64
from scaling.data.shards import UInt16
from scaling.data.sources import open_source
from scaling.evaluation import evaluate
from scaling.process import Interrupted, JobProcess, recorded_failure, run_job
from scaling.records import RunFolder, read_json, write_json
from scaling.steps import step_scales
from scaling.tokenizer import training as stage1
from scaling.tokenizer.feed import KeptOriginals, prefetched, train_images, validation_images
from scaling.tokenizer.stage1 import Stage1
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer, save_tokenizer
from scaling.trainer import EVAL_BATCH, State, finish, make_accelerator, set_rates
from scaling.training_step import Batches, train_step

LEAST_STEPS = 2
SHOWN = 64
"""Validation images of a tokenizer's timed evaluation."""


@dataclass
class Stopwatch:
    """Seconds by what they went to, by the first process's clock."""

    accelerator: Accelerator
    job: JobProcess
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """What happens inside, with the device done with it."""
        start = self.now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start
        self.job.beat(step=len(self.seconds))
        if self.agreed(float(self.job.should_stop())):
            raise Interrupted

    def now(self) -> float:
        """Seconds, once the device is idle."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        return time.monotonic()

    def agreed(self, value: float) -> float:
        """The first process's value."""
        if self.accelerator.num_processes == 1:
            return value
        sent = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(broadcast(sent).item())

    def __getitem__(self, part: str) -> float:
        return self.agreed(self.seconds[part])


class NoiseTokens(CachedSplit):
    """Tokens and labels of no image."""

    def __init__(self, config: RunConfig, images: int) -> None:
        self.images, self.views, self.seq_len = images, config.data.views, config.tokenizer.seq_len
        draw = np.random.default_rng(0)
        self._pool: UInt16 = draw.integers(config.tokenizer.vocab, size=(256, self.seq_len), dtype=np.uint16)
        self.labels = draw.integers(config.model.num_classes, size=images, dtype=np.int64)

    def tokens(self, indices: Int64, views: Int64 | int = 0) -> UInt16:
        """Token ids (B, L)."""
        return self._pool[indices % len(self._pool)]


class NoiseImages:
    """Images of noise in place of those that are not at hand, at the size that crops are cut from."""

    def __init__(self, data: DataConfig) -> None:
        self.skipped, self.num_classes = Skipped(), data.num_classes or 1
        self.class_names = tuple(map(str, range(self.num_classes)))
        self._counts = {"train": data.train_images or 1, "val": data.val_images or 1}
        side = round(data.resolution * data.crop_margin)
        self._pixels = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)

    def count(self, split: Split) -> int:
        """As the config says."""
        return self._counts[split]

    def label(self, split: Split, i: int) -> int:
        """Any."""
        return i % self.num_classes

    def image(self, split: Split, i: int) -> Image.Image:
        """The same picture."""
        return Image.fromarray(self._pixels)

    def fingerprint(self) -> str:
        """Of no data."""
        return "noise"


def probe_run(folder: RunFolder, config: RunConfig, launch: LaunchConfig, seconds: float) -> None:
    """Time one run's training, evaluation, checkpoint and pictures; the speed goes to ``speed.json``."""
    torch.manual_seed(0)
    save_tokenizer(Tokenizer(config.tokenizer), folder.path / "tokenizer", {})
    tokenizer = load_tokenizer(folder.path / "tokenizer")
    assert config.data.train_images is not None
    assert config.data.val_images is not None
    accelerator = make_accelerator(config, launch)
    with JobProcess(folder, accelerator.is_main_process, accelerator.wait_for_everyone) as job:
        watch = Stopwatch(accelerator, job)
        launch = replace(launch, attention=choose_attention(folder, config, launch, accelerator))
        state = State(config, launch, accelerator, tokenizer)
        train_split = NoiseTokens(config, config.data.train_images)

        def steps(part: str, config: RunConfig, seconds: float, least: int) -> flops.Spent:
            batches = Batches(config, launch, accelerator, train_split, folder)
            total, step = flops.Spent(0, 0), 0
            while step < least or watch[part] < seconds:
                scales = step_scales(config.model, config.seed, step)
                with watch.timed(part):
                    set_rates(state.optimizer, config, min(step, config.total_steps - 1))
                    float(train_step(state, batches, step, scales)["loss_avg"])
                total, step = total + flops.step_cost(config, scales), step + 1
            watch.seconds[f"{part} steps"] = step
            return total

        share = -(-config.train.batch // accelerator.num_processes)
        micro = min(launch.micro_batch or share, share)
        small = micro * accelerator.num_processes
        most = max(1, config.train.batch // small)
        with_micros = [_with_batch(config, small), config]
        if most > 1:
            steps("first", with_micros[0], 0.0, 1)
            steps("second", with_micros[0], 0.0, 1)
            fitting = max(1, min(most, int(seconds / watch["second"])))
            with_micros[1] = config if fitting == most else _with_batch(config, small * fitting)
        else:
            steps("first", config, 0.0, 1)
        spent = steps("train", with_micros[1], seconds, LEAST_STEPS)
        per_second = spent.flops / watch["train"]

        batch = launch.micro_batch or EVAL_BATCH
        wanted = min(config.evaluation.images or config.data.val_images, config.data.val_images)
        one = flops.forward_flops(config.model)
        affordable = batch * max(1, int(seconds / 2 * per_second / (one * batch)))
        images = min(wanted, affordable * accelerator.num_processes)
        with watch.timed("evaluation"):
            evaluate(
                state.bare, config.model, state.quantizer, NoiseTokens(config, config.data.val_images),
                accelerator, cached=config.tokenizer.scales, images=images, batch=batch,
            )  # fmt: skip
        with watch.timed("checkpoint"):
            state.save(folder, 1)
        with watch.timed("samples"):
            finish(folder, config, launch, state, tokenizer)
        if accelerator.is_main_process:
            steps_done = int(watch.seconds["train steps"])
            found = {
                "flops_per_second": per_second,
                "steps": steps_done,
                "evaluation_flops_per_second": one * images / watch.seconds["evaluation"],
                "checkpoint_seconds": watch.seconds["checkpoint"],
                # What a real run spends as well: the start, one checkpoint, the pictures, and what its first
                # step takes longer than the others.
                "inside_seconds": watch.seconds["train"] * (1 + 1 / steps_done)
                + watch.seconds.get("second", 0.0)
                + watch.seconds["evaluation"],
                "peak_memory": peak_memory(accelerator.device),
                "host_memory": host_memory(),
            }
            write_json(folder.path / "speed.json", found)
        accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


def _with_batch(config: RunConfig, batch: int) -> RunConfig:
    train = replace(config.train, batch=batch, lr=config.train.peak_lr, steps=10**6, epochs=None, tokens=None)
    return replace(config, train=train)


def probe_stage(folder: RunFolder, config: TokenizerRunConfig, launch: LaunchConfig, seconds: float) -> None:
    """Time a tokenizer's training, evaluation and checkpoint, and the encoding of tokens with it."""
    accelerator = stage1.make_accelerator(launch)
    train, world, rank = config.train, accelerator.num_processes, accelerator.process_index
    with JobProcess(folder, accelerator.is_main_process, accelerator.wait_for_everyone) as job:
        watch = Stopwatch(accelerator, job)
        try:
            source: ImageSource = open_source(config.data)
        except ConfigError:
            source = NoiseImages(config.data)
        images, trained = KeptOriginals(source), Stage1(config, accelerator)
        threads = launch.threads or 1
        validation = validation_images(images, config.data, min(SHOWN, train.eval_images))

        def batches(step: int) -> np.ndarray:
            return train_images(images, config.data, train.seed, train.batch, step, rank, world)

        def steps(first: int, end: int, part: str, seconds: float) -> int:
            done = 0
            with contextlib.closing(prefetched(batches, first, end, threads)) as stream:
                for step, batch in enumerate(stream, first):
                    with watch.timed(part):
                        trained.step(step, stage1.to_device(batch, accelerator.device), launch.micro_batch)
                        float(trained.sums[0])
                    done += 1
                    if done >= LEAST_STEPS and watch[part] >= seconds:
                        break
            return done

        edges = {0, train.autoencode_steps, train.steps}
        if train.adversarial.weight > 0:
            edges.add(min(train.adversarial.start, train.steps))
        phases = [(a, b) for a, b in zip(sorted(edges), sorted(edges)[1:], strict=False)]
        steps(0, 1, "first", 0.0)
        expected, counted = 0.0, 0
        for number, (first, end) in enumerate(phases):
            if first == train.autoencode_steps:
                with watch.timed("seeding"):
                    _seed(trained, batches, launch, config)
            part = f"phase {number}"
            done = steps(first, end, part, seconds / len(phases))
            expected += (end - first) * watch[part] / done
            counted += done
        with watch.timed("evaluation"):
            facts = stage1.evaluate_and_log(trained, validation, folder, 1, launch)
        if accelerator.is_main_process:
            with watch.timed("checkpoint"):
                save_checkpoint(folder.checkpoints, 1, trained.tensors(), trained.state())
            with watch.timed("finish"):
                stage1.finish(trained, source, validation, facts, folder)
        accelerator.wait_for_everyone()
        encoded = _encode(folder, config, launch, watch, trained, source, seconds / 2)
        if accelerator.is_main_process:
            times = watch.seconds
            found = {
                "images_per_second": train.steps * train.batch / expected,
                "steps": counted,
                "evaluation_seconds": times["evaluation"] * train.eval_images / len(validation),
                "checkpoint_seconds": times["checkpoint"],
                "once_seconds": times["seeding"] + times["finish"] + times["first"] - expected / train.steps,
                "inside_seconds": sum(times.values()),
                "encoded_per_second": encoded / times["encoding"],
                "host_memory": host_memory(),
            }
            write_json(folder.path / "speed.json", found)
        accelerator.wait_for_everyone()
    accelerator.end_training()


def _seed(trained: Stage1, batches: Callable[[int], np.ndarray], launch: LaunchConfig,
          config: TokenizerRunConfig) -> None:  # fmt: skip
    train, device = config.train, trained.device
    count = -(-max(stage1.SEED_IMAGES, config.tokenizer.vocab) // train.batch)
    parts = launch.micro_batch or train.batch
    trained.seed_codebook(stage1.to_device(batches(i), device).split(parts) for i in range(count))


def _encode(
    folder: RunFolder,
    config: TokenizerRunConfig,
    launch: LaunchConfig,
    watch: Stopwatch,
    trained: Stage1,
    source: ImageSource,
    seconds: float,
) -> int:
    """Encode some images into a cache of their own, about so many seconds' worth; how many they were."""
    accelerator = watch.accelerator
    encode = encoder(trained.tokenizer, accelerator.device)
    batch = batch_size(config.data.resolution, accelerator.device.type)
    one = np.zeros((batch, config.data.resolution, config.data.resolution, 3), np.uint8)
    for part in ("first batch", "batch"):
        with watch.timed(part):
            encode(one)
    wanted = batch * accelerator.num_processes * max(1, int(seconds / watch["batch"]))
    some = min(wanted, source.count("train"))
    with watch.timed("encoding"):
        build_cache(
            folder.path / "tokens", config.data, config.tokenizer.scales, config.tokenizer.vocab,
            _First(source, some), encode, "", batch=batch, threads=launch.threads or 1,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
    return some * config.data.views + 1


class _First(KeptOriginals):
    """The first images of a source, and one for validation."""

    def __init__(self, source: ImageSource, images: int) -> None:
        super().__init__(source, budget=0)
        self._images = images

    def count(self, split: Split) -> int:
        """Few."""
        return self._images if split == "train" else 1


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="scaling.probe", description="Time a few seconds of real work.")
    parser.add_argument("what", choices=("run", "stage"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    folder = RunFolder(args.folder)
    with recorded_failure(folder):
        launch = from_dict(LaunchConfig, read_json(folder.path / "launch.json"))
        if launch.threads is not None:
            torch.set_num_threads(launch.threads)
        torch.backends.cudnn.allow_tf32 = False  # as the jobs
        if args.what == "run":
            probe_run(folder, from_dict(RunConfig, folder.config()), launch, args.seconds)
        else:
            probe_stage(folder, from_dict(TokenizerRunConfig, folder.config()), launch, args.seconds)


if __name__ == "__main__":
    sys.exit(run_job(main))
