"""An evaluation's numbers: means over tokens, errors over images."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaling.clock import Clock
from scaling.config import ModelConfig, TokenizerConfig
from scaling.evaluation import Evaluation, evaluate, per_scale
from scaling.families.var import VAR
from scaling.records import RunFolder
from scaling.tokenizer.quantizer import MultiScaleQuantizer

SCALES = (1, 2, 3)
SIZES = np.array([1, 4, 9])


@given(images=st.integers(2, 20), seed=st.integers(0, 1000))
def test_averages_are_over_tokens_and_standard_errors_over_images(images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    loss_nL, wrong_nL = rng.exponential(4, (images, 14)), (rng.random((images, 14)) < 0.7).astype(float)
    parts = [per_scale(torch.from_numpy(v), SCALES).numpy() for v in (loss_nL, wrong_nL)]
    record = Evaluation(parts[0], parts[1], SIZES).record()
    assert record["loss_avg"] == pytest.approx(loss_nL.mean())
    assert record["loss_last"] == pytest.approx(loss_nL[:, 5:].mean())
    assert record["loss_scales"][1] == pytest.approx(loss_nL[:, 1:5].mean())
    assert record["error_avg"] == pytest.approx(wrong_nL.mean())
    assert record["loss_avg_se"] == pytest.approx(loss_nL.mean(axis=1).std(ddof=1) / math.sqrt(images))
    assert record["eval_images"] == images


def test_a_part_of_the_images_is_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image folder is sorted by class: its first images would be of its first classes only."""
    asked: list[int] = []

    def tokens(indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        asked.extend(indices.tolist())
        return np.zeros((len(indices), 14), dtype=np.uint16)

    split = SimpleNamespace(images=100, labels=np.zeros(100, dtype=np.int64), tokens=tokens)
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, device=torch.device("cpu"), autocast=contextlib.nullcontext
    )
    torch.manual_seed(0)
    config = ModelConfig.from_depth(1, vocab=8, latent_channels=4, scales=SCALES, num_classes=2)
    model = VAR(config)
    quantizer = MultiScaleQuantizer(TokenizerConfig(vocab=8, latent_channels=4, scales=SCALES))
    found = evaluate(
        model, config, quantizer, split, accelerator, cached=SCALES, images=7, batch=3  # type: ignore[arg-type]
    )  # fmt: skip
    assert asked == [0, 14, 28, 42, 57, 71, 85]
    assert found.loss_nK.shape == (7, 3)
    assert model.training


def test_one_image_has_no_standard_error(tmp_path: Path) -> None:
    record = Evaluation(np.ones((1, 3)), np.ones((1, 3)), SIZES).record()
    errors = [name for name in record if name.endswith("_se")]
    assert len(errors) == 4
    assert all(math.isnan(record[name]) for name in errors)
    folder = RunFolder(tmp_path)
    folder.append({"kind": "eval", "step": 1, **record})
    assert [folder.metrics()[0][name] for name in errors] == [None] * 4


def test_the_clock_leaves_out_pauses_and_the_first_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("scaling.clock.time.monotonic", lambda: now[0])
    clock = Clock(checkpoint_seconds=100.0)
    assert clock.steps_per_second is None
    now[0] = 50.0  # the warm-up
    assert clock.lap(1) == pytest.approx(1 / 50)
    with clock.paused("evaluation"):
        now[0] += 30
    now[0] += 2
    assert clock.lap(11) == pytest.approx(10 / 2)
    assert clock.steps_per_second == pytest.approx(5.0)
    assert not clock.checkpoint_due()
    now[0] = 101.0
    assert clock.checkpoint_due()
    clock.checkpointed()
    assert not clock.checkpoint_due()
