"""Runs that share their stable phase are, bit for bit, the runs that they would be alone."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaling.branches import Sharing
from scaling.checkpoint import load_checkpoint
from scaling.config import ConfigError, EvaluationConfig, RunConfig, TrainConfig, content_hash, identity
from scaling.data.cache import open_cache
from scaling.flops import spent
from scaling.process import Interrupted, JobProcess
from scaling.records import RunFolder
from scaling.schedule import learning_rate
from scaling.tokenizer.vqvae import load_tokenizer
from scaling.trainer import train
from tests.scaling import tiny
from tests.scaling.test_trainer import fresh_accelerate, numbers, start, weights  # noqa: F401

Chain = tuple[Path, Path]


def config(steps: int, **more: object) -> RunConfig:
    settings: dict[str, object] = {"schedule": "wsd", "warmup_steps": 2, "steps": steps}
    return tiny.run_config(**settings | more)


def run(path: Path, chain: Chain, wanted: RunConfig, sharing: Sharing) -> RunFolder:
    folder = tiny.make_run(path, wanted)
    tokenizer = load_tokenizer(chain[1] / "tokenizer")
    cache = open_cache(chain[0], tokenizer.content_hash)
    train(folder, wanted, tiny.LAUNCH, cache, tokenizer, sharing)
    return folder


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    assert numbers(one) == numbers(other)
    mine, theirs = weights(one), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return tiny.make_tokens(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def trunk(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """20 steps, with what runs of 5 and 10 need."""
    leave = frozenset({config(5).stable_steps, config(10).stable_steps})
    return run(tmp_path_factory.mktemp("trunk") / "trunk", chain, config(20), Sharing(leave=leave))


@pytest.fixture(scope="module")
def alone(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("alone") / "run", chain, config(10), Sharing())


def copy_of(trunk: RunFolder, path: Path, *steps: int) -> RunFolder:
    """A trunk's folder with these of its checkpoints."""
    copied = RunFolder(path / "trunk")
    for step in steps:
        for file in trunk.branch(step).iterdir():
            target = copied.branch(step) / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return copied


# -- the schedule ------------------------------------------------------------------------------


@given(
    short=st.integers(10, 2000),
    longer=st.integers(0, 2000),
    warmup=st.integers(0, 5),
    decay=st.floats(0.01, 0.5),
    points=st.integers(2, 40),
)
def test_until_its_decay_a_run_is_any_longer_one(
    short: int, longer: int, warmup: int, decay: float, points: int
) -> None:
    one, other = (config(n, warmup_steps=warmup, decay=decay) for n in (short, short + longer))
    stable = one.stable_steps
    assert stable <= other.stable_steps
    rates = [[learning_rate(c.train, step, c.total_steps) for step in range(stable)] for c in (one, other)]
    assert rates[0] == rates[1]
    spacing = EvaluationConfig(points=points, first=0.05)
    one, other = (dataclasses.replace(c, evaluation=spacing) for c in (one, other))
    before = [[step for step in c.eval_steps if step <= stable and step < short] for c in (one, other)]
    assert before[0] == before[1]
    assert one.eval_steps[-1] == short


