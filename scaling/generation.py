"""Sampling images from a trained model, chunk by chunk with a cache: a step of tokens, or a token.

- Guidance adds t·(logits − unconditional logits). VAR's t rises over the steps, t = guidance·k/(K−1);
  ``constant`` keeps it (LlamaGen, whose cfg is 1 + t). 0 runs without the unconditional half.
- FlexVAR as published: beyond the trained number of steps the ramp goes on above 1; steps larger than those
  trained on have the full weight, and their most likely tokens.
- Every image has its own generator on the CPU, so its picture does not depend on the batch it is drawn in
  or on the device's random numbers.
- Tokens can be forced, at every step, to what is known of an image (``Forced``).

Shapes: B images, L tokens (l of one chunk), V vocabulary, C latent channels; sizes are (h, w).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scaling.config import FLEXIBLE, ConfigError, ModelConfig, SamplingConfig, require
from scaling.families.interface import FamilyModel
from scaling.families.registry import FAMILIES
from scaling.pictures import image_grid
from scaling.pretrained import open_model
from scaling.tokenizer.quantizer import Quantizer, Size
from scaling.tokenizer.vqvae import Tokenizer

SMOOTHEST, SHARPEST = 0.27, 0.005
"""Temperatures of smoothed sampling at the first step and its floor, as published."""


def keep_top(logits_BlV: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits with everything outside the top k and the nucleus p set to −∞; 0 keeps all.

    The nucleus is the smallest set of most likely tokens whose probability reaches p.
    """
    if top_k > 0:
        bound = logits_BlV.topk(min(top_k, logits_BlV.shape[-1]), dim=-1).values[..., -1:]
        logits_BlV = logits_BlV.masked_fill(logits_BlV < bound, -math.inf)
    if top_p > 0:
        ascending, order = logits_BlV.sort(dim=-1)
        outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        outside[..., -1] = False
        logits_BlV = logits_BlV.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return logits_BlV


