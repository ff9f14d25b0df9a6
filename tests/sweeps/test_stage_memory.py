"""What a tokenizer's jobs are told to need: held to what autograd keeps and to what the jobs do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scaling.config import DataConfig, LaunchConfig, TokenizerConfig, TokenizerRunConfig, TokenizerTrainConfig
from scaling.data import encode
from scaling.records import RunFolder
from scaling.tokenizer import feed, quantizer, training
from scaling.tokenizer.vqvae import Tokenizer
from sweeps import stage_memory
from sweeps.calibration import Calibration, measure_images
from sweeps.machine import Machine
from sweeps.stage_memory import FLOAT, encoding_memory, networks, training_memory

SMALL = TokenizerConfig(vocab=64, latent_channels=8, channels=16, norm_groups=4, multipliers=(1, 2, 2),
                        res_blocks=1, scales=(1, 2, 4, 8))  # fmt: skip
DATA = DataConfig(resolution=32, train_images=100, val_images=10, num_classes=18)
STAGE = TokenizerRunConfig(DATA, SMALL, TokenizerTrainConfig())


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (SMALL, None),
        (replace(SMALL, res_blocks=2, multipliers=(1, 1, 2), channels=32), None),
        (replace(SMALL, multipliers=(2, 1), scales=(4, 16)), None),
        (replace(SMALL, quantizer="scalable"), [(s, s) for s in SMALL.scales]),
    ],
)
def test_what_is_kept_for_the_backward_pass_is_counted(
    config: TokenizerConfig, sizes: Sequence[tuple[int, int]] | None
) -> None:
    images, tokenizer = 4, Tokenizer(config)
    weights = {p.untyped_storage().data_ptr() for p in tokenizer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs, _ = tokenizer(torch.zeros(images, 3, 32, 32), sizes=sizes)
    nets, area = networks(config), sum(s * s for s in config.scales) / config.scales[-1] ** 2
    told = nets.encoder + nets.decoder * (area if config.quantizer == "scalable" else 1)
    assert len(outputs) == (1 if sizes is None else len(sizes))
    assert sum(kept.values()) == pytest.approx(FLOAT * images * told, rel=0.12)
    assert sum(p.numel() for p in tokenizer.parameters()) == pytest.approx(nets.weights, rel=0.12)


def test_the_constants_are_those_of_the_jobs() -> None:
    assert (stage_memory.SEED_IMAGES, stage_memory.KEPT_ORIGINALS) == (training.SEED_IMAGES, feed.CACHE_BYTES)
    assert stage_memory.DISTANCES_AT_ONCE == quantizer.DISTANCES_AT_ONCE
    for resolution in (16, 64, 256, 1024):
        wanted = min(stage_memory.ENCODED_IMAGES, stage_memory.ENCODED_PIXELS // resolution**2)
        assert encode.batch_size(resolution, "cpu") == max(1, wanted)


def test_memory_grows_with_what_is_computed_at_once() -> None:
    more = replace(STAGE, tokenizer=replace(SMALL, vocab=4096))
    lpips = replace(STAGE.train, perceptual=1.0, lpips_weights="vgg.safetensors", lpips_sha256="0" * 64)
    judged = replace(STAGE.train, adversarial=replace(STAGE.train.adversarial, weight=0.1))
    for other in (more, replace(STAGE, train=lpips), replace(STAGE, train=judged)):
        assert training_memory(STAGE, 8) < training_memory(STAGE, 16) < training_memory(other, 16)
    assert encoding_memory(STAGE) < encoding_memory(more) < training_memory(more, 16)


def test_what_a_job_took_counts_for_one_just_like_it(tmp_path: Path) -> None:
    folder, launch, machine = RunFolder(tmp_path), LaunchConfig(), Machine("here", 2, 2**33, ())
    folder.set_status("done", images_per_second=9.0, host_memory=123)
    speed = measure_images("tokenizer", folder, STAGE, machine, 1, launch, 60.0)
    assert speed is not None
    known = Calibration(images=(speed,))
    assert known.image_memory("tokenizer", STAGE, machine, launch) == 123
    batch = replace(STAGE, train=replace(STAGE.train, batch=STAGE.train.batch * 2))
    for job, stage, where in (
        ("tokens", STAGE, machine),
        ("tokenizer", batch, machine),
        ("tokenizer", STAGE, replace(machine, name="there")),
    ):
        assert known.image_memory(job, stage, where, launch) is None
