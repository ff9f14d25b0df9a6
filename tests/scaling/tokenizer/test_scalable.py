"""Laws of scalable quantisation: every size by itself, at unit length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from scaling.config import ConfigError
from scaling.tokenizer.quantizer import Size
from scaling.tokenizer.scalable import ScalableQuantizer
from scaling.tokenizer.vqvae import Tokenizer
from tests.scaling.tokenizer import tiny

SCALABLE = tiny.SCALABLE.tokenizer
schedules = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4).map(tuple)


def quantizer(seed: int = 0) -> ScalableQuantizer:
    made = ScalableQuantizer(SCALABLE)
    tiny.randomised(made, seed)
    return made


def features(h: int = 5, w: int = 6, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, h, w, generator=torch.Generator().manual_seed(1))


def count(sizes: tuple[Size, ...]) -> int:
    return sum(h * w for h, w in sizes)


def test_codes_have_unit_length_whatever_the_codebook() -> None:
    q = quantizer()
    tokens = torch.arange(32).view(4, 8)
    codes = q.codes(tokens)
    assert codes.shape == (4, 8, 8)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(4, 8))
    before = q.encode(features(4, 4))
    with torch.no_grad():
        q.embedding.weight *= torch.linspace(0.1, 9, 32)[:, None]
    torch.testing.assert_close(q.codes(tokens), codes)
    assert torch.equal(q.encode(features(4, 4)), before)
    torch.testing.assert_close(ScalableQuantizer(SCALABLE).embedding.weight.norm(dim=1), torch.ones(32))


def test_a_token_is_the_code_of_the_smallest_angle() -> None:
    q, f = quantizer(), features(4, 4)
    pooled = F.adaptive_avg_pool2d(f, (2, 2)).flatten(2).mT
    cosines = F.cosine_similarity(pooled[:, :, None], q.embedding.weight[None, None], dim=-1)
    assert torch.equal(q.encode(f, [(2, 2)]), cosines.argmax(-1))


@given(schedules, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_tokens_of_a_size_do_not_depend_on_the_other_sizes(sizes: tuple[Size, ...], seed: int) -> None:
    q, f = quantizer(seed), features()
    alone = [q.encode(f, [size]) for size in sizes]
    assert torch.equal(q.encode(f, sizes), torch.cat(alone, dim=1))


@given(schedules, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_sampling_sees_what_teacher_forcing_gave(sizes: tuple[Size, ...], seed: int) -> None:
    q = quantizer(seed)
    tokens = q.encode(features(), sizes)
    state, inputs = q.start(3, sizes), [torch.zeros(3, 0, 8)]
    assert state.shape == (3, 8, *sizes[-1])
    cumulative = q.cumulative_features(tokens, sizes)
    for k, part in enumerate(tokens.split([h * w for h, w in sizes], dim=1)):
        codes = q.codes(part).mT.unflatten(2, sizes[k])
        assert torch.equal(cumulative[k], codes)
        state, following = q.advance(k, state, codes, sizes)
        assert state.shape == (3, 8, *sizes[-1])
        assert (following is None) == (k == len(sizes) - 1)
        if following is not None:
            assert following.shape[2:] == sizes[k + 1]
            inputs.append(following.flatten(2).mT)
    teacher = q.teacher_inputs(tokens, sizes)
    assert teacher.shape == (3, count(sizes) - count(sizes[:1]), 8)
    assert teacher.dtype == torch.float32
    assert torch.equal(teacher, torch.cat(inputs, 1))
    assert torch.equal(state, q.features(tokens, sizes))


@given(schedules, st.integers(0, 9))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_codes_are_encoded_to_themselves(sizes: tuple[Size, ...], seed: int) -> None:
    q, tokens = (
        quantizer(seed),
        torch.randint(32, (2, count(sizes)), generator=torch.Generator().manual_seed(seed)),
    )
    last = q.features(tokens, sizes)
    assert torch.equal(q.encode(3 * last, [sizes[-1]]), tokens[:, -sizes[-1][0] * sizes[-1][1] :])


def test_gradients_go_straight_through_the_unit_length() -> None:
    q, f = quantizer(), features(4, 4).requires_grad_()
    trained = q(f)
    torch.testing.assert_close(trained.features, q.features(q.encode(f)))
    weights = torch.randn(trained.features.shape, generator=torch.Generator().manual_seed(2))
    (straight,) = torch.autograd.grad((weights * trained.features).sum(), f, retain_graph=True)
    (expected,) = torch.autograd.grad((weights * F.normalize(f, dim=1)).sum(), f)
    torch.testing.assert_close(straight, expected)
    (codebook,) = torch.autograd.grad(trained.loss, q.embedding.weight)
    used = torch.zeros(32, dtype=torch.bool)
    used[trained.tokens.unique()] = True
    assert (codebook[~used] == 0).all()
    assert (codebook[used] != 0).any(1).all()


def test_loss_is_the_mean_over_sizes_of_codebook_and_commitment() -> None:
    q, f = quantizer(), features(4, 4)
    trained = q(f)
    errors = []
    for size, codes in zip(q.sizes, q.cumulative_features(trained.tokens), strict=True):
        errors.append(F.mse_loss(codes, F.normalize(F.adaptive_avg_pool2d(f, size), dim=1)))
    torch.testing.assert_close(trained.loss, 1.25 * torch.stack(errors).mean())


def entropy_gradient(
    q: ScalableQuantizer, parts: list[torch.Tensor], means: list[torch.Tensor]
) -> torch.Tensor:
    q.zero_grad()
    whole = sum(len(part) for part in parts)
    for part in parts:
        (len(part) / whole * q.entropy(q(part, [(2, 2), (4, 4)]).vectors, means)).backward()
    assert q.embedding.weight.grad is not None
    return q.embedding.weight.grad.clone()


def test_parts_of_a_batch_have_the_entropy_gradient_of_the_whole() -> None:
    q, f, sizes = quantizer(), features(4, 4, batch=4), [(2, 2), (4, 4)]
    means = q.mean_probabilities(f, sizes)
    whole, parts = (entropy_gradient(q, list(f.split(n)), means) for n in (4, 1))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    # And it is that of the term as it is written, mean H(p) − H(mean p).
    q.zero_grad()
    total = torch.zeros(())
    for size in sizes:
        units = F.normalize(F.adaptive_avg_pool2d(f, size), dim=1).permute(0, 2, 3, 1).reshape(-1, 8)
        p = (2 * units @ F.normalize(q.embedding.weight, dim=1).T / 0.01).softmax(1)
        mean = p.mean(0)
        total = total - (p * (p + 1e-30).log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    (total / 2).backward()
    torch.testing.assert_close(whole, q.embedding.weight.grad, rtol=1e-4, atol=1e-6)


def test_quantisation_ignores_autocast() -> None:
    q, f = quantizer(), features(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q(f).tokens, q.encode(f))
        assert q(f).features.dtype == torch.float32
        assert torch.equal(q.teacher_inputs(q.encode(f)), quantizer().teacher_inputs(q.encode(f)))


def test_a_step_larger_than_the_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a step of \(5, 7\) is larger than the features, \(5, 6\)"):
        quantizer().encode(features(), [(1, 1), (5, 7)])
    with pytest.raises(ValueError, match="expected 21 tokens per image, got 20"):
        quantizer().features(torch.zeros(1, 20, dtype=torch.int64))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 16), (24, 40)])
def test_images_of_any_shape_have_tokens_and_come_back(height: int, width: int) -> None:
    torch.manual_seed(0)
    model, images = Tokenizer(SCALABLE), torch.rand(2, 3, height, width) * 2 - 1
    sizes = ((1, 2), (3, 2), (height // 4, width // 4))
    tokens = model.encode(images, sizes)
    assert tokens.shape == (2, count(sizes))
    assert model.decode(tokens, sizes).shape == images.shape
    assert model.encode(images).shape == (2, 21)


@pytest.mark.parametrize("shape", [(3, 18, 16), (3, 8, 16), (1, 16, 16)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="multiples of 4 and at least 16 and 16"):
        Tokenizer(SCALABLE).encode(torch.zeros(1, *shape))


def test_channels_between_encoder_and_quantiser() -> None:
    model = Tokenizer(SCALABLE)
    assert model.quant_conv.weight.shape == (8, 12, 1, 1)
    assert model.post_quant_conv.weight.shape == (12, 8, 1, 1)
    assert model.encoder.conv_out.out_channels == model.decoder.conv_in.in_channels == 12
    assert [n for n in model.state_dict() if n.startswith("quantize")] == ["quantize.embedding.weight"]


def test_every_step_is_reconstructed_at_its_size() -> None:
    torch.manual_seed(0)
    model, images, sizes = Tokenizer(SCALABLE), torch.rand(2, 3, 16, 16) * 2 - 1, [(1, 1), (2, 3), (4, 4)]
    rebuilds, quantized = model(images, sizes=sizes)
    assert [tuple(r.shape[2:]) for r in rebuilds] == [(4, 4), (8, 12), (16, 16)]
    assert quantized is not None
    assert torch.equal(quantized.tokens, model.encode(images, sizes))
    torch.testing.assert_close(
        rebuilds[-1].clamp(-1, 1), model.decode(quantized.tokens, sizes), rtol=1e-4, atol=1e-4
    )
    # Every one of them teaches the encoder.
    for rebuild in rebuilds:
        model.zero_grad()
        rebuild.square().mean().backward(retain_graph=True)
        assert model.encoder.conv_in.weight.grad is not None
        assert (model.encoder.conv_in.weight.grad != 0).any()
    rebuilds, quantized = model(images, quantise=False, sizes=sizes)
    assert [tuple(r.shape[2:]) for r in rebuilds] == [(4, 4), (8, 12), (16, 16)]
    assert quantized is None
