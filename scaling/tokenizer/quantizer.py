"""What every quantiser offers, and multi-scale residual quantisation (VAR algorithms 1 and 2).

Design choices
- Models, sampling and the token cache know the interface, ``Quantizer``, only: tokens of all steps coarse
  to fine, the inputs that teacher forcing gives, and the same inputs step by step while sampling.
- ``sizes`` are the steps (h, w) of one image; None means the tokenizer's own scales. Whatever was trained
  serves other schedules, rectangular ones too.
- Residual: one codebook for all scales. Scale k quantises what the scales before it left over: the
  residual, area-averaged to the scale's size, to the nearest code; the codes, upsampled
  (bicubic) and smoothed by φ_k, are then taken off the residual and added to f_hat.
- The last scale has the latent's size and is resized neither down nor up.
- φ(h) = (1 − r)·h + r·conv(h), r = ``phi_ratio``. Which φ serves scale k is the nearest of
  evenly spread ticks to k/(K − 1); the four shared ones of the published model have ticks of
  their own, 1/12 … 11/12.
- Quantisation runs in float32 whatever autocast says: a token is an argmin over distances.

Shapes: B batch, C latent channels, H W the latent's sides, h w one scale's, L = Σ h·w tokens,
l one scale's tokens, N vectors, V codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling.config import TokenizerConfig

Size = tuple[int, int]
DISTANCES_AT_ONCE = 2**26
"""256 MiB of them, and as much again beside."""


@dataclass(frozen=True)
class Quantized:
    """What one training forward pass gives.

    ``features`` (B, C, H, W) is what the decoder gets, with the straight-through gradient, and ``smaller``
    what it gets too where steps are decoded by themselves; ``loss`` the VQ loss; ``tokens`` (B, L) the codes
    chosen; ``vectors`` per step what was quantised (B·h·w, C).
    """

    features: Tensor
    loss: Tensor
    tokens: Tensor
    vectors: tuple[Tensor, ...]
    smaller: tuple[Tensor, ...] = ()


class Quantizer(nn.Module):
    """Features to tokens of all steps and back; the interface of every quantiser.

    Args:
        config: vocabulary, latent channels, scales.
    """

    embedding: nn.Embedding

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes: tuple[Size, ...] = tuple((s, s) for s in config.scales)

    def encode(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> Tensor:
        """The tokens (B, L) int64 of features, coarse to fine."""
        raise NotImplementedError

    def codes(self, tokens: Tensor) -> Tensor:
        """Codebook vectors of tokens of any shape: (..., C)."""
        raise NotImplementedError

    def advance(
        self, k: int, state_BCHW: Tensor, codes_BChw: Tensor, sizes: Sequence[Size] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Take in the codes of step k, while sampling.

        Returns:
            the new state (B, C, H, W), a latent of the last size, and the transformer's next input
            (B, C, h, w) of the next step's size, or None after the last step.
        """
        raise NotImplementedError

    def cumulative_features(self, tokens_BL: Tensor, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Per step, what the decoder gets when the tokens end there; the last is ``features``."""
        raise NotImplementedError

    def forward(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> Quantized:
        """Quantise with gradients."""
        raise NotImplementedError

    def unquantised(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> tuple[Tensor, ...]:
        """What the decoder would get of a codebook that holds every vector; the last of the last size."""
        raise NotImplementedError

    def vectors(self, k: int, f_BCHW: Tensor) -> Tensor:
        """What step k quantises of features that the steps before it left over: vectors (B·h·w, C)."""
        raise NotImplementedError

    def left_over(self, k: int, f_BCHW: Tensor, vectors_NC: Tensor, codebook_VC: Tensor) -> Tensor:
        """The features (B, C, H, W) that steps after k quantise, when k quantised with another codebook."""
        raise NotImplementedError

    def start(self, batch: int, sizes: Sequence[Size] | None = None) -> Tensor:
        """The state before the first step: zeros (B, C, H, W) of the last size."""
        side = (sizes or self.sizes)[-1]
        weight = self.embedding.weight
        return weight.new_zeros(batch, self.config.latent_channels, *side, dtype=torch.float32)

    def features(self, tokens_BL: Tensor, sizes: Sequence[Size] | None = None) -> Tensor:
        """What the decoder makes an image of (B, C, H, W), from all steps' tokens."""
        return self.cumulative_features(tokens_BL, sizes)[-1]

    def teacher_inputs(self, tokens_BL: Tensor, sizes: Sequence[Size] | None = None) -> Tensor:
        """The transformer's inputs for steps 2 … K under teacher forcing: (B, L − first, C) float32.

        Position by position what ``advance`` gives as the next input; none stands on the last step's tokens.
        """
        inputs = [tokens_BL.new_zeros(len(tokens_BL), 0, self.config.latent_channels, dtype=torch.float32)]
        with torch.autocast(tokens_BL.device.type, enabled=False):
            for next_BChw in self._inputs(tokens_BL, sizes or self.sizes):
                inputs.append(next_BChw.flatten(2).mT)
        return torch.cat(inputs, dim=1)

    def _inputs(self, tokens_BL: Tensor, sizes: Sequence[Size]) -> Iterator[Tensor]:
        """The inputs (B, C, h, w) of steps 2 … K."""
        raise NotImplementedError

    def _codes_by_step(self, tokens_BL: Tensor, sizes: Sequence[Size]) -> Iterator[Tensor]:
        """Each step's codes (B, C, h, w)."""
        counts = [h * w for h, w in sizes]
        if tokens_BL.shape[1] != sum(counts):
            raise ValueError(f"expected {sum(counts)} tokens per image, got {tokens_BL.shape[1]}")
        for size, tokens_Bl in zip(sizes, tokens_BL.split(counts, dim=1), strict=True):
            yield self.codes(tokens_Bl).mT.unflatten(2, size)


class Phi(nn.Conv2d):
    """φ(h) = (1 − r)·h + r·conv3×3(h): mends what upsampling loses."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return h_BCHW * (1 - self.ratio) + super().forward(h_BCHW) * self.ratio


class SharedPhi(nn.Module):
    """One φ for all scales."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.qresi = Phi(channels, ratio)

    def at(self, position: float) -> Phi:
        """The φ of the scale at ``position``, 0 (coarsest) to 1 (finest)."""
        return self.qresi


class TickedPhis(nn.Module):
    """Several φ, each serving the scales nearest to its tick."""

    def __init__(self, count: int, channels: int, ratio: float) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels, ratio) for _ in range(count))

    def at(self, position: float) -> Phi:
        """The φ of the scale at ``position``, 0 (coarsest) to 1 (finest)."""
        phi = self.qresi_ls[nearest_tick(len(self.qresi_ls), position)]
        assert isinstance(phi, Phi)
        return phi


