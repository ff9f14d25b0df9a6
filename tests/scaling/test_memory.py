"""Out of memory: smaller micro-batches, the same global batch, nothing lost and nothing doubled."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from scaling import training_step
from scaling.config import ConfigError
from scaling.memory import MicroBatch, out_of_memory
from scaling.objective import Objective
from scaling.process import MemoryShortError, cause_of, exit_code
from scaling.records import RecordsError, RunFolder, read_json
from tests.scaling import tiny
from tests.scaling.test_trainer import assert_equal_within_rounding, numbers, run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.make_tokens(tmp_path_factory.mktemp("chain"))


def training(folder: RunFolder) -> list[dict[str, Any]]:
    return [record for record in numbers(folder) if record["kind"] == "train"]


def too_large(most: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``_loss`` on a device that has memory for ``most`` images: the rest fails after its forward pass."""

    def loss(state: Any, part: Any, scales: Any) -> Any:
        found = real(state, part, scales)
        if len(part[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return found

    return loss


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (MemoryShortError("out of memory on this"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, memory: bool) -> None:
    assert out_of_memory(error) == memory


def test_torch_on_the_cpu_says_it_in_these_words() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**60)
    assert out_of_memory(told.value)


def test_the_step_is_taken_again_in_halves_and_equals_a_run_with_that_micro_batch(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(
        tmp_path / "two", chain, tiny.run_config(), dataclasses.replace(tiny.LAUNCH, micro_batch=2)
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(training_step, "_loss", too_large(3, training_step._loss))
    folder = run(tmp_path / "run", chain, tiny.run_config())
    assert training(folder) == training(expected), "the very same sums, so the very same bits"
    assert_equal_within_rounding(folder, expected)
    assert folder.status()["micro_batch"] == 2
    assert read_json(folder.path / "memory.json")["micro_batch"] == 2


def test_memory_that_runs_out_amid_a_step_leaves_no_part_of_a_gradient(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third of four micro-batches of the seventh step: two have left their gradients by then."""
    launch = dataclasses.replace(tiny.LAUNCH, micro_batch=2)
    expected = run(tmp_path / "whole", chain, tiny.run_config(), launch)
    AcceleratorState._reset_state(reset_partial_state=True)
    calls, real = 0, training_step._loss

    def loss(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6 * 4 + 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return real(*given)

    monkeypatch.setattr(training_step, "_loss", loss)
    folder = run(tmp_path / "run", chain, tiny.run_config(), launch)
    assert calls == 6 * 4 + 3 + 14 * 8
    assert_equal_within_rounding(folder, expected)


def test_a_resumed_run_does_not_fail_again(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make_run(tmp_path / "run", tiny.run_config())
    (folder.path / "memory.json").write_text(
        f'{{"device": "{training_step.device_name(torch.device("cpu"))}", "micro_batch": 2}}'
    )
    monkeypatch.setattr(training_step, "_loss", too_large(2, training_step._loss))
    monkeypatch.setattr(MicroBatch, "halve", lambda self: pytest.fail("it failed again"))
    run(tmp_path / "run", chain, tiny.run_config())


def test_one_image_that_does_not_fit_is_a_refusal(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "_loss", too_large(0, training_step._loss))
    with pytest.raises(ConfigError, match=r"out of memory on .* with one image at a time"):
        run(tmp_path / "run", chain, tiny.run_config())
    assert RunFolder(tmp_path / "run").status()["cause"] == "refused"


def test_memory_that_runs_out_in_the_optimiser_ends_the_attempt_with_its_cause(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryShortError, match="with 8 images at a time; to go on with 4"):
            run(tmp_path / "run", chain, tiny.run_config())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert RunFolder(tmp_path / "run").status()["cause"] == "memory"
    folder = run(tmp_path / "run", chain, tiny.run_config())
    assert (folder.status()["state"], folder.status()["micro_batch"]) == ("done", 4)


def test_an_evaluation_goes_on_with_fewer_images_at_a_time(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "whole", chain, tiny.run_config())
    AcceleratorState._reset_state(reset_partial_state=True)
    real, seen = Objective.forward, list[int]()

    def forward(self: Objective, labels_B: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            seen.append(len(labels_B))
            if len(labels_B) > 3:
                raise MemoryError
        return real(self, labels_B, *rest, **more)

    monkeypatch.setattr(Objective, "forward", forward)
    folder = run(tmp_path / "run", chain, tiny.run_config())
    assert seen[:6] == [10, 5, 2, 2, 2, 2]
    assert_equal_within_rounding(folder, expected)


def test_another_device_may_have_more_memory(tmp_path: Path) -> None:
    small = MicroBatch(tmp_path, "a small one", 8)
    small.halve()
    assert MicroBatch(tmp_path, "a small one", 8).size == 4
    assert MicroBatch(tmp_path, "a small one", 2).size == 2
    assert MicroBatch(tmp_path, "a large one", 8).size == 8
    (tmp_path / "memory.json").write_text("[]")
    with pytest.raises(RecordsError, match=r"memory\.json: expected an object with a micro_batch"):
        MicroBatch(tmp_path, "a small one", 8)


def test_a_shortage_has_a_cause_and_is_no_refusal() -> None:
    error = MemoryShortError("out of memory")
    assert (cause_of(error), exit_code(error)) == ("memory", 1)


SHORT = """
import os, sys
import torch
import scaling.trainer as trainer
from scaling import training_step
from scaling.process import run_job
real, calls = training_step._loss, 0
fails = {fails}
def loss(state, part, scales):
    global calls
    found = real(state, part, scales)
    calls += 1
    if os.environ["RANK"] == "1" and fails(calls, len(part[0])):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return found
training_step._loss = loss
sys.exit(run_job(trainer.main))
"""


@pytest.mark.parametrize(
    "fails",
    [
        pytest.param("lambda calls, images: images > 1", id="in the rehearsal"),
        pytest.param("lambda calls, images: calls == 9", id="in the eighth step, the other waiting"),
    ],
)
def test_one_of_two_processes_that_lacks_memory(chain: tuple[Path, Path], tmp_path: Path, fails: str) -> None:
    expected = run(tmp_path / "one", chain, tiny.run_config(steps=12))
    launch = dataclasses.replace(tiny.LAUNCH, processes=2)
    folder = tiny.make_run(tmp_path / "run", tiny.run_config(steps=12), launch)
    (tmp_path / "short.py").write_text(SHORT.format(fails=fails))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(tmp_path / "short.py"), str(folder.path)]
    command += ["--tokens", str(chain[0]), "--tokenizer", str(chain[1])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, check=False, timeout=240).returncode == 0
    assert_equal_within_rounding(folder, expected)
    rehearsed = "images" in fails.partition(":")[2]
    assert read_json(folder.path / "memory.json")["micro_batch"] == (1 if rehearsed else 2)
    assert folder.status()["micro_batch"] == (1 if rehearsed else 4), (
        "of the main process, after the rehearsal"
    )
