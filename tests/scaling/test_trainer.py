"""Laws of a training run: resumed = unbroken, one process = two, micro-batches change rounding only."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file

from scaling import flops
from scaling.branches import ALONE, Sharing
from scaling.checkpoint import load_checkpoint
from scaling.clock import Clock
from scaling.config import ConfigError, LaunchConfig, RunConfig, SamplingConfig
from scaling.data.cache import open_cache
from scaling.process import DivergedError, Interrupted, JobProcess, cause_of, exit_code, one_line
from scaling.records import RunFolder
from scaling.tokenizer.vqvae import load_tokenizer
from scaling.trainer import make_accelerator, train
from tests.scaling import tiny

TIMES = {"images_per_second"}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision per process; a run of the product has a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.make_tokens(tmp_path_factory.mktemp("chain"))


def run(
    path: Path,
    chain: tuple[Path, Path],
    config: RunConfig,
    launch: LaunchConfig = tiny.LAUNCH,
    sharing: Sharing = ALONE,
) -> RunFolder:
    """Train in this process."""
    folder = tiny.make_run(path, config, launch)
    tokenizer = load_tokenizer(chain[1] / "tokenizer")
    train(folder, config, launch, open_cache(chain[0], tokenizer.content_hash), tokenizer, sharing)
    return folder


def numbers(folder: RunFolder) -> list[dict[str, Any]]:
    """All records without the times that no law holds for."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in folder.metrics()]


def assert_equal_within_rounding(one: RunFolder, other: RunFolder) -> None:
    """All records agree to 1e-4; errors are left out, since an argmax may flip on a rounding."""
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if not name.startswith("error"):
                expected = b[name] if isinstance(value, str) else pytest.approx(b[name], rel=1e-4)
                assert value == expected, name


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "final" / "weights.safetensors")


@pytest.fixture(scope="module")
def unbroken(chain: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("unbroken") / "run", chain, tiny.run_config())


def test_a_run_leaves_its_records(unbroken: RunFolder) -> None:
    config = tiny.run_config()
    evaluations = unbroken.metrics("eval")
    assert [r["step"] for r in evaluations] == list(config.eval_steps)
    last = evaluations[-1]
    assert last["tokens"] == 20 * 8 * 5
    assert last["flops"] == 20 * 8 * flops.train_flops(config.model)
    assert last["params"] == flops.params(config.model)
    assert last["unique_tokens"] == 30 * 2 * 5  # two crops of every image
    assert evaluations[0]["unique_tokens"] == evaluations[0]["tokens"] == 2 * 8 * 5
    assert last["epochs"] == pytest.approx(160 / 30)
    assert len(last["loss_scales"]) == 2
    assert last["loss_avg"] == pytest.approx((last["loss_scales"][0] + 4 * last["loss_scales"][1]) / 5)
    assert last["loss_last"] == last["loss_scales"][-1]
    assert last["eval_images"] == 10
    assert last["loss_avg_se"] > 0
    status = unbroken.status()
    assert status["state"] == "done"
    assert status["step"] == status["total_steps"] == 20
    assert status["images_per_second"] > 0
    assert status["peak_memory"] > 0
    assert (unbroken.path / "samples.png").stat().st_size > 0
    costs = unbroken.costs()
    assert costs == flops.costs(config)
    assert last["flops"] == 160 * sum(costs["flops_per_image"].values())
    assert last["params_total"] == sum(costs["params"].values())


