"""Weights along the way: at the steps asked for, the same after a kill, and no part of old runs' hashes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scaling.config import ConfigError, EvaluationConfig, RunConfig, content_hash, identity
from scaling.data.cache import open_cache
from scaling.process import Interrupted, JobProcess
from scaling.tokenizer.vqvae import load_tokenizer
from scaling.trainer import train
from tests.scaling import tiny
from tests.scaling.test_trainer import fresh_accelerate, run  # noqa: F401  # a fixture


def config(*shares: float) -> RunConfig:
    base = tiny.run_config(steps=8)
    return dataclasses.replace(base, evaluation=dataclasses.replace(base.evaluation, snapshots=shares))


def test_a_snapshot_is_the_weights_of_its_step(tmp_path: Path) -> None:
    chain = tiny.make_tokens(tmp_path)
    folder = run(tmp_path / "run", chain, config(0.3, 0.5))
    assert config(0.3, 0.5).snapshot_steps == {0.3: 2, 0.5: 4}
    files = sorted((folder.path / "snapshots").iterdir())
    assert files == [folder.snapshot(2), folder.snapshot(4)]
    plain = run(tmp_path / "plain", chain, config())
    assert not (plain.path / "snapshots").exists()
    final, other = load_file(folder.weights), load_file(plain.weights)
    assert all(torch.equal(final[name], other[name]) for name in other), "looking changes nothing"
    assert not torch.equal(load_file(files[0])["head.to_vocab.weight"], final["head.to_vocab.weight"])


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_killed_and_resumed_leaves_the_same_snapshots(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = tiny.make_tokens(tmp_path)
    unbroken = run(tmp_path / "unbroken", chain, config(0.5))
    folder, asked = tiny.make_run(tmp_path / "run", config(0.5)), 0

    def stops(job: JobProcess) -> bool:
        nonlocal asked
        asked += 1
        return asked == stop

    tokenizer = load_tokenizer(chain[1] / "tokenizer")
    cache = open_cache(chain[0], tokenizer.content_hash)
    with monkeypatch.context() as patch:
        patch.setattr(JobProcess, "should_stop", stops)
        with pytest.raises(Interrupted):
            train(folder, config(0.5), tiny.LAUNCH, cache, tokenizer)
    assert folder.snapshot(4).exists() == (stop >= 4)
    train(folder, config(0.5), tiny.LAUNCH, cache, tokenizer)
    assert folder.snapshot(4).read_bytes() == unbroken.snapshot(4).read_bytes()


def test_hashes_of_runs_without_snapshots_stay() -> None:
    assert "snapshots" not in identity(config())["evaluation"]
    assert content_hash(config(0.5)) != content_hash(config())
    for shares in ((0.5, 0.2), (0.0,), (1.0,), (0.2, 0.2)):
        with pytest.raises(ConfigError, match="snapshots are growing shares"):
            EvaluationConfig(snapshots=shares)
