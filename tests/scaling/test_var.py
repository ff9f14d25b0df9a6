"""Laws of the VAR transformer that hold for random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scaling.config import ModelConfig
from scaling.families.var import VAR
from scaling.layers.block import MAX_LOG_SCALE, Block
from scaling.trainer import decay_groups

SCALES = (1, 2, 3)


def model(**options: object) -> VAR:
    torch.manual_seed(0)
    options = {"vocab": 32, "latent_channels": 8, "scales": SCALES, "num_classes": 5} | options
    network = VAR(ModelConfig.from_depth(2, **options)).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # the published start has gates near 0, which would hide mistakes
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def batch(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.tensor([0, 3, 5])[:count], torch.randn(count, 13, 8, generator=generator)


@pytest.mark.parametrize("options", [{}, {"adaln": "shared"}, {"adaln": "none"}, {"qk_norm": False}])
def test_attention_back_ends_agree_with_gradients(options: dict[str, Any]) -> None:
    network, (labels, inputs) = model(**options), batch()
    results = []
    for backend in ("masked", "blockwise"):
        network.attention_backend = backend  # type: ignore[assignment]
        network.zero_grad()
        logits = network(labels, inputs)
        logits.square().sum().backward()
        results.append(
            (logits.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"adaln": "shared"}, {"adaln": "none"}, {"qk_norm": False}])
def test_cached_steps_equal_teacher_forcing(options: dict[str, Any]) -> None:
    network, (labels, inputs) = model(**options), batch()
    with torch.no_grad():
        expected = network(labels, inputs)
        decoding = network.begin(labels)
        parts, start = [], 0
        for scale, side in enumerate(SCALES):
            given = None if scale == 0 else inputs[:, start - 1 : start - 1 + side * side]
            parts.append(network.extend(decoding, given))
            start += side * side
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_no_token_sees_a_finer_scale() -> None:
    network, (labels, inputs) = model(), batch()
    with torch.no_grad():
        before = network(labels, inputs)
        changed = inputs.clone()
        changed[:, 4:] += 1.0  # the inputs of the last scale
        after = network(labels, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_tokens_of_one_scale_see_each_other() -> None:
    network, (labels, inputs) = model(), batch()
    with torch.no_grad():
        before = network(labels, inputs)
        changed = inputs.clone()
        changed[:, 3] += 1.0  # the last token of scale 2
        after = network(labels, changed)
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_images_of_a_batch_do_not_touch() -> None:
    network, (labels, inputs) = model(), batch()
    with torch.no_grad():
        together = network(labels, inputs)
        alone = network(labels[1:2], inputs[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_a_dropped_path_leaves_the_identity() -> None:
    network, (labels, inputs) = model(), batch()
    dropped = torch.zeros(2, 2, 3)
    kept = torch.ones(2, 2, 3)
    with torch.no_grad():
        assert torch.equal(network(labels, inputs, kept), network(labels, inputs))
        plain = network(labels, inputs, dropped)
        for block in network.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        assert torch.equal(network(labels, inputs), plain)


def test_published_initialisation() -> None:
    torch.manual_seed(0)
    network = VAR(ModelConfig.from_depth(4, vocab=512, num_classes=50, scales=SCALES))
    network.requires_grad_(False)
    std = (1 / (3 * 256)) ** 0.5
    block = network.blocks[0]
    assert isinstance(block, Block)
    assert block.mixer.qkv.weight.std() == pytest.approx(std, rel=0.02)
    assert network.class_embedding.weight.std() == pytest.approx(std, rel=0.02)
    assert network.head.to_vocab.weight.std() == pytest.approx(0.02 * std, rel=0.02)
    assert block.mixer.out.weight.std() == pytest.approx(std / 8**0.5, rel=0.02)
    assert block.adaln.weight[: 2 * 256].std() == pytest.approx(1e-5 * std, rel=0.02)
    assert block.adaln.weight[2 * 256 :].std() == pytest.approx(0.5 * std, rel=0.02)
    torch.testing.assert_close(block.mixer.log_scale.detach().exp(), torch.full((4,), 4.0))
    assert not block.adaln.bias.any()


def test_the_scale_of_attention_is_clamped_at_100() -> None:
    network, (labels, inputs) = model(), batch()
    with torch.no_grad():
        for block in network.blocks:
            block.mixer.log_scale.fill_(MAX_LOG_SCALE)
        at_bound = network(labels, inputs)
        for block in network.blocks:
            block.mixer.log_scale.fill_(MAX_LOG_SCALE + 3)
        assert torch.equal(network(labels, inputs), at_bound)


def test_weight_decay_spares_vectors_and_positions() -> None:
    network = model(adaln="shared")
    names = {id(p): n for n, p in network.named_parameters()}
    groups = {g["decay"]: {names[id(p)] for p in g["params"]} for g in decay_groups(network)}
    assert {"start_position", "positions", "scale_embedding.weight", "blocks.0.adaln_offset"} <= groups[0.0]
    assert {"blocks.1.mixer.q_bias", "blocks.1.mixer.log_scale", "head.to_vocab.bias"} <= groups[0.0]
    assert {
        "class_embedding.weight",
        "token_embedding.weight",
        "head.to_vocab.weight",
        "blocks.0.mixer.qkv.weight",
    } <= groups[1.0]
    assert groups[0.0] | groups[1.0] == set(names.values())
    assert not groups[0.0] & groups[1.0]


def test_bf16_autocast_is_near_fp32() -> None:
    network, (labels, inputs) = model(), batch()
    with torch.no_grad():
        exact = network(labels, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(labels, inputs)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
