"""The loss without all logits equals the plain one, gradients too; so does attention step by step."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scaling import objective
from scaling.config import ModelConfig
from scaling.families.registry import build, family_model
from scaling.layers.attention import Backend, Blockwise, KeyValueCache, block_causal
from scaling.objective import Objective

VOCAB, SCALES = 37, (1, 2, 3)
TOKENS = 14
BACKENDS: tuple[Backend, ...] = ("masked", "blockwise")


def objective_of(depth: int = 2) -> tuple[Objective, dict[str, Tensor]]:
    """A VAR with weights that are not nearly zero, and a batch for it."""
    config = ModelConfig.from_depth(depth, vocab=VOCAB, latent_channels=8, scales=SCALES, num_classes=5)
    torch.manual_seed(0)
    network = build(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    given_B = {
        "labels_B": torch.tensor([0, 4, 5]),
        "inputs": torch.randn(3, TOKENS - 1, 8),
        "tokens_BL": torch.randint(VOCAB, (3, TOKENS)),
    }
    return Objective(family_model(network)), given_B


def plain(module: Objective, batch: dict[str, Tensor], weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """As a textbook has it."""
    logits_BLV = module.model(batch["labels_B"], batch["inputs"])
    tokens_BL = batch["tokens_BL"]
    loss_N = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction="none")
    wrong_BL = (logits_BLV.argmax(dim=-1) != tokens_BL).float()
    return loss_N.sum() * weight, loss_N.view_as(tokens_BL), wrong_BL


def gradients(module: Objective, total: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (3.0 * total).backward()  # as a loss scaler does
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("portion", [1, 5 * VOCAB, 2**20])
def test_equals_plain_cross_entropy_with_all_gradients(portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objective.LOGITS_AT_ONCE, "cpu", portion)
    module, batch = objective_of()
    expected = plain(module, batch, 0.25)
    wanted = gradients(module, expected[0])
    found = module(**batch, weight=0.25)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not found.loss_BL.requires_grad
    assert not found.wrong_BL.requires_grad
    got = gradients(module, found.total)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_in_bf16_it_is_as_near_to_the_exact_loss_as_plain_logits_are() -> None:
    module, batch = objective_of()
    exact = plain(module, batch, 1.0)
    true = gradients(module, exact[0])
    errors = []
    for compute in (lambda: plain(module, batch, 1.0), lambda: module(**batch)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = compute()
        got = gradients(module, found[0])
        off = [(got[n] - true[n]).norm() / true[n].norm() for n in true]
        errors.append((abs(found[0].item() / exact[0].item() - 1), max(off).item()))
    (plain_loss, plain_gradient), (own_loss, own_gradient) = errors
    assert own_loss < max(2 * plain_loss, 1e-3)
    assert own_gradient < 1.5 * plain_gradient


def test_without_gradients_it_keeps_nothing() -> None:
    module, batch = objective_of()
    with torch.no_grad():
        found = module(**batch)
    assert not found.total.requires_grad
    torch.testing.assert_close(found.loss_BL, plain(module, batch, 1.0)[1].detach(), atol=1e-5, rtol=1e-5)


def test_even_logits_lose_the_log_of_the_vocabulary() -> None:
    module, batch = objective_of()
    for parameter in module.model.head.to_vocab.parameters():
        torch.nn.init.zeros_(parameter)
    found = module(**batch)
    torch.testing.assert_close(found.loss_BL, torch.full((3, TOKENS), math.log(VOCAB)))
    assert found.wrong_BL.sum() == (batch["tokens_BL"] != 0).sum()  # of equal logits the first is taken


def test_logits_of_thousands_do_not_overflow() -> None:
    module, batch = objective_of()
    with torch.no_grad():
        module.model.head.to_vocab.weight.mul_(1e6)
    found = module(**batch)
    found.total.backward()
    torch.testing.assert_close(found.loss_BL, plain(module, batch, 1.0)[1].detach(), rtol=1e-4, atol=1e-2)
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    scale=st.floats(0.01, 60.0),
)
def test_attention_by_steps_equals_the_masked_one(sizes: list[tuple[int, int]], scale: float) -> None:
    length = sum(h * w for h, w in sizes)
    generator = torch.Generator().manual_seed(length)
    x_3BHLE = torch.randn(3, 2, 3, length, 8, generator=generator)
    x_3BHLE[:2] = F.normalize(x_3BHLE[:2], dim=-1)
    weights = torch.randn(2, 3, length, 8, generator=generator)

    def results(backend: Backend, kind: torch.dtype) -> list[Tensor]:
        given_3 = [x.to(kind).requires_grad_() for x in x_3BHLE]
        attend = block_causal(sizes, backend, torch.device("cpu"))
        out = attend(given_3[0], given_3[1], given_3[2], scale)
        (out * weights.to(kind)).sum().backward()
        return [out.detach().double(), *(x.grad.double() for x in given_3 if x.grad is not None)]

    exact = results("masked", torch.float64)
    # Scores of up to ``scale`` are rounded by as much; that goes into everything.
    for backend in BACKENDS:
        for one, true in zip(results(backend, torch.float32), exact, strict=True):
            assert (one - true).abs().max() <= 5e-6 * (1 + scale) * (1 + true.abs().max())


def test_attention_in_bf16_is_as_near_to_the_exact_one_as_a_fused_call() -> None:
    sizes = ((1, 1), (2, 2), (4, 4), (6, 6))
    length = sum(h * w for h, w in sizes)
    torch.manual_seed(0)
    x_3BHLE = torch.randn(3, 2, 3, length, 64)
    x_3BHLE[:2] = F.normalize(x_3BHLE[:2], dim=-1)
    x_3BHLE = x_3BHLE.bfloat16()
    weights = torch.randn(2, 3, length, 64).bfloat16()

    def results(backend: Backend, kind: torch.dtype) -> list[Tensor]:
        given_3 = [x.to(kind).requires_grad_() for x in x_3BHLE]
        attend = block_causal(sizes, backend, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            out = attend(given_3[0], given_3[1], given_3[2], 40.0)
        (out * weights.to(kind)).sum().backward()
        return [out.detach().double(), *(x.grad.double() for x in given_3 if x.grad is not None)]

    exact = results("masked", torch.float64)
    for name, one, other, true in zip(
        ("out", "q", "k", "v"),
        results("blockwise", torch.bfloat16), results("masked", torch.bfloat16), exact, strict=True,
    ):  # fmt: skip
        assert (one - true).norm() < 2.5 * (other - true).norm(), name
    cache = KeyValueCache(2, 3, length, 64, x_3BHLE)
    with torch.autocast("cpu", torch.bfloat16):
        one = cache.attend(*x_3BHLE, 40.0).double()  # all at once: every token sees all others
    q, k, v = x_3BHLE
    true = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=40.0)
    other = F.scaled_dot_product_attention(q, k, v, scale=40.0).double()
    assert (one - true).norm() < 2.5 * (other - true).norm()


def test_the_attention_keeps_its_type() -> None:
    for kind in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 1, 5, 4).to(kind)
        assert Blockwise.apply(x, x, x, 1.0, [1, 4]).dtype == kind
