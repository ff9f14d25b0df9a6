"""FlexVAR-Mamba: caching, causality over steps, closed forms, the start, training, precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scaling import flops
from scaling.config import ModelConfig, TokenizerConfig
from scaling.families.mamba import FlexVARMamba
from scaling.families.registry import build, family_model
from scaling.generation import sample_tokens
from scaling.layers.mamba import Mamba, ScanPlace
from scaling.layers.zigzag import PATHS, pyramid_path
from scaling.tokenizer.scalable import ScalableQuantizer
from scaling.trainer import decay_groups

SCALES = (1, 2, 3)
SIZES = [((1, 1), (2, 2), (3, 3)), ((1, 1), (1, 2), (3, 4), (2, 5)), ((1, 1), (4, 4))]


def config(depth: int = 2, **options: Any) -> ModelConfig:
    small: dict[str, Any] = {"vocab": 32, "latent_channels": 8, "scales": SCALES, "num_classes": 5}
    return ModelConfig.from_depth(depth, family="flexvar-mamba", **(small | options))


def model(depth: int = 2, **options: Any) -> FlexVARMamba:
    torch.manual_seed(0)
    network = build(config(depth, **options)).eval()
    assert isinstance(network, FlexVARMamba)
    with torch.no_grad():  # the start has gates near 0, which would hide mistakes
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def batch(sizes: tuple[tuple[int, int], ...], count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    length = sum(h * w for h, w in sizes[1:])
    return torch.tensor([0, 3, 5])[:count], torch.randn(count, length, 8, generator=generator)


def deep(**options: Any) -> FlexVARMamba:
    """More layers than paths, but narrow."""
    return model(PATHS + 1, width=32, heads=1, **options)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"adaln": "shared"}, {"adaln": "none"}, {"ssm_conv": 1}, {"ssm_state": 3}]
)
def test_cached_steps_equal_teacher_forcing(
    sizes: tuple[tuple[int, int], ...], options: dict[str, Any]
) -> None:
    network, (labels, inputs) = deep(**options), batch(sizes)
    with torch.no_grad():
        expected = network(labels, inputs, sizes=sizes)
        decoding, parts, start = network.begin(labels, sizes), [], 0
        for step, count in enumerate(network.chunks(sizes)):
            parts.append(network.extend(decoding, inputs[:, start : start + count] if step else None))
            start += count if step else 0
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_no_token_sees_a_finer_step() -> None:
    network, (labels, inputs) = deep(), batch(SIZES[0])
    with torch.no_grad():
        before = network(labels, inputs)
        changed = inputs.clone()
        changed[:, 4:] += 1.0  # all of the 3 x 3 step
        after = network(labels, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


def test_over_eight_layers_every_token_of_a_step_sees_every_other() -> None:
    network, (labels, inputs) = deep(), batch(SIZES[0])
    with torch.no_grad():
        before = network(labels, inputs)
        for token in range(4, 13):
            changed = inputs.clone()
            changed[:, token] += 1.0
            assert not torch.isclose(before[:, 5:], network(labels, changed)[:, 5:]).all(-1).any()


@pytest.mark.parametrize("path", range(PATHS))
def test_a_mixers_token_sees_those_before_it_on_its_path_and_no_other(path: int) -> None:
    torch.manual_seed(0)
    sizes = ((1, 1), (2, 3))
    order, inverse = pyramid_path(sizes, path, torch.device("cpu"))
    mixer, x = Mamba(32), torch.randn(1, 7, 32)
    with torch.no_grad():
        before = mixer(x, ScanPlace(order, inverse))
        for token in range(7):
            changed = x.clone()
            changed[:, token] += 1.0
            differs = (mixer(changed, ScanPlace(order, inverse)) != before).any(-1)[0]
            assert torch.equal(differs, inverse >= inverse[token])


def test_the_layers_take_turns_with_the_eight_paths() -> None:
    network = deep()
    orders = [tuple(p.order_L.tolist()) for p in network.teacher_places(SIZES[0], torch.device("cpu"))]
    assert len(set(orders[:PATHS])) == PATHS
    assert orders[PATHS] == orders[0]


def test_images_of_a_batch_do_not_touch() -> None:
    network, (labels, inputs) = model(), batch(SIZES[0])
    with torch.no_grad():
        together = network(labels, inputs)
        alone = network(labels[1:2], inputs[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_a_dropped_path_leaves_the_identity() -> None:
    network, (labels, inputs) = model(), batch(SIZES[0])
    with torch.no_grad():
        assert torch.equal(network(labels, inputs, torch.ones(2, 2, 3)), network(labels, inputs))
        plain = network(labels, inputs, torch.zeros(2, 2, 3))
        for block in network.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        assert torch.equal(network(labels, inputs), plain)


def counted(model_config: ModelConfig) -> tuple[dict[str, int], int, int]:
    """Torch's own count: parameters by part, forward FLOPs, those of the convolutions among them."""
    matrices = {"input": "qkv", "selection": "qkv", "delta": "qkv", "out": "projection"}
    parts = dict.fromkeys(flops.params_by_part(model_config), 0)
    with torch.device("meta"):
        network = build(model_config)
        inputs = torch.zeros(
            1, model_config.seq_len - model_config.scales[0] ** 2, model_config.latent_channels
        )
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, dtype=torch.long), inputs)
    for name, parameter in network.named_parameters():
        module, _, rest = name.partition(".")
        layer = rest.split(".")[1:]
        if module != "blocks":
            part = {"shared_adaln": "adaln_shared", "head": "head"}.get(module, "embeddings")
        elif layer[-1] != "weight" or layer[0].startswith("norm"):
            part = "biases"
        else:
            part = {"mlp_in": "mlp", "mlp_out": "mlp", "adaln": "adaln"}.get(layer[0]) or matrices[layer[1]]
        parts[part] += parameter.numel()
    of_operators = counter.get_flop_counts()["Global"]
    conv = sum(n for operator, n in of_operators.items() if "conv" in str(operator))
    return parts, counter.get_total_flops(), conv


