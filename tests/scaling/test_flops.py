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
