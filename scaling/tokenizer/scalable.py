"""Scalable quantisation (FlexVAR section 3.1): every size of the latent is quantised by itself.

Design choices
- A step's tokens are those of the features area-averaged to its size, whatever the other steps are: a
  model may take any subset of the steps, and one step alone is a plain vector quantiser.
- Codes and features are compared, and used, at unit length (as published); only the direction of a
  codebook row counts.
- The next step's input is this step's codes alone, upsampled (bicubic): ground truth, not a sum of
  residuals. The decoder gets the last step's codes, as they are.
- Quantisation runs in float32 whatever autocast says: a token is an argmin over distances.

Shapes: B batch, C latent channels, H W the latent's sides, h w one step's, L = Σ h·w tokens, N vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling.config import TokenizerConfig
from scaling.tokenizer.quantizer import Quantized, Quantizer, Size, nearest_codes, vectors_of_size

TEMPERATURE = 0.01
"""Of the entropy term's softmax, as published."""
_TINY = 1e-5


class ScalableQuantizer(Quantizer):
    """Each size by itself.

    Args:
        config: vocabulary, latent channels, scales (the sizes that are cached) and β.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab, config.latent_channels)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=1))

    @torch.no_grad()
    def encode(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> Tensor:
        """The tokens (B, L) int64 of features, step by step.

        Args:
            f_BCHW: features of the encoder.
            sizes: other steps (h, w) than the config's; none may exceed the features' size.
        """
        book_VC = self._codebook()
        tokens = [
            nearest_codes(unit_vectors(f_BCHW.float(), size), book_VC).view(len(f_BCHW), -1)
            for size in sizes or self.sizes
        ]
        return torch.cat(tokens, dim=1)

    def codes(self, tokens: Tensor) -> Tensor:
        """Codebook vectors of unit length, of tokens of any shape: (..., C)."""
        return F.normalize(self.embedding(tokens), dim=-1)

    def advance(
        self, k: int, state_BCHW: Tensor, codes_BChw: Tensor, sizes: Sequence[Size] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Replace the state by step k's codes, upsampled (bicubic) to the last size.

        Returns:
            the new state (B, C, H, W), and the codes upsampled to the next step's size, or None after the
            last step.
        """
        sizes = sizes or self.sizes
        if k == len(sizes) - 1:
            return codes_BChw, None
        return _resized(codes_BChw, sizes[-1]), _resized(codes_BChw, sizes[k + 1])

    def cumulative_features(self, tokens_BL: Tensor, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """The codes of each step (B, C, h, w), of its own size: the decoder makes a small image of few."""
        return list(self._codes_by_step(tokens_BL, sizes or self.sizes))

    def _inputs(self, tokens_BL: Tensor, sizes: Sequence[Size]) -> Iterator[Tensor]:
        for codes_BChw, following in zip(self._codes_by_step(tokens_BL, sizes), sizes[1:], strict=False):
            yield _resized(codes_BChw, following)

    def forward(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> Quantized:
        """Quantise with gradients, each size by itself.

        loss = 1/K·Σ_k (β·|sg(c_k) − f_k|² + |c_k − sg(f_k)|²), |·|² the mean over elements, f_k the features
        of step k at unit length and c_k their codes; the gradient of a code goes straight to its feature.
        """
        sizes = sizes or self.sizes
        loss, tokens, vectors, features = torch.zeros((), device=f_BCHW.device), [], [], []
        with torch.autocast(f_BCHW.device.type, enabled=False):
            book_VC = self._codebook().detach()
            for size in sizes:
                unit_NC = unit_vectors(f_BCHW.float(), size)
                tokens_N = nearest_codes(unit_NC.detach(), book_VC)
                codes_NC = self.codes(tokens_N)
                commitment = F.mse_loss(codes_NC.detach(), unit_NC)
                loss = loss + self.config.beta * commitment + F.mse_loss(codes_NC, unit_NC.detach())
                tokens.append(tokens_N.view(len(f_BCHW), -1))
                vectors.append(unit_NC)
                features.append(_map((codes_NC - unit_NC).detach() + unit_NC, size))
        *smaller, last_BCHW = features
        return Quantized(
            last_BCHW, loss / len(sizes), torch.cat(tokens, dim=1), tuple(vectors), tuple(smaller)
        )

    def unquantised(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> tuple[Tensor, ...]:
        """Each step's features (B, C, h, w), at unit length."""
        return tuple(_map(unit_vectors(f_BCHW, size), size) for size in sizes or self.sizes)

    # -- the entropy term ------------------------------------------------------------------------

    def mean_probabilities(self, f_BCHW: Tensor, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Per step, how likely each code is on average: (V,), softmax of −|f − c|²/τ over the codes."""
        units = [unit_vectors(f_BCHW.float(), size) for size in sizes or self.sizes]
        return [self._log_probabilities(unit_NC).exp().mean(0) for unit_NC in units]

    def entropy(self, vectors: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
        """mean_n H(p_n) − H(mean_n p_n), averaged over steps: each vector sure of its code, all codes used.

        Args:
            vectors: per step those of this part of the batch (N, C), of unit length, with gradients.
            means: per step ``mean_probabilities`` of the whole batch. The mean's entropy is no mean over
                parts; with its slope at the batch's mean every part gets the whole batch's gradient.
        """
        total = torch.zeros((), device=means[0].device)
        for unit_NC, mean_V in zip(vectors, means, strict=True):
            log_NV, mean_V = self._log_probabilities(unit_NC), mean_V.detach()
            each = -(log_NV.exp() * log_NV).sum(1).mean()
            logs_V = (mean_V + _TINY).log()
            slope = ((logs_V + mean_V / (mean_V + _TINY)) * log_NV.exp().mean(0)).sum()
            total = total + each + (mean_V * logs_V).sum() + slope - slope.detach()
        return total / len(means)

    def _log_probabilities(self, unit_NC: Tensor) -> Tensor:
        # |f − c|² = 2 − 2·f·c at unit length; the constant falls out of the softmax.
        return F.log_softmax(2 * unit_NC @ self._codebook().T / TEMPERATURE, dim=1)

    # -- seeding -----------------------------------------------------------------------------------

    def vectors(self, k: int, f_BCHW: Tensor) -> Tensor:
        """What step k quantises of features: vectors (B·h·w, C) of unit length."""
        return unit_vectors(f_BCHW, self.sizes[k])

    def left_over(self, k: int, f_BCHW: Tensor, vectors_NC: Tensor, codebook_VC: Tensor) -> Tensor:
        """The features as they are: no step takes anything from another."""
        return f_BCHW

    def _codebook(self) -> Tensor:
        """All codes (V, C), of unit length."""
        return F.normalize(self.embedding.weight, dim=1)


def unit_vectors(f_BCHW: Tensor, size: Size) -> Tensor:
    """Features area-averaged to a step's size, as vectors (B·h·w, C) of unit length."""
    H, W = f_BCHW.shape[2:]
    if size[0] > H or size[1] > W:
        raise ValueError(f"a step of {size} is larger than the features, {(H, W)}")
    return F.normalize(vectors_of_size(f_BCHW, size), dim=1)


def _map(vectors_NC: Tensor, size: Size) -> Tensor:
    """Vectors (B·h·w, C) as a map (B, C, h, w)."""
    return vectors_NC.unflatten(0, (-1, *size)).permute(0, 3, 1, 2)


def _resized(codes_BChw: Tensor, size: Size) -> Tensor:
    """Codes upsampled (bicubic) to a size, as they are when they have it."""
    return codes_BChw if codes_BChw.shape[2:] == size else F.interpolate(codes_BChw, size, mode="bicubic")
