"""Main memory of a tokenizer's training and of the encoding of tokens, in closed form; one process's tensors.

- A residual block keeps for its backward pass, per position, 3 numbers of each channel that it takes and 3
  of each that it gives (what each norm, SiLU and convolution took), attention 8 and its weights; a resizing
  keeps what its convolution takes. Beside these stand three tensors as large as the largest.
- Weights, gradients and two Adam moments take 16 bytes a weight. φ, the discriminator and LPIPS are not among
  the weights; what the latter two keep is counted.
- k-means, which seeds the codebook, sees the features of ``SEED_IMAGES`` images at once, twice, and of their
  distances to its share of the codes so many, twice, while they are computed. The allocator still holds what
  the steps before took, so it is added.
- Decoded originals are kept, up to a bound.
- Numbers count as fp32, also where autocast has some in 16 bits: so it is too much rather than too little.
- Compared with the peaks of whole jobs on a CPU in docs/LOG.md; the libraries' own share is
  ``sweeps.machine.PROCESS_BYTES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaling.config import DataConfig, TokenizerConfig, TokenizerRunConfig

FLOAT = 4
SEED_IMAGES = 512
"""And no fewer than codes (``scaling.tokenizer.training``)."""
DISTANCES_AT_ONCE = 2**26
"""Of ``scaling.tokenizer.quantizer``."""
KEPT_ORIGINALS = 512 * 2**20
"""Bytes (``scaling.tokenizer.feed``)."""
ENCODED_PIXELS, ENCODED_IMAGES = 2**19, 256
"""At most so many are encoded at once on a CPU (``scaling.data.encode``)."""
VGG = 270
"""Channels of all layers of LPIPS, weighted by their share of an image's pixels."""


@dataclass(frozen=True)
class Networks:
    """What an encoder and a decoder hold for one image."""

    encoder: int
    """Numbers that are kept for the backward pass."""
    decoder: int
    widest: int
    """Numbers of the largest tensor of the encoder."""
    largest: int
    """Of both."""
    weights: int


def training_memory(config: TokenizerRunConfig, micro_batch: int) -> int:
    """Peak bytes of one training process's tensors and images.

    Args:
        micro_batch: images per forward pass and process.
    """
    tokenizer, train = config.tokenizer, config.train
    nets, area = networks(tokenizer), tokenizer.scales[-1] ** 2
    decoded = nets.decoder
    if tokenizer.quantizer == "scalable":  # every size is decoded
        decoded = decoded * sum(side * side for side in tokenizer.scales) // area
    pixels = config.data.resolution**2
    judged = VGG * pixels * (3 if train.lpips_weights is not None and train.perceptual > 0 else 0)
    if train.adversarial.weight > 0:  # strided convolutions, seen twice
        judged += 2 * 3 * sum(train.adversarial.channels * 2**i * pixels // 4 ** (i + 1) for i in range(4))
    per_image = nets.encoder + decoded + 3 * nets.largest + judged + 2 * area * tokenizer.vocab
    share, rest = divmod(tokenizer.vocab, len(tokenizer.scales))
    vectors = max(SEED_IMAGES, tokenizer.vocab) * area
    distances = min(vectors * (share + rest), DISTANCES_AT_ONCE)
    seeding = 2 * distances + 2 * vectors * tokenizer.latent_channels
    return FLOAT * (4 * nets.weights + micro_batch * per_image + seeding) + kept_originals(config.data)


def kept_originals(data: DataConfig) -> int:
    """Bytes of the decoded images that a tokenizer's training keeps, if they are as small as they may be."""
    return min((data.train_images or 0) * 3 * round(data.resolution * data.crop_margin) ** 2, KEPT_ORIGINALS)


def encoding_memory(config: TokenizerRunConfig) -> int:
    """Peak bytes of one process's tensors while it encodes on a CPU: three as large as the largest, or the
    distances to all codes, twice."""
    tokenizer = config.tokenizer
    images = max(1, min(ENCODED_IMAGES, ENCODED_PIXELS // config.data.resolution**2))
    nets, distances = networks(tokenizer), 2 * tokenizer.scales[-1] ** 2 * tokenizer.vocab
    return FLOAT * (nets.weights + images * max(3 * nets.widest, distances))


def networks(config: TokenizerConfig) -> Networks:
    """Count both networks of a tokenizer, layer by layer."""
    widths = [config.channels * m for m in config.multipliers]
    side, lowest = config.scales[-1] * config.downsampling, len(widths) - 1
    first, top = config.channels, widths[-1]
    down = _levels([(i, w) for i, w in enumerate(widths)], first, config.res_blocks, side, lowest)
    up = _levels(
        [(i, w) for i, w in reversed(list(enumerate(widths)))], top, config.res_blocks + 1, side, lowest
    )
    low = (side >> lowest) ** 2  # positions of the lowest resolution, where there is attention
    middle = low * (2 * _block(top, top) + 8 * top + low)
    kept = [
        sum(area * (_block(a, b) + (8 * b + low) * (i == lowest)) for i, area, a, b in part)
        for part in (down, up)
    ]
    resized_down = sum((side >> i) ** 2 * w for i, w in enumerate(widths[:-1]))
    resized_up = sum((side >> (i - 1)) ** 2 * w for i, w in enumerate(widths) if i > 0)
    widest = max(area * max(a, b) for _, area, a, b in down)
    largest = [widest, *((side >> (i - 1)) ** 2 * w for i, w in enumerate(widths) if i > 0)]
    blocks = sum(
        9 * a * b + 9 * b * b + a * b * (a != b) + 4 * b * b * (i == lowest) for i, _, a, b in (*down, *up)
    )
    resizing = 2 * sum(9 * w * w for w in widths) - 9 * (top * top + widths[0] ** 2)
    weights = blocks + resizing + 2 * (2 * 18 * top * top + 4 * top * top) + 2 * 27 * first
    return Networks(
        kept[0] + resized_down + middle + 3 * low * top,
        kept[1] + resized_up + middle + 3 * side**2 * first,
        widest,
        max(largest),
        weights + config.vocab * config.latent_channels,
    )


def _levels(
    levels: Sequence[tuple[int, int]], channels: int, blocks: int, side: int, lowest: int
) -> list[tuple[int, int, int, int]]:
    """Level, positions, channels in and out of every residual block in its order."""
    found = []
    for i, width in levels:
        for _ in range(blocks):
            found.append((i, (side >> i) ** 2, channels, width))
            channels = width
    return found


def _block(before: int, after: int) -> int:
    """Numbers per position that a residual block keeps."""
    return 3 * before + 3 * after
