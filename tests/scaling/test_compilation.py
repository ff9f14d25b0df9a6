"""Compiled layers change rounding only, and random steps do not have them compiled without end."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.attention.flex_attention as torch_flex
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from scaling.compilation import GRAPHS, compile_layers
from scaling.config import Family
from scaling.data.cache import open_cache
from scaling.layers.attention import Backend
from scaling.process import Interrupted, JobProcess
from scaling.records import RunFolder
from scaling.tokenizer.vqvae import load_tokenizer
from scaling.trainer import train
from tests.scaling import tiny
from tests.scaling.test_backends import model_config, moved, outputs

RANDOM_STEPS = [(1, 2, 3, 4, 5), (1, 2, 4, 5), (1, 3, 5), (1, 5), (1, 2, 3, 5), (1, 4, 5)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before, nothing left behind; FlexAttention's uncompiled gradients on a CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, true in zip(found, expected, strict=True):
        torch.testing.assert_close(one, true, atol=1e-5 * float(true.abs().max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "attention", "graphs"),
    [
        ("var", "masked", 1), ("var", "flex", 1), ("flexvar", "masked", 1), ("raster", "auto", 1),
        # Called from outside: before attention, after it, and what lies around both.
        ("var", "blockwise", 5), ("flexvar-mamba", "auto", 5),
    ],
)  # fmt: skip
def test_every_family_compiles_to_a_graph_and_computes_the_same(
    family: Family, attention: Backend, graphs: int
) -> None:
    config, counter = model_config(family), CompileCounterWithBackend("aot_eager")
    network = moved(config, attention)
    names = list(network.state_dict())
    compile_layers(network, counter)
    assert_close(outputs(network, config.scales), outputs(moved(config), config.scales))
    assert list(network.state_dict()) == names
    assert 0 < counter.frame_count <= graphs  # for both layers


@pytest.mark.parametrize("attention", ["masked", "blockwise", "flex"])
def test_random_steps_need_a_few_graphs(attention: Backend) -> None:
    config = dataclasses.replace(model_config("flexvar"), scales=(1, 2, 3, 4, 5))
    counter = CompileCounterWithBackend("aot_eager")
    network, plain = moved(config, attention), moved(config)
    compile_layers(network, counter)
    counts = []
    for images, scales in [(3, s) for s in RANDOM_STEPS] + [(2, s) for s in RANDOM_STEPS]:
        assert_close(outputs(network, scales, images), outputs(plain, scales, images))
        counts.append(counter.frame_count)
    # The first, one for any length, one for any number of images.
    assert counts[0] == 1 or attention == "blockwise"
    assert counts[len(RANDOM_STEPS) - 1] == 2 * counts[0]
    assert counts[-1] == 3 * counts[0]


def test_flexattention_has_a_graph_for_each_number_of_blocks() -> None:
    config = dataclasses.replace(model_config("flexvar"), scales=(1, 9, 13))
    counter = CompileCounterWithBackend("aot_eager")
    network, plain = moved(config, "flex"), moved(config)
    compile_layers(network, counter)
    for scales in [(1, 9, 13), (1, 13), (1, 9), (1, 10), (1, 8), (1, 12), (1, 9, 12)]:  # 251 to 65 tokens
        assert_close(outputs(network, scales), outputs(plain, scales))
    assert counter.frame_count <= 4
    assert torch._dynamo.config.recompile_limit == GRAPHS


def test_no_layer_is_left_uncompiled_without_a_word() -> None:
    network = moved(model_config("var"))
    compile_layers(network)
    assert isinstance(network.blocks, nn.ModuleList)
    assert all(block._compiled_call_impl is not None for block in network.blocks)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++ on a CPU")
def test_a_compiled_run_differs_by_rounding_and_goes_on_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, tokenizer_run = tiny.make_tokens(tmp_path)
    tokenizer = load_tokenizer(tokenizer_run / "tokenizer")
    cache = open_cache(tokens, tokenizer.content_hash)
    config = tiny.run_config(steps=8)
    compiled = dataclasses.replace(tiny.LAUNCH, compile=True)

    def trained(name: str, compile_it: bool) -> RunFolder:
        launch = compiled if compile_it else tiny.LAUNCH
        folder = tiny.make_run(tmp_path / name, config, launch)
        train(folder, config, launch, cache, tokenizer)
        return folder

    plain, whole = trained("plain", False), trained("whole", True)
    asked: list[int] = []

    def should_stop(self: JobProcess) -> bool:
        asked.append(1)
        return len(asked) == 4

    with monkeypatch.context() as patch:
        patch.setattr(JobProcess, "should_stop", should_stop)
        with pytest.raises(Interrupted):
            trained("stopped", True)
    for folder in (whole, trained("stopped", False)):
        for one, true in zip(folder.metrics(), plain.metrics(), strict=True):
            assert one["loss_avg"] == pytest.approx(true["loss_avg"], rel=1e-4)
            assert one["loss_last"] == pytest.approx(true["loss_last"], rel=1e-4)
    assert [p.name for p in (whole.path / "final").iterdir()] == ["weights.safetensors"]
