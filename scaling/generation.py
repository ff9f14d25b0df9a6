"""Sampling images from a trained model, chunk by chunk with a cache: a step of tokens, or a token.

- Guidance adds t·(logits − unconditional logits). VAR's t rises over the steps, t = guidance·k/(K−1);
  ``constant`` keeps it (LlamaGen, whose cfg is 1 + t). 0 runs without the unconditional half.
- FlexVAR as published: beyond the trained number of steps the ramp goes on above 1; steps larger than those
  trained on have the full weight, and their most likely tokens.
- Every image has its own seed, and its picture does not depend on the batch it is drawn in or on the device's
  random numbers (``scaling.drawing``).
- Tokens can be forced, at every step, to what is known of an image (``Forced``).

Shapes: B images, L tokens (l of one chunk), V vocabulary, C latent channels; sizes are (h, w).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from scaling.config import FLEXIBLE, ModelConfig, SamplingConfig, require
from scaling.drawing import SMOOTHING, draw, keep_top
from scaling.families.interface import FamilyModel
from scaling.families.registry import FAMILIES
from scaling.layers.linear import half_weights
from scaling.noise import gumbel
from scaling.pictures import image_grid
from scaling.tokenizer.quantizer import Quantizer, Size
from scaling.tokenizer.vqvae import Tokenizer

SMOOTHEST, SHARPEST = 0.27, 0.005
"""Temperatures of smoothed sampling at the first step and its floor, as published."""
ROWS_PER_THREAD = 1024
"""On a CPU so many tokens at once and thread: what a layer holds of them stays in the caches, and is memory
used again where larger tensors come fresh from the system each time, page by page."""


@dataclass(frozen=True)
class Forced:
    """Tokens that are known beforehand, all steps of every image."""

    tokens_BL: Tensor
    keep_BL: Tensor
    """bool; where it is False the token is drawn."""


@torch.no_grad()
def sample_tokens(
    model: FamilyModel,
    quantizer: Quantizer,
    labels_B: Tensor,
    seeds: Sequence[int],
    *,
    guidance: float = 1.5,
    guidance_form: Literal["ramp", "constant"] = "ramp",
    top_k: int = 0,
    top_p: float = 0.0,
    smooth: bool = False,
    sizes: Sequence[Size] | None = None,
    largest: int | None = None,
    forced: Forced | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one image per label.

    Args:
        guidance, guidance_form: as ``SamplingConfig``.
        top_k, top_p: as ``keep_top``.
        smooth: mix the codes by Gumbel-softmax weights instead of taking one, for smoother pictures; as
            published, never for measuring. Next-scale families only.
        sizes: the steps of the image; None for the model's own.
        largest: FlexVAR's steps whose shorter side is above this are larger than those trained on; None for
            the largest of the model's own.
        forced: what is known of the images.

    Returns:
        tokens (B, L) and the latent (B, C, h, w) for the decoder.

    Raises:
        ConfigError: steps that the family cannot have, smoothing of next-token models.
    """
    config, batch = model.config, len(labels_B)
    family, steps = FAMILIES[config.family], config.sizes if sizes is None else tuple(sizes)
    require(not smooth or family.guidance is None, f"{config.family} feeds tokens back: none to smooth")
    choice = _Choice(
        guidance, family.guidance or guidance_form, top_k, top_p, smooth,
        largest=config.scales[-1] if largest is None else largest,
    )  # fmt: skip
    together = batch
    if labels_B.device.type == "cpu":
        rows = max(model.chunks(steps)) * (2 if guidance > 0 else 1)
        together = max(1, ROWS_PER_THREAD * torch.get_num_threads() // rows)
    tokens, latents = [], []
    for start in range(0, batch, together):
        part = slice(start, start + together)
        known = None if forced is None else Forced(forced.tokens_BL[part], forced.keep_BL[part])
        tokens_bL, latent_bCHW = _sample_together(
            model, quantizer, labels_B[part], seeds[part], steps, choice, known
        )
        tokens.append(tokens_bL)
        latents.append(latent_bCHW)
    return torch.cat(tokens), torch.cat(latents)


@dataclass(frozen=True)
class _Choice:
    """How tokens are chosen; as the arguments of ``sample_tokens``."""

    guidance: float
    form: Literal["ramp", "constant"]
    top_k: int
    top_p: float
    smooth: bool
    largest: int


def _sample_together(
    model: FamilyModel,
    quantizer: Quantizer,
    labels_B: Tensor,
    seeds: Sequence[int],
    steps: Sequence[Size],
    choice: _Choice,
    forced: Forced | None,
) -> tuple[Tensor, Tensor]:
    """``sample_tokens`` of images that go through the model side by side."""
    config = model.config
    decoding = model.begin(labels_B, steps, guided=choice.guidance > 0)
    feed = FAMILIES[config.family].feed(quantizer, len(labels_B), steps)
    inputs: Tensor | None = None
    tokens, start = [], 0
    for chunk, count in enumerate(model.chunks(steps)):
        # Longer in one direction only, a step shows nothing finer than what the model was trained on.
        beyond = config.family in FLEXIBLE and min(steps[chunk]) > choice.largest
        progress = 1.0 if beyond else ramp(config, len(steps), chunk)
        weight = choice.guidance * (progress if choice.form == "ramp" else 1.0)
        logits_BlV = model.extend(decoding, inputs, weight)
        top_k = 1 if beyond else choice.top_k
        ids_Bl = draw(logits_BlV, seeds, start, top_k, choice.top_p)
        known = slice(start, start + count)
        if forced is not None:
            ids_Bl = torch.where(forced.keep_BL[:, known], forced.tokens_BL[:, known], ids_Bl)
        codes_BlC = quantizer.codes(ids_Bl)
        if choice.smooth:
            kept_BlV = keep_top(logits_BlV, top_k, choice.top_p).float()
            noise_BlV = gumbel(seeds, SMOOTHING, start, count, config.vocab, labels_B.device)
            mixed_BlC = _smoothed(kept_BlV, noise_BlV, quantizer, progress)
            if forced is not None:
                mixed_BlC = torch.where(forced.keep_BL[:, known, None], codes_BlC, mixed_BlC)
            codes_BlC = mixed_BlC
        tokens.append(ids_Bl)
        inputs = feed.next(chunk, ids_Bl, codes_BlC)
        start += count
    return torch.cat(tokens, dim=1), feed.latent()


def ramp(config: ModelConfig, steps: int, step: int) -> float:
    """How far guidance has risen at a step: 0 at the first to 1 at the last.

    FlexVAR, as published: 1 is reached with the trained number of steps, and it goes on rising after that.
    """
    last = max(1, steps - 1)
    trained = max(1, len(config.scales) - 1)
    return step / (min(last, trained) if config.family in FLEXIBLE else last)


def _smoothed(logits_BlV: Tensor, noise_BlV: Tensor, quantizer: Quantizer, progress: float) -> Tensor:
    """Codes (B, l, C) mixed by softmax((logits·(1 + progress) + Gumbel noise) / temperature)."""
    temperature = max(SMOOTHEST * (1 - 0.95 * progress), SHARPEST)
    noisy_BlV = logits_BlV * (1 + progress) + noise_BlV
    ids_V = torch.arange(logits_BlV.shape[-1], device=logits_BlV.device)
    return (noisy_BlV / temperature).softmax(dim=-1) @ quantizer.codes(ids_V)


@torch.no_grad()
def draw_images(
    model: FamilyModel,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    *,
    smooth: bool = False,
    sizes: Sequence[Size] | None = None,
    forced: Forced | None = None,
) -> Tensor:
    """Images (n, 3, H, W) in [−1, 1], on the model's device, all at once; as ``sample_tokens``."""
    labels_B = torch.tensor(list(labels), device=next(tokenizer.parameters()).device)
    return draw_tokens(
        model, tokenizer, labels_B, seeds, sampling, smooth=smooth, sizes=sizes, forced=forced
    )[1]


@torch.no_grad()
def draw_tokens(
    model: FamilyModel,
    tokenizer: Tokenizer,
    labels_B: Tensor,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    *,
    smooth: bool = False,
    sizes: Sequence[Size] | None = None,
    forced: Forced | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (n, L) and images (n, 3, H, W) in [−1, 1], in the precision asked for; as ``sample_tokens``."""
    half = sampling.precision == "bf16"
    with half_weights(cast(nn.Module, model)) if half else contextlib.nullcontext():
        tokens_BL, latent_BCHW = sample_tokens(
            model, tokenizer.quantize, labels_B, seeds,
            guidance=sampling.guidance, guidance_form=sampling.guidance_form,
            top_k=sampling.top_k, top_p=sampling.top_p, smooth=smooth, sizes=sizes, forced=forced,
        )  # fmt: skip
        return tokens_BL, tokenizer.decode_features(latent_BCHW).float().clamp(-1, 1)


def sample_images(
    model: FamilyModel,
    tokenizer: Tokenizer,
    classes: Sequence[int],
    sampling: SamplingConfig,
    batch: int = 32,
) -> Tensor:
    """Images (n, 3, H, W) in [−1, 1], one per class given; image i has seed ``sampling.seed + i``."""
    images = []
    for start in range(0, len(classes), batch):
        labels = classes[start : start + batch]
        seeds = [sampling.seed + start + i for i in range(len(labels))]
        images.append(draw_images(model, tokenizer, labels, seeds, sampling).cpu())
    return torch.cat(images)


def sample_grid(
    model: FamilyModel, tokenizer: Tokenizer, sampling: SamplingConfig, num_classes: int, target: Path
) -> None:
    """Write a PNG grid of ``sampling.images`` samples, the classes in turn."""
    classes = [i % num_classes for i in range(sampling.images)]
    image_grid(sample_images(model, tokenizer, classes, sampling)).save(target)