def draw(logits_BlV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token id per position, (B, l), image b from its own generator.

    The exponential race: argmax of p / Exp(1) is distributed as p.
    """
    noise = torch.stack([torch.empty(logits_BlV.shape[1:]).exponential_(generator=g) for g in generators])
    return (logits_BlV.float().softmax(dim=-1) / noise.to(logits_BlV.device)).argmax(dim=-1)


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
        largest: FlexVAR's side above which a step is larger than those trained on; None for the largest of
            the model's own.
        forced: what is known of the images.

    Returns:
        tokens (B, L) and the latent (B, C, h, w) for the decoder.

    Raises:
        ConfigError: steps that the family cannot have, smoothing of next-token models.
    """
    config, batch = model.config, len(labels_B)
    family, steps = FAMILIES[config.family], config.sizes if sizes is None else tuple(sizes)
    require(not smooth or family.guidance is None, f"{config.family} feeds tokens back: none to smooth")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    both, largest = guidance > 0, config.scales[-1] if largest is None else largest
    null_B = torch.full_like(labels_B, config.num_classes)
    decoding = model.begin(torch.cat([labels_B, null_B]) if both else labels_B, steps)
    feed = family.feed(quantizer, batch, steps)
    form = family.guidance or guidance_form
    inputs: Tensor | None = None
    tokens, start = [], 0
    for chunk, count in enumerate(model.chunks(steps)):
        doubled = torch.cat([inputs, inputs]) if both and inputs is not None else inputs
        logits_BlV = model.extend(decoding, doubled)
        beyond = config.family in FLEXIBLE and max(steps[chunk]) > largest
        progress = 1.0 if beyond else ramp(config, len(steps), chunk)
        if both:
            weight = guidance * (progress if form == "ramp" else 1.0)
            logits_BlV = (1 + weight) * logits_BlV[:batch] - weight * logits_BlV[batch:]
        kept_BlV = keep_top(logits_BlV, 1 if beyond else top_k, top_p)
        ids_Bl = draw(kept_BlV, generators)
        if forced is not None:
            known = slice(start, start + count)
            ids_Bl = torch.where(forced.keep_BL[:, known], forced.tokens_BL[:, known], ids_Bl)
        codes_BlC = quantizer.codes(ids_Bl)
        if smooth:
            mixed_BlC = _smoothed(kept_BlV, quantizer, progress, generators)
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


def _smoothed(
    logits_BlV: Tensor, quantizer: Quantizer, progress: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Codes (B, l, C) mixed by softmax((logits·(1 + progress) + Gumbel noise) / temperature)."""
    temperature = max(SMOOTHEST * (1 - 0.95 * progress), SHARPEST)
    noise = torch.stack([torch.empty(logits_BlV.shape[1:]).exponential_(generator=g) for g in generators])
    noisy_BlV = logits_BlV.float() * (1 + progress) - noise.log().to(logits_BlV.device)
    ids_V = torch.arange(logits_BlV.shape[-1], device=logits_BlV.device)
    return (noisy_BlV / temperature).softmax(dim=-1) @ quantizer.codes(ids_V)


def sample_images(
    model: FamilyModel,
    tokenizer: Tokenizer,
    classes: Sequence[int],
    sampling: SamplingConfig,
    batch: int = 32,
    sizes: Sequence[Size] | None = None,
) -> Tensor:
    """Images (n, 3, H, W) in [−1, 1], one per class given; image i has seed ``sampling.seed + i``."""
    device = next(tokenizer.parameters()).device
    images = []
    for start in range(0, len(classes), batch):
        labels_B = torch.tensor(list(classes[start : start + batch]), device=device)
        seeds = [sampling.seed + start + i for i in range(len(labels_B))]
        _, latent_BCHW = sample_tokens(
            model, tokenizer.quantize, labels_B, seeds,
            guidance=sampling.guidance, guidance_form=sampling.guidance_form,
            top_k=sampling.top_k, top_p=sampling.top_p, sizes=sizes,
        )  # fmt: skip
        with torch.no_grad():
            images.append(tokenizer.decode_features(latent_BCHW).clamp(-1, 1).cpu())
    return torch.cat(images)


def sample_grid(
    model: FamilyModel, tokenizer: Tokenizer, sampling: SamplingConfig, num_classes: int, target: Path
) -> None:
    """Write a PNG grid of ``sampling.images`` samples, the classes in turn."""
    classes = [i % num_classes for i in range(sampling.images)]
    image_grid(sample_images(model, tokenizer, classes, sampling)).save(target)


def sample_run(
    run_folder: Path,
    tokenizer_folder: Path,
    *,
    classes: Sequence[int] | None,
    count: int,
    seed: int,
    cfg: float,
    top_k: int,
    top_p: float,
    out: Path,
) -> Path:
    """Sample ``count`` images from a finished run: PNGs and ``grid.png`` in the folder ``out``.

    Args:
        classes: class ids, repeated in turn; all classes in turn when None.

    Raises:
        ConfigError: a class that the run does not have.
        RecordsError: the run is not finished.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = open_model(run_folder, tokenizer_folder, device)
    known = opened.model.config.num_classes
    chosen = list(classes) if classes else list(range(known))
    for label in chosen:
        if not 0 <= label < known:
            raise ConfigError(f"class {label} is not one of the run's {known} classes (0 to {known - 1})")
    sampling = SamplingConfig(images=count, guidance=cfg, top_k=top_k, top_p=top_p, seed=seed)
    labels = [chosen[i % len(chosen)] for i in range(count)]
    images = sample_images(opened.model, opened.tokenizer, labels, sampling)
    out.mkdir(parents=True, exist_ok=True)
    for i, (label, image) in enumerate(zip(labels, images, strict=True)):
        image_grid(image[None]).save(out / f"{i:05d}-class{label}-seed{seed + i}.png")
    grid = out / "grid.png"
    image_grid(images).save(grid)
    return grid
