"""Published checkpoints to this project's layout: names and shapes of a VAR transformer's state dict.

Buffers that the published code stores (masks, level ids, a zero bias for k) follow from the config
here and are left out. A state dict with missing or unexpected keys is refused by name.
"""

from __future__ import annotations

import re

from torch import Tensor

from scaling.schema import ConfigError

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


def published_name(key: str) -> str | None:
    """This project's name of a published VAR key; None for a buffer that is not kept.

    Raises:
        ConfigError: a key that a VAR checkpoint does not have.
    """
    if _BUFFERS.search(key):
        return None
    if key in _TOP:
        return _TOP[key]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if match and match[2] in _BLOCK:
        return f"blocks.{match[1]}.{_BLOCK[match[2]]}"
    raise ConfigError(f"not a VAR checkpoint: unexpected key '{key}'")


def transformer_from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published VAR state dict under this project's names and shapes."""
    converted = {}
    for key, value in state.items():
        name = published_name(key)
        if name is None:
            continue
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("start_position", "positions"):
            value = value[0]
        elif leaf == "adaln_offset":
            value = value[0, 0]
        elif leaf == "log_scale":
            value = value.reshape(-1)
        converted[name] = value
    return converted
