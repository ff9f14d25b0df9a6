"""Multi-scale residual quantisation (VAR algorithms 1 and 2).

Design choices
- One codebook for all scales. Scale k quantises what the scales before it left over: the
  residual, area-averaged to the scale's size, to the nearest code; the codes, upsampled
  (bicubic) and smoothed by φ_k, are then taken off the residual and added to f_hat.
- The last scale has the latent's size and is resized neither down nor up.
- φ(h) = (1 − r)·h + r·conv(h), r = ``phi_ratio``. Which φ serves scale k is the nearest of
  evenly spread ticks to k/(K − 1); the four shared ones of the published model have ticks of
  their own, 1/12 … 11/12.
- Quantisation runs in float32 whatever autocast says: a token is an argmin over distances.
- ``sizes`` lets the trained φ and codebook serve other schedules, rectangular ones too.

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
VECTORS_AT_ONCE = 2**16


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


@dataclass(frozen=True)
class Quantized:
    """What one training forward pass gives.

    ``features`` (B, C, H, W) is f_hat with the straight-through gradient; ``loss`` the VQ loss; ``tokens``
    (B, L) the codes chosen; ``residuals`` per scale the vectors (B·h·w, C) that were quantised.
    """

    features: Tensor
    loss: Tensor
    tokens: Tensor
    residuals: tuple[Tensor, ...]


class MultiScaleQuantizer(nn.Module):
    """Features to tokens of all scales and back.

    Args:
        config: vocabulary, latent channels, scales, φ and β.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes: tuple[Size, ...] = tuple((s, s) for s in config.scales)
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

    def advance(self, k: int, f_hat_BCHW: Tensor, codes_BChw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add scale k's codes to ``f_hat`` (one step of VAR algorithm 2, used while sampling).

        Returns:
            the new f_hat (B, C, H, W), and it area-averaged to the next scale's size (the
            transformer's next input), or None after the last scale.
        """
        last = len(self.sizes) - 1
        f_hat_BCHW = f_hat_BCHW + self._contribution(k, codes_BChw, self.sizes)
        return f_hat_BCHW, None if k == last else F.interpolate(f_hat_BCHW, self.sizes[k + 1], mode="area")

    def cumulative_features(self, tokens_BL: Tensor) -> list[Tensor]:
        """f_hat (B, C, H, W) after each scale; the last is ``features``."""
        return [f_hat_BCHW for f_hat_BCHW, _ in self._replay(self._by_scale(tokens_BL))]

    def features(self, tokens_BL: Tensor) -> Tensor:
        """f_hat (B, C, H, W) of all scales' tokens (VAR algorithm 2)."""
        return self.cumulative_features(tokens_BL)[-1]

    def teacher_inputs(self, tokens_BL: Tensor) -> Tensor:
        """The transformer's inputs for scales 2 … K under teacher forcing: (B, L − first², C) float32.

        Position by position, the cumulative f_hat of the scales before, area-averaged to the scale's size.
        """
        inputs = [tokens_BL.new_zeros(len(tokens_BL), 0, self.config.latent_channels, dtype=torch.float32)]
        # No input stands on the last scale's tokens.
        for _, next_BChw in self._replay(self._by_scale(tokens_BL)[:-1]):
            assert next_BChw is not None
            inputs.append(next_BChw.flatten(2).mT)
        return torch.cat(inputs, dim=1)

    # -- training ----------------------------------------------------------------------------

    def forward(self, f_BCHW: Tensor) -> Quantized:
        """Quantise with gradients.

        loss = 1/K·Σ_k (β·|sg(f_hat_k) − f|² + |f_hat_k − sg(f)|²), |·|² the mean over elements and
        f_hat_k the sum of the first k scales; the gradient of f_hat goes straight to f.
        """
        with torch.autocast(f_BCHW.device.type, enabled=False):
            f_BCHW = f_BCHW.float()
            target_BCHW = f_BCHW.detach()
            f_hat_BCHW, loss = torch.zeros_like(target_BCHW), torch.zeros((), device=f_BCHW.device)
            tokens, residuals = [], []
            for tokens_Bl, residual_NC, h_BCHW in self._residual_steps(f_BCHW, self.sizes):
                f_hat_BCHW = f_hat_BCHW + h_BCHW
                commitment = F.mse_loss(f_hat_BCHW.detach(), f_BCHW)
                loss = loss + self.config.beta * commitment + F.mse_loss(f_hat_BCHW, target_BCHW)
                tokens.append(tokens_Bl)
                residuals.append(residual_NC)
            straight_BCHW = (f_hat_BCHW.detach() - target_BCHW) + f_BCHW
        return Quantized(straight_BCHW, loss / len(self.sizes), torch.cat(tokens, dim=1), tuple(residuals))

    def vectors(self, k: int, residual_BCHW: Tensor) -> Tensor:
        """What scale k quantises of a residual: vectors (B·h·w, C)."""
        return _vectors(residual_BCHW, self.sizes[k])

    def quantized(self, k: int, vectors_NC: Tensor, codebook_VC: Tensor) -> Tensor:
        """What scale k adds to f_hat (B, C, H, W) when it quantises ``vectors_NC`` with another codebook."""
        codes_NC = codebook_VC[nearest_codes(vectors_NC, codebook_VC)]
        h, w = self.sizes[k]
        codes_BChw = codes_NC.view(-1, h, w, codes_NC.shape[1]).permute(0, 3, 1, 2)
        return self._contribution(k, codes_BChw, self.sizes)

    # -- the two walks over the scales ---------------------------------------------------------

    def _residual_steps(
        self, f_BCHW: Tensor, sizes: Sequence[Size]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per scale: tokens (B, h·w), the vectors quantised (B·h·w, C), φ(upsampled codes) (B, C, H, W)."""
        B, _, H, W = f_BCHW.shape
        if sizes[-1] != (H, W):
            raise ValueError(f"the last scale is {sizes[-1]} but the features are {(H, W)}")
        residual_BCHW = f_BCHW.detach().float()
        for k, (h, w) in enumerate(sizes):
            vectors_NC = _vectors(residual_BCHW, (h, w))
            tokens_N = nearest_codes(vectors_NC, self.embedding.weight)
            codes_BChw = self.codes(tokens_N.view(B, h, w)).permute(0, 3, 1, 2)
            h_BCHW = self._contribution(k, codes_BChw, sizes)
            residual_BCHW = residual_BCHW - h_BCHW.detach()
            yield tokens_N.view(B, h * w), vectors_NC, h_BCHW

    def _by_scale(self, tokens_BL: Tensor) -> tuple[Tensor, ...]:
        """Each scale's tokens (B, h·w)."""
        counts = [h * w for h, w in self.sizes]
        if tokens_BL.shape[1] != sum(counts):
            raise ValueError(f"expected {sum(counts)} tokens per image, got {tokens_BL.shape[1]}")
        return tokens_BL.split(counts, dim=1)

    def _replay(self, tokens: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Per scale, from the tokens (B, h·w) of the first scales: what ``advance`` returns."""
        f_hat_BCHW = self.embedding.weight.new_zeros(
            1, self.config.latent_channels, *self.sizes[-1], dtype=torch.float32
        )
        for k, tokens_Bl in enumerate(tokens):
            codes_BChw = self.codes(tokens_Bl).mT.unflatten(2, self.sizes[k])
            f_hat_BCHW, next_BChw = self.advance(k, f_hat_BCHW, codes_BChw)
            yield f_hat_BCHW, next_BChw

    def _contribution(self, k: int, codes_BChw: Tensor, sizes: Sequence[Size]) -> Tensor:
        """φ_k of scale k's codes, upsampled to the latent's size unless it is the last scale."""
        last = len(sizes) - 1
        if k != last:
            codes_BChw = F.interpolate(codes_BChw, sizes[-1], mode="bicubic")
        phi = self.quant_resi.at(k / last if last else 0.0)
        out_BCHW: Tensor = phi(codes_BChw.contiguous())
        return out_BCHW


def _vectors(residual_BCHW: Tensor, size: Size) -> Tensor:
    """The residual area-averaged to a scale's size, as vectors (B·h·w, C)."""
    if residual_BCHW.shape[2:] != size:
        residual_BCHW = F.interpolate(residual_BCHW, size, mode="area")
    return residual_BCHW.permute(0, 2, 3, 1).reshape(-1, residual_BCHW.shape[1])


@torch.no_grad()
def nearest_codes(vectors_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Index (N,) of the code nearest to each vector in squared distance |x|² − 2·x·c + |c|²."""
    norms_V = codebook_VC.square().sum(1)

    def nearest(part_nC: Tensor) -> Tensor:
        distances_nV = part_nC.square().sum(1, keepdim=True) + norms_V
        return torch.addmm(distances_nV, part_nC, codebook_VC.T, alpha=-2).argmin(1)

    # In parts: all distances of the vectors that seed a large codebook would not fit into memory.
    return torch.cat([nearest(part_nC) for part_nC in vectors_NC.split(VECTORS_AT_ONCE)])