def test_training_lowers_the_loss(chain: tuple[Path, Path], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", chain, tiny.run_config(steps=200))
    losses = [r["loss_avg"] for r in folder.metrics("train")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


@pytest.mark.parametrize("stops", [(1,), (7,), (3, 4, 19)])
def test_resumed_equals_unbroken_bit_for_bit(
    stops: tuple[int, ...],
    unbroken: RunFolder,
    chain: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stop in stops:
        asked: list[int] = []

        def should_stop(self: JobProcess, at: int = stop, asked: list[int] = asked) -> bool:
            asked.append(1)
            return load_step(tmp_path / "run") + len(asked) >= at

        monkeypatch.setattr(JobProcess, "should_stop", should_stop)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", chain, tiny.run_config())
        assert RunFolder(tmp_path / "run").status()["state"] == "interrupted"
    monkeypatch.undo()
    folder = run(tmp_path / "run", chain, tiny.run_config())
    assert numbers(folder) == numbers(unbroken)
    for name, value in weights(unbroken).items():
        assert torch.equal(weights(folder)[name], value), name


def load_step(path: Path) -> int:
    checkpoint = load_checkpoint(path / "checkpoints")
    return 0 if checkpoint is None else checkpoint.step


def test_a_finished_run_started_again_changes_nothing(unbroken: RunFolder, chain: tuple[Path, Path]) -> None:
    before = numbers(unbroken)
    run(unbroken.path, chain, tiny.run_config())
    assert numbers(unbroken) == before


def test_sigkill_and_restart_end_with_the_same_numbers(
    unbroken: RunFolder, chain: tuple[Path, Path], tmp_path: Path
) -> None:
    launch = dataclasses.replace(tiny.LAUNCH, checkpoint_seconds=0.0)
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(), launch)
    process = start(folder, chain)
    while not list(folder.checkpoints.glob("step-*")):
        assert process.poll() is None, "ended before its first checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(folder, chain).wait() == 0
    assert numbers(folder) == numbers(unbroken)


def start(
    folder: RunFolder,
    chain: tuple[Path, Path],
    prefix: list[str] | None = None,
    more: Sequence[str] = (),
) -> subprocess.Popen:
    command = [*(prefix or [sys.executable]), "-m", "scaling.trainer", str(folder.path)]
    command += ["--tokens", str(chain[0]), "--tokenizer", str(chain[1]), *more]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_micro_batches_change_only_rounding(
    unbroken: RunFolder, chain: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = run(tmp_path / "run", chain, tiny.run_config(), dataclasses.replace(tiny.LAUNCH, micro_batch=3))
    assert_equal_within_rounding(folder, unbroken)


ENDING = """
import gc, sys
import accelerate
import scaling.trainer as trainer
from scaling.process import run_job
from torch.nn.parallel import DistributedDataParallel
ended = accelerate.Accelerator.end_training
def end_training(self):
    assert self.num_processes == 2
    assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
    ended(self)
accelerate.Accelerator.end_training = end_training
sys.exit(run_job(trainer.main))
"""


def test_the_wrapped_model_is_gone_before_the_process_group(chain: tuple[Path, Path], tmp_path: Path) -> None:
    """Else its end can wait for a thread of the group that waits for it."""
    launch = dataclasses.replace(tiny.LAUNCH, processes=2)
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(steps=2), launch)
    (tmp_path / "ending.py").write_text(ENDING)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(tmp_path / "ending.py"), str(folder.path)]
    command += ["--tokens", str(chain[0]), "--tokenizer", str(chain[1])]
    path = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    assert subprocess.run(command, env=environment, check=False, timeout=240).returncode == 0


def test_two_processes_equal_one(unbroken: RunFolder, chain: tuple[Path, Path], tmp_path: Path) -> None:
    launch = dataclasses.replace(tiny.LAUNCH, processes=2)
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(), launch)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    assert start(folder, chain, launcher).wait(120) == 0
    assert folder.status()["processes"] == 2
    assert_equal_within_rounding(folder, unbroken)


def test_two_processes_leave_together_and_go_on(chain: tuple[Path, Path], tmp_path: Path) -> None:
    """Asked to leave, they agree on a step and save it, before their launcher kills them."""
    launch = dataclasses.replace(tiny.LAUNCH, processes=2)
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(steps=10**6), launch)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    process = start(folder, chain, launcher)
    while not folder.metrics("train"):
        assert process.poll() is None, "ended before its first line"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert folder.status()["state"] == "interrupted"
    assert load_step(folder.path) >= folder.metrics()[-1]["step"]


def test_no_pictures_may_be_asked_for(chain: tuple[Path, Path], tmp_path: Path) -> None:
    launch = dataclasses.replace(tiny.LAUNCH, sampling=SamplingConfig(images=0))
    folder = run(tmp_path / "run", chain, tiny.run_config(steps=1), launch)
    assert folder.status()["state"] == "done"
    assert not (folder.path / "samples.png").exists()


