"""Closed-form parameters and FLOPs equal torch's own count, at every depth of the dial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scaling import flops
from scaling.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
)
from scaling.families.registry import build
from scaling.steps import step_scales

VARIANTS: dict[str, dict[str, Any]] = {
    "var": {},
    "var shared": {"adaln": "shared"},
    "var without adaLN": {"adaln": "none"},
    "var without QK norm": {"qk_norm": False},
    "flexvar": {"family": "flexvar"},
    "raster": {"family": "raster"},
}


def given_to(config: ModelConfig, images: int, sizes: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """What the family's forward takes beside the labels."""
    length = sum(h * w for h, w in sizes)
    if config.family == "raster":
        return torch.zeros(images, length, dtype=torch.long)
    return torch.zeros(images, length - sizes[0][0] * sizes[0][1], config.latent_channels)


def counted(
    config: ModelConfig, images: int = 1, sizes: tuple[tuple[int, int], ...] | None = None
) -> tuple[int, int]:
    """(parameters, forward FLOPs per image) as torch counts them on the meta device."""
    with torch.device("meta"):
        model = build(config)
        labels = torch.zeros(images, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(labels, given_to(config, images, sizes or config.sizes), None, sizes)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // images


@pytest.mark.parametrize("depth", range(1, 37))
def test_closed_form_is_torchs_count_at_every_depth(depth: int) -> None:
    config = ModelConfig.from_depth(depth)
    parameters, forward = counted(config)
    assert flops.params_total(config) == parameters
    assert flops.forward_flops(config, masked=False) == forward


@pytest.mark.parametrize("depth", [1, 2, 5, 16, 36])
@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_is_torchs_count_for_every_family(variant: str, depth: int) -> None:
    config = ModelConfig.from_depth(depth, **VARIANTS[variant])
    parameters, forward = counted(config)
    assert flops.params_total(config) == parameters
    assert flops.forward_flops(config, masked=False) == forward


@pytest.mark.parametrize("sizes", [((1, 1), (3, 5), (7, 7)), ((1, 1), (2, 2), (24, 24)), ((1, 1), (16, 16))])
def test_closed_form_holds_for_other_steps(sizes: tuple[tuple[int, int], ...]) -> None:
    config = ModelConfig.from_depth(2, family="flexvar")
    _, forward = counted(config, sizes=sizes)
    assert flops.forward_flops(config, masked=False, sizes=sizes) == forward


MATRICES = {"qkv": "qkv", "out": "projection", "mlp_in": "mlp", "mlp_out": "mlp", "adaln": "adaln"}
"""Linear layers of a block and the part that each belongs to."""


def part_of(parameter: str) -> str:
    """The part of a parameter, told from its name in torch's model."""
    module, _, rest = parameter.partition(".")
    if module == "blocks":
        layer, _, kind = rest.partition(".")[2].removeprefix("mixer.").rpartition(".")
        return MATRICES[layer] if kind == "weight" and layer in MATRICES else "biases"
    return {"shared_adaln": "adaln_shared", "head": "head"}.get(module, "embeddings")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [1, 3, 16, 30])
def test_every_part_is_torchs_count_of_it(depth: int, variant: str) -> None:
    config = ModelConfig.from_depth(depth, **VARIANTS[variant])
    with torch.device("meta"):
        model = build(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, dtype=torch.long), given_to(config, 1, config.sizes))
    parameters = dict.fromkeys(flops.params_by_part(config), 0)
    for name, parameter in model.named_parameters():
        parameters[part_of(name)] += parameter.numel()
    assert flops.params_by_part(config) == parameters

    forward = dict.fromkeys(flops.forward_flops_by_part(config), 0)
    linear = {"token_embedding": "embedding", "head": "head", "shared_adaln": "adaln"}
    counts = counter.get_flop_counts()
    for name, by_operator in counts.items():
        module, _, rest = name.partition(".")[2].partition(".")
        if (module in linear and not rest) or (module == "head" and rest in ("to_vocab", "adaln")):
            forward[linear[module]] += sum(by_operator.values())
        elif module == "blocks" and rest.rpartition(".")[2] in MATRICES:
            forward[MATRICES[rest.rpartition(".")[2]]] += sum(by_operator.values())
    forward["attention"] = sum(n for op, n in counts["Global"].items() if "addmm" not in str(op))
    forward["qkv"] = sum(counts["Global"].values()) - sum(forward.values())  # called without its module
    assert flops.forward_flops_by_part(config, masked=False) == forward


