"""What a tokenizer is and how it is trained: frozen dataclasses, imported from ``scaling.config``.

- ``TokenizerConfig`` is the network's shape, ``TokenizerTrainConfig`` stage 1.
- Weights that the user brings (LPIPS) are told apart by their content: where the file lies is no part of
  what a tokenizer is, and the file's name says nothing of what is in it.
- No torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from scaling.schema import ConfigError, require

PAPER_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
LPIPS_KEY = "tokenizer_train.lpips_weights"
Precision = Literal["fp32", "bf16", "fp16"]


def check_betas(betas: tuple[float, float], name: str) -> None:
    """``ConfigError`` unless Adam can work with them."""
    require(all(0 <= beta < 1 for beta in betas), f"{name} must be in [0, 1), got {list(betas)}")


@dataclass(frozen=True)
class TokenizerConfig:
    """A VQVAE with tokens of several sizes.

    residual: every scale quantises what the scales before it left over (VAR algorithms 1 and 2).
    scalable: every scale quantises the latent by itself (FlexVAR); a model takes any of them that end with
    the last, and one scale alone is a plain VQVAE.
    """

    vocab: int = 4096
    latent_channels: int = 32
    channels: int = 160
    """Channels of the first convolution, a multiple of ``norm_groups``."""
    norm_groups: int = 32
    """Groups of the group norms; with as many as channels, a norm would wipe out every channel's mean."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels per resolution in units of ``channels``; downsampling is 2^(len − 1)."""
    res_blocks: int = 2
    scales: tuple[int, ...] = PAPER_SCALES
    """Side lengths of the token maps, coarse to fine; the last is the latent's side."""
    phis: int = 4
    """φ convolutions: 0 one per scale, 1 shared by all, n shared by nearest tick."""
    phi_ratio: float = 0.5
    beta: float = 0.25
    """Weight of the commitment term beside the codebook term."""
    quantizer: Literal["residual", "scalable"] = field(default="residual", metadata={"added": True})
    """residual, or scalable: without φ, codes of unit length, quant convolutions 1×1 instead of 3×3."""
    z_channels: int | None = field(default=None, metadata={"added": True})
    """Channels between encoder and quant convolution, and back; None for ``latent_channels``."""
    encode_precision: Literal["fp32", "bf16"] = field(default="fp32", metadata={"added": True})
    """Of the encoder when images become tokens. bf16 is faster and gives some tokens another id, so that it
    is another tokenizer."""

    def __post_init__(self) -> None:
        require(2 <= self.vocab <= 65536, f"tokenizer.vocab must be 2 to 65536 (uint16), got {self.vocab}")
        require(
            self.norm_groups > 0 and self.channels > 0 and self.channels % self.norm_groups == 0,
            f"tokenizer.channels must be a multiple of norm_groups {self.norm_groups}, got {self.channels}",
        )
        require(
            len(self.multipliers) >= 1 and all(m > 0 for m in self.multipliers),
            "tokenizer.multipliers must be positive",
        )
        require(
            len(self.scales) >= 1 and all(s > 0 for s in self.scales),
            "tokenizer.scales must be positive side lengths",
        )
        require(
            all(a < b for a, b in zip(self.scales, self.scales[1:], strict=False)),
            f"tokenizer.scales must grow, got {list(self.scales)}",
        )
        require(0.0 <= self.phi_ratio <= 1.0, f"tokenizer.phi_ratio must be 0 to 1, got {self.phi_ratio}")
        require(self.phis >= 0, f"tokenizer.phis must be 0 or more, got {self.phis}")
        require(
            self.latent_channels >= 1,
            f"tokenizer.latent_channels must be at least 1, got {self.latent_channels}",
        )
        require(
            self.z_channels is None or self.z_channels >= 1,
            f"tokenizer.z_channels must be at least 1, got {self.z_channels}",
        )
        require(self.res_blocks >= 1, f"tokenizer.res_blocks must be at least 1, got {self.res_blocks}")

    def effective(self) -> TokenizerConfig:
        """With what a scalable tokenizer, which has no φ, does not use at its default."""
        if self.quantizer == "residual":
            return self
        return replace(self, phis=TokenizerConfig.phis, phi_ratio=TokenizerConfig.phi_ratio)

    @property
    def z_width(self) -> int:
        """Channels that the encoder gives and the decoder takes."""
        return self.latent_channels if self.z_channels is None else self.z_channels

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position, along a side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def seq_len(self) -> int:
        """Tokens per image, Σ side²."""
        return sum(s * s for s in self.scales)