class OwnPhis(nn.ModuleList):
    """One φ per scale; published under keys without ``qresi_ls``."""

    def __init__(self, count: int, channels: int, ratio: float) -> None:
        super().__init__(Phi(channels, ratio) for _ in range(count))

    def at(self, position: float) -> Phi:
        """The φ of the scale at ``position``, 0 (coarsest) to 1 (finest)."""
        phi = self[nearest_tick(len(self), position)]
        assert isinstance(phi, Phi)
        return phi


def nearest_tick(count: int, position: float) -> int:
    """Index of the tick nearest to ``position`` (0 to 1) among ``count``.

    In NumPy's float64, as published: some scales lie half-way between two ticks, where rounding decides.
    """
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(margin, 1 - margin, count)
    return int(np.argmin(np.abs(ticks - position)))


class MultiScaleQuantizer(Quantizer):
    """Residual: every scale adds to f_hat what the scales before it left over.

    Args:
        config: vocabulary, latent channels, scales, φ and β.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        channels, ratio = config.latent_channels, config.phi_ratio
        self.quant_resi: SharedPhi | TickedPhis | OwnPhis
        if config.phis == 1:
            self.quant_resi = SharedPhi(channels, ratio)
        elif config.phis == 0:
            self.quant_resi = OwnPhis(len(config.scales), channels, ratio)
        else:
            self.quant_resi = TickedPhis(config.phis, channels, ratio)
        self.embedding = nn.Embedding(config.vocab, channels)

    # -- tokens ------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> Tensor:
        """The tokens (B, L) int64 of features, coarse to fine (VAR algorithm 1).

        Args:
            f_BCHW: features of the encoder.
            sizes: another schedule of (h, w) than the config's; the last must be the features' size.
        """
        steps = self._residual_steps(f_BCHW, sizes or self.sizes)
        return torch.cat([tokens_Bl for tokens_Bl, _, _ in steps], dim=1)

    def codes(self, tokens: Tensor) -> Tensor:
        """Codebook vectors of tokens of any shape: (..., C)."""
        vectors: Tensor = self.embedding(tokens)
        return vectors

    # -- features ----------------------------------------------------------------------------

    def advance(
        self, k: int, state_BCHW: Tensor, codes_BChw: Tensor, sizes: Sequence[Size] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Add scale k's codes to f_hat (one step of VAR algorithm 2).

        Returns:
            the new f_hat (B, C, H, W), and it area-averaged to the next scale's size, or None after the
            last scale.
        """
        sizes = sizes or self.sizes
        f_hat_BCHW = state_BCHW + self._contribution(k, codes_BChw, sizes)
        if k == len(sizes) - 1:
            return f_hat_BCHW, None
        return f_hat_BCHW, F.interpolate(f_hat_BCHW, sizes[k + 1], mode="area")

    def cumulative_features(self, tokens_BL: Tensor, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """f_hat (B, C, H, W) after each scale; the last is ``features``."""
        return [f_hat_BCHW for f_hat_BCHW, _ in self._replay(tokens_BL, sizes or self.sizes)]

    def _inputs(self, tokens_BL: Tensor, sizes: Sequence[Size]) -> Iterator[Tensor]:
        steps = self._replay(tokens_BL, sizes)
        for _ in sizes[1:]:
            _, next_BChw = next(steps)
            assert next_BChw is not None
            yield next_BChw

    def _replay(self, tokens_BL: Tensor, sizes: Sequence[Size]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Per scale, what ``advance`` returns."""
        f_hat_BCHW = self.start(len(tokens_BL), sizes)
        for k, codes_BChw in enumerate(self._codes_by_step(tokens_BL, sizes)):
            f_hat_BCHW, next_BChw = self.advance(k, f_hat_BCHW, codes_BChw, sizes)
            yield f_hat_BCHW, next_BChw

    # -- training ----------------------------------------------------------------------------

    def forward(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> Quantized:
        """Quantise with gradients.

        loss = 1/K·Σ_k (β·|sg(f_hat_k) − f|² + |f_hat_k − sg(f)|²), |·|² the mean over elements and
        f_hat_k the sum of the first k scales; the gradient of f_hat goes straight to f.
        """
        sizes = sizes or self.sizes
        with torch.autocast(f_BCHW.device.type, enabled=False):
            f_BCHW = f_BCHW.float()
            target_BCHW = f_BCHW.detach()
            f_hat_BCHW, loss = torch.zeros_like(target_BCHW), torch.zeros((), device=f_BCHW.device)
            tokens, vectors = [], []
            for tokens_Bl, vectors_NC, h_BCHW in self._residual_steps(f_BCHW, sizes):
                f_hat_BCHW = f_hat_BCHW + h_BCHW
                commitment = F.mse_loss(f_hat_BCHW.detach(), f_BCHW)
                loss = loss + self.config.beta * commitment + F.mse_loss(f_hat_BCHW, target_BCHW)
                tokens.append(tokens_Bl)
                vectors.append(vectors_NC)
            straight_BCHW = (f_hat_BCHW.detach() - target_BCHW) + f_BCHW
        return Quantized(straight_BCHW, loss / len(sizes), torch.cat(tokens, dim=1), tuple(vectors))

    def unquantised(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> tuple[Tensor, ...]:
        """The features themselves."""
        return (f_BCHW,)

    def vectors(self, k: int, f_BCHW: Tensor) -> Tensor:
        """What scale k quantises of a residual: vectors (B·h·w, C)."""
        return vectors_of_size(f_BCHW, self.sizes[k])

    def left_over(self, k: int, f_BCHW: Tensor, vectors_NC: Tensor, codebook_VC: Tensor) -> Tensor:
        """The residual without what scale k adds to f_hat when it quantises ``vectors_NC``."""
        codes_NC = codebook_VC[nearest_codes(vectors_NC, codebook_VC)]
        codes_BChw = codes_NC.unflatten(0, (-1, *self.sizes[k])).permute(0, 3, 1, 2)
        return f_BCHW - self._contribution(k, codes_BChw, self.sizes)

    # -- the walk of encoding --------------------------------------------------------------------

    def _residual_steps(
        self, f_BCHW: Tensor, sizes: Sequence[Size]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per scale: tokens (B, h·w), the vectors quantised (B·h·w, C), φ(upsampled codes) (B, C, H, W)."""
        B, _, H, W = f_BCHW.shape
        if sizes[-1] != (H, W):
            raise ValueError(f"the last scale is {sizes[-1]} but the features are {(H, W)}")
        residual_BCHW = f_BCHW.detach().float()
        for k, (h, w) in enumerate(sizes):
            vectors_NC = vectors_of_size(residual_BCHW, (h, w))
            tokens_N = nearest_codes(vectors_NC, self.embedding.weight)
            codes_BChw = self.codes(tokens_N.view(B, h, w)).permute(0, 3, 1, 2)
            h_BCHW = self._contribution(k, codes_BChw, sizes)
            residual_BCHW = residual_BCHW - h_BCHW.detach()
            yield tokens_N.view(B, h * w), vectors_NC, h_BCHW

    def _contribution(self, k: int, codes_BChw: Tensor, sizes: Sequence[Size]) -> Tensor:
        """φ_k of scale k's codes, upsampled to the latent's size unless it is the last scale."""
        last = len(sizes) - 1
        if k != last:
            codes_BChw = F.interpolate(codes_BChw, sizes[-1], mode="bicubic")
        phi = self.quant_resi.at(k / last if last else 0.0)
        out_BCHW: Tensor = phi(codes_BChw.contiguous())
        return out_BCHW


def vectors_of_size(f_BCHW: Tensor, size: Size) -> Tensor:
    """Features area-averaged to a step's size, as vectors (B·h·w, C)."""
    if f_BCHW.shape[2:] != size:
        f_BCHW = F.interpolate(f_BCHW, size, mode="area")
    return f_BCHW.permute(0, 2, 3, 1).reshape(-1, f_BCHW.shape[1])


@torch.no_grad()
def nearest_codes(vectors_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Index (N,) of the code nearest to each vector in squared distance |x|² − 2·x·c + |c|²."""
    norms_V = codebook_VC.square().sum(1)

    def nearest(part_nC: Tensor) -> Tensor:
        distances_nV = part_nC.square().sum(1, keepdim=True) + norms_V
        return torch.addmm(distances_nV, part_nC, codebook_VC.T, alpha=-2).argmin(1)

    # In parts: all distances of the vectors that seed a large codebook would not fit into memory.
    return torch.cat(
        [nearest(part_nC) for part_nC in vectors_NC.split(max(1, DISTANCES_AT_ONCE // len(codebook_VC)))]
    )
