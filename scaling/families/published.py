"""Published transformers' state dicts (VAR, FlexVAR) to this project's and back: names and shapes, no files.

- The config is told from keys and shapes, so that a file says itself what it is.
- Buffers that the published code stores (masks, level ids, a zero bias for k) follow from the config: left
  out here, made on the way out.
- Nothing is copied: a converted tensor is a view of the one given.

Shapes: L tokens, K scales.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from scaling.config import PAPER_SCALES, PUBLISHED_SIDE, ModelConfig
from scaling.families.registry import build
from scaling.schema import ConfigError, require
from scaling.steps import proportional_sizes

PUBLISHED_SCALES = (PAPER_SCALES, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
"""Of the published models for 256 and 512 px."""
HEAD_WIDTH = 64
Index = tuple[int | slice | None, ...]
_NAMED = 5
_BUFFERS = re.compile(r"(^lvl_1L$|attn_bias_for_masking$|zero_k_bias$)")
_TOP = {
    "class_emb.weight": "class_embedding.weight",
    "pos_start": "start_position",
    "pos_1LC": "positions",
    "lvl_embed.weight": "scale_embedding.weight",
    "word_embed.weight": "token_embedding.weight",
    "word_embed.bias": "token_embedding.bias",
    "shared_ada_lin.1.weight": "shared_adaln.weight",
    "shared_ada_lin.1.bias": "shared_adaln.bias",
    "head_nm.ada_lin.1.weight": "head.adaln.weight",
    "head_nm.ada_lin.1.bias": "head.adaln.bias",
    "head.weight": "head.to_vocab.weight",
    "head.bias": "head.to_vocab.bias",
}
_BLOCK = {
    "attn.scale_mul_1H11": "mixer.log_scale",
    "attn.q_bias": "mixer.q_bias",
    "attn.v_bias": "mixer.v_bias",
    "attn.mat_qkv.weight": "mixer.qkv.weight",
    "attn.proj.weight": "mixer.out.weight",
    "attn.proj.bias": "mixer.out.bias",
    "ffn.fc1.weight": "mlp_in.weight",
    "ffn.fc1.bias": "mlp_in.bias",
    "ffn.fc2.weight": "mlp_out.weight",
    "ffn.fc2.bias": "mlp_out.bias",
    "ada_lin.1.weight": "adaln.weight",
    "ada_lin.1.bias": "adaln.bias",
    "ada_gss": "adaln_offset",
}
_PUBLISHED = {ours: theirs for table in (_TOP, _BLOCK) for theirs, ours in table.items()}


def told_config(state: Mapping[str, Tensor], scales: Sequence[int] | None = None) -> ModelConfig:
    """The config of a published VAR or FlexVAR, from its keys and shapes.

    Scales: of a VAR from the level of every position, which is stored, else by the number of positions if it
    is a published model's; of a FlexVAR, which has no scales of its own, the ten of the paper if its largest
    map is 16 × 16, else those of them that are smaller, and further ones up to its largest map.

    Raises:
        ConfigError: keys are missing; scales that do not fit, or that nothing tells.
    """
    kind = "FlexVAR" if "pos_1LC" in state and state["pos_1LC"].ndim == 4 else "VAR"

    def shape(key: str, ndim: int) -> torch.Size:
        require(key in state, f"not this {kind}: it is missing {key}")
        found = state[key].shape
        require(len(found) == ndim, f"not this {kind}: {key} has shape {tuple(found)}, not {ndim} dimensions")
        return found

    family: dict[str, Any]
    if kind == "FlexVAR":
        scales = _flexvar_scales(shape("pos_1LC", 4)[-1] // 2, scales)
        own_steps = scales[-1] == PUBLISHED_SIDE
        family = {"family": "flexvar", "step_schedule": "published" if own_steps else "paper"}
    else:
        length, count = shape("pos_1LC", 3)[1], shape("lvl_embed.weight", 2)[0]
        family, scales = {"family": "var"}, _var_scales(length, count, state.get("lvl_1L"), scales)
    width, qk_norm = shape("word_embed.weight", 2)[0], "blocks.0.attn.scale_mul_1H11" in state
    heads = shape("blocks.0.attn.scale_mul_1H11", 4)[1] if qk_norm else width // HEAD_WIDTH
    depth = len({match[0] for key in state if (match := re.match(r"blocks\.\d+\.", key))})
    return ModelConfig.from_depth(
        depth,
        width=width,
        heads=max(1, heads),
        vocab=shape("head.weight", 2)[0],
        latent_channels=shape("word_embed.weight", 2)[1],
        num_classes=shape("class_emb.weight", 2)[0] - 1,
        scales=scales,
        mlp_ratio=shape("blocks.0.ffn.fc1.weight", 2)[0] // width,
        adaln="shared" if "shared_ada_lin.1.weight" in state else "own",
        qk_norm=qk_norm,
        **family,
    )


def _var_scales(
    length: int, count: int, level_1L: Tensor | None, given: Sequence[int] | None
) -> tuple[int, ...]:
    """Scales of a VAR with so many positions and levels, which must agree with what is stored or known."""
    told = _sides(level_1L) if level_1L is not None and not level_1L.is_meta else None
    if told is None:
        known = [s for s in PUBLISHED_SCALES if (sum(side * side for side in s), len(s)) == (length, count)]
        told = known[0] if known else None
    found = told if given is None else tuple(given)
    if found is None:
        raise ConfigError(f"{length} positions in {count} scales are no published model's: give --scales")
    require(
        (sum(side * side for side in found), len(found)) == (length, count) and told in (None, found),
        f"scales {list(found)} do not fit: the file has {length} positions in {count} scales"
        + (f", {list(told)}" if told else ""),
    )
    return found


def _sides(level_1L: Tensor) -> tuple[int, ...] | None:
    """Side lengths from the level of every position; None if these are no levels."""
    if level_1L.dtype != torch.int64 or int(level_1L.min()) < 0:
        return None
    return tuple(math.isqrt(int(count)) for count in level_1L.flatten().bincount())


def _flexvar_scales(side: int, given: Sequence[int] | None) -> tuple[int, ...]:
    """Scales of a FlexVAR whose largest trained map has this side."""
    if given is None:
        return tuple(side for side, _ in proportional_sizes((side, side), PAPER_SCALES))
    require(
        given[-1] == side, f"scales must end with the largest trained map's side {side}, got {list(given)}"
    )
    return tuple(given)


def published_name(key: str) -> str | None:
    """This project's name of a published VAR or FlexVAR key; None for a buffer that is not kept.

    Raises:
        ConfigError: a key that such a checkpoint does not have.
    """
    if _BUFFERS.search(key):
        return None
    if key in _TOP:
        return _TOP[key]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if match and match[2] in _BLOCK:
        return f"blocks.{match[1]}.{_BLOCK[match[2]]}"
    raise ConfigError(f"not a VAR checkpoint: unexpected key '{key}'")


def transformer_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published VAR or FlexVAR state dict under this project's names and shapes; nothing is copied.

    Raises:
        ConfigError: a key that such a checkpoint does not have.
    """
    converted = {}
    for key, value in state.items():
        name = published_name(key)
        if name is not None:
            converted[name] = value[_axes(name)[1]] if value.ndim else value
    return converted


