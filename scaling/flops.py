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

from scaling.config import ModelConfig, TokenizerConfig

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def params(model: ModelConfig) -> int:
    """N: parameters of the blocks' matrices (qkv 3w², projection w², MLP 8w², adaLN 6w² unless shared)."""
    per_layer = 4 + 2 * model.mlp_ratio + (0 if model.shared_adaln else 6)
    return per_layer * model.width**2 * model.depth


def params_total(model: ModelConfig) -> int:
    """Every trained parameter: N, biases, embeddings, the adaLN before the head, the head."""
    w, L, K = model.width, model.seq_len, len(model.scales)
    biases = 2 * w + w + model.mlp_ratio * w + w  # q and v; projection; two MLP layers
    adaln = 6 * w  # the bias of a layer's own adaLN, or its learned offsets when shared
    qk_scale = model.heads if model.qk_norm else 0
    shared = (6 * w**2 + 6 * w) if model.shared_adaln else 0
    embeddings = (
        (model.num_classes + 1) * w  # classes and the null class
        + model.scales[0] ** 2 * w  # start position
        + L * w  # positions
        + K * w  # scales
        + model.latent_channels * w + w  # token embedding
    )  # fmt: skip
    head = 2 * w**2 + 2 * w + w * model.vocab + model.vocab
    return params(model) + model.depth * (biases + adaln + qk_scale) + shared + embeddings + head


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
    w, L, d = model.width, model.seq_len, model.depth
    tokens = 2 * (4 + 2 * model.mlp_ratio) * w**2 * L  # qkv, projection, MLP
    attention = 4 * w * attention_pairs(model.scales, masked)  # q·k and weights·v
    adaln = 12 * w**2  # once per image
    embedding = 2 * model.latent_channels * w * (L - model.scales[0] ** 2)
    head = 4 * w**2 + 2 * w * model.vocab * L
    adaln_total = adaln if model.shared_adaln else d * adaln
    return d * (tokens + attention) + adaln_total + embedding + head


def train_flops(model: ModelConfig) -> int:
    """FLOPs of training on one image: 3 × forward, attention masked."""
    return 3 * forward_flops(model)


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
