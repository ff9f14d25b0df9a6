"""A run whose loss diverges is given up, by a rule that noise does not meet, and is never saved as it is."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from scaling import checkpoint, trainer
from scaling.branches import Sharing
from scaling.checkpoint import NotFiniteError, check_finite, forget_newest, load_checkpoint, save_checkpoint
from scaling.divergence import FACTOR, PATIENCE, Divergence
from scaling.process import (
    DivergedError,
    Interrupted,
    JobProcess,
    cause_of,
    exit_code,
    recorded_failure,
)
from scaling.records import RunFolder
from tests.scaling import tiny
from tests.scaling.test_trainer import numbers, run

V = 16
BOUND = FACTOR * math.log(V)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.make_tokens(tmp_path_factory.mktemp("chain"))


def judged(losses: list[float], before: tuple[float, ...] = ()) -> int | None:
    """The log point at which a run with these losses is given up."""
    judge = Divergence(V, False, before)
    for step, loss in enumerate(losses, 1):
        try:
            judge.look(loss, 1.0, step)
        except DivergedError:
            return step
    return None


def test_only_a_loss_that_stays_high_is_given_up() -> None:
    high, low = BOUND * 1.01, BOUND * 0.99
    few = [high] * (PATIENCE - 1)
    assert judged([math.log(V), *[low] * 20]) is None
    assert judged([*few, low, *few, low]) is None, "spikes that are over"
    assert judged([low, *few, high]) == PATIENCE + 1
    assert judged([high], before=(low, *few)) == 1, "as if it had not been stopped in between"
    assert judged([1.0, math.inf]) == 2
    assert judged([math.nan]) == 1


def test_an_infinite_gradient_counts_unless_the_loss_is_scaled() -> None:
    with pytest.raises(DivergedError, match="gradient's norm became inf at step 3"):
        Divergence(V, False, ()).look(1.0, math.inf, 3)
    Divergence(V, True, ()).look(1.0, math.inf, 3)


def test_a_diverged_run_says_so_for_people_and_for_machines(chain: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"times a uniform guess's, for 5 log points in a row"):
        run(tmp_path / "run", chain, tiny.run_config(lr=10.0, steps=60))
    status = RunFolder(tmp_path / "run").status()
    assert (status["state"], status["cause"], status["exit_code"]) == ("failed", "diverged", 1)
    assert f"at step {status['step']} " in status["error"]
    assert status["step"] < 60


def test_noise_of_tiny_batches_and_bold_learning_rates_does_not_meet_the_rule(
    chain: tuple[Path, Path], tmp_path: Path
) -> None:
    for lr, batch in ((1e-2, 1), (3e-2, 8)):
        run(tmp_path / str(lr), chain, tiny.run_config(lr=lr, batch=batch, steps=60))
        AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_that_are_no_numbers_are_never_saved(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.train_step

    def poisoned(state: trainer.State, *rest: object) -> object:
        sums = real(state, *rest)  # type: ignore[arg-type]
        if rest[1] == 4:
            next(iter(state.bare.parameters())).data[0] = math.nan
        return sums

    monkeypatch.setattr(trainer, "train_step", poisoned)
    monkeypatch.setattr(trainer.Clock, "checkpoint_due", lambda self: True)
    with pytest.raises(DivergedError, match=r"after step 5 model/\S+ holds numbers that are not finite"):
        run(tmp_path / "run", chain, tiny.run_config())
    found = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == 4


def test_any_tensor_may_be_the_one() -> None:
    good = {"model": {"a": torch.ones(3), "n": torch.tensor([2])}, "optimizer": {"b": torch.zeros(2)}}
    check_finite(good)
    check_finite({})
    good["optimizer"]["b"][1] = math.inf
    with pytest.raises(NotFiniteError, match="optimizer/b holds"):
        check_finite(good)


def test_nothing_is_written_of_what_is_not_finite(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(1)}}, {})
    with pytest.raises(NotFiniteError):
        save_checkpoint(tmp_path, 2, {"model": {"a": torch.tensor([math.nan])}}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_the_last_of_several_checkpoints_can_be_forgotten(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"model": {"a": torch.ones(1)}}, {})
    for _ in range(2):
        forget_newest(tmp_path)
        assert [p.name for p in checkpoint._checkpoints(tmp_path)] == ["step-000000001"]


def test_once_more_begins_at_the_checkpoint_before_and_is_counted(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "whole", chain, tiny.run_config())
    AcceleratorState._reset_state(reset_partial_state=True)
    starts, resume = list[int](), trainer.State.resume

    def resumed(
        self: trainer.State, folder: RunFolder, trunk: RunFolder | None
    ) -> tuple[int, list[dict[str, Any]]]:
        found = resume(self, folder, trunk)
        starts.append(found[0])
        return found

    monkeypatch.setattr(trainer.State, "resume", resumed)
    monkeypatch.setattr(trainer.Clock, "checkpoint_due", lambda self: True)
    with monkeypatch.context() as patch:
        patch.setattr(Divergence, "look", diverges_at_12)
        with pytest.raises(DivergedError):
            run(tmp_path / "run", chain, tiny.run_config())
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = run(tmp_path / "run", chain, tiny.run_config())
    assert starts == [0, 10], "checkpoints of 10 and 11 were there"
    assert numbers(folder) == numbers(expected)
    assert (folder.status()["divergences"], folder.status()["state"]) == (1, "done")


def diverges_at_12(self: Divergence, loss: float, grad_norm: float, step: int) -> None:
    if step == 12:
        raise DivergedError("the loss is high at step 12")


def test_divergence_is_no_refusal_and_is_counted_once_and_gone_back_from_once(tmp_path: Path) -> None:
    error = DivergedError("the loss became nan at step 3")
    assert (cause_of(error), exit_code(error)) == ("diverged", 1)
    folder = RunFolder(tmp_path)
    for attempt, (after, count) in enumerate([(False, None), *[(True, 1)] * 3, (False, 1)]):
        with contextlib.suppress(Interrupted), JobProcess(folder) as job:
            assert job.after_divergence == after
            assert folder.status().get("divergences") == count
            assert "cause" not in folder.status()
            if attempt == 1:  # asked to leave before it has gone back
                raise Interrupted
            if attempt == 3:
                job.beat(go_back=False)
        if attempt == 0:
            folder.fail(str(error), 1, "diverged")
            with pytest.raises(OSError, match="a GPU"), recorded_failure(folder):  # before it enters
                raise OSError(errno.EIO, "a GPU that is not there for a moment")
        assert folder.status()["attempt"] == attempt + 1


def test_what_a_diverged_attempt_has_left_for_branches_is_left_anew(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the steps that the run goes back behind; it may have been on its way to the end by then."""
    monkeypatch.setattr(trainer.Clock, "checkpoint_due", lambda self: True)
    folder, calls, leave = RunFolder(tmp_path / "run"), list[tuple[int, list[int]]](), trainer.State.leave

    def left() -> list[int]:
        return [checkpoint._step(path) for path in checkpoint._checkpoints(folder.branches)]

    def leaving(self: trainer.State, folder: RunFolder, step: int) -> None:
        calls.append((step, left()))
        leave(self, folder, step)

    monkeypatch.setattr(trainer.State, "leave", leaving)
    sharing = Sharing(leave=frozenset({5, 11}))
    with monkeypatch.context() as patch:
        patch.setattr(Divergence, "look", diverges_at_12)
        with pytest.raises(DivergedError):
            run(folder.path, chain, tiny.run_config(), sharing=sharing)
    assert left() == [5, 11]
    AcceleratorState._reset_state(reset_partial_state=True)
    run(folder.path, chain, tiny.run_config(), sharing=sharing)
    assert calls == [(5, []), (11, [5]), (11, [5])], "back to step 10, and step 11 left anew"
    assert left() == [5, 11]
    assert folder.status()["go_back"] is False
