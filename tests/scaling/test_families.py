"""Laws that hold for every family of the registry: caching, guidance, seeds, forcing, other steps."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from scaling.config import FLEXIBLE, ConfigError, Family, ModelConfig, TokenizerConfig
from scaling.families.interface import FamilyModel
from scaling.families.registry import FAMILIES, build, family_model
from scaling.generation import Forced, sample_tokens
from scaling.tokenizer.quantizer import MultiScaleQuantizer, Quantizer, Size
from scaling.tokenizer.scalable import ScalableQuantizer

SCALES = (1, 2, 3)
OWN: tuple[Size, ...] = ((1, 1), (2, 2), (3, 3))
OTHERS: list[tuple[Size, ...]] = [
    ((1, 1), (3, 3)),
    ((1, 1), (1, 2), (2, 3), (2, 4)),
    ((1, 1), (2, 2), (3, 2), (4, 3), (5, 5)),
]
FAMILY_NAMES = list(FAMILIES)
NEXT_SCALE = [name for name in FAMILY_NAMES if FAMILIES[name].guidance is None]
LABELS = torch.tensor([0, 1, 2, 0, 1])


def pair(family: str, depth: int = 2) -> tuple[FamilyModel, Quantizer]:
    """A model whose gates and head are large enough to show mistakes, and its quantiser."""
    torch.manual_seed(5)
    options = {"vocab": 24, "latent_channels": 6, "scales": SCALES, "num_classes": 3}
    model = build(ModelConfig.from_depth(depth, family=family, **options)).eval().requires_grad_(False)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = TokenizerConfig(
        vocab=24, latent_channels=6, scales=SCALES, quantizer="residual" if family == "var" else "scalable"
    )
    quantizer = MultiScaleQuantizer(tokens) if family == "var" else ScalableQuantizer(tokens)
    return family_model(model), quantizer.requires_grad_(False)


PAIRS = {family: pair(family) for family in FAMILY_NAMES}


def steps_of(family: str) -> list[tuple[Size, ...] | None]:
    return [None, *OTHERS] if family in FLEXIBLE else [None]


def teacher_logits(
    family: str, tokens_BL: Tensor, sizes: tuple[Size, ...] | None, labels_B: Tensor
) -> Tensor:
    model, quantizer = PAIRS[family]
    steps = model.config.sizes if sizes is None else sizes
    return model(labels_B, FAMILIES[family].inputs(quantizer, tokens_BL, steps), None, steps)


def cached_logits(
    family: str, tokens_BL: Tensor, sizes: tuple[Size, ...] | None, guided: bool = False
) -> Tensor:
    """Logits of ``extend``, fed with given tokens in place of drawn ones."""
    model, quantizer = PAIRS[family]
    steps = model.config.sizes if sizes is None else sizes
    decoding = model.begin(LABELS, steps, guided=guided)
    feed = FAMILIES[family].feed(quantizer, len(LABELS), steps)
    logits, inputs, start = [], None, 0
    for chunk, count in enumerate(model.chunks(steps)):
        logits.append(model.extend(decoding, inputs, 0.75))
        ids_Bl = tokens_BL[:, start : start + count]
        inputs = feed.next(chunk, ids_Bl, quantizer.codes(ids_Bl))
        start += count
    return torch.cat(logits, dim=1)


def some_tokens(family: str, sizes: tuple[Size, ...] | None) -> Tensor:
    count = sum(PAIRS[family][0].chunks(sizes))
    return torch.randint(24, (len(LABELS), count), generator=torch.Generator().manual_seed(1))


def test_every_family_that_a_config_can_name_is_tested() -> None:
    assert set(FAMILY_NAMES) == set(get_args(Family))


@pytest.mark.parametrize(
    ("family", "sizes"), [(family, sizes) for family in FAMILY_NAMES for sizes in steps_of(family)]
)
def test_cached_sampling_is_teacher_forcing(family: str, sizes: tuple[Size, ...] | None) -> None:
    tokens = some_tokens(family, sizes)
    conditional = teacher_logits(family, tokens, sizes, LABELS)
    assert conditional.std() > 0.1, "a model that says nothing shows nothing"
    torch.testing.assert_close(cached_logits(family, tokens, sizes), conditional, atol=1e-4, rtol=0)
    unconditional = teacher_logits(family, tokens, sizes, torch.full_like(LABELS, 3))
    wanted = 1.75 * conditional - 0.75 * unconditional
    torch.testing.assert_close(cached_logits(family, tokens, sizes, guided=True), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_guidance_nothing_is_no_guidance(family: str) -> None:
    model, quantizer = PAIRS[family]
    without, _ = sample_tokens(model, quantizer, LABELS, range(5), guidance=0)
    tiny, _ = sample_tokens(model, quantizer, LABELS, range(5), guidance=1e-12)
    strong, _ = sample_tokens(model, quantizer, LABELS, range(5), guidance=4)
    assert torch.equal(without, tiny)
    assert not torch.equal(without, strong)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_constant_guidance_is_the_same_at_every_step_and_a_ramp_starts_at_none(family: str) -> None:
    model, quantizer = PAIRS[family]
    ramped, _ = sample_tokens(model, quantizer, LABELS, range(5), guidance=3, top_k=1)
    constant, _ = sample_tokens(
        model, quantizer, LABELS, range(5), guidance=3, top_k=1, guidance_form="constant"
    )
    conditional = teacher_logits(family, constant, None, LABELS)
    unconditional = teacher_logits(family, constant, None, torch.full_like(LABELS, 3))
    assert torch.equal((4 * conditional - 3 * unconditional).argmax(-1), constant)
    if FAMILIES[family].guidance == "constant":
        assert torch.equal(ramped, constant)
        return
    first = teacher_logits(family, ramped, None, LABELS)[:, :1]
    assert torch.equal(first.argmax(-1), ramped[:, :1])
    weights = torch.tensor([0.0, *([1.5] * 4), *([3.0] * 9)])[:, None]
    conditional = teacher_logits(family, ramped, None, LABELS)
    unconditional = teacher_logits(family, ramped, None, torch.full_like(LABELS, 3))
    assert torch.equal(((1 + weights) * conditional - weights * unconditional).argmax(-1), ramped)


@pytest.mark.parametrize(
    ("family", "smooth"),
    [*((family, False) for family in FAMILY_NAMES), *((family, True) for family in NEXT_SCALE)],
)
def test_a_seed_fixes_the_picture_in_any_batch(family: str, smooth: bool) -> None:
    model, quantizer = PAIRS[family]
    seeds = [3, 4, 5, 6, 7]
    together = sample_tokens(model, quantizer, LABELS, seeds, smooth=smooth, top_k=12)
    for rows in ([2], [4, 0], [1, 2, 3]):
        some = sample_tokens(
            model, quantizer, LABELS[rows], [seeds[row] for row in rows], smooth=smooth, top_k=12
        )
        assert torch.equal(some[0], together[0][rows])
        torch.testing.assert_close(some[1], together[1][rows], atol=1e-4, rtol=0)
    other = sample_tokens(model, quantizer, LABELS, range(10, 15), smooth=smooth, top_k=12)
    assert not torch.equal(other[0], together[0])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_portions_of_a_batch_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, quantizer = PAIRS[family]
    tokens, latent = sample_tokens(model, quantizer, LABELS, range(5))
    monkeypatch.setattr("scaling.generation.ROWS_PER_THREAD", 1)
    alone_tokens, alone_latent = sample_tokens(model, quantizer, LABELS, range(5))
    assert torch.equal(tokens, alone_tokens)
    torch.testing.assert_close(latent, alone_latent, atol=1e-5, rtol=0)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_forced_tokens_stay_and_a_known_image_is_reproduced(family: str, smooth: bool) -> None:
    model, quantizer = PAIRS[family]
    if smooth and family not in NEXT_SCALE:
        return
    known = some_tokens(family, None)
    keep = torch.rand(known.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    tokens, _ = sample_tokens(model, quantizer, LABELS, range(5), forced=Forced(known, keep), smooth=smooth)
    assert torch.equal(tokens[keep], known[keep])
    assert not torch.equal(tokens, known)
    everything = Forced(known, torch.ones_like(keep))
    tokens, latent = sample_tokens(model, quantizer, LABELS, range(5), forced=everything, smooth=smooth)
    assert torch.equal(tokens, known)
    torch.testing.assert_close(latent, quantizer.features(known, model.config.sizes), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_follows_depends_on_what_was_forced_and_what_was_before_does_not(family: str) -> None:
    model, quantizer = PAIRS[family]
    known = some_tokens(family, None)
    place = 1  # in the second step, or the second token of a row
    keep = torch.zeros_like(known, dtype=torch.bool)
    keep[:, place] = True
    free, _ = sample_tokens(model, quantizer, LABELS, range(5))
    ours, _ = sample_tokens(model, quantizer, LABELS, range(5), forced=Forced((free + 1) % 24, keep))
    assert torch.equal(ours[:, :place], free[:, :place])
    assert not torch.equal(ours[:, place + 1 :], free[:, place + 1 :])


@pytest.mark.parametrize("family", FLEXIBLE)
def test_steps_larger_than_trained_take_the_most_likely_tokens(family: str) -> None:
    model, quantizer = PAIRS[family]
    sizes = ((1, 1), (2, 2), (4, 4))
    tokens, _ = sample_tokens(model, quantizer, LABELS, range(5), guidance=2, sizes=sizes)
    conditional = teacher_logits(family, tokens, sizes, LABELS)
    unconditional = teacher_logits(family, tokens, sizes, torch.full_like(LABELS, 3))
    assert torch.equal((3 * conditional - 2 * unconditional)[:, 5:].argmax(-1), tokens[:, 5:])
    assert not torch.equal(conditional[:, :5].argmax(-1), tokens[:, :5]), "the others are drawn"
    drawn = [
        sample_tokens(model, quantizer, LABELS, seeds, sizes=((1, 1), (2, 2), (3, 4)))[0]
        for seeds in (range(5), range(5, 10))
    ]
    assert not torch.equal(drawn[0][:, 5:], drawn[1][:, 5:]), "longer in one direction only is as trained"


@pytest.mark.parametrize("family", NEXT_SCALE)
def test_without_temperature_smoothing_is_the_most_likely_code(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, quantizer = PAIRS[family]
    greedy, latent = sample_tokens(model, quantizer, LABELS, range(5), top_k=1)
    monkeypatch.setattr("scaling.generation.SMOOTHEST", 1e-6)
    monkeypatch.setattr("scaling.generation.SHARPEST", 1e-6)
    # One token is left of each position, whatever the noise.
    smooth, smooth_latent = sample_tokens(model, quantizer, LABELS, range(5), top_k=1, smooth=True)
    assert torch.equal(smooth, greedy)
    torch.testing.assert_close(smooth_latent, latent, atol=1e-5, rtol=0)
    # Of several the mixture is one code, that of its own race.
    _, sharp = sample_tokens(model, quantizer, LABELS, range(5), smooth=True, sizes=OWN)
    if family in FLEXIBLE:
        codes_VC = quantizer.codes(torch.arange(24))
        distances = torch.cdist(sharp.flatten(2).mT, codes_VC).amin(-1)
        assert distances.max() < 1e-3


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in FLEXIBLE])
def test_families_of_fixed_steps_refuse_others_in_one_line(family: str) -> None:
    model, quantizer = PAIRS[family]
    message = (
        "draws one map of 3 x 3" if family == "raster" else r"scales that it was trained on, \[1, 2, 3\]"
    )
    for sizes in (((1, 1), (3, 3)), ((1, 1), (2, 2), (3, 4))):
        with pytest.raises(ConfigError, match=message) as error:
            sample_tokens(model, quantizer, LABELS, range(5), sizes=sizes)
        assert "need a FlexVAR" in str(error.value)
        assert "\n" not in str(error.value)


def test_next_token_models_refuse_smoothing() -> None:
    model, quantizer = PAIRS["raster"]
    with pytest.raises(ConfigError, match="raster feeds tokens back: none to smooth"):
        sample_tokens(model, quantizer, LABELS, range(5), smooth=True)
