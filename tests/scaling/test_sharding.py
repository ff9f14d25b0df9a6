"""A run divided among its processes: one process's numbers, one format of checkpoints, one way to go on."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from scaling import flops
from scaling.agreement import Agreement
from scaling.branches import Sharing
from scaling.checkpoint import load_checkpoint
from scaling.config import ConfigError, Family, ModelConfig
from scaling.data.cache import open_cache
from scaling.process import Interrupted
from scaling.records import RunFolder, read_json
from scaling.tokenizer.vqvae import load_tokenizer
from scaling.trainer import make_accelerator, train
from tests.scaling import tiny
from tests.scaling.test_trainer import assert_equal_within_rounding, numbers, run, weights

REPOSITORY = Path(__file__).resolve().parents[2]
TWO = dataclasses.replace(tiny.LAUNCH, processes=2)
SHARD = dataclasses.replace(TWO, shard=True)
Chain = tuple[Path, Path]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return tiny.make_tokens(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def alone(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One process."""
    return run(tmp_path_factory.mktemp("alone") / "run", chain, tiny.run_config())


@pytest.fixture(scope="module")
def sharded(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two processes, unbroken."""
    folder = tiny.make_run(tmp_path_factory.mktemp("sharded") / "run", tiny.run_config(), SHARD)
    assert together(folder, chain).wait(120) == 0
    return folder


def together(folder: RunFolder, chain: Chain, script: Path | None = None, *more: str) -> subprocess.Popen:
    """Two processes on a run; of another main program, if given."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(script)] if script else ["-m", "scaling.trainer"]
    command += [str(folder.path), "--tokens", str(chain[0]), "--tokenizer", str(chain[1]), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment)


def assert_near(one: RunFolder, other: RunFolder) -> None:
    """Weights agree to 1e-4 of a tensor's largest number, or 1e-6."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-4 * float(value.abs().max()) + 1e-6)


def assert_same_bits(one: RunFolder, other: RunFolder) -> None:
    assert numbers(one) == numbers(other)
    assert all(torch.equal(weights(one)[name], value) for name, value in weights(other).items())


def test_two_sharded_processes_are_one_process_within_rounding(sharded: RunFolder, alone: RunFolder) -> None:
    """Losses, gradient norms before clipping, evaluations, final weights; checkpoints of one form."""
    assert_equal_within_rounding(sharded, alone)
    assert_near(sharded, alone)
    assert (sharded.path / "samples.png").stat().st_size > 0
    kept = [load_checkpoint(folder.checkpoints) for folder in (sharded, alone)]
    assert kept[0] is not None
    assert kept[1] is not None
    for group, tensors in kept[1].tensors.items():
        assert {n: t.shape for n, t in kept[0].tensors[group].items()} == {
            n: t.shape for n, t in tensors.items()
        }


INSIDE = """
import os, sys
import torch
import scaling.trainer as trainer
from scaling.process import run_job
from torch.distributed.tensor import DTensor
made = trainer.State.resume
def resume(self, *given):
    found = made(self, *given)
    cut = [p for p in self.bare.parameters()]
    assert all(isinstance(p, DTensor) for p in cut)
    held, full = sum(p.to_local().numel() for p in cut), sum(p.numel() for p in cut)
    assert 0.4 < held / full < 0.6, (held, full)
    return found
trainer.State.resume = resume
stepped = trainer.train_step
def train_step(state, *given):
    sums = stepped(state, *given)
    assert type(sums["grad_norm"]) is torch.Tensor
    moments = [m for s in state.optimizer.optimizer.state.values() for m in s.values() if m.ndim]
    assert moments and all(isinstance(m, DTensor) for m in moments)
    return sums
trainer.train_step = train_step
sys.exit(run_job(trainer.main))
"""


@pytest.mark.parametrize("family", ["flexvar-mamba", "raster"])
def test_every_family_in_pieces_with_micro_batches_and_recomputing(family: Family, tmp_path: Path) -> None:
    """Each process holds half of the weights and moments; gradients are clipped by the norm of all."""
    chain = tiny.make_tokens(tmp_path, config=tiny.SCALABLE)
    config = tiny.run_config(family, steps=8, clip=0.1)
    one = run(tmp_path / "alone", chain, config)
    assert any(line["grad_norm"] > 0.1 for line in one.metrics("train")), "something is clipped"
    launch = dataclasses.replace(SHARD, micro_batch=2, recompute_activations=True)
    folder = tiny.make_run(tmp_path / "run", config, launch)
    (tmp_path / "inside.py").write_text(INSIDE)
    assert together(folder, chain, tmp_path / "inside.py").wait(120) == 0
    assert_equal_within_rounding(folder, one)
    assert_near(folder, one)


def stopped(folder: RunFolder, chain: Chain) -> None:
    """A run that leaves after five steps."""
    script = folder.path.parent / f"{folder.name}.py"
    script.write_text(STOP)
    assert together(folder, chain, script).wait(120) != 0
    checkpoint = load_checkpoint(folder.checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 5
    assert folder.status()["state"] == "interrupted"


STOP = """
import sys
import scaling.trainer as trainer
from scaling.agreement import Agreement
from scaling.process import run_job
Agreement.ask = lambda self, done, leave, due: (done == 5, False)
sys.exit(run_job(trainer.main))
"""


def test_a_sharded_run_goes_on_in_one_process(alone: RunFolder, chain: Chain, tmp_path: Path) -> None:
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(), SHARD)
    stopped(folder, chain)
    assert run(folder.path, chain, tiny.run_config()).status()["state"] == "done"
    assert_equal_within_rounding(folder, alone)
    assert_near(folder, alone)


def test_a_run_of_one_process_goes_on_sharded(
    alone: RunFolder, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Agreement, "ask", lambda self, done, leave, due: (done == 5, False))
        with pytest.raises(Interrupted):
            run(tmp_path / "run", chain, tiny.run_config())
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(), SHARD)
    assert together(folder, chain).wait(120) == 0
    assert_equal_within_rounding(folder, alone)
    assert_near(folder, alone)


def test_killed_and_started_again_is_unbroken_bit_for_bit(
    sharded: RunFolder, chain: Chain, tmp_path: Path
) -> None:
    launch = dataclasses.replace(SHARD, checkpoint_seconds=0.0)
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(), launch)
    process = together(folder, chain)
    while not list(folder.checkpoints.glob("step-*")):
        assert process.poll() is None, "ended before its first checkpoint"
        time.sleep(0.01)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.wait(60)
    assert folder.status()["state"] != "done"
    assert together(folder, chain).wait(120) == 0
    assert_same_bits(folder, sharded)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


SHORT = """
import os, sys
import torch
import scaling.trainer as trainer
from scaling import training_step
from scaling.process import run_job
real, calls = training_step._loss, 0
def loss(state, part, scales):
    global calls
    found = real(state, part, scales)
    calls += 1
    if os.environ["RANK"] == "1" and len(part[0]) > 2 and calls > {after}:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return found
training_step._loss = loss
sys.exit(run_job(trainer.main))
"""


@pytest.mark.parametrize("after", [0, 4])
def test_out_of_memory_ends_the_job_and_the_next_takes_less(
    after: int, alone: RunFolder, chain: Chain, tmp_path: Path
) -> None:
    """In the rehearsal or in a step, of one process of two: the other waits in a layer, and is ended."""
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(), SHARD)
    script = tmp_path / "short.py"
    script.write_text(SHORT.format(after=after))
    assert together(folder, chain, script).wait(120) != 0
    status = folder.status()
    assert (status["state"], status["cause"]) == ("failed", "memory")
    assert read_json(folder.path / "memory.json")["micro_batch"] == 2
    assert together(folder, chain, script).wait(120) == 0
    assert folder.status()["micro_batch"] == 2
    assert_equal_within_rounding(folder, alone)


def test_what_cannot_be_divided_is_refused(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch\.shard is not made for precision fp16"):
        make_accelerator(tiny.run_config(precision="fp16"), SHARD)
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(batch=7), SHARD)
    assert together(folder, chain).wait(120) != 0
    assert "train.batch 7 is not a multiple of 2" in folder.status()["error"]


def test_a_trunk_in_pieces_leaves_snapshots_and_what_branches_start_from(
    chain: Chain, tmp_path: Path
) -> None:
    longer, short = (tiny.run_config(schedule="wsd", warmup_steps=2, steps=steps) for steps in (20, 10))
    evaluation = dataclasses.replace(longer.evaluation, snapshots=(0.2,))
    longer = dataclasses.replace(longer, evaluation=evaluation)
    trunk = tiny.make_run(tmp_path / "trunk", longer, SHARD)
    assert together(trunk, chain, None, "--leave", "8").wait(120) == 0
    plain = run(tmp_path / "plain", chain, longer)
    assert_equal_within_rounding(trunk, plain)
    mine, theirs = (load_file(folder.snapshot(4)) for folder in (trunk, plain))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = run(tmp_path / "alone", chain, short)
    AcceleratorState._reset_state(reset_partial_state=True)
    branch = tiny.make_run(tmp_path / "branch", short)
    tokenizer = load_tokenizer(chain[1] / "tokenizer")
    train(branch, short, tiny.LAUNCH, open_cache(chain[0]), tokenizer, Sharing(trunk))
    assert branch.shared()["step"] == 8
    assert_equal_within_rounding(branch, alone)


POISON = """
import math, os, sys
import scaling.trainer as trainer
from scaling.agreement import Agreement
from scaling.process import run_job
real = trainer.train_step
def train_step(state, batches, step, scales):
    sums = real(state, batches, step, scales)
    if step == 4 and os.environ["RANK"] == "1":
        state.names["head.to_vocab.weight"].to_local().data[0, 0] = math.nan
    return sums
trainer.train_step = train_step
Agreement.ask = lambda self, done, leave, due: (False, done in (4, 5))
sys.exit(run_job(trainer.main))
"""


def test_a_number_that_is_none_in_one_slice_is_found_by_all(chain: Chain, tmp_path: Path) -> None:
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(), SHARD)
    (tmp_path / "poison.py").write_text(POISON)
    assert together(folder, chain, tmp_path / "poison.py").wait(120) != 0
    status = folder.status()
    assert (status["state"], status["cause"]) == ("failed", "diverged")
    assert "after step 5 model/head.to_vocab.weight holds numbers that are not finite" in status["error"]
    checkpoint = load_checkpoint(folder.checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 4


def test_in_bf16_it_is_two_unsharded_processes(chain: Chain, tmp_path: Path) -> None:
    """The same casts in the same places."""
    config = tiny.run_config(steps=6, precision="bf16", clip=1e9)
    folders = [tiny.make_run(tmp_path / f"run{i}", config, launch) for i, launch in enumerate((SHARD, TWO))]
    for folder in folders:
        assert together(folder, chain).wait(120) == 0
    assert_equal_within_rounding(*folders)
    assert_near(*folders)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_divides_what_is_divided(precision: str) -> None:
    model = ModelConfig.from_depth(24)

    def bytes_of(shards: int, micro_batch: int = 1) -> int:
        return flops.train_memory(model, micro_batch, precision, shards=shards)

    total = flops.params_total(model)
    assert bytes_of(2) - bytes_of(4) == 16 * total // 4
    assert bytes_of(8) < bytes_of(1) / 2
    assert bytes_of(10**6) > 4 * total, "an evaluation has all weights"
    assert bytes_of(8, 65) - bytes_of(8, 64) == bytes_of(1, 65) - bytes_of(1, 64), (
        "activations are not divided"
    )
