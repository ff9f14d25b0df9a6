"""The families by name. A family is a model, what teacher forcing gives it, and how sampling feeds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from scaling.config import ModelConfig
from scaling.families.flexvar import FlexVAR
from scaling.families.interface import FamilyModel, Feed, ScaleFeed, TokenFeed
from scaling.families.mamba import FlexVARMamba
from scaling.families.raster import Raster
from scaling.families.var import VAR
from scaling.layers.attention import Backend
from scaling.tokenizer.quantizer import Quantizer, Size

Inputs = Callable[[Quantizer, Tensor, Sequence[Size]], Tensor]


@dataclass(frozen=True)
class FamilyEntry:
    """How one family is built and fed."""

    model: Callable[[ModelConfig, Backend], nn.Module]
    inputs: Inputs
    """From the quantiser, tokens (B, L) and their steps to what ``forward`` takes beside the labels."""
    feed: Callable[[Quantizer, int, Sequence[Size]], Feed]
    """From the quantiser, the number of images and their steps to what feeds sampling."""
    guidance: Literal["ramp", "constant"] | None = None
    """The only form of guidance that makes sense for it; None for any."""


def _codes(quantizer: Quantizer, tokens_BL: Tensor, sizes: Sequence[Size]) -> Tensor:
    return quantizer.teacher_inputs(tokens_BL, sizes)


def _tokens(quantizer: Quantizer, tokens_BL: Tensor, sizes: Sequence[Size]) -> Tensor:
    return tokens_BL


FAMILIES: dict[str, FamilyEntry] = {
    "var": FamilyEntry(VAR, _codes, ScaleFeed),
    "flexvar": FamilyEntry(FlexVAR, _codes, ScaleFeed),
    "flexvar-mamba": FamilyEntry(FlexVARMamba, _codes, ScaleFeed),
    # A ramp over 256 tokens would leave the first half of the picture without guidance.
    "raster": FamilyEntry(Raster, _tokens, TokenFeed, guidance="constant"),
}


def build(config: ModelConfig, attention: Backend = "auto") -> nn.Module:
    """The model that ``config`` describes, initialised from torch's current random state."""
    return FAMILIES[config.family].model(config, attention)


def family_model(module: nn.Module) -> FamilyModel:
    """The same module under the interface that all families have."""
    return cast(FamilyModel, module)