@pytest.mark.parametrize(("shape", "half"), [("1-sqrt", 1 - 0.5**0.5), ("linear", 0.5)])
def test_the_decay_has_its_shape(shape: str, half: float) -> None:
    wanted = TrainConfig(
        steps=100, lr=1.0, schedule="wsd", warmup_steps=10, decay=0.2, decay_shape=shape, lr_end=0.0
    )  # type: ignore[arg-type]
    rates = [learning_rate(wanted, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[10:80] == [1.0] * 70
    assert rates[80] < 1.0
    assert rates[89] == pytest.approx(half)
    assert rates[99] == 0.0
    assert learning_rate(dataclasses.replace(wanted, lr_end=0.1), 99, 100) == pytest.approx(0.1)


def test_the_default_form_is_the_one_that_the_paper_prefers() -> None:
    assert config(10).train.decay_shape == "1-sqrt"
    assert config(10).train.decay == 0.2


def test_ids_of_runs_with_other_schedules_stay() -> None:
    assert not {"warmup_steps", "decay", "decay_shape"} & set(identity(tiny.run_config().train))
    assert content_hash(config(10)) != content_hash(config(10, decay=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": None}, r"train\.warmup_steps .* is needed for train\.schedule 'wsd'"),
        ({"warmup_steps": -1}, r"train\.warmup_steps must not be negative, got -1"),
        ({"warmup_steps": 9}, r"train\.warmup_steps 9 reaches into the decay .* after step 8"),
        ({"decay": 1.0}, r"train\.decay is a share of training, above 0 and below 1, got 1"),
        ({"weight_decay_end": 0.1}, r"train\.weight_decay_end depends on a run's length"),
        ({"schedule": "cos", "decay": 0.1}, r"train\.decay 0\.1 is for train\.schedule 'wsd', not 'cos'"),
        ({"schedule": "cos", "decay_shape": "linear"}, r"train\.decay_shape linear is for"),
    ],
)
def test_a_schedule_that_cannot_be_shared_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(10, **settings)


# -- the runs ----------------------------------------------------------------------------------


def test_a_trunk_is_the_run_without_branches(trunk: RunFolder, chain: Chain, tmp_path: Path) -> None:
    assert_same_run(trunk, run(tmp_path / "run", chain, config(20), Sharing()))
    assert sorted(p.name for p in trunk.branches.iterdir()) == [trunk.branch(s).name for s in (4, 8)]
    assert trunk.shared()["step"] == 0


@pytest.mark.parametrize("steps", [5, 10])
def test_a_branch_is_the_run_alone_bit_for_bit(
    steps: int, trunk: RunFolder, chain: Chain, tmp_path: Path
) -> None:
    alone = run(tmp_path / "alone", chain, config(steps), Sharing())
    branch = run(tmp_path / "branch", chain, config(steps), Sharing(trunk))
    assert_same_run(branch, alone)
    assert [r["step"] for r in branch.metrics("eval")] == list(config(steps).eval_steps)
    began = spent(config(steps), config(steps).stable_steps)
    assert branch.shared() == {
        "run": "trunk", "step": config(steps).stable_steps, "tokens": began.tokens, "flops": began.flops
    }  # fmt: skip
    assert alone.shared()["flops"] == 0
    assert not (alone.path / "shared.json").exists()


def test_another_share_of_decay_has_the_same_trunk(trunk: RunFolder, chain: Chain, tmp_path: Path) -> None:
    wanted = config(10, decay=0.4, decay_shape="linear")  # begins at 6; the trunk has left 4 and 8
    branch = run(tmp_path / "branch", chain, wanted, Sharing(trunk))
    assert branch.shared()["step"] == 4
    assert_same_run(branch, run(tmp_path / "alone", chain, wanted, Sharing()))


@pytest.mark.parametrize(("left", "begins"), [((4,), 4), ((), 0)])
def test_without_its_checkpoint_a_branch_does_more_itself(
    left: tuple[int, ...], begins: int, trunk: RunFolder, alone: RunFolder, chain: Chain, tmp_path: Path
) -> None:
    branch = run(tmp_path / "branch", chain, config(10), Sharing(copy_of(trunk, tmp_path, *left)))
    assert branch.shared()["step"] == begins
    assert_same_run(branch, alone)


@pytest.mark.parametrize(("left", "begins"), [((4, 8), 4), ((8,), 0)])
def test_a_damaged_checkpoint_is_passed_over(
    left: tuple[int, ...], begins: int, trunk: RunFolder, alone: RunFolder, chain: Chain, tmp_path: Path
) -> None:
    copied = copy_of(trunk, tmp_path, *left)
    file = copied.branch(8) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    branch = run(tmp_path / "branch", chain, config(10), Sharing(copied))
    assert branch.shared()["step"] == begins
    assert_same_run(branch, alone)


def test_a_killed_branch_goes_on_from_its_own_checkpoint(
    trunk: RunFolder, alone: RunFolder, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy_of(trunk, tmp_path, 4, 8)
    with monkeypatch.context() as patch:
        patch.setattr(JobProcess, "should_stop", lambda job: True)
        with pytest.raises(Interrupted):
            run(tmp_path / "branch", chain, config(10), Sharing(copied))
    found = load_checkpoint(RunFolder(tmp_path / "branch").checkpoints)
    assert found is not None
    assert found.step == 9
    for step in (4, 8):
        for file in copied.branch(step).iterdir():
            file.unlink()
    branch = run(tmp_path / "branch", chain, config(10), Sharing(copied))
    assert branch.shared()["step"] == 8
    assert_same_run(branch, alone)


def test_a_trunk_that_was_cut_back_still_hands_over_all_lines(
    trunk: RunFolder, alone: RunFolder, chain: Chain, tmp_path: Path
) -> None:
    """Resumed from before the branch point, its own metrics end earlier than the checkpoint that it left."""
    copied = copy_of(trunk, tmp_path, 8)
    copied.append({"kind": "train", "step": 1})
    assert_same_run(run(tmp_path / "branch", chain, config(10), Sharing(copied)), alone)


def test_passing_a_branch_point_again_leaves_a_sound_checkpoint_alone(
    trunk: RunFolder, chain: Chain, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "trunk")
    copy_of(trunk, tmp_path, 4, 8)
    damaged = folder.branch(4) / "model.safetensors"
    damaged.write_bytes(b"")
    sound = (folder.branch(8) / "manifest.json").stat().st_mtime_ns
    run(folder.path, chain, config(20), Sharing(leave=frozenset({4, 8})))
    assert (folder.branch(8) / "manifest.json").stat().st_mtime_ns == sound
    assert damaged.read_bytes() == (trunk.branch(4) / "model.safetensors").read_bytes()


def test_the_command_line_takes_both(chain: Chain, alone: RunFolder, tmp_path: Path) -> None:
    longer = tiny.make_run(tmp_path / "longer", config(20))
    process = start(longer, chain, more=["--leave", "4", "8"])
    while not longer.branch(8).exists():
        assert process.poll() is None, "ended without a branch"
        time.sleep(0.01)
    branch = tiny.make_run(tmp_path / "branch", config(10))
    assert start(branch, chain, more=["--trunk", str(longer.path)]).wait() == 0  # beside the trunk
    assert process.wait() == 0
    assert branch.shared()["step"] == 8
    assert_same_run(branch, alone)
