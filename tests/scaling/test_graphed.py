"""Sampling through buffers that stay, as CUDA graphs need them, draws the same pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scaling.config import ConfigError
from scaling.families import graphed as module
from scaling.families.graphed import MOST, graphed
from scaling.families.interface import Decoding, FamilyModel
from scaling.generation import sample_tokens
from scaling.layers.linear import half_weights
from tests.scaling.test_families import OTHERS, pair

BATCHES = [([0, 1, 2], 1.5), ([2, 2, 0], 1.5), ([1, 0, 1], 0.5), ([0, 2, 1], 3.0)]


def drawn(model: FamilyModel, family: str, labels: list[int], guidance: float, **options: Any) -> Tensor:
    """Tokens of one batch; its seeds are its labels'."""
    _, quantizer = pair(family)
    seeds = [10 * label + index for index, label in enumerate(labels)]
    return sample_tokens(model, quantizer, torch.tensor(labels), seeds, guidance=guidance, **options)[0]


@pytest.mark.parametrize("family", ["var", "flexvar", "raster"])
def test_batches_of_all_kinds_are_drawn_as_without(family: str) -> None:
    model, _ = pair(family)
    replayed = graphed(model)
    for labels, guidance in BATCHES:
        assert torch.equal(drawn(replayed, family, labels, guidance), drawn(model, family, labels, guidance))
    # A smaller last batch, one without guidance, and the first shape again.
    for labels, guidance in [([1, 2], 1.5), ([1, 0], 1.5), ([1, 2, 0], 0.0), ([2, 1, 0], 0.0), *BATCHES[:3]]:
        assert torch.equal(drawn(replayed, family, labels, guidance), drawn(model, family, labels, guidance))
    assert len(replayed._records) <= MOST  # type: ignore[attr-defined]


def test_steps_that_a_model_was_not_trained_on() -> None:
    model, _ = pair("flexvar")
    replayed = graphed(model)
    for sizes in (*OTHERS, *OTHERS, OTHERS[-1], OTHERS[-1]):
        found = drawn(replayed, "flexvar", [0, 1], 1.5, sizes=sizes)
        assert torch.equal(found, drawn(model, "flexvar", [0, 1], 1.5, sizes=sizes))


def test_every_step_runs_from_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("var")
    replayed = graphed(model)
    read = list[list[int]]()
    extend = type(model).extend

    def noted(self: FamilyModel, decoding: Decoding, inputs: Tensor | None, guidance: Any) -> Tensor:
        parts = [x for x in (inputs, guidance) if isinstance(x, Tensor)]
        read[-1].extend(x.data_ptr() for x in parts)
        return extend(self, decoding, inputs, guidance)

    monkeypatch.setattr(type(model), "extend", noted)
    for labels, guidance in BATCHES:
        read.append([])
        drawn(replayed, "var", labels, guidance)
    assert len(read[1]) == 2 * 3 - 1  # three steps' weights of guidance, and the inputs of all but the first
    assert read[1] == read[2] == read[3]


def test_weights_that_moved_are_read_where_they_are() -> None:
    model, _ = pair("var")
    replayed = graphed(model)
    for _ in range(3):
        drawn(replayed, "var", [0, 1], 1.5)
    with half_weights(model):  # type: ignore[arg-type]
        low = drawn(model, "var", [0, 1], 1.5)
        for _ in range(3):
            assert torch.equal(drawn(replayed, "var", [0, 1], 1.5), low)
    assert torch.equal(drawn(replayed, "var", [0, 1], 1.5), drawn(model, "var", [0, 1], 1.5))


def test_autocast_casts_anew_inside_a_recording_and_keeps_its_habit_outside() -> None:
    assert torch.is_autocast_cache_enabled()
    with module._without_cached_casts():
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


def test_a_mamba_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="flexvar-mamba cannot be sampled as CUDA graphs"):
        graphed(pair("flexvar-mamba")[0])
