"""Sampling: cached = teacher-forced, guidance 0 = none, a seed fixes a picture in any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scaling.config import ConfigError, ModelConfig
from scaling.families.var import VAR
from scaling.generation import draw, keep_top, sample_run, sample_tokens
from scaling.records import RecordsError
from scaling.tokenizer.vqvae import Tokenizer
from tests.scaling import tiny


@pytest.fixture(scope="module")
def pair() -> tuple[VAR, Tokenizer]:
    torch.manual_seed(3)
    model = VAR(ModelConfig.from_depth(2, vocab=16, latent_channels=4, scales=(1, 2), num_classes=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, Tokenizer(tiny.TOKENIZER).eval().requires_grad_(False)


LABELS = torch.tensor([0, 1, 2, 0])


def test_greedy_tokens_are_the_teacher_forced_argmax(pair: tuple[VAR, Tokenizer]) -> None:
    model, tokenizer = pair
    tokens, f_hat = sample_tokens(model, tokenizer.quantize, LABELS, range(4), guidance=0, top_k=1)
    with torch.no_grad():
        logits = model(LABELS, tokenizer.quantize.teacher_inputs(tokens))
    assert torch.equal(logits.argmax(-1), tokens)
    torch.testing.assert_close(f_hat, tokenizer.quantize.features(tokens), atol=1e-5, rtol=0)


def test_guidance_moves_logits_away_from_the_unconditional(pair: tuple[VAR, Tokenizer]) -> None:
    model, tokenizer = pair
    quantizer = tokenizer.quantize
    free, _ = sample_tokens(model, quantizer, LABELS, range(4), guidance=0, top_k=1)
    tiny_guidance, _ = sample_tokens(model, quantizer, LABELS, range(4), guidance=1e-9, top_k=1)
    assert torch.equal(free, tiny_guidance)
    strong, _ = sample_tokens(model, quantizer, LABELS, range(4), guidance=8, top_k=1)
    assert torch.equal(free[:, :1], strong[:, :1])  # no guidance at the first scale
    with torch.no_grad():
        inputs = quantizer.teacher_inputs(strong)
        conditional, null = model(LABELS, inputs), model(torch.full_like(LABELS, 3), inputs)
    assert torch.equal((9 * conditional - 8 * null)[:, 1:].argmax(-1), strong[:, 1:])


def test_a_seed_fixes_the_picture_in_any_batch(pair: tuple[VAR, Tokenizer]) -> None:
    model, tokenizer = pair
    together, _ = sample_tokens(model, tokenizer.quantize, LABELS, [5, 6, 7, 8])
    alone, _ = sample_tokens(model, tokenizer.quantize, LABELS[2:3], [7])
    assert torch.equal(together[2:3], alone)
    other, _ = sample_tokens(model, tokenizer.quantize, LABELS.repeat(8), range(32))
    assert not torch.equal(other[0::4], other[0:1].expand(8, -1))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(1, 20_000, 4)
    ids = draw(logits, [torch.Generator().manual_seed(0)])
    shares = torch.bincount(ids.flatten(), minlength=4) / ids.numel()
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), atol=0.012, rtol=0)


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12, unique=True),
    st.integers(1, 12),
    st.floats(0.01, 1),
)
def test_filters_keep_the_most_likely(values: list[float], top_k: int, top_p: float) -> None:
    logits = torch.tensor(values)[None, None]
    kept_k = keep_top(logits, top_k=top_k)[0, 0].isfinite()
    assert kept_k.sum() == min(top_k, len(values))
    assert (
        logits[0, 0][kept_k].min() >= logits[0, 0].sort(descending=True).values[min(top_k, len(values)) - 1]
    )
    kept_p = keep_top(logits, top_p=top_p)[0, 0].isfinite()
    probabilities = logits[0, 0].softmax(-1)
    assert kept_p.any()
    assert probabilities[kept_p].sum() >= top_p - 1e-5
    assert probabilities[kept_p].sum() - probabilities[kept_p].min() <= top_p + 1e-5
    assert torch.equal(keep_top(logits), logits)


def test_sampling_a_run_writes_pictures(tmp_path: Path) -> None:
    from tests.scaling.test_trainer import run

    chain = tiny.make_tokens(tmp_path)
    folder = run(tmp_path / "run", chain, tiny.run_config(steps=2))
    options = {"seed": 0, "cfg": 1.5, "top_k": 0, "top_p": 0.9}
    grid = sample_run(folder.path, chain[1], classes=[2, 0], count=3, out=tmp_path / "out", **options)  # type: ignore[arg-type]
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["00000-class2-seed0.png", "00001-class0-seed1.png", "00002-class2-seed2.png", "grid.png"]
    assert Image.open(grid).size == (2 * 64 + 2, 2 * 64 + 2)
    with pytest.raises(ConfigError, match=r"class 3 is not one of the run's 3 classes \(0 to 2\)"):
        sample_run(folder.path, chain[1], classes=[3], count=1, out=tmp_path / "x", **options)  # type: ignore[arg-type]
    unfinished = tiny.make_run(tmp_path / "unfinished", tiny.run_config(steps=3))
    with pytest.raises(RecordsError, match="has no final weights yet"):
        sample_run(unfinished.path, chain[1], classes=None, count=1, out=tmp_path / "x", **options)  # type: ignore[arg-type]