@dataclass(frozen=True)
class AdversarialConfig:
    """The PatchGAN term of stage 1: hinge loss, weight adapted to the last decoder layer's gradients."""

    weight: float = 0.0
    """0 turns it off."""
    start: int = 0
    """First step on which the generator sees it."""
    lr: float = 1e-4
    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"adversarial.weight must not be negative, got {self.weight}")


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """Stage 1: how the tokenizer is trained."""

    steps: int = 1000
    batch: int = 64
    lr: float = 4e-4
    warmup: int = 50
    lr_end: float = 0.1
    """Cosine to this share of ``lr``."""
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.0
    clip: float = 1.0
    pixel_l1: float = 0.2
    pixel_l2: float = 1.0
    codebook: float = 1.0
    """Weight of the vector-quantisation loss (codebook + β·commitment)."""
    entropy: float = field(default=0.0, metadata={"added": True})
    """Scalable: weight of the entropy term, which makes vectors sure of their code and all codes used."""
    random_sizes: int = field(default=5, metadata={"added": True})
    """Scalable: how many smaller sizes of the latent are reconstructed in a step, beside the full one."""
    perceptual: float = 1.0
    """Weight of LPIPS; off, with a word in the log, while ``lpips_weights`` is not given."""
    lpips_weights: str | None = field(default=None, metadata={"identity": False})
    """A file (safetensors or .pth), or a folder of them, with VGG-16 and LPIPS linear weights, brought by
    the user. Not part of the tokenizer's identity: the same file may be moved."""
    lpips_sha256: str | None = field(default=None, metadata={"identity": "lpips_weights"})
    """What is in it; filled in from ``lpips_weights`` before a tokenizer is planned, when it is not given."""
    adversarial: AdversarialConfig = AdversarialConfig()
    autoencode_steps: int = 0
    """Steps without quantisation at the start; then the codebook is seeded from features worth quantising."""
    revive_every: int = 50
    """Every so many steps codes that were not used since are moved onto data; 0 never."""
    revive_until: float = 0.8
    """No more revivals after this share of training, so that the codebook settles."""
    precision: Precision = "fp32"
    log_every: int = 20
    checkpoint_every: int = 200
    eval_images: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"tokenizer_train.steps must be at least 1, got {self.steps}")
        require(self.batch >= 1, f"tokenizer_train.batch must be at least 1, got {self.batch}")
        require(self.clip > 0, f"tokenizer_train.clip must be positive, got {self.clip}")
        require(self.seed >= 0, f"tokenizer_train.seed must not be negative, got {self.seed}")
        check_betas(self.betas, "tokenizer_train.betas")
        for name in ("log_every", "checkpoint_every", "eval_images"):
            require(
                getattr(self, name) >= 1,
                f"tokenizer_train.{name} must be at least 1, got {getattr(self, name)}",
            )
        for name in (
            "revive_every",
            "warmup",
            "weight_decay",
            "pixel_l1",
            "pixel_l2",
            "codebook",
            "entropy",
            "random_sizes",
            "perceptual",
        ):
            require(
                getattr(self, name) >= 0,
                f"tokenizer_train.{name} must not be negative, got {getattr(self, name)}",
            )
        require(
            0 <= self.autoencode_steps < self.steps,
            f"tokenizer_train.autoencode_steps must be 0 to steps - 1, got {self.autoencode_steps}",
        )
        require(self.lr > 0, f"tokenizer_train.lr must be positive, got {self.lr}")
        if self.lpips_sha256 is not None:
            # It stands for the weights in the identity: alone it would name a tokenizer trained without them.
            require(
                self.lpips_weights is not None,
                "tokenizer_train.lpips_sha256 is given without tokenizer_train.lpips_weights, the file",
            )
            object.__setattr__(self, "lpips_sha256", self.lpips_sha256.lower())
            require(
                re.fullmatch("[0-9a-f]{64}", self.lpips_sha256) is not None,
                f"tokenizer_train.lpips_sha256 must be 64 hexadecimal digits, got '{self.lpips_sha256}'",
            )

    def effective_for(self, tokenizer: TokenizerConfig) -> TokenizerTrainConfig:
        """With what the training of ``tokenizer`` does not use at its default."""
        if tokenizer.quantizer == "scalable":
            return self
        return replace(
            self, entropy=TokenizerTrainConfig.entropy, random_sizes=TokenizerTrainConfig.random_sizes
        )

    def resolved(self) -> TokenizerTrainConfig:
        """With the checksum of ``lpips_weights`` and its absolute path.

        Weights whose checksum is given are not looked at: a plan can be made before they are at hand.

        Raises:
            ConfigError: no such file.
        """
        if self.lpips_weights is None:
            return self
        path = Path(self.lpips_weights).expanduser().absolute()
        digest = self.lpips_sha256 or lpips_digest(lpips_files(path))
        return replace(self, lpips_weights=str(path), lpips_sha256=digest)


def lpips_files(path: Path) -> list[Path]:
    """The files of LPIPS weights: the one, or all of a folder, by name.

    Raises:
        ConfigError: no such file, or none in the folder.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pth"))
        require(len(files) > 0, f"{LPIPS_KEY}: {path}: no .safetensors and no .pth file in this folder")
    require(files[0].is_file(), f"{LPIPS_KEY}: {path}: no such file")
    return files


def lpips_digest(files: Sequence[Path]) -> str:
    """SHA-256 (hex) of a file; of several, of their checksums in this order.

    Raises:
        ConfigError: a file that cannot be read.
    """
    digests = []
    for path in files:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise ConfigError(f"{LPIPS_KEY}: {path}: not readable ({error.strerror})") from None
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
