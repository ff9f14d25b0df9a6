"""Stage 1's moving parts and one optimiser step: tokenizer, discriminator, codebook care.

Design choices
- Gradients of all micro-batches are added up and then averaged over the processes in one flat tensor:
  the step is that of the whole global batch, however it is divided.
- λ, the adaptive weight of the adversarial term, is of the whole global batch too; it can only be known
  after every micro-batch was seen, so step s uses the λ measured in step s − 1.
- Before ``autoencode_steps`` nothing is quantised: features of an encoder that has seen nothing say
  little about where codes will be needed, and a codebook seeded from them leaves the coarse scales poor.
- Codes are counted over all processes in every step, so revival and logs are the same everywhere.
- Everything that the next step depends on is in ``tensors`` and ``state``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from scaling.checkpoint import Checkpoint, Tensors, optimizer_tensors, restore_module, restore_optimizer
from scaling.config import ConfigError, TokenizerRunConfig
from scaling.tokenizer.codebook import (
    forget_moments,
    hits,
    perplexity,
    revive,
    seeded_codebook,
    step_scales,
    usage,
)
from scaling.tokenizer.discriminator import PatchDiscriminator
from scaling.tokenizer.losses import adaptive_weight, hinge_discriminator, hinge_generator, learning_rate
from scaling.tokenizer.lpips import load_lpips
from scaling.tokenizer.metrics import at_size
from scaling.tokenizer.quantizer import Size
from scaling.tokenizer.scalable import ScalableQuantizer
from scaling.tokenizer.vqvae import Tokenizer

TERMS = ("loss", "pixel_l1", "pixel_l2", "vq", "entropy", "perceptual", "adversarial", "discriminator")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def not_finite(what: str) -> ConfigError:
    """That training cannot go on, and what to change."""
    return ConfigError(f"{what}; lower tokenizer_train.lr or use tokenizer_train.precision fp32")


class Stage1:
    """Everything that stage 1 trains, on the accelerator's device.

    Args:
        config: the run.
        accelerator: device and processes.

    Raises:
        ConfigError: LPIPS weights that cannot be read, images too small for the discriminator.
    """

    def __init__(self, config: TokenizerRunConfig, accelerator: Accelerator) -> None:
        train = config.train
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.perceptual: nn.Module | None = None
        if train.lpips_weights is not None and train.perceptual > 0:
            self.perceptual = load_lpips(train.lpips_weights, train.lpips_sha256).to(self.device)
        # The same initial weights on every process and whatever was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.seed)
            self.tokenizer = Tokenizer(config.tokenizer).to(self.device)
            self.discriminator: PatchDiscriminator | None = None
            if train.adversarial.weight > 0:
                judge = PatchDiscriminator(train.adversarial, config.data.resolution)
                self.discriminator = judge.to(self.device)
        self.optimizer = self._adam(self.tokenizer, train.lr, train.weight_decay)
        self.judge_optimizer = (
            self._adam(self.discriminator, train.adversarial.lr, 0.0) if self.discriminator else None
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        shape = (len(config.tokenizer.scales), config.tokenizer.vocab)
        self.hits_logged_KV = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.hits_revival_KV = torch.zeros_like(self.hits_logged_KV)
        self.sums = torch.zeros(len(TERMS), device=self.device)
        self.summed = 0
        self.weight = torch.zeros((), device=self.device)
        self.revived = 0

    def _adam(self, module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
        betas = self.config.train.betas
        return torch.optim.AdamW(
            module.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True
        )

    # -- one step ----------------------------------------------------------------------------

    def step(self, step: int, images_B3HW: Tensor, micro_batch: int | None) -> None:
        """One optimiser step on this process's share of the global batch.

        Args:
            step: counted from 0.
            images_B3HW: in [−1, 1].
            micro_batch: images per forward pass; None for all.
        """
        train, adversarial = self.config.train, self.config.train.adversarial
        quantise = step >= train.autoencode_steps
        judged = self.discriminator is not None and step >= adversarial.start
        # λ of the first judged step is measured in the step before it.
        measured = self.discriminator is not None and step >= adversarial.start - 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        self.optimizer.zero_grad()
        if self.judge_optimizer is not None:
            self.judge_optimizer.zero_grad()
        last_layer = self.tokenizer.decoder.conv_out.weight
        norms = torch.zeros(2, *last_layer.shape, device=self.device)
        sums, hits_KV = torch.zeros_like(self.sums), torch.zeros_like(self.hits_logged_KV)
        vectors: list[list[Tensor]] = []
        parts = images_B3HW.split(micro_batch or len(images_B3HW))
        used = step_scales(self.config.tokenizer, train, step)
        sizes = [self.tokenizer.quantize.sizes[k] for k in used]
        means = self._mean_probabilities(parts, sizes) if train.entropy > 0 and quantise else None
        for part_B3HW in parts:
            share = len(part_B3HW) / len(images_B3HW)
            with self._autocast():
                rebuilds, quantized = self.tokenizer(part_B3HW, quantise, sizes)
                rebuilds = [rebuild_B3hw.float() for rebuild_B3hw in rebuilds]
                reconstruction_B3HW = rebuilds[-1]
                terms = self._reconstruction_terms(part_B3HW, rebuilds)
                rebuilt = (
                    train.pixel_l1 * terms["pixel_l1"]
                    + train.pixel_l2 * terms["pixel_l2"]
                    + train.perceptual * terms["perceptual"]
                )
                loss = rebuilt if quantized is None else rebuilt + train.codebook * quantized.loss
                if quantized is not None and means is not None:
                    terms["entropy"] = self._entropy(quantized.vectors, means)
                    loss = loss + train.entropy * terms["entropy"]
                if measured:
                    generator = self._judge_frozen(reconstruction_B3HW)
                    for row, term in enumerate((rebuilt, generator)):
                        (gradient,) = torch.autograd.grad(term, last_layer, retain_graph=True)
                        norms[row] += share * gradient.float()
                    terms["adversarial"] = generator.detach()
                    if judged:
                        loss = loss + adversarial.weight * self.weight * generator
            self.scaler.scale(loss * share).backward()
            if judged:
                terms["discriminator"] = self._judge_backward(part_B3HW, reconstruction_B3HW.detach(), share)
            terms["loss"] = loss
            if quantized is not None:
                terms["vq"] = quantized.loss
                hits_KV[used] += hits(quantized.tokens, [h for h, _ in sizes], self.config.tokenizer.vocab)
                vectors.append([vectors_NC.detach() for vectors_NC in quantized.vectors])
            sums += share * torch.stack([terms.get(t, sums.new_zeros(())).detach() for t in TERMS])
        self._average([*self._gradients(), norms, sums])
        hits_KV = self._over_processes(hits_KV, "sum")
        if measured:
            self.weight = adaptive_weight(norms[0], norms[1])
        self._update(self.optimizer, self.tokenizer)
        if judged and self.judge_optimizer is not None and self.discriminator is not None:
            self._update(self.judge_optimizer, self.discriminator)
        self.scaler.update()
        self.sums += sums
        self.summed += 1
        self.hits_logged_KV += hits_KV
        self.hits_revival_KV += hits_KV
        if quantise and train.revive_every and (step + 1 - train.autoencode_steps) % train.revive_every == 0:
            self._revive(step, vectors)

    def _reconstruction_terms(self, images_B3HW: Tensor, rebuilds: Sequence[Tensor]) -> dict[str, Tensor]:
        """Pixel terms over all reconstructions, each against the image at its size; LPIPS at the full one.

        Every pixel weighs the same, whichever reconstruction it is of: on CIFAR-10 the full size gained
        0.5 dB over equal weights for all sizes, at the cost of the two smallest ones.
        """
        zero = torch.zeros((), device=self.device)
        terms = {"pixel_l1": zero, "pixel_l2": zero, "perceptual": zero}
        pixels = sum(rebuild_B3hw.shape[2:].numel() for rebuild_B3hw in rebuilds)
        for rebuild_B3hw in rebuilds:
            weight = rebuild_B3hw.shape[2:].numel() / pixels
            difference_B3hw = rebuild_B3hw - at_size(images_B3HW, rebuild_B3hw)
            terms["pixel_l1"] = terms["pixel_l1"] + weight * difference_B3hw.abs().mean()
            terms["pixel_l2"] = terms["pixel_l2"] + weight * difference_B3hw.square().mean()
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(images_B3HW, rebuilds[-1])
        return terms

    @torch.no_grad()
    def _mean_probabilities(self, parts: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """Per size how likely each code is, on average over the global batch."""
        quantizer, images = self.tokenizer.quantize, sum(len(part_B3HW) for part_B3HW in parts)
        assert isinstance(quantizer, ScalableQuantizer)
        total_KV = torch.zeros(len(sizes), quantizer.config.vocab, device=self.device)
        for part_B3HW in parts:
            with self._autocast():
                features_BCHW = self.tokenizer.encode_features(part_B3HW)
            means = quantizer.mean_probabilities(features_BCHW, sizes)
            total_KV += len(part_B3HW) / images * torch.stack(means)
        return list(self._over_processes(total_KV, "mean"))

    def _entropy(self, vectors: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
        quantizer = self.tokenizer.quantize
        assert isinstance(quantizer, ScalableQuantizer)
        with torch.autocast(self.device.type, enabled=False):
            return quantizer.entropy(vectors, means)

    def _judge_frozen(self, reconstruction_B3HW: Tensor) -> Tensor:
        """The generator's term; no gradient reaches the discriminator's weights."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        term = hinge_generator(self.discriminator(reconstruction_B3HW).float())
        self.discriminator.requires_grad_(True)
        return term

    def _judge_backward(self, images_B3HW: Tensor, reconstruction_B3HW: Tensor, share: float) -> Tensor:
        assert self.discriminator is not None
        with self._autocast():
            logits = self.discriminator(torch.cat([images_B3HW, reconstruction_B3HW])).float()
            real, fake = logits.chunk(2)
            loss = hinge_discriminator(real, fake)
        self.scaler.scale(loss * share).backward()
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.config.train.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _update(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(module.parameters(), self.config.train.clip)
        self.scaler.step(optimizer)

    # -- over processes ------------------------------------------------------------------------

    def _gradients(self) -> list[Tensor]:
        modules = [m for m in (self.tokenizer, self.discriminator) if m is not None]
        return [p.grad for module in modules for p in module.parameters() if p.grad is not None]

    def _average(self, tensors: list[Tensor]) -> None:
        """The mean over processes, in place, in one exchange."""
        if self.accelerator.num_processes == 1:
            return
        flat = self._over_processes(torch.cat([t.reshape(-1) for t in tensors]), "mean")
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def _over_processes(self, tensor: Tensor, reduction: str) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(tensor, reduction)
        return reduced

    def _gathered(self, vectors: Iterable[list[Tensor]]) -> list[Tensor]:
        """Per scale, the vectors of all micro-batches and processes, in the global batch's order."""
        scales = [torch.cat(parts) for parts in zip(*vectors, strict=True)]
        return [self.accelerator.gather(vectors_NC) for vectors_NC in scales]

    # -- the codebook ----------------------------------------------------------------------------

    @torch.no_grad()
    def seed_codebook(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Fit the codebook to images.

        Args:
            batches: this process's share of each, in micro-batches (b, 3, H, W) in [−1, 1].
        """
        shares = (torch.cat([self.tokenizer.encode_features(part) for part in parts]) for parts in batches)
        features = [self.accelerator.gather(share) for share in shares]
        book_VC = seeded_codebook(self.tokenizer.quantize, torch.cat(features), self.config.train.seed)
        # Sums over vectors may round differently on another GPU.
        self.tokenizer.quantize.embedding.weight.copy_(broadcast(book_VC))

    @torch.no_grad()
    def _revive(self, step: int, vectors: list[list[Tensor]]) -> None:
        train, codebook = self.config.train, self.tokenizer.quantize.embedding.weight
        if step + 1 <= train.revive_until * train.steps:
            unused_V = self.hits_revival_KV.sum(0) == 0
            rows = revive(codebook, unused_V, self._gathered(vectors), train.seed, step)
            forget_moments(self.optimizer, codebook, rows)
            self.revived += len(rows)
        self.hits_revival_KV.zero_()

    # -- logs ------------------------------------------------------------------------------------

    def logged(self, step: int) -> dict[str, Any]:
        """Means of the terms, and usage and perplexity per scale, since the last call.

        Raises:
            ConfigError: the loss is not finite any more.
        """
        means = dict(zip(TERMS, (self.sums / self.summed).tolist(), strict=True))
        if not torch.isfinite(self.sums).all():
            raise not_finite(f"the tokenizer's loss is not finite at step {step} (loss {means['loss']})")
        record: dict[str, Any] = dict(means)
        if self.config.train.entropy == 0:
            record["entropy"] = None
        if self.perceptual is None:
            record["perceptual"] = None
        if self.discriminator is None:
            record["adversarial"] = record["discriminator"] = None
        else:
            record["adversarial_weight"] = float(self.weight)
        record |= {
            "lr": learning_rate(self.config.train, step - 1),
            "usage_scales": usage(self.hits_logged_KV),
            "perplexity_scales": perplexity(self.hits_logged_KV),
            "codes_revived": self.revived,
        }
        self.sums.zero_()
        self.hits_logged_KV.zero_()
        self.summed = self.revived = 0
        return record

    # -- checkpoints -------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Groups of tensors that ``restore`` needs."""
        found = {
            "tokenizer": self.tokenizer.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, dict(self.tokenizer.named_parameters())),
            "counters": {
                "hits_logged": self.hits_logged_KV,
                "hits_revival": self.hits_revival_KV,
                "sums": self.sums,
                "weight": self.weight,
            },
        }
        if self.discriminator is not None and self.judge_optimizer is not None:
            names = dict(self.discriminator.named_parameters())
            found["discriminator"] = self.discriminator.state_dict()
            found["discriminator_optimizer"] = optimizer_tensors(self.judge_optimizer, names)
        return found

    def state(self) -> dict[str, Any]:
        """The rest of what ``restore`` needs, as JSON values."""
        return {"summed": self.summed, "revived": self.revived, "scaler": self.scaler.state_dict()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this run as if nothing had happened."""
        tensors = checkpoint.tensors
        restore_module(self.tokenizer, tensors["tokenizer"])
        restore_optimizer(self.optimizer, dict(self.tokenizer.named_parameters()), tensors["optimizer"])
        if self.discriminator is not None and self.judge_optimizer is not None:
            restore_module(self.discriminator, tensors["discriminator"])
            names = dict(self.discriminator.named_parameters())
            restore_optimizer(self.judge_optimizer, names, tensors["discriminator_optimizer"])
        counters = tensors["counters"]
        self.hits_logged_KV.copy_(counters["hits_logged"])
        self.hits_revival_KV.copy_(counters["hits_revival"])
        self.sums.copy_(counters["sums"])
        self.weight.copy_(counters["weight"])
        self.summed, self.revived = checkpoint.state["summed"], checkpoint.state["revived"]
        if checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
