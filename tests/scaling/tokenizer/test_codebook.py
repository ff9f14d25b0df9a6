"""Seeding, revival and the measures of codebook use."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import TokenizerConfig, TokenizerTrainConfig
from scaling.tokenizer.codebook import (
    choose,
    forget_moments,
    hits,
    kmeans,
    perplexity,
    revive,
    seeded_codebook,
    step_scales,
    usage,
)
from scaling.tokenizer.quantizer import nearest_codes
from scaling.tokenizer.scalable import ScalableQuantizer
from tests.scaling.tokenizer import tiny
from tests.scaling.tokenizer.test_quantizer import features, quantizer


def test_hits_are_counted_per_scale() -> None:
    counted = hits(torch.tensor([[0, 1, 1, 2, 2], [3, 1, 1, 1, 1]]), (1, 2), 5)
    assert counted.tolist() == [[1, 0, 0, 1, 0], [0, 6, 2, 0, 0]]
    assert usage(counted) == [0.4, 0.4]


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30))
def test_perplexity_lies_between_one_and_the_codes_used(counts: list[int]) -> None:
    hits_KV = torch.tensor([counts])
    used = round(usage(hits_KV)[0] * len(counts))
    (found,) = perplexity(hits_KV)
    assert min(used, 1) - 1e-9 <= found <= used + 1e-9


def test_perplexity_of_equal_use_is_the_number_of_codes() -> None:
    assert perplexity(torch.full((1, 7), 3)) == pytest.approx([7])
    assert perplexity(torch.tensor([[3, 0, 1]])) == pytest.approx(
        [math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))]
    )


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 99))
def test_choices_repeat_only_when_they_must(count: int, wanted: int, seed: int) -> None:
    chosen = choose(count, wanted, 1, seed)
    assert len(chosen) == wanted
    assert len(set(chosen)) == min(count, wanted)
    assert chosen == choose(count, wanted, 1, seed)


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 99), st.integers(0, 5))
def test_a_step_trains_on_some_sizes_and_the_last(count: int, wanted: int, step: int, seed: int) -> None:
    tokenizer = TokenizerConfig(scales=tuple(range(1, count + 1)), quantizer="scalable")
    train = TokenizerTrainConfig(random_sizes=wanted, seed=seed)
    chosen = step_scales(tokenizer, train, step)
    assert chosen == step_scales(tokenizer, train, step) == sorted(set(chosen))
    assert len(chosen) == min(wanted, count - 1) + 1
    assert chosen[-1] == count - 1
    residual = dataclasses.replace(tokenizer, quantizer="residual")
    assert step_scales(residual, train, step) == list(range(count))


def test_sizes_vary_over_the_steps_and_each_has_its_turn() -> None:
    tokenizer, train = TokenizerConfig(quantizer="scalable"), TokenizerTrainConfig()
    drawn = [tuple(step_scales(tokenizer, train, step)) for step in range(40)]
    assert len(set(drawn)) > 20
    assert {k for chosen in drawn for k in chosen} == set(range(10))


def test_kmeans_finds_separate_clusters() -> None:
    centres = 10 * torch.eye(4, 6)
    noise = 0.1 * torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    found = kmeans(centres.repeat(100, 1) + noise, 16, 0)
    assert torch.cdist(centres, found).min(1).values.max() < 0.2


def error(book: torch.Tensor, seed: int) -> float:
    q = quantizer(seed=seed)
    with torch.no_grad():
        q.embedding.weight.copy_(book)
        f = features(4, batch=64)
        return float((q(f).features - f).square().mean())


@given(st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_seeding_serves_every_scale(seed: int) -> None:
    q, f = quantizer(seed=seed), features(4, batch=64)
    book = seeded_codebook(q, f, seed)
    assert book.shape == (32, 8)
    assert torch.equal(book, seeded_codebook(q, f, seed))
    # Random features are far from any code; the seeded codes must beat random vectors of the same data.
    vectors = f.permute(0, 2, 3, 1).reshape(-1, 8)
    assert error(book, seed) < error(vectors[choose(len(vectors), 32, seed)], seed)
    with torch.no_grad():
        q.embedding.weight.copy_(book)
    assert min(usage(hits(q.encode(f), (1, 2, 4), 32))) > 0.2


def test_the_unused_are_moved_onto_residuals_of_every_scale() -> None:
    book = torch.zeros(10, 3)
    unused = torch.tensor([True, False] * 5)
    residuals = [torch.full((4, 3), float(k + 1)) for k in range(3)]
    rows = revive(book, unused, residuals, seed=0, step=7)
    assert rows == [0, 2, 4, 6, 8]
    assert book[:, 0].tolist() == [1, 0, 2, 0, 3, 0, 1, 0, 2, 0]


def test_revival_depends_on_seed_and_step_only() -> None:
    residuals, unused = [torch.randn(50, 3)], torch.ones(10, dtype=torch.bool)
    books = [torch.zeros(10, 3) for _ in range(3)]
    for book, step in zip(books, (5, 5, 6), strict=True):
        revive(book, unused, residuals, 1, step)
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])
    assert (nearest_codes(books[0], residuals[0]).unique().numel()) == 10


def test_moments_of_moved_rows_are_forgotten() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([weight])
    forget_moments(optimizer, weight, [1])
    weight.square().sum().backward()
    optimizer.step()
    forget_moments(optimizer, weight, [1, 3])
    state = optimizer.state[weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert (state[key][[1, 3]] == 0).all()
        assert (state[key][[0, 2]] != 0).all()
    assert float(state["step"]) == 1


def test_seeding_serves_every_size_by_itself() -> None:
    q, f = ScalableQuantizer(tiny.SCALABLE.tokenizer), features(4, batch=64)
    book = seeded_codebook(q, f, 0)
    assert book.shape == (32, 8)

    @torch.no_grad()
    def lost(codebook: torch.Tensor) -> list[float]:
        q.embedding.weight.copy_(codebook)
        trained = q(f)
        codes = q.codes(trained.tokens).split([1, 4, 16], 1)
        return [
            float((v - c.reshape(v.shape)).square().mean())
            for v, c in zip(trained.vectors, codes, strict=True)
        ]

    random = torch.nn.functional.normalize(
        torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert all(a < b for a, b in zip(lost(book), lost(random), strict=True))
    assert min(usage(hits(q.encode(f), (1, 2, 4), 32))) > 0.2
