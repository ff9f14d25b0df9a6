"""A tokenizer's training, evaluation and checkpoint, timed; with the recipe's images where they are at hand,
since reading them is part of the speed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np

from scaling.checkpoint import save_checkpoint
from scaling.clock import host_memory
from scaling.config import LaunchConfig, TokenizerRunConfig
from scaling.probes.noise import images_or_noise
from scaling.probes.stopwatch import Stopwatch
from scaling.process import JobProcess
from scaling.records import RunFolder, write_json
from scaling.tokenizer import training as stage1
from scaling.tokenizer.feed import KeptOriginals, prefetched, train_images, validation_images
from scaling.tokenizer.stage1 import Stage1

LEAST_STEPS = 2
SHOWN = 64
"""Validation images of the timed evaluation."""


def probe_tokenizer(
    folder: RunFolder, config: TokenizerRunConfig, launch: LaunchConfig, seconds: float
) -> None:
    """Time a tokenizer's training, evaluation and checkpoint; what was measured goes to ``speed.json``."""
    accelerator = stage1.make_accelerator(launch)
    train, world, rank = config.train, accelerator.num_processes, accelerator.process_index
    with JobProcess(folder, accelerator.is_main_process, accelerator.wait_for_everyone) as job:
        watch = Stopwatch(accelerator, job)
        source = images_or_noise(config.data)
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
            times = watch.seconds
            found = {
                "images_per_second": train.steps * train.batch / expected,
                "steps": counted,
                "evaluation_seconds": times["evaluation"] * train.eval_images / len(validation),
                "checkpoint_seconds": times["checkpoint"],
                "once_seconds": times["seeding"] + times["finish"] + times["first"] - expected / train.steps,
                "inside_seconds": sum(times.values()),
                # Beside a GPU, the threads that read images may fill the cores: in a real job too.
                "waited": watch.waited([f"phase {number}" for number in range(len(phases))])
                if accelerator.device.type == "cpu"
                else None,
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
