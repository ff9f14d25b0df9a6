"""Parameters, FLOPs and memory of a model in closed form; no torch.

Conventions (DESIGN, "Words and units"):
- A multiply-add is 2 FLOPs; training is 3 × forward.
- ``params`` is the paper's N(d): the matrices of the blocks alone, 18·w²·d (VAR eq. 8), or 12·w²·d
  with shared adaLN. ``params_total`` counts everything that is trained.
- adaLN is a third of N, but its matrices see one vector per image, not one per token, so it is
  next to no compute and ``flops_6nd`` overstates C by about half.
- Attention counts the pairs that the block-causal mask allows; ``masked=False`` counts all L².
- Norms, softmax, biases and pointwise functions are not counted, as in torch's own counter.
- Tests hold all of this to torch's count on the meta device at depths 1 to 36.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scaling.config import ModelConfig, RunConfig, TokenizerConfig

N_PARTS = ("qkv", "projection", "mlp", "adaln")
"""The parts of ``params_by_part`` that the paper's N counts."""
TRAIN_FORWARDS = 3
"""Forward and backward together cost so many forward passes."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def params(model: ModelConfig) -> int:
    """N: parameters of the blocks' matrices (qkv 3w², projection w², MLP 8w², adaLN 6w² unless shared)."""
    parts = params_by_part(model)
    return sum(parts[part] for part in N_PARTS)


def params_total(model: ModelConfig) -> int:
    """Every trained parameter: N, biases, embeddings, the adaLN before the head, the head."""
    return sum(params_by_part(model).values())


def params_by_part(model: ModelConfig) -> dict[str, int]:
    """Every trained parameter by what it belongs to; the parts of ``N_PARTS`` add up to N.

    ``biases`` are all vectors of the blocks: biases, the learned offsets of a shared adaLN, the scales
    of the attention heads. ``head`` has the adaLN before it.
    """
    w, L, d = model.width, model.seq_len, model.depth
    vectors = (
        (2 * w + w + model.mlp_ratio * w + w)  # q and v; projection; two MLP layers
        + 6 * w  # the bias of a layer's own adaLN, or its learned offsets when shared
        + (model.heads if model.qk_norm else 0)
    )
    embeddings = (
        (model.num_classes + 1) * w  # classes and the null class
        + model.scales[0] ** 2 * w  # start position
        + L * w  # positions
        + len(model.scales) * w  # scales
        + model.latent_channels * w + w  # token embedding
    )  # fmt: skip
    return {
        "qkv": 3 * w**2 * d,
        "projection": w**2 * d,
        "mlp": 2 * model.mlp_ratio * w**2 * d,
        "adaln": 0 if model.shared_adaln else 6 * w**2 * d,
        "adaln_shared": 6 * w**2 + 6 * w if model.shared_adaln else 0,
        "biases": d * vectors,
        "embeddings": embeddings,
        "head": 2 * w**2 + 2 * w + w * model.vocab + model.vocab,
    }


def attention_pairs(scales: tuple[int, ...], masked: bool = True) -> int:
    """(query, key) pairs per head: Σ n_k·n_{≤k} under the block-causal mask, else L²."""
    total = pairs = 0
    for side in scales:
        total += side * side
        pairs += side * side * total
    return pairs if masked else total * total


def forward_flops(model: ModelConfig, masked: bool = True) -> int:
    """FLOPs of one image's forward pass.

    Args:
        masked: count the allowed attention pairs (exact); False counts all L², as torch's counter does.
    """
    return sum(forward_flops_by_part(model, masked).values())


def forward_flops_by_part(model: ModelConfig, masked: bool = True) -> dict[str, int]:
    """``forward_flops`` by what is computed."""
    w, L, d = model.width, model.seq_len, model.depth
    return {
        "qkv": 6 * w**2 * L * d,
        "projection": 2 * w**2 * L * d,
        "mlp": 4 * model.mlp_ratio * w**2 * L * d,
        "attention": 4 * w * attention_pairs(model.scales, masked) * d,  # q·k and weights·v
        "adaln": 12 * w**2 * (1 if model.shared_adaln else d),  # once per image
        "embedding": 2 * model.latent_channels * w * (L - model.scales[0] ** 2),
        "head": 4 * w**2 + 2 * w * model.vocab * L,
    }


def train_flops(model: ModelConfig) -> int:
    """FLOPs of training on one image: 3 × forward, attention masked."""
    return TRAIN_FORWARDS * forward_flops(model)


@dataclass(frozen=True)
class Spent:
    """What steps of training have taken."""

    tokens: int
    flops: int


def spent(config: RunConfig, steps: int) -> Spent:
    """Training tokens and FLOPs of a run's first ``steps`` steps."""
    images = config.train.batch * steps
    return Spent(images * config.model.seq_len, images * train_flops(config.model))


def costs(model: ModelConfig) -> dict[str, Any]:
    """What a run's ``costs.json`` holds, so that other conventions of N and C can be told from it.

    Returns:
        ``params`` (``params_by_part``, sums to ``params_total``), ``flops_per_image`` (training FLOPs
        of one image by part, sums to ``train_flops``), ``tokens_per_image`` (L).
    """
    forward = forward_flops_by_part(model)
    return {
        "params": params_by_part(model),
        "flops_per_image": {part: TRAIN_FORWARDS * count for part, count in forward.items()},
        "tokens_per_image": model.seq_len,
    }


def flops_6nd(model: ModelConfig, tokens: float) -> float:
    """The common approximation 6·N·D; about half too much here, see the module's docstring."""
    return 6.0 * params(model) * tokens


def train_memory(model: ModelConfig, micro_batch: int, precision: str = "bf16") -> int:
    """Estimated peak bytes of one training process's tensors (not the libraries' own share).

    Weights, gradients and two Adam moments in fp32, plus saved activations. Per token and layer the
    backward pass keeps about: the block input, two norms, two modulated inputs, q, k, v, normalised
    q and k, attention output, projection, MLP hidden before and after GELU, MLP output - 5 fp32 and
    18 autocast widths - and with a materialised mask none of the L² scores. The head keeps the
    logits, their softmax and its gradient in fp32.
    """
    low = _BYTES[precision]
    state = 16 * params_total(model) + (2 * params(model) if low == 2 else 0)
    per_token = model.depth * model.width * (5 * 4 + 18 * low)
    head = 3 * 4 * model.vocab + 3 * 4 * model.width
    return state + micro_batch * model.seq_len * (per_token + head)


def checkpoint_bytes(model: ModelConfig) -> int:
    """Bytes of one checkpoint on disk: weights and two Adam moments in fp32."""
    return 12 * params_total(model)


def token_bytes(tokenizer: TokenizerConfig, images: int) -> int:
    """Bytes of ``images`` cached token sequences (uint16)."""
    return 2 * tokenizer.seq_len * images
