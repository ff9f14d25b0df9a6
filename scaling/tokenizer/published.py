"""Published tokenizers' state dicts to this project's and back: names and shapes, no files.

- VAR's ``vae_ch160v4096z32``: its names are ours, but for one statistic of its training.
- FlexVAR's VQ-16, in LlamaGen's layout: levels are ``conv_blocks``, in the decoder coarse to fine where ours
  run fine to coarse; the middle is a list; attention has three convolutions where ours has one.

Statistics of training that the published code keeps as buffers are left out, and are zeros on the way back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scaling.config import TokenizerConfig, require
from scaling.tokenizer.vqvae import Tokenizer

FLEXVAR_TOKENIZER = TokenizerConfig(
    vocab=8912, channels=128, scales=tuple(range(1, 17)), quantizer="scalable", z_channels=256
)
"""FlexVAR's VQ-16, with every size up to 256 px."""

_VAR_HITS, _FLEXVAR_USED = "quantize.ema_vocab_hit_SV", "quantize.codebook_used"
_USED_LENGTH = 65536
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}
_NAMED = 5
_IMPLIED = ("norm_groups", "phi_ratio")
"""What no published tensor tells, and the published code has as this project's defaults."""


def from_published(config: TokenizerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under this project's names.

    Args:
        config: the tokenizer that it should fit: residual as VAR's, scalable as FlexVAR's.
        state: as published.

    Raises:
        ConfigError: names or shapes of another model; the keys are named.
    """
    expected = _expected(config)
    sources = {name: _published_names(config, name) for name in expected}
    known = {key for keys in sources.values() for key in keys}
    _refuse(config, "is missing", [key for key in sorted(known) if key not in state])
    _refuse(config, "has unexpected keys", [k for k in state if k not in known and k not in _buffers(config)])
    converted = {name: _joined([state[key] for key in keys]) for name, keys in sources.items()}
    wrong = [
        f"{' + '.join(sources[name])} {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in converted.items()
        if value.shape != expected[name].shape
    ]
    _refuse(config, "has other shapes:", wrong)
    return converted


def told_tokenizer(state: Mapping[str, Tensor], scales: Sequence[int]) -> TokenizerConfig:
    """The config of a published tokenizer, from its keys and shapes; these do not tell the scales.

    Raises:
        ConfigError: a key that tells it is missing; channels that the implied groups do not divide.
    """
    scalable = any("conv_blocks" in key for key in state)
    level, block = ("encoder.conv_blocks", "res") if scalable else ("encoder.down", "block")

    def rows(key: str) -> int:
        require(key in state and state[key].ndim > 0, f"not this tokenizer: it is missing {key}")
        return state[key].shape[0]

    def count(pattern: str) -> int:
        return len({match[0] for key in state if (match := re.match(pattern, key))})

    first = "encoder.conv_in.weight"
    channels, latent = rows(first), rows("quant_conv.weight")
    levels = count(rf"{level}\.\d+\.")
    require(
        channels % TokenizerConfig.norm_groups == 0,
        f"not this tokenizer: {first} has {channels} channels; published ones have a multiple of "
        f"{TokenizerConfig.norm_groups}, the groups of their norms",
    )
    one_phi = any(key.startswith("quantize.quant_resi.qresi.") for key in state)
    phis = 1 if one_phi else count(r"quantize\.quant_resi\.qresi_ls\.\d+\.")
    widths = [rows(f"{level}.{i}.{block}.0.conv1.weight") for i in range(levels)]
    z_width = rows("encoder.conv_out.weight")
    return TokenizerConfig(
        vocab=rows("quantize.embedding.weight"),
        latent_channels=latent,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=count(rf"{level}\.0\.{block}\.\d+\."),
        scales=tuple(scales),
        phis=TokenizerConfig.phis if scalable else phis,
        quantizer="scalable" if scalable else "residual",
        z_channels=None if z_width == latent else z_width,
    )


def to_published(config: TokenizerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a tokenizer of this project as the published code loads it.

    Raises:
        ConfigError: not the state of a tokenizer of this config; the keys are named. Options that the
            published layout cannot tell.
    """
    for option in _IMPLIED:
        value, implied = getattr(config, option), getattr(TokenizerConfig, option)
        require(
            value == implied,
            f"tokenizer.{option} {value} cannot be written in the published layout, which implies {implied}",
        )
    expected = _expected(config)
    _refuse(config, "is missing", [name for name in expected if name not in state])
    _refuse(config, "has unexpected keys", [name for name in state if name not in expected])
    published = dict(_buffers(config))
    for name, value in state.items():
        keys = _published_names(config, name)
        published |= {k: v.contiguous() for k, v in zip(keys, value.chunk(len(keys)), strict=True)}
    return published


def _expected(config: TokenizerConfig) -> dict[str, Tensor]:
    """This project's names and shapes, without memory."""
    with torch.device("meta"):
        return dict(Tokenizer(config).state_dict())


def _buffers(config: TokenizerConfig) -> dict[str, Tensor]:
    if config.quantizer == "scalable":
        return {_FLEXVAR_USED: torch.zeros(_USED_LENGTH)}
    return {_VAR_HITS: torch.zeros(len(config.scales), config.vocab)}


def _published_names(config: TokenizerConfig, name: str) -> list[str]:
    """The published keys, joined along the first dimension, of one of ours."""
    if config.quantizer == "residual":
        return [name]
    if match := re.fullmatch(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(\w+)\.(.+)", name):
        half, level, kind, rest = match.groups()
        i = int(level) if half == "encoder" else len(config.multipliers) - 1 - int(level)
        name = f"{half}.conv_blocks.{i}.{'res' if kind == 'block' else kind}.{rest}"
    elif match := re.fullmatch(r"(encoder|decoder)\.mid\.(\w+)\.(.+)", name):
        name = f"{match[1]}.mid.{_MIDDLE[match[2]]}.{match[3]}"
    head, found, tail = name.partition(".qkv.")
    return [f"{head}.{part}.{tail}" for part in "qkv"] if found else [name]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _refuse(config: TokenizerConfig, what: str, keys: Sequence[str]) -> None:
    family = "FlexVAR" if config.quantizer == "scalable" else "VAR"
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    require(not keys, f"not this {family} tokenizer: it {what} {', '.join(keys[:_NAMED])}{more}")
