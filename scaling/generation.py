"""Sampling images from a trained transformer, scale by scale with a key-value cache.

- Guidance as published: the weight t = guidance·k/(K−1) rises over the scales, and
  logits = (1 + t)·conditional − t·unconditional; 0 runs without the unconditional half.
- Every image has its own generator on the CPU, so its picture does not depend on the batch
  it is drawn in or on the device's random numbers.

Shapes: B images, l tokens of one scale, V vocabulary, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from scaling.config import ConfigError, RunConfig, SamplingConfig, from_dict
from scaling.families.registry import build
from scaling.families.var import VAR
from scaling.pictures import image_grid
from scaling.records import RecordsError, RunFolder
from scaling.tokenizer.quantizer import Quantizer
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer


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


@torch.no_grad()
def sample_tokens(
    model: VAR,
    quantizer: Quantizer,
    labels_B: Tensor,
    seeds: Sequence[int],
    *,
    guidance: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sample one image per label.

    Returns:
        tokens (B, L) and the reconstructed latent f_hat (B, C, side, side).
    """
    config, device = model.config, labels_B.device
    batch, count = len(labels_B), len(config.scales)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    both = guidance > 0
    null_B = torch.full_like(labels_B, config.num_classes)
    cond_BW, caches = model.begin(torch.cat([labels_B, null_B]) if both else labels_B)
    side = config.scales[-1]
    f_hat = torch.zeros(batch, config.latent_channels, side, side, device=device)
    inputs_BlC: Tensor | None = None
    tokens = []
    for scale, edge in enumerate(config.scales):
        doubled = torch.cat([inputs_BlC, inputs_BlC]) if both and inputs_BlC is not None else inputs_BlC
        logits_BlV = model.extend(scale, cond_BW, caches, doubled)
        if both:
            weight = guidance * scale / max(1, count - 1)
            logits_BlV = (1 + weight) * logits_BlV[:batch] - weight * logits_BlV[batch:]
        ids_Bl = draw(keep_top(logits_BlV, top_k, top_p), generators)
        tokens.append(ids_Bl)
        codes_BChw = quantizer.codes(ids_Bl).transpose(1, 2).unflatten(-1, (edge, edge))
        f_hat, next_BChw = quantizer.advance(scale, f_hat, codes_BChw)
        inputs_BlC = None if next_BChw is None else next_BChw.flatten(2).transpose(1, 2)
    return torch.cat(tokens, dim=1), f_hat


def sample_images(
    model: VAR, tokenizer: Tokenizer, classes: Sequence[int], sampling: SamplingConfig, batch: int = 32
) -> Tensor:
    """Images (n, 3, H, W) in [−1, 1], one per class given; image i has seed ``sampling.seed + i``."""
    device = next(model.parameters()).device
    quantizer, images = tokenizer.quantize, []
    for start in range(0, len(classes), batch):
        labels_B = torch.tensor(list(classes[start : start + batch]), device=device)
        seeds = [sampling.seed + start + i for i in range(len(labels_B))]
        _, f_hat = sample_tokens(
            model, quantizer, labels_B, seeds,
            guidance=sampling.guidance, top_k=sampling.top_k, top_p=sampling.top_p,
        )  # fmt: skip
        with torch.no_grad():
            images.append(tokenizer.decode_features(f_hat).cpu())
    return torch.cat(images)


def sample_grid(
    model: VAR, tokenizer: Tokenizer, sampling: SamplingConfig, num_classes: int, target: Path
) -> None:
    """Write a PNG grid of ``sampling.images`` samples, the classes in turn."""
    classes = [i % num_classes for i in range(sampling.images)]
    tokenizer.to(next(model.parameters()).device)
    image_grid(sample_images(model, tokenizer, classes, sampling)).save(target)


def load_model(run: RunFolder) -> tuple[VAR, RunConfig]:
    """The trained model of a finished run, in evaluation mode.

    Raises:
        RecordsError: the run has no final weights yet.
    """
    config = from_dict(RunConfig, run.config())
    weights = run.path / "final" / "weights.safetensors"
    if not weights.exists():
        raise RecordsError(f"{run.path} has no final weights yet (state: {run.status()['state']})")
    model = build(config.model)
    model.load_state_dict(load_file(weights))
    assert isinstance(model, VAR)
    return model.eval(), config


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
    model, config = load_model(RunFolder(run_folder))
    known = config.model.num_classes
    chosen = list(classes) if classes else list(range(known))
    for label in chosen:
        if not 0 <= label < known:
            raise ConfigError(f"class {label} is not one of the run's {known} classes (0 to {known - 1})")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = model.to(device), load_tokenizer(tokenizer_folder / "tokenizer").to(device)
    sampling = SamplingConfig(images=count, guidance=cfg, top_k=top_k, top_p=top_p, seed=seed)
    labels = [chosen[i % len(chosen)] for i in range(count)]
    images = sample_images(model, tokenizer, labels, sampling)
    out.mkdir(parents=True, exist_ok=True)
    for i, (label, image) in enumerate(zip(labels, images, strict=True)):
        image_grid(image[None]).save(out / f"{i:05d}-class{label}-seed{seed + i}.png")
    grid = out / "grid.png"
    image_grid(images).save(grid)
    return grid
