"""What training, evaluation and sampling ask of a family: its model, and how drawn tokens come back to it.

Shapes: B images, L tokens (l of one chunk), C latent channels, V vocabulary; sizes are (h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scaling.config import ModelConfig
from scaling.layers.block import Head, Modulation
from scaling.tokenizer.quantizer import Quantizer, Size


@dataclass
class Decoding:
    """Where the sampling of some images stands."""

    sizes: tuple[Size, ...]
    """The steps of every image."""
    cond_BW: Tensor
    """The class embedding."""
    modulations: list[Modulation]
    """Of each layer: they depend on the class alone, so they are computed once."""
    places: list[Any]
    """What each layer's mixer keeps from chunk to chunk; for attention the ``attend`` of its cache."""
    guided: bool = False
    """Every image is there twice: with its class, and all of them once more without, for guidance."""
    step: int = 0
    """Chunks done."""


class FamilyModel(Protocol):
    """A family's torch module."""

    config: ModelConfig
    NO_DECAY: tuple[str, ...]
    head: Head

    def features(
        self,
        labels_B: Tensor,
        inputs: Tensor,
        path_scale_D2B: Tensor | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> Tensor:
        """Teacher forcing: what ``head.to_vocab`` makes the logits of, (B, L, W) in fp32."""
        ...

    def __call__(
        self,
        labels_B: Tensor,
        inputs: Tensor,
        path_scale_D2B: Tensor | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> Tensor:
        """Teacher forcing: logits (B, L, V)."""
        ...

    def chunks(self, sizes: Sequence[Size] | None = None) -> list[int]:
        """Tokens that each ``extend`` predicts."""
        ...

    def begin(self, labels_B: Tensor, sizes: Sequence[Size] | None = None, guided: bool = False) -> Decoding:
        """Start sampling, with classifier-free guidance or without."""
        ...

    def extend(self, decoding: Decoding, inputs: Tensor | None, guidance: float = 0.0) -> Tensor:
        """Logits (B, l, V) of the next chunk, guided by c + t·(c − u) if the decoding is."""
        ...


def guided_labels(labels_B: Tensor, null: int, guided: bool) -> Tensor:
    """The labels, and with guidance those of the same images without a class after them: (2B,)."""
    return torch.cat([labels_B, torch.full_like(labels_B, null)]) if guided else labels_B


class Feed(Protocol):
    """Brings what was drawn back to the model, chunk by chunk, and ends with the image's latent."""

    def next(self, chunk: int, ids_Bl: Tensor, codes_BlC: Tensor) -> Tensor | None:
        """What the chunk after ``chunk`` is predicted from; None after the last."""
        ...

    def latent(self) -> Tensor:
        """What the decoder gets (B, C, h, w), after the last chunk."""
        ...


class ScaleFeed:
    """Of next-scale models: the latent so far, at the next step's size."""

    def __init__(self, quantizer: Quantizer, batch: int, sizes: Sequence[Size]) -> None:
        self._quantizer, self._sizes = quantizer, sizes
        self._latent_BCHW = quantizer.start(batch, sizes)

    def next(self, chunk: int, ids_Bl: Tensor, codes_BlC: Tensor) -> Tensor | None:
        """(B, l, C) codes; None after the last step."""
        codes_BChw = codes_BlC.transpose(1, 2).unflatten(-1, self._sizes[chunk])
        self._latent_BCHW, following_BChw = self._quantizer.advance(
            chunk, self._latent_BCHW, codes_BChw, self._sizes
        )
        return None if following_BChw is None else following_BChw.flatten(2).transpose(1, 2)

    def latent(self) -> Tensor:
        """(B, C, h, w)."""
        return self._latent_BCHW


class TokenFeed:
    """Of next-token models: the token itself; the latent is the codes of all, row by row."""

    def __init__(self, quantizer: Quantizer, batch: int, sizes: Sequence[Size]) -> None:
        self._size, self._codes = sizes[-1], list[Tensor]()

    def next(self, chunk: int, ids_Bl: Tensor, codes_BlC: Tensor) -> Tensor | None:
        """The token ids (B, 1) themselves; None after the last."""
        self._codes.append(codes_BlC)
        h, w = self._size
        return None if chunk == h * w - 1 else ids_Bl

    def latent(self) -> Tensor:
        """(B, C, h, w)."""
        return torch.cat(self._codes, dim=1).transpose(1, 2).unflatten(-1, self._size)