@pytest.mark.parametrize(
    "options", [{}, {"adaln": "shared"}, {"adaln": "none"}, {"ssm_state": 5, "ssm_conv": 3}]
)
@pytest.mark.parametrize("depth", [1, 2, 5, 16, 20])
def test_closed_forms_are_torchs_count(depth: int, options: dict[str, Any]) -> None:
    paper = ModelConfig.from_depth(depth, family="flexvar-mamba", **options)
    parts, total, conv = counted(paper)
    by_part = flops.forward_flops_by_part(paper)
    assert flops.params_by_part(paper) == parts
    assert flops.forward_flops(paper, masked=False) - by_part["scan"] == total
    assert by_part["conv"] == conv
    assert sum(by_part.values()) == flops.forward_flops(paper)


def test_closed_forms_hold_for_a_width_that_sixteen_does_not_divide() -> None:
    odd = config(2, width=40, heads=1, ssm_expand=3, scales=(2, 3))
    parts, total, _ = counted(odd)
    assert flops.params_by_part(odd) == parts
    assert flops.forward_flops(odd) - flops.forward_flops_by_part(odd)["scan"] == total


def test_n_is_the_polynomial_of_the_docstring_and_near_the_papers() -> None:
    for depth in range(1, 37):
        assert flops.params(config(depth)) == 82944 * depth**3 + 4096 * depth**2
    for depth, published in ((16, 370e6), (20, 700e6)):
        full = ModelConfig.from_depth(depth, family="flexvar-mamba", vocab=8912)
        assert flops.params_total(full) == pytest.approx(published, rel=0.045)


