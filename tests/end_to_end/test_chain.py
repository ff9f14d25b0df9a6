"""The whole chain as a user runs it: images, tokenizer, tokens, runs, report; and killed at any stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling.records import RunFolder, list_runs

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = """
name: tiny
depths: [1, 2]
data: {source: photos, resolution: 16, train_images: 48, val_images: 16}
tokenizer:
  {vocab: 32, latent_channels: 4, channels: 32, multipliers: [1, 1, 1], res_blocks: 1, scales: [1, 2, 4]}
tokenizer_train:
  {steps: 6, batch: 8, warmup: 2, log_every: 2, checkpoint_every: 2, eval_images: 8, revive_every: 2}
train: {steps: 12, batch: 8, lr: 1.0e-3, precision: fp32}
evaluation: {points: 4}
launch:
  {device: cpu, runs_at_once: 2, threads: 1, checkpoint_seconds: 0.0, log_every: 4, sampling: {images: 4}}
"""
TIMES = {"images_per_second", "seconds"}


def command(folder: Path, name: str = "run", *options: str) -> list[str]:
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    script = str(REPOSITORY / "run_sweep.py")
    return [sys.executable, script, name, str(recipe), "--root", str(folder / "runs"), *options]


def finish(folder: Path, name: str = "run", *options: str) -> str:
    """Run to the end; the output. Fails with it when the exit code is not 0."""
    done = subprocess.run(command(folder, name, *options), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every record of tokenizer and runs, without times."""
    found = [
        *(folder / "runs" / "tokenizers").iterdir(),
        *(r.path for r in list_runs(folder / "runs" / "tiny")),
    ]
    return {
        path.name: [{k: v for k, v in r.items() if k not in TIMES} for r in RunFolder(path).metrics()]
        for path in found
    }


def token_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "runs" / "tokens").glob("*/*.bin")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    finish(folder)
    return folder


@pytest.mark.slow
def test_the_chain_leaves_what_it_promises(unbroken: Path) -> None:
    sweep = unbroken / "runs" / "tiny"
    for name in ("report.html", "report.md", "fits.json"):
        assert (sweep / "report" / name).stat().st_size > 0
    page = (sweep / "report" / "report.html").read_text()
    assert "file://" not in page
    assert str(REPOSITORY) not in page
    tokenizer = next((unbroken / "runs" / "tokenizers").iterdir())
    facts = json.loads((tokenizer / "tokenizer" / "tokenizer.json").read_text())["facts"]
    assert len(facts["usage_scales"]) == 3
    assert (tokenizer / "reconstructions.png").exists()
    runs = list_runs(sweep)
    assert [r.config()["model"]["depth"] for r in runs] == [1, 2]
    for run in runs:
        assert run.status()["state"] == "done"
        assert (run.path / "samples.png").exists()


@pytest.mark.slow
def test_a_second_run_trains_nothing(unbroken: Path) -> None:
    before = numbers(unbroken)
    assert "everything is done already" in finish(unbroken)
    assert numbers(unbroken) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizers", "tokens"])
def test_what_was_made_from_other_images_is_not_taken_for_these(
    unbroken: Path, tmp_path: Path, kind: str
) -> None:
    """Where images lie is no part of a config; what they are must still be the same."""
    shutil.copytree(unbroken / "runs", tmp_path / "runs", symlinks=True)
    (folder,) = (tmp_path / "runs" / kind).iterdir()
    (folder / "data.json").write_text('{"fingerprint": "of other photographs"}')
    sweep = tmp_path / "runs" / "tiny" / "sweep.json"
    before = sweep.read_bytes()
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "made from other images" in done.stderr
    assert "--data.name" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sweep.read_bytes() == before


def test_pictures_can_be_drawn_from_a_finished_run(unbroken: Path) -> None:
    grid = Path(finish(unbroken, "sample", "--depth", "2", "--count", "2", "--classes", "1").strip())
    assert len(list(grid.parent.glob("*.png"))) == 3


