"""Parameters, FLOPs and memory of a model in closed form; no torch.

Conventions (DESIGN, "Words and units"):
- A multiply-add is 2 FLOPs; training is 3 × forward.
- ``params`` is the paper's N(d): the matrices of the blocks alone, 18·w²·d (VAR eq. 8), or 12·w²·d
  with a shared adaLN or none. ``params_total`` counts everything that is trained.
- adaLN is a third of N, but its matrices see one vector per image, not one per token, so it is
  next to no compute and ``flops_6nd`` overstates C by about half.
- Attention counts the pairs that the mask allows; ``masked=False`` counts all L².
- flexvar-mamba has no attention. With E channels its ``qkv`` are the matrices before the scan (2·w·E into the
  channels, 2·E·(R + S) to Δ, B and C and out to Δ, with R = ⌈w/16⌉ and S numbers of state), its
  ``projection`` the one after (w·E), so that at E = 2·w, S = 16 params is (20.25·w² + 64·w)·d. ``conv`` and
  ``scan`` are parts of their own; torch's counter does not see the scan.
- Norms, softmax, biases and pointwise functions are not counted, as in torch's own counter.
- A run with random steps (FlexVAR) is counted step by step: ``spent``.
- Tests hold all of this to torch's count on the meta device at depths 1 to 36.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scaling.config import FLEXIBLE, ModelConfig, RunConfig, TokenizerConfig, require
from scaling.steps import schedule_counts, step_scales

Size = tuple[int, int]
N_PARTS = ("qkv", "projection", "mlp", "adaln")
"""The parts of ``params_by_part`` that the paper's N counts."""
TRAIN_FORWARDS = 3
"""Forward and backward together cost so many forward passes."""
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Logits of training computed at a time: 4 MB stay in a CPU's cache, while a GPU wants large products."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def params(model: ModelConfig) -> int:
    """N: the blocks' matrices (qkv 3w², projection w², MLP 8w², a layer's own adaLN 6w²; Mamba: above)."""
    parts = params_by_part(model)
    return sum(parts[part] for part in N_PARTS)


def params_total(model: ModelConfig) -> int:
    """Every trained parameter: N, biases, embeddings, the norm before the head, the head."""
    return sum(params_by_part(model).values())


def params_by_part(model: ModelConfig) -> dict[str, int]:
    """Every trained parameter by what it belongs to; the parts of ``N_PARTS`` add up to N.

    ``biases`` is what else the blocks have: biases, the learned vectors of a shared adaLN or of plain layer
    norms, the scales of the attention heads, what a Mamba has per channel. ``head`` has the norm before it.
    """
    w, d = model.width, model.depth
    vectors = (
        _mixer_vectors(model)
        + (model.mlp_ratio * w + w)  # two MLP layers
        + (4 if model.adaln == "none" else 6) * w  # two layer norms; or adaLN's bias or learned offsets
    )
    before, after = _mixer_matrices(model)
    norm = 2 * w if model.adaln == "none" else 2 * w**2 + 2 * w
    return {
        "qkv": before * d,
        "projection": after * d,
        "mlp": 2 * model.mlp_ratio * w**2 * d,
        "adaln": 6 * w**2 * d if model.adaln == "own" else 0,
        "adaln_shared": 6 * w**2 + 6 * w if model.adaln == "shared" else 0,
        "biases": d * vectors,
        "embeddings": _embedding_params(model),
        "head": norm + w * model.vocab + model.vocab,
    }


def _mixer_matrices(model: ModelConfig) -> tuple[int, int]:
    """(parameters before the mixing, after it) of one layer's mixer."""
    w = model.width
    if model.family == "flexvar-mamba":
        channels, rank = model.ssm_expand * w, delta_rank(w)
        return channels * (2 * w + (rank + 2 * model.ssm_state) + rank), channels * w
    return 3 * w**2, w**2


def _mixer_vectors(model: ModelConfig) -> int:
    """Parameters of one layer's mixer that are no matrices."""
    if model.family == "flexvar-mamba":  # taps and their bias; Δ's bias; A; D
        return model.ssm_expand * model.width * ((model.ssm_conv + 1) + 1 + model.ssm_state + 1)
    return 2 * model.width + model.width + (model.heads if model.qk_norm else 0)  # q and v; projection


