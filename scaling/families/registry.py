"""The families by name. A family is a model and the inputs that teacher forcing gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from scaling.config import ModelConfig
from scaling.families.var import VAR
from scaling.tokenizer.quantizer import Quantizer


@dataclass(frozen=True)
class FamilyEntry:
    """How one family is built and fed."""

    model: Callable[[ModelConfig, Literal["masked", "blockwise"]], nn.Module]
    inputs: Callable[[Quantizer, Tensor], Tensor]
    """From the quantiser and tokens (B, L) to what the model's forward takes beside the labels."""


FAMILIES: dict[str, FamilyEntry] = {
    "var": FamilyEntry(model=VAR, inputs=lambda quantizer, tokens_BL: quantizer.teacher_inputs(tokens_BL)),
}


def build(config: ModelConfig, attention: Literal["masked", "blockwise"] = "masked") -> nn.Module:
    """The model that ``config`` describes, initialised from torch's current random state."""
    return FAMILIES[config.family].model(config, attention)
