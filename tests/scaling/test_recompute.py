"""Activations computed again in the backward pass: the same numbers, bit for bit, from less memory."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scaling import flops, training_step
from scaling.config import Family, ModelConfig
from scaling.families.registry import FAMILIES, build, family_model
from scaling.layers import block
from scaling.layers.block import Block
from scaling.objective import Objective
from scaling.process import Interrupted, JobProcess
from scaling.records import RunFolder
from tests.scaling import tiny
from tests.scaling.test_memory import too_large, training
from tests.scaling.test_trainer import assert_equal_within_rounding, numbers, run, start, weights

RECOMPUTE = dataclasses.replace(tiny.LAUNCH, recompute_activations=True)
IMAGES = 4


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.make_tokens(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def kept(chain: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that keeps all activations."""
    return run(tmp_path_factory.mktemp("kept") / "run", chain, tiny.run_config())


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, weights apart."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._tensors: list[Tensor] = []
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._tensors.append(tensor)  # alive, so that no other storage gets its address
            self.bytes += storage.nbytes()
        return tensor


def one_step(
    family: Family,
    recompute: bool,
    depth: int = 3,
    precision: str = "fp32",
    prepare: Callable[[torch.nn.Module], object] = lambda layer: None,
) -> tuple[ModelConfig, int, Tensor, dict[str, Tensor | None]]:
    """The model, bytes kept, loss and gradients of one micro-batch with drop path."""
    scales = (12,) if family == "raster" else (1, 2, 3, 4, 5, 6, 8)
    config = ModelConfig.from_depth(
        2, vocab=64, latent_channels=8, scales=scales, num_classes=3, drop_path=0.3, family=family
    )
    config = dataclasses.replace(config, depth=depth)  # all of one width
    torch.manual_seed(0)
    model = build(config)
    for layer in model.get_submodule("blocks").children():
        assert isinstance(layer, Block)
        layer.recompute = recompute
        prepare(layer)
    tokens_BL, labels_B = torch.randint(0, 64, (IMAGES, config.seq_len)), torch.randint(0, 3, (IMAGES,))
    given = torch.randn(IMAGES, config.seq_len - config.scales[0] ** 2, 8)
    path_scale = (torch.rand(depth, 2, IMAGES) < 0.7).float() / 0.7
    objective, kept = Objective(family_model(model)), Kept(model)
    autocast = contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor), autocast:
        inputs = tokens_BL if family == "raster" else given
        loss = objective(labels_B, inputs, tokens_BL, path_scale, config.sizes, 1 / tokens_BL.numel())[0]
    counted = kept.bytes
    loss.backward()
    return config, counted, loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value is not None
        assert torch.equal(value, other[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_same_bits_from_less_memory(family: Family, precision: str) -> None:
    config, all_bytes, loss, gradients = one_step(family, False, precision=precision)
    _, fewer, again, gradients_again = one_step(family, True, precision=precision)
    assert torch.equal(loss, again)
    assert_same(gradients, gradients_again)
    assert fewer < all_bytes / 5
    _, shallower, _, _ = one_step(family, True, depth=2, precision=precision)
    paths = 4 * 2 * IMAGES  # factors of drop path, of one layer
    layer_input = IMAGES * config.seq_len * config.width * (4 if precision == "fp32" else 2)
    assert fewer - shallower == layer_input + paths, "of a layer nothing but what goes into it"


@pytest.mark.parametrize("family", ["var", "flexvar", "flexvar-mamba"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_counts_the_bytes_that_are_kept(family: Family, precision: str) -> None:
    """What is kept when the last layer has just been computed again, its gradient still to come."""

    def planned(config: ModelConfig, recompute: bool) -> int:
        state = flops.train_memory(config, 0, precision, "cpu", recompute=recompute)
        return flops.train_memory(config, IMAGES, precision, "cpu", recompute=recompute) - state

    config, all_bytes, _, _ = one_step(family, False, precision=precision)
    _, less, _, _ = one_step(family, False, depth=2, precision=precision)
    _, inputs, _, _ = one_step(family, True, precision=precision)
    one_layer = all_bytes - less
    assert planned(config, False) == pytest.approx(all_bytes, rel=0.15)
    assert planned(config, True) == pytest.approx(inputs + one_layer, rel=0.15)


@pytest.mark.parametrize("family", ["var", "flexvar-mamba"])
def test_compiled_layers_compute_theirs_again_too(family: Family) -> None:
    """Traced and differentiated by the compiler; turned into machine code in no test: that takes a minute."""
    torch._dynamo.reset()
    plain = one_step(family, False, depth=1)
    compiled = one_step(family, True, depth=1, prepare=lambda layer: layer.compile(backend="aot_eager"))
    assert compiled[1] < plain[1] / 2
    torch.testing.assert_close(compiled[2], plain[2])
    for name, value in plain[3].items():
        torch.testing.assert_close(compiled[3][name], value)


def test_a_run_is_the_same_bit_for_bit(
    kept: RunFolder, chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = 0, checkpoint

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*given, **more)

    monkeypatch.setattr(block, "checkpoint", counted)
    folder = run(tmp_path / "run", chain, tiny.run_config(), RECOMPUTE)
    assert calls == 20 * 1, "every layer of every step, and none of an evaluation"
    assert numbers(folder) == numbers(kept), "the FLOPs too: they are the model's"
    for name, value in weights(kept).items():
        assert torch.equal(weights(folder)[name], value), name


@pytest.mark.parametrize("first", [tiny.LAUNCH, RECOMPUTE])
def test_a_stopped_run_may_go_on_with_the_other_setting(
    first: Any, kept: RunFolder, chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(JobProcess, "should_stop", lambda job: True)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", chain, tiny.run_config(), first)
    second = dataclasses.replace(first, recompute_activations=not first.recompute_activations)
    folder = run(tmp_path / "run", chain, tiny.run_config(), second)
    assert numbers(folder) == numbers(kept)
    for name, value in weights(kept).items():
        assert torch.equal(weights(folder)[name], value), name


def test_micro_batches_are_halved_all_the_same(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = run(tmp_path / "two", chain, tiny.run_config(), dataclasses.replace(tiny.LAUNCH, micro_batch=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(training_step, "_loss", too_large(3, training_step._loss))
    folder = run(tmp_path / "run", chain, tiny.run_config(), RECOMPUTE)
    assert training(folder) == training(two)
    assert folder.status()["micro_batch"] == 2


def test_memory_that_runs_out_while_a_layer_is_computed_again_is_met_too(
    kept: RunFolder, chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = 0, Block.modulated

    def modulated(self: Block, *given: Any) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == 2 and torch.is_grad_enabled():  # the first layer for the second time
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *given)

    monkeypatch.setattr(Block, "modulated", modulated)
    folder = run(tmp_path / "run", chain, tiny.run_config(), RECOMPUTE)
    assert folder.status()["micro_batch"] == 4
    assert_equal_within_rounding(folder, kept)


def test_two_processes_equal_one(kept: RunFolder, chain: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tiny.make_run(
        tmp_path / "run", tiny.run_config(), dataclasses.replace(RECOMPUTE, processes=2, micro_batch=2)
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    assert start(folder, chain, launcher).wait(120) == 0
    assert_equal_within_rounding(folder, kept)