def test_raster_counts_the_pairs_of_a_causal_mask() -> None:
    config = ModelConfig.from_depth(2, family="raster", scales=(1, 2, 7))
    part = flops.forward_flops_by_part(config)["attention"]
    assert part == 4 * config.width * config.depth * int(torch.ones(49, 49).tril().sum())


def run_of(model: ModelConfig, steps: int = 7, seed: int = 0) -> RunConfig:
    """A run of a model; stage 1 is the smallest that gives its tokens."""
    scales = tuple(range(1, 17)) if model.step_schedule == "published" else model.scales
    tokenizer = TokenizerConfig(
        vocab=model.vocab, latent_channels=model.latent_channels, scales=scales, multipliers=(1,),
        quantizer="residual" if model.family == "var" else "scalable",
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig(
            resolution=scales[-1], train_images=50, val_images=5, num_classes=model.num_classes
        ),
        tokenizer=tokenizer, tokenizer_train=TokenizerTrainConfig(),
        train=TrainConfig(steps=steps, batch=4), evaluation=EvaluationConfig(), seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", ["fixed", "paper", "published"])
def test_a_runs_costs_are_the_sums_over_its_steps(schedule: str) -> None:
    model = ModelConfig.from_depth(2, family="flexvar", step_schedule=schedule)
    config, steps = run_of(model, steps=60, seed=3), 60
    used = [step_scales(model, 3, step) for step in range(steps)]
    assert (len(set(used)) == 1) == (schedule == "fixed")
    costs = [
        (4 * sum(s * s for s in u), 4 * flops.train_flops(model, tuple((s, s) for s in u))) for u in used
    ]
    for done in (0, 1, 37, steps):
        found = flops.spent(config, done)
        assert (found.tokens, found.flops) == (
            sum(t for t, _ in costs[:done]),
            sum(c for _, c in costs[:done]),
        )
    whole, parts = flops.spent(config, steps), flops.costs(config)
    assert parts["tokens_per_image"] * 4 * steps == pytest.approx(whole.tokens, rel=1e-12)
    assert sum(parts["flops_per_image"].values()) * 4 * steps == pytest.approx(whole.flops, rel=1e-12)


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
        depth, vocab=vocab, latent_channels=latent, scales=scales, mlp_ratio=ratio,
        adaln="shared" if shared else "own", qk_norm=norm,
    )  # fmt: skip
    costs = flops.costs(run_of(config))
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
        adaln="shared" if shared else "own", qk_norm=norm,
    )  # fmt: skip
    assert (flops.params_total(config), flops.forward_flops(config, masked=False)) == counted(config)


@pytest.mark.parametrize(("shared", "per_cube"), [(False, 73728), (True, 49152)])
def test_n_is_the_papers(shared: bool, per_cube: int) -> None:
    for depth in range(1, 37):
        assert (
            flops.params(ModelConfig.from_depth(depth, adaln="shared" if shared else "own"))
            == per_cube * depth**3
        )


def test_the_mask_allows_the_published_share_of_pairs() -> None:
    sizes = ModelConfig.from_depth(1).sizes
    assert flops.attention_pairs(sizes) / flops.attention_pairs(sizes, masked=False) == pytest.approx(
        0.619, abs=5e-4
    )


def test_pairs_are_the_masks_true_entries() -> None:
    from scaling.layers.attention import block_causal_mask

    for sizes in [((1, 1),), ((1, 1), (2, 2), (3, 3)), ((2, 2), (5, 3), (6, 7))]:
        assert flops.attention_pairs(sizes) == int(block_causal_mask(sizes).sum())


def test_batch_scales_flops_linearly() -> None:
    for variant in VARIANTS.values():
        config = ModelConfig.from_depth(2, scales=(1, 2, 3), num_classes=10, **variant)
        assert counted(config, images=1) == counted(config, images=3)


def test_training_is_three_forwards_and_6nd_overstates() -> None:
    config = ModelConfig.from_depth(16)
    assert flops.train_flops(config) == 3 * flops.forward_flops(config)
    ratio = flops.flops_6nd(config, config.seq_len) / flops.train_flops(config)
    assert 1.2 < ratio < 1.5
