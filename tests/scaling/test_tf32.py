"""Convolutions in TF32 round so coarsely that a token, an argmin, can be another one on another device: every
way to a token switches them off."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import scaling.data.encode
import scaling.fidelity.job
import scaling.tokenizer.training
import scaling.trainer
from scaling.config import ConfigError, TokenizerRunConfig, TokenizerTrainConfig, to_dict
from scaling.families.registry import build
from scaling.pretrained import filled
from scaling.records import RecordsError, RunFolder, write_json
from scaling.requests import EvaluateRequest, FidelityJob, FidelityRequest
from scaling.validation import validate
from tests.scaling import tiny


def _tokenizer_run(root: Path) -> Path:
    """A tokenizer's folder whose images are not there."""
    data = dataclasses.replace(tiny.DATA, source="folder", path=str(root / "nowhere"), resolution=16)
    tokenizer = dataclasses.replace(tiny.TOKENIZER, scales=(1, 4))
    config = TokenizerRunConfig(data, tokenizer, TokenizerTrainConfig())
    RunFolder(root / "tok").create(to_dict(config))
    write_json(root / "tok" / "launch.json", to_dict(tiny.LAUNCH))
    return root / "tok"


def _train(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.make_run(root / "run", tiny.run_config()).path
    words = ["trainer", str(folder), "--tokens", str(root), "--tokenizer", str(root)]
    monkeypatch.setattr(sys, "argv", words)
    scaling.trainer.main()


def _encode(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling.data.encode.encode_folder(RunFolder(_tokenizer_run(root)), root / "nowhere")


def _train_tokenizer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling.tokenizer.training.main([str(_tokenizer_run(root))])


def _evaluate(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate(str(root / "nowhere.pth"), EvaluateRequest(), lambda done, total: None)


def _fidelity(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = FidelityRequest(extractor="x:y", images=1, device="cpu")
    write_json(root / "launch.json", to_dict(FidelityJob(request, (str(root / "nowhere"),))))
    scaling.fidelity.job.main([str(root / "launch.json")])


@pytest.mark.parametrize("way", [_train, _encode, _train_tokenizer, _evaluate, _fidelity])
def test_a_job_switches_it_off_before_it_computes(
    way: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them stop at the first thing that is not there, which comes after."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    try:
        with pytest.raises((ConfigError, RecordsError)):
            way(tmp_path, monkeypatch)
        assert torch.backends.cudnn.allow_tf32 is False
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_is_opened_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    config = tiny.run_config().model
    filled(config, build(config).state_dict(), "cpu")
    assert torch.backends.cudnn.allow_tf32 is False
