"""Trunks and branches as a user runs them: by the records they cost half, and each run is the run alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scaling.records import RunFolder, list_runs

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = """
name: grid
depths: [1, 2]
lengths: [1, 2, 3, 4]
data: {source: photos, resolution: 16, train_images: 48, val_images: 16}
tokenizer:
  {vocab: 32, latent_channels: 4, channels: 32, multipliers: [1, 1, 1], res_blocks: 1, scales: [1, 2, 4]}
tokenizer_train:
  {steps: 6, batch: 8, warmup: 2, log_every: 2, checkpoint_every: 2, eval_images: 8, revive_every: 2}
train: {steps: 10, batch: 8, lr: 1.0e-3, precision: fp32, schedule: wsd, warmup_steps: 2}
evaluation: {points: 4, first: 0.1}
launch:
  {device: cpu, runs_at_once: 2, threads: 1, checkpoint_seconds: 0.0, log_every: 4, sampling: {images: 0}}
"""


def run_sweep(folder: Path, name: str, *options: str) -> str:
    recipe = folder / "grid.yaml"
    recipe.write_text(RECIPE)
    command = [sys.executable, str(REPOSITORY / "run_sweep.py"), name, str(recipe)]
    command += ["--root", str(folder / "runs"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(run: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in run.metrics()]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    output = run_sweep(folder, "run")
    assert "design: trunks and branches" in output
    return folder


@pytest.mark.slow
def test_by_the_records_a_grid_costs_half_of_its_runs_alone(grid: Path) -> None:
    runs = list_runs(grid / "runs" / "grid")
    assert len(runs) == 8
    recorded = [run.metrics("eval")[-1]["flops"] for run in runs]
    spent = [flops - run.shared()["flops"] for flops, run in zip(recorded, runs, strict=True)]
    assert sum(spent) / sum(recorded) <= 0.55
    plan = json.loads(run_sweep(grid, "plan", "--json"))
    assert [run["flops"] for run in plan["runs"]] == recorded
    assert [run["flops_spent"] for run in plan["runs"]] == spent
    assert plan["total"]["flops_to_do"] == 0
    assert not list((grid / "runs" / "grid").glob("*/branches")), "cleared once nobody needs them"
    report = (grid / "runs" / "grid" / "report" / "report.md").read_text()
    assert "by the records" in report
    assert "needs at least 3 distinct params, got 2" in report, "the surface says why it is not there"
    assert "everything is done already" in run_sweep(grid, "run")


@pytest.mark.slow
def test_a_branch_is_the_run_that_a_recipe_of_one_length_trains(grid: Path, tmp_path: Path) -> None:
    for shared in ("tokenizers", "tokens"):
        shutil.copytree(grid / "runs" / shared, tmp_path / "runs" / shared)
    run_sweep(tmp_path, "run", "--lengths", "2", "--depths", "1")
    (alone,) = list_runs(tmp_path / "runs" / "grid")
    branch = RunFolder(grid / "runs" / "grid" / alone.name)
    assert branch.shared()["step"] == 16
    assert alone.shared()["step"] == 0
    assert numbers(branch) == numbers(alone)
    mine, theirs = load_file(branch.weights), load_file(alone.weights)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