def test_it_starts_as_if_it_knew_nothing_and_with_mambas_start() -> None:
    torch.manual_seed(0)
    network, (labels, inputs) = build(config(4)), batch(SIZES[0])
    targets = torch.randint(32, (3, 14))
    with torch.no_grad():
        logits = network(labels, inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert loss.item() == pytest.approx(math.log(32), abs=0.02)
        for layer, block in enumerate(network.blocks):  # type: ignore[arg-type]
            mixer, std = block.mixer, math.sqrt(1 / (3 * 256))
            assert mixer.input.weight.std() == pytest.approx(std, rel=0.02)
            assert mixer.out.weight.std() == pytest.approx(std / math.sqrt(8), rel=0.02)
            start = torch.nn.functional.softplus(mixer.delta_bias)
            assert 1e-3 <= start.min() < 2e-3
            assert 5e-2 < start.max() <= 1e-1
            assert start.log10().mean() == pytest.approx(-2, abs=0.1)
            torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
            assert torch.equal(mixer.D, torch.ones(512)), layer


def test_weight_decay_spares_the_decays_of_the_state() -> None:
    network = model(adaln="shared")
    names = {id(p): n for n, p in network.named_parameters()}
    groups = {g["decay"]: {names[id(p)] for p in g["params"]} for g in decay_groups(network)}
    vectors = {"A_log", "D", "delta_bias", "taps_bias"}
    assert {f"blocks.1.mixer.{name}" for name in vectors} | {"positions", "blocks.0.adaln_offset"} <= groups[
        0.0
    ]
    matrices = {"input", "selection", "delta", "out"}
    assert {f"blocks.0.mixer.{name}.weight" for name in matrices} | {"blocks.0.mixer.taps"} <= groups[1.0]


def test_training_lowers_the_loss_and_moves_every_parameter() -> None:
    """The toy: a step's tokens are those of the step before, read off its codes."""
    torch.manual_seed(0)
    network, generator = build(config(2, width=64, heads=1)), torch.Generator().manual_seed(2)
    codebook = torch.nn.functional.normalize(torch.randn(32, 8, generator=generator), dim=-1)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    losses = []
    for _ in range(60):
        labels = torch.randint(5, (16,), generator=generator)
        tokens = torch.cat([labels[:, None], torch.randint(32, (16, 13), generator=generator)], dim=1)
        logits = network(labels, codebook[tokens[:, 1:]])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    assert all(not torch.equal(start[name], parameter) for name, parameter in network.named_parameters())


def test_bf16_autocast_is_near_fp32() -> None:
    network, (labels, inputs) = model(), batch(SIZES[0])
    with torch.no_grad():
        exact = network(labels, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(labels, inputs)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_cached_steps_equal_teacher_forcing_under_autocast() -> None:
    network, (labels, inputs) = model(), batch(SIZES[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(labels, inputs)
        decoding = network.begin(labels)
        parts = [
            network.extend(decoding, None),
            network.extend(decoding, inputs[:, :4]),
            network.extend(decoding, inputs[:, 4:]),
        ]
    assert (torch.cat(parts, 1) - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.fixture(scope="module")
def quantizer() -> ScalableQuantizer:
    torch.manual_seed(3)
    return ScalableQuantizer(
        TokenizerConfig(quantizer="scalable", vocab=32, latent_channels=8, scales=SCALES)
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_greedy_samples_are_what_teacher_forcing_predicts_of_them(
    sizes: tuple[tuple[int, int], ...], quantizer: ScalableQuantizer
) -> None:
    network, labels = deep(), torch.tensor([0, 3, 4])
    tokens, latent = sample_tokens(
        family_model(network), quantizer, labels, [5, 6, 7], sizes=sizes, guidance=0.0, top_k=1
    )
    assert latent.shape == (3, 8, *sizes[-1])
    with torch.no_grad():
        logits = network(labels, quantizer.teacher_inputs(tokens, sizes), sizes=sizes)
    assert torch.equal(logits.argmax(-1), tokens)


def test_a_sampled_picture_does_not_depend_on_its_batch(quantizer: ScalableQuantizer) -> None:
    network, labels, seeds = family_model(model()), torch.tensor([0, 3, 4]), [5, 6, 7]
    tokens, _ = sample_tokens(network, quantizer, labels, seeds, sizes=SIZES[1], guidance=2.0)
    alone, _ = sample_tokens(network, quantizer, labels[1:2], seeds[1:2], sizes=SIZES[1], guidance=2.0)
    assert torch.equal(tokens[1:2], alone)
