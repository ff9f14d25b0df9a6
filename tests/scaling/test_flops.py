"""Closed-form parameters and FLOPs equal torch's own count, at every depth of the dial."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scaling import flops
from scaling.config import ModelConfig
from scaling.families.registry import build


def counted(config: ModelConfig, images: int = 1) -> tuple[int, int]:
    """(parameters, forward FLOPs per image) as torch counts them on the meta device."""
    with torch.device("meta"):
        model = build(config)
        labels = torch.zeros(images, dtype=torch.long)
        inputs = torch.zeros(images, config.seq_len - config.scales[0] ** 2, config.latent_channels)
        with FlopCounterMode(display=False) as counter:
            model(labels, inputs)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // images


@pytest.mark.parametrize("depth", range(1, 37))
def test_closed_form_is_torchs_count_at_every_depth(depth: int) -> None:
    config = ModelConfig.from_depth(depth)
    parameters, forward = counted(config)
    assert flops.params_total(config) == parameters
    assert flops.forward_flops(config, masked=False) == forward


MATRICES = {"qkv": "qkv", "attention_out": "projection", "mlp_in": "mlp", "mlp_out": "mlp", "adaln": "adaln"}
"""Linear layers of a block and the part that each belongs to."""


def part_of(parameter: str) -> str:
    """The part of a parameter, told from its name in torch's model."""
    module, _, rest = parameter.partition(".")
    if module == "blocks":
        layer, _, kind = rest.partition(".")[2].partition(".")
        return MATRICES[layer] if kind == "weight" else "biases"
    known = {"shared_adaln": "adaln_shared", "head": "head", "head_adaln": "head"}
    return known.get(module, "embeddings")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("depth", [1, 3, 16, 30])
def test_every_part_is_torchs_count_of_it(depth: int, shared: bool) -> None:
    config = ModelConfig.from_depth(depth, shared_adaln=shared)
    with torch.device("meta"):
        model = build(config)
        labels, start = torch.zeros(1, dtype=torch.long), config.scales[0] ** 2
        inputs = torch.zeros(1, config.seq_len - start, config.latent_channels)
        with FlopCounterMode(display=False) as counter:
            model(labels, inputs)
    parameters = dict.fromkeys(flops.params_by_part(config), 0)
    for name, parameter in model.named_parameters():
        parameters[part_of(name)] += parameter.numel()
    assert flops.params_by_part(config) == parameters

    forward = dict.fromkeys(flops.forward_flops_by_part(config), 0)
    linear = {"token_embedding": "embedding", "head": "head", "head_adaln": "head", "shared_adaln": "adaln"}
    counts = counter.get_flop_counts()
    for name, by_operator in counts.items():
        module, _, rest = name.removeprefix("VAR.").partition(".")
        if module in linear:
            forward[linear[module]] += sum(by_operator.values())
        elif module == "blocks" and rest.count("."):
            forward[MATRICES[rest.partition(".")[2]]] += sum(by_operator.values())
    forward["attention"] = sum(n for op, n in counts["Global"].items() if "addmm" not in str(op))
    forward["qkv"] = sum(counts["Global"].values()) - sum(forward.values())  # called without its module
    assert flops.forward_flops_by_part(config, masked=False) == forward


@given(
    depth=st.integers(1, 30),
    scales=st.lists(st.integers(1, 16), min_size=1, max_size=10, unique=True).map(lambda s: tuple(sorted(s))),
    vocab=st.integers(2, 65536),
    latent=st.integers(1, 64),
    ratio=st.integers(1, 8),
    shared=st.booleans(),
    norm=st.booleans(),
)
@settings(deadline=None)
def test_costs_add_up(
    depth: int, scales: tuple[int, ...], vocab: int, latent: int, ratio: int, shared: bool, norm: bool
) -> None:
    config = ModelConfig.from_depth(
        depth, vocab=vocab, latent_channels=latent, scales=scales, mlp_ratio=ratio, shared_adaln=shared,
        qk_norm=norm,
    )  # fmt: skip
    costs = flops.costs(config)
    parts = costs["params"]
    assert sum(parts.values()) == flops.params_total(config)
    assert parts["qkv"] + parts["projection"] + parts["mlp"] + parts["adaln"] == flops.params(config)
    assert (parts["adaln_shared"] > 0) == shared != (parts["adaln"] > 0)
    assert sum(costs["flops_per_image"].values()) == flops.train_flops(config)
    assert costs["tokens_per_image"] == sum(side * side for side in scales)
    # 2 FLOPs per weight and token, three times: what 6·N·D counts, rightly but for adaLN.
    for part in ("qkv", "projection", "mlp"):
        assert costs["flops_per_image"][part] == 6 * parts[part] * config.seq_len


@given(
    depth=st.integers(1, 4),
    scales=st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True).map(lambda s: tuple(sorted(s))),
    vocab=st.integers(2, 300),
    latent=st.integers(1, 40),
    classes=st.integers(1, 30),
    shared=st.booleans(),
    norm=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_closed_form_holds_for_any_shape(
    depth: int, scales: tuple[int, ...], vocab: int, latent: int, classes: int, shared: bool, norm: bool
) -> None:
    config = ModelConfig.from_depth(
        depth, vocab=vocab, latent_channels=latent, scales=scales, num_classes=classes,
        shared_adaln=shared, qk_norm=norm,
    )  # fmt: skip
    assert (flops.params_total(config), flops.forward_flops(config, masked=False)) == counted(config)


@pytest.mark.parametrize(("shared", "per_cube"), [(False, 73728), (True, 49152)])
def test_n_is_the_papers(shared: bool, per_cube: int) -> None:
    for depth in range(1, 37):
        assert flops.params(ModelConfig.from_depth(depth, shared_adaln=shared)) == per_cube * depth**3


def test_the_mask_allows_the_published_share_of_pairs() -> None:
    scales = ModelConfig.from_depth(1).scales
    assert flops.attention_pairs(scales) / flops.attention_pairs(scales, masked=False) == pytest.approx(
        0.619, abs=5e-4
    )


def test_pairs_are_the_masks_true_entries() -> None:
    from scaling.layers.attention import block_causal_mask

    for scales in [(1,), (1, 2, 3), (2, 5, 6)]:
        assert flops.attention_pairs(scales) == int(block_causal_mask(scales).sum())


def test_batch_scales_flops_linearly() -> None:
    config = ModelConfig.from_depth(2, scales=(1, 2, 3), num_classes=10)
    assert counted(config, images=1) == counted(config, images=3)


def test_training_is_three_forwards_and_6nd_overstates() -> None:
    config = ModelConfig.from_depth(16)
    assert flops.train_flops(config) == 3 * flops.forward_flops(config)
    ratio = flops.flops_6nd(config, config.seq_len) / flops.train_flops(config)
    assert 1.2 < ratio < 1.5