@pytest.mark.slow
def test_status_and_plan_know_that_all_is_done(unbroken: Path) -> None:
    states = json.loads(finish(unbroken, "status", "--json"))
    assert {job["state"] for job in states.values()} == {"done"}
    plan = json.loads(finish(unbroken, "plan", "--json"))
    assert plan["total"]["flops_to_do"] == 0
    for run in plan["runs"]:
        folder = RunFolder(unbroken / "runs" / "tiny" / run["run"])
        last = folder.metrics("eval")[-1]
        assert (run["flops"], run["tokens"]) == (last["flops"], last["tokens"]), (
            "planned is recorded, exactly"
        )
        assert set(folder.status()["seconds"]) == {"train", "evaluation", "checkpoints", "samples"}
    recorded = [r.metrics("eval")[-1]["flops"] for r in list_runs(unbroken / "runs" / "tiny")]
    assert [run["flops"] for run in plan["runs"]] == recorded
    assert plan["total"]["seconds_to_do"] == 0


@pytest.mark.slow
def test_a_damaged_shard_is_found_and_encoded_again(unbroken: Path) -> None:
    whole = token_bytes(unbroken)
    shard = next((unbroken / "runs" / "tokens").glob("*/train-00000.bin"))
    middle = len(whole[shard.name]) // 2
    shard.write_bytes(whole[shard.name][:middle] + b"\xff\xff" + whole[shard.name][middle + 2 :])
    finish(unbroken, "tokenize")
    assert token_bytes(unbroken) == whole


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    finish(folder, "run", "--launch.processes", "2", "--depths", "1")
    return folder


@pytest.mark.slow
def test_several_processes_go_through_the_launcher(two_processes: Path, tmp_path: Path) -> None:
    two = ("--launch.processes", "2", "--depths", "1", "--tokenizer-train.batch", "3")
    refused = subprocess.run(command(tmp_path, "run", *two), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "tokenizer_train.batch 3 cannot be shared evenly by 2 processes" in refused.stdout
    (run,) = list_runs(two_processes / "runs" / "tiny")
    assert (run.status()["state"], run.status()["processes"]) == ("done", 2)


@pytest.mark.slow
def test_two_machines_leave_the_records_of_two_processes(two_processes: Path, tmp_path: Path) -> None:
    for name in ("tokenizers", "tokens"):
        shutil.copytree(two_processes / "runs" / name, tmp_path / "runs" / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    share = ("--depths", "1", "--launch.runs-at-once", "1", "--launch.machines", "2")
    share += ("--launch.main-address", "127.0.0.1", "--launch.main-port", str(port))
    launchers = [
        subprocess.Popen(
            command(tmp_path, "run", *share, "--launch.machine-rank", str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    (run,) = list_runs(tmp_path / "runs" / "tiny")
    assert (run.status()["state"], run.status()["processes"], run.status()["attempt"]) == ("done", 2, 1)
    assert numbers(tmp_path) == numbers(two_processes)
    assert "report: " in outputs[0]
    assert "report: " not in outputs[1]
    assert f"machine 1: joins {run.name}" in outputs[1]


def has_checkpoint(pattern: str) -> Callable[[Path], bool]:
    return lambda folder: any((folder / "runs").glob(pattern))


@pytest.mark.slow
def test_killed_at_every_stage_it_ends_with_the_same_numbers(unbroken: Path, tmp_path: Path) -> None:
    instants = [
        has_checkpoint("tokenizers/*/checkpoints/step-*"),
        has_checkpoint("tokens/*/train-00000.bin"),
        has_checkpoint("tiny/*/checkpoints/step-*"),
    ]
    for reached in instants:
        launcher = subprocess.Popen(
            command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not reached(tmp_path):
            assert time.monotonic() < deadline, "the stage was never reached"
            assert launcher.poll() is None, "the sweep ended before it could be killed"
            time.sleep(0.005)
        # The launcher dies without a word; its jobs live on as orphans until they notice.
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    finish(tmp_path)
    assert token_bytes(tmp_path) == token_bytes(unbroken)
    assert numbers(tmp_path) == numbers(unbroken)


@pytest.mark.slow
def test_two_launchers_at_once_train_every_run_once(unbroken: Path, tmp_path: Path) -> None:
    launchers = [
        subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    folders = [RunFolder(p.parent) for p in (tmp_path / "runs").glob("*/*/status.json")]
    attempts = {
        folder.name: folder.status()["attempt"] for folder in folders if "tokens" not in folder.path.parts
    }
    assert len(attempts) == 3
    assert set(attempts.values()) == {1}
    assert numbers(tmp_path) == numbers(unbroken)