def test_a_refusal_before_training_is_recorded(chain: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tiny.make_run(tmp_path / "run", tiny.run_config())
    process = start(folder, (tmp_path / "nothing", chain[1]))
    assert process.wait() == 2
    status = folder.status()
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "no token cache there" in status["error"]


def test_bf16_trains(chain: tuple[Path, Path], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", chain, tiny.run_config(precision="bf16", steps=4))
    assert folder.metrics("eval")[-1]["loss_avg"] > 0


def test_masked_attention_changes_only_rounding(
    unbroken: RunFolder, chain: tuple[Path, Path], tmp_path: Path
) -> None:
    assert unbroken.status()["attention"] == "blockwise"  # what auto takes on a CPU
    launch = dataclasses.replace(tiny.LAUNCH, attention="masked")
    folder = run(tmp_path / "run", chain, tiny.run_config(), launch)
    assert_equal_within_rounding(folder, unbroken)


def test_a_loss_that_is_no_number_fails_the_run(chain: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"loss became nan at step"):
        run(tmp_path / "run", chain, tiny.run_config(lr=1e30, clip=1e30))
    status = RunFolder(tmp_path / "run").status()
    assert status["state"] == "failed"
    assert "nan" in status["error"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_stops_a_run_in_one_line_and_room_lets_it_go_on_to_the_same_numbers(
    unbroken: RunFolder, chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2560k", "varscale-test", str(disk)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Clock, "checkpoint_due", lambda self: True)
            with pytest.raises((OSError, SafetensorError)) as full:
                run(disk / "run", chain, tiny.run_config())
        AcceleratorState._reset_state(reset_partial_state=True)
        assert (cause_of(full.value), exit_code(full.value)) == ("disk", 2)
        assert "the disk is full" in one_line(full.value)
        folder = RunFolder(disk / "run")
        reached = load_step(folder.path)
        assert 0 < reached < 20
        assert folder.metrics() is not None
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run(disk / "run", chain, tiny.run_config())
        assert numbers(folder) == numbers(unbroken)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_tokens_of_another_tokenizer_are_refused_on_resume(chain: tuple[Path, Path], tmp_path: Path) -> None:
    run(tmp_path / "run", chain, tiny.run_config(steps=2))
    other = tiny.make_tokens(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="was trained on tokens of tokenizer"):
        run(tmp_path / "run", other, tiny.run_config(steps=2))


def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        make_accelerator(tiny.run_config(precision="fp16"), tiny.LAUNCH)


def test_a_batch_smaller_than_the_processes_is_refused(chain: tuple[Path, Path]) -> None:
    from types import SimpleNamespace

    from scaling.training_step import Batches

    accelerator = SimpleNamespace(num_processes=9, process_index=0, device=torch.device("cpu"))
    split = open_cache(chain[0]).split("train")
    with pytest.raises(ConfigError, match=r"train\.batch 8 is smaller than the 9 processes"):
        Batches(tiny.run_config(), tiny.LAUNCH, accelerator, split, RunFolder(chain[0]))  # type: ignore[arg-type]


BLIND = """
import os, sys
import scaling.trainer as trainer
from scaling.process import run_job
if os.environ["RANK"] == "1":
    trainer.load_checkpoint = lambda folder: None
sys.exit(run_job(trainer.main))
"""


def test_two_processes_that_see_other_checkpoints_do_not_train(
    chain: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = run(tmp_path / "run", chain, tiny.run_config(steps=2))
    before = folder.metrics()
    (tmp_path / "blind.py").write_text(BLIND)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(tmp_path / "blind.py"), str(folder.path)]
    command += ["--tokens", str(chain[0]), "--tokenizer", str(chain[1])]
    path = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment)
    try:
        assert process.wait(60) != 0
    finally:
        process.terminate()  # the launcher takes its processes with it
        process.wait(60)
    status = folder.status()
    # No refusal, which nobody would try again: the file system may be late.
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "different checkpoints (steps 2, 0 by process)" in status["error"]
    assert folder.metrics() == before
