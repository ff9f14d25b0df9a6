"""``evaluate`` as a person calls it: one process or two, and what went wrong in one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import run_sweep
from scaling.records import RunFolder
from tests.scaling.test_validation import NUMBERS, run

__all__ = ["run"]  # the fixture


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where jobs of their own have their folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def evaluated(run: RunFolder, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run_sweep.main(["evaluate", str(run.path), "--threads", "1", *words]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found: dict[str, Any] = json.loads(shown.out)
    return found


def test_one_process_gives_what_two_give(
    run: RunFolder, capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    alone = evaluated(run, capsys, "--json", "--device", "cpu")
    assert {name: alone[name] for name in NUMBERS} == {
        name: run.metrics("eval")[-1][name] for name in NUMBERS
    }, "the run's own last numbers"
    device = "cpu" if torch.cuda.is_available() else "auto"  # which is another way to the CPU
    two = evaluated(run, capsys, "--json", "--processes", "2", "--device", device)
    assert two.keys() == alone.keys()
    for name in NUMBERS:
        assert two[name] == pytest.approx(alone[name], rel=1e-5), name
    assert two["eval_images"] == 90
    assert list(own_folder.iterdir()) == [], "nothing is left behind"


def test_what_a_person_can_remove_is_one_line_and_leaves_nothing(
    run: RunFolder, capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    words = ["--data.path", str(own_folder / "nowhere"), "--processes", "2", "--device", "cpu"]
    assert run_sweep.main(["evaluate", str(run.path), *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line
    assert list(own_folder.iterdir()) == []
    assert run_sweep.main(["evaluate", str(run.path), "--processes", "0"]) == 2
    assert "--processes must be at least 1" in capsys.readouterr().err