def delta_rank(width: int) -> int:
    """The rank of Δ's matrix in a Mamba, ⌈w/16⌉ (2312.00752)."""
    return -(-width // 16)


def _embedding_params(model: ModelConfig) -> int:
    w = model.width
    classes = (model.num_classes + 1) * w  # and the null class
    if model.family == "raster":
        return classes + model.vocab * w + model.seq_len * w  # tokens, positions
    start = model.scales[0] ** 2 * w
    token = model.latent_channels * w + w
    if model.family in FLEXIBLE:
        return classes + start + token + (2 * model.scales[-1]) ** 2 * w  # one map of positions for all sizes
    return classes + start + token + model.seq_len * w + len(model.scales) * w  # positions, scales


def attention_pairs(sizes: Sequence[Size], masked: bool = True) -> int:
    """(query, key) pairs per head: Σ n_k·n_{≤k} under the block-causal mask, else L²."""
    total = pairs = 0
    for h, w in sizes:
        total += h * w
        pairs += h * w * total
    return pairs if masked else total * total


def scan_flops(tokens: int, channels: int, states: int) -> int:
    """Additions and multiplications of a selective scan over one image's tokens.

    Per token, channel and number of state: Δ·A, (Δu)·B, one multiply-add of the recurrence, one with C,
    6 in all; per token and channel Δ·u and a multiply-add with D, 3. The exponential is pointwise and not
    counted, as everywhere here. It is the work of the recurrence itself: what a parallel form does more is
    no more counted than masked attention pairs.
    """
    return tokens * channels * (6 * states + 3)


def forward_flops(model: ModelConfig, masked: bool = True, sizes: Sequence[Size] | None = None) -> int:
    """FLOPs of one image's forward pass.

    Args:
        masked: count the allowed attention pairs (exact); False counts all L², as torch's counter does.
        sizes: the steps (h, w) of the image; None for ``model.scales``.
    """
    return sum(forward_flops_by_part(model, masked, sizes).values())


def forward_flops_by_part(
    model: ModelConfig, masked: bool = True, sizes: Sequence[Size] | None = None
) -> dict[str, int]:
    """``forward_flops`` by what is computed."""
    sizes = model.sizes if sizes is None else sizes
    w, d = model.width, model.depth
    L, first = sum(h * v for h, v in sizes), sizes[0][0] * sizes[0][1]
    if model.family == "raster":  # each token sees itself and those before it; embedding is a look-up
        pairs, embedding = (L * (L + 1) // 2 if masked else L * L), 0
    else:
        pairs, embedding = attention_pairs(sizes, masked), 2 * model.latent_channels * w * (L - first)
    before, after = _mixer_matrices(model)
    if model.family == "flexvar-mamba":
        channels = model.ssm_expand * w
        mixing = {
            "attention": 0,
            "conv": 2 * model.ssm_conv * channels * L * d,
            "scan": scan_flops(L, channels, model.ssm_state) * d,
        }
    else:
        mixing = {"attention": 4 * w * pairs * d}  # q·k and weights·v
    return {
        "qkv": 2 * before * L * d,
        "projection": 2 * after * L * d,
        "mlp": 4 * model.mlp_ratio * w**2 * L * d,
        **mixing,
        "adaln": 12 * w**2 * {"own": d, "shared": 1, "none": 0}[model.adaln],  # once per image
        "embedding": embedding,
        "head": (0 if model.adaln == "none" else 4 * w**2) + 2 * w * model.vocab * L,
    }


def train_flops(model: ModelConfig, sizes: Sequence[Size] | None = None) -> int:
    """FLOPs of training on one image with these steps: 3 × forward, attention masked."""
    return TRAIN_FORWARDS * forward_flops(model, sizes=sizes)


@dataclass(frozen=True)
class Spent:
    """What some steps of a run cost."""

    tokens: int
    """Training tokens seen, D."""
    flops: int
    """Training FLOPs, C."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.tokens + other.tokens, self.flops + other.flops)


def step_cost(config: RunConfig, scales: tuple[int, ...]) -> Spent:
    """One optimiser step whose images have these side lengths as steps."""
    images, sizes = config.train.batch, tuple((side, side) for side in scales)
    return Spent(images * sum(side * side for side in scales), images * train_flops(config.model, sizes))


def spent(config: RunConfig, steps: int) -> Spent:
    """The first ``steps`` optimiser steps of a run, exactly, whatever steps their images have."""
    total = Spent(0, 0)
    for scales, times in schedule_counts(config.model, config.seed, steps).items():
        cost = step_cost(config, scales)
        total += Spent(times * cost.tokens, times * cost.flops)
    return total


def steps_within(config: RunConfig, budget: float) -> int:
    """Optimiser steps whose training FLOPs are the nearest to ``budget``.

    Args:
        config: the run, whatever its length.

    Raises:
        ConfigError: the budget is less than one step.
    """

    def cost(step: int) -> int:
        return step_cost(config, step_scales(config.model, config.seed, step)).flops

    require(
        budget >= cost(0),
        f"budgets: {budget:.3g} FLOPs are less than one optimiser step of depth {config.model.depth}, "
        f"which costs {cost(0):.3g}",
    )
    # Steps of one run cost alike but for random token maps: a guess, then step by step to the nearest.
    sample = 1 if config.model.step_schedule == "fixed" else 1000
    steps = max(1, round(budget * sample / spent(config, sample).flops))
    total = spent(config, steps).flops
    while total + cost(steps) / 2 < budget:
        total += cost(steps)
        steps += 1
    while steps > 1 and total - cost(steps - 1) / 2 > budget:
        steps -= 1
        total -= cost(steps)
    return steps


def costs(config: RunConfig) -> dict[str, Any]:
    """What a run's ``costs.json`` holds, so that other conventions of N and C can be told from it.

    Returns:
        ``params`` (``params_by_part``, sums to ``params_total``), ``flops_per_image`` (training FLOPs of one
        image by part), ``tokens_per_image``; these two are means over the run's images where their steps
        differ, and whole numbers where they do not.
    """
    model, steps = config.model, config.total_steps
    tokens, by_part = 0, dict.fromkeys(forward_flops_by_part(model), 0)
    for scales, times in schedule_counts(model, config.seed, steps).items():
        sizes = tuple((side, side) for side in scales)
        tokens += times * sum(side * side for side in scales)
        for part, count in forward_flops_by_part(model, sizes=sizes).items():
            by_part[part] += times * TRAIN_FORWARDS * count

    def mean(total: int) -> int | float:
        return total // steps if total % steps == 0 else total / steps

    return {
        "params": params_by_part(model),
        "flops_per_image": {part: mean(total) for part, total in by_part.items()},
        "tokens_per_image": mean(tokens),
    }


def flops_6nd(model: ModelConfig, tokens: float) -> float:
    """The common approximation 6·N·D; about half too much here, see the module's docstring."""
    return 6.0 * params(model) * tokens


def train_memory(
    model: ModelConfig,
    micro_batch: int,
    precision: str = "bf16",
    device: str = "cuda",
    attention: str = "auto",
    recompute: bool = False,
    shards: int = 1,
) -> int:
    """Estimated peak bytes of one training process's tensors (not the libraries' own share).

    Weights, gradients and two Adam moments in fp32, plus saved activations. Per token and layer the
    backward pass keeps about: the block input, two norms, two modulated inputs, q, k, v, normalised
    q and k, attention output, projection, MLP hidden before and after GELU, MLP output - 5 fp32 and
    18 autocast widths - and with a materialised mask none of the L² scores. A Mamba keeps in place of the 7
    from q to projection its input and, per channel, about 3 fp32 and 8 autocast numbers. The head keeps
    its features and their gradient, its matrix's gradient, and of a portion of the logits their softmax in
    fp32 and a copy for the products (``scaling.objective``). Attention step by step on a CPU keeps copies of
    q, k and v and the weights of all allowed pairs; a GPU's kernels keep none. With activations computed
    again every layer keeps its input, and one at a time all of that.

    Divided among processes, weights, gradients and moments are, and beside its share each has either all that
    is outside the layers, with its gradient, two layers gathered and one's gradient, or, in an evaluation,
    all weights. A layer's weights in 16 bits are kept for the backward pass, unless it is computed again.

    Args:
        device: cpu or cuda: how many logits there are at a time, and what ``auto`` attention is.
        attention: ``launch.attention``.
        recompute: ``launch.recompute_activations``.
        shards: processes among which the run is divided (``launch.shard``).
    """
    low = _BYTES[precision]
    state = 16 * params_total(model) // shards
    copies = 2 * params(model) if low == 2 else 0
    mamba = model.family == "flexvar-mamba"
    mixer = model.ssm_expand * (3 * 4 + 8 * low) + low if mamba else 7 * low
    per_token = model.width * (5 * 4 + 11 * low + mixer)
    stepwise = device == "cpu" and attention in ("auto", "blockwise")
    pairs = 0
    if stepwise and not mamba and model.family != "raster":
        per_token += model.width * 3 * low
        pairs = micro_batch * model.heads * attention_pairs(model.sizes) * low
    tokens = micro_batch * model.seq_len
    layer = tokens * per_token + pairs
    layers = layer + model.depth * tokens * model.width * low if recompute else model.depth * layer
    logits = min(tokens * model.vocab, LOGITS_AT_ONCE[device])
    head = 2 * 4 * logits + 4 * model.width * model.vocab
    training = layers + tokens * 3 * 4 * model.width + head + copies
    if shards == 1:
        return state + training
    parts = params_by_part(model)
    blocks = sum(parts[part] for part in (*N_PARTS, "biases"))
    gathered = 3 * 4 * blocks // model.depth + 2 * 4 * (params_total(model) - blocks)
    if recompute:
        training -= copies - copies // model.depth
    return state + max(training + gathered, 4 * params_total(model))


def checkpoint_bytes(model: ModelConfig) -> int:
    """Bytes of one checkpoint on disk: weights and two Adam moments in fp32."""
    return 12 * params_total(model)


def token_bytes(tokenizer: TokenizerConfig, images: int) -> int:
    """Bytes of ``images`` cached token sequences (uint16)."""
    return 2 * tokenizer.seq_len * images
