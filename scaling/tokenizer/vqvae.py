"""The tokenizer: images to tokens of all scales and back, and its folder on disk.

Design choices
- Which quantiser stands in the middle is the config's; everything around it is the same, but for the
  quant convolutions: 3×3 around the residual one (as VAR's), 1×1 around the scalable one (as LlamaGen's).
- State-dict keys are those of VAR's published checkpoint (without ``ema_vocab_hit_SV``, a statistic
  of its training).
- ``sizes`` are other steps than the config's. Residual ones end at the latent's size; scalable ones may be
  any that are no larger, and the images any whose sides are multiples of the downsampling.
- The content hash is of the configuration and every weight's bytes, so a token cache can say
  exactly which tokenizer made it. It is computed, never stored on the object, and checked on load.

    <folder>/weights.safetensors    the weights
    <folder>/tokenizer.json         format, config, content_hash, facts; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scaling.config import ConfigError, TokenizerConfig, from_dict, identity, to_dict
from scaling.records import RecordsError, read_json, write_json
from scaling.tokenizer.networks import Decoder, Encoder
from scaling.tokenizer.quantizer import MultiScaleQuantizer, Quantized, Quantizer, Size
from scaling.tokenizer.scalable import ScalableQuantizer

FORMAT = "varscale-tokenizer-1"


class Tokenizer(nn.Module):
    """A VQVAE with tokens of several sizes: images (B, 3, H, W) in [−1, 1], tokens (B, L) coarse to fine.

    Args:
        config: its shape; ``config.scales`` must end at the latent's side, H / config.downsampling.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        scalable = config.quantizer == "scalable"
        self.quantize: Quantizer = ScalableQuantizer(config) if scalable else MultiScaleQuantizer(config)
        kernel = 1 if scalable else 3
        self.quant_conv = nn.Conv2d(config.z_width, config.latent_channels, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.z_width, kernel, padding=kernel // 2)

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return self.config.scales[-1] * self.config.downsampling

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the configuration and the weights as they are now."""
        digest = hashlib.sha256(json.dumps(identity(self.config), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def encode_features(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, C, H/f, W/f) before quantisation."""
        features_BCHW: Tensor = self.quant_conv(self.encoder(images_B3HW))
        return features_BCHW

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor, sizes: Sequence[Size] | None = None) -> Tensor:
        """Tokens (B, L) int64 of images.

        Args:
            images_B3HW: in [−1, 1].
            sizes: other steps (h, w) than the config's.

        Raises:
            ConfigError: images of a shape that this tokenizer, or these sizes, are not for.
        """
        self._check(images_B3HW, sizes)
        # Quantising is in fp32 always: bf16 would confuse codes that lie near each other.
        half = self.config.encode_precision == "bf16"
        with torch.autocast(images_B3HW.device.type, dtype=torch.bfloat16, enabled=half):
            features_BCHW = self.encode_features(images_B3HW)
        return self.quantize.encode(features_BCHW.float(), sizes)

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor, sizes: Sequence[Size] | None = None) -> Tensor:
        """Images (B, 3, H, W), clamped to [−1, 1], of tokens of the config's steps or of ``sizes``."""
        return self.decode_features(self.quantize.features(tokens_BL, sizes)).clamp(-1, 1)

    def decode_features(self, f_hat_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W), not clamped, of quantised features."""
        images_B3HW: Tensor = self.decoder(self.post_quant_conv(f_hat_BCHW))
        return images_B3HW

    def forward(
        self, images_B3HW: Tensor, quantise: bool = True, sizes: Sequence[Size] | None = None
    ) -> tuple[list[Tensor], Quantized | None]:
        """Reconstructions, not clamped, and the quantiser's result, with gradients.

        Args:
            images_B3HW: in [−1, 1].
            quantise: False reconstructs from the encoder's own features, as a plain autoencoder.
            sizes: other steps (h, w) than the config's.

        Returns:
            the reconstruction (B, 3, H, W), scalable: of every step (B, 3, h·f, w·f), the last at full size;
            and the quantiser's result.
        """
        self._check(images_B3HW, sizes)
        features_BCHW = self.encode_features(images_B3HW)
        if not quantise:
            steps = self.quantize.unquantised(features_BCHW, sizes)
            return [self.decode_features(f_BChw) for f_BChw in steps], None
        quantized: Quantized = self.quantize(features_BCHW, sizes)
        steps = (*quantized.smaller, quantized.features)
        return [self.decode_features(f_BChw) for f_BChw in steps], quantized

    def _check(self, images_B3HW: Tensor, sizes: Sequence[Size] | None) -> None:
        steps, factor, shape = sizes or self.quantize.sizes, self.config.downsampling, images_B3HW.shape[1:]
        name = f"tokenizer of scales {list(self.config.scales)} and downsampling {factor}"
        if self.config.quantizer == "scalable":
            h, w = (max(sides) for sides in zip(*steps, strict=True))
            fits = shape[0] == 3 and all(side % factor == 0 for side in shape[1:])
            if not fits or shape[1] < h * factor or shape[2] < w * factor:
                raise ConfigError(
                    f"{name} takes images of shape (3, height, width) whose sides are multiples of {factor} "
                    f"and at least {h * factor} and {w * factor} for these steps, got {tuple(shape)}"
                )
            return
        h, w = steps[-1]
        if shape != (3, h * factor, w * factor):
            raise ConfigError(
                f"{name} takes images of shape {(3, h * factor, w * factor)}"
                f"{f' for steps that end at {(h, w)}' if sizes else ''}, got {tuple(shape)}"
            )


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, facts: dict[str, Any]) -> str:
    """Write the tokenizer's folder; ``facts`` (JSON values) say how it was made. Returns the content hash.

    A kill at any instant leaves the old folder's files or the new; mixed ones are told by the hash.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    partial = root / ".weights.partial"
    save_file(weights, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(root / "weights.safetensors")
    content_hash = tokenizer.content_hash
    write_json(
        root / "tokenizer.json",
        {"format": FORMAT, "config": to_dict(tokenizer.config), "content_hash": content_hash, "facts": facts},
    )
    return content_hash


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder, in evaluation mode and without gradients.

    Raises:
        RecordsError: a file is missing, damaged, of another format, or not the other's partner.
    """
    root = Path(folder)
    description, file = read_json(root / "tokenizer.json"), root / "weights.safetensors"
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise RecordsError(f"{root / 'tokenizer.json'}: expected a tokenizer of format {FORMAT!r}")
    try:
        tokenizer = Tokenizer(from_dict(TokenizerConfig, description.get("config")))
    except ConfigError as error:
        raise RecordsError(f"{root / 'tokenizer.json'}: {error}") from None
    try:
        tokenizer.load_state_dict(load_file(file))
    except FileNotFoundError:
        raise RecordsError(f"{file}: no such file") from None
    except (SafetensorError, RuntimeError) as error:
        raise RecordsError(f"{file}: not the weights of this tokenizer ({error})") from None
    if tokenizer.content_hash != description.get("content_hash"):
        raise RecordsError(
            f"{root}: tokenizer.json and weights.safetensors do not belong together (content hash)"
        )
    return tokenizer.eval().requires_grad_(False)


def facts_of(folder: str | Path) -> dict[str, Any]:
    """The facts that ``save_tokenizer`` stored: steps, PSNR, SSIM, usage per scale, the data's identity."""
    facts = read_json(Path(folder) / "tokenizer.json").get("facts")
    if not isinstance(facts, dict):
        raise RecordsError(f"{Path(folder) / 'tokenizer.json'}: no facts in it")
    return facts