def transformer_to_published(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model of this project as the published code loads it, its buffers included.

    FlexVAR's stored mask is, as published, of the steps last used; here of ``config.scales``.

    Raises:
        ConfigError: a model that the published code does not have; not the state of a model of this config.
    """
    require(
        config.family in ("var", "flexvar") and config.adaln != "none",
        f"the published code has no {config.family} with adaln '{config.adaln}': only var and flexvar, with "
        "adaLN own or shared",
    )
    check_names(f"{config.family} model", skeleton(config).state_dict(), state)
    published_state = {_published_key(name): value[_axes(name)[0]] for name, value in state.items()}
    device = state["positions"].device
    side_K = torch.tensor(config.scales, device=device)
    level_L = torch.arange(len(side_K), device=device).repeat_interleave(
        side_K**2, output_size=config.seq_len
    )
    allowed_LL = level_L[:, None] >= level_L
    mask_LL = torch.zeros(allowed_LL.shape, device=device).masked_fill_(~allowed_LL, -math.inf)
    published_state["attn_bias_for_masking"] = mask_LL[None, None]
    if config.family == "var":
        published_state["lvl_1L"] = level_L[None]
    for layer in range(config.depth):
        published_state[f"blocks.{layer}.attn.zero_k_bias"] = torch.zeros(config.width, device=device)
    return published_state


def _axes(name: str) -> tuple[Index, Index]:
    """Indices that give a tensor of ours its published shape, and back."""
    leaf = name.rsplit(".", 1)[-1]
    every = slice(None)
    if leaf in ("start_position", "positions"):
        return (None,), (0,)
    if leaf == "adaln_offset":
        return (None, None), (0, 0)
    if leaf == "log_scale":
        return (None, every, None, None), (0, every, 0, 0)
    return (every,), (every,)


def _published_key(name: str) -> str:
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    return match[1] + _PUBLISHED[match[2]] if match else _PUBLISHED[name]


def check_published(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """``ConfigError``, with the published keys, unless a published state dict is of this config."""
    expected = transformer_to_published(config, skeleton(config).state_dict())
    check_names(
        "FlexVAR" if config.family == "flexvar" else "VAR",
        {key: value for key, value in expected.items() if not _BUFFERS.search(key)},
        {key: value for key, value in state.items() if not _BUFFERS.search(key)},
    )


def check_names(what: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    for problem, keys in (
        ("it is missing", [key for key in expected if key not in given]),
        ("it has unexpected keys", [key for key in given if key not in expected]),
        ("it has other shapes:", wrong),
    ):
        require(not keys, f"not this {what}: {problem} {listed(keys)}")


def listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def skeleton(config: ModelConfig) -> nn.Module:
    """The model without memory for its parameters."""
    with init_empty_weights(include_buffers=False):
        return build(config)
