"""A run's training, evaluation, checkpoint and pictures, timed.

- Its tokens are noise and its tokenizer is untrained: neither changes a speed.
- One step of one micro-batch comes first: it pays what only the first step pays, and says how many
  micro-batches a measured step can have. A step of fewer than the recipe's counts the optimiser too often.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from scaling import flops
from scaling.backends import choose_attention
from scaling.clock import host_memory, peak_memory
from scaling.config import LaunchConfig, RunConfig
from scaling.data.cache import CachedSplit
from scaling.data.sampler import Int64
from scaling.data.shards import UInt16
from scaling.evaluation import evaluate
from scaling.probes.stopwatch import Stopwatch
from scaling.process import JobProcess
from scaling.records import RunFolder, write_json
from scaling.steps import step_scales
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer, save_tokenizer
from scaling.trainer import EVAL_BATCH, State, finish, make_accelerator, set_rates
from scaling.training_step import Batches, train_step

LEAST_STEPS = 2


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


def probe_run(folder: RunFolder, config: RunConfig, launch: LaunchConfig, seconds: float) -> None:
    """Time one run's training, evaluation, checkpoint and pictures; the speed goes to ``speed.json``."""
    assert config.data.train_images is not None
    assert config.data.val_images is not None
    accelerator = make_accelerator(config, launch)
    torch.manual_seed(0)
    if accelerator.is_main_process:
        save_tokenizer(Tokenizer(config.tokenizer), folder.path / "tokenizer", {})
    accelerator.wait_for_everyone()
    tokenizer = load_tokenizer(folder.path / "tokenizer")
    with JobProcess(folder, accelerator.is_main_process, accelerator.wait_for_everyone) as job:
        watch = Stopwatch(accelerator, job)
        launch = replace(launch, attention=choose_attention(folder, config, launch, accelerator))
        state = State(config, launch, accelerator, tokenizer)
        train_split = NoiseTokens(config, config.data.train_images)

        def steps(part: str, config: RunConfig, seconds: float, least: int) -> flops.Spent:
            total, step = flops.Spent(0, 0), 0
            with Batches(config, launch, accelerator, train_split, folder) as batches:
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
            state.with_weights(partial(
                evaluate, config=config.model, quantizer=state.quantizer,
                split=NoiseTokens(config, config.data.val_images), accelerator=accelerator,
                cached=config.tokenizer.scales, images=images, batch=batch,
            ))  # fmt: skip
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
                "waited": watch.waited(["train"]),
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
