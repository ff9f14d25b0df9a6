"""Random numbers that are a function of where they are used, the same on every device.

Philox-4x64 with 10 rounds (Salmon et al., SC 2011), as NumPy has it: 256 bits of counter and 128 of key to
four words of 64 bits. An image's seed is the key, a token's place and a word of the vocabulary the counter.
So there is no generator to carry along, any part can be drawn by itself, in any order and on any number of
threads, and a picture depends neither on what is drawn beside it nor on the device.

Shapes: l tokens that follow each other in one image, B images, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NOISE = "philox-4x64-10"
"""What pictures of a seed depend on besides; another name whenever a seed would draw others."""

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = 0xFFFFFFFF

PER_COUNTER = 8
"""Numbers of 32 bits from one counter."""
ONE = 0x3F800000
"""The bits of 1 in fp32; with 23 random bits m below it is 1 + m/2²³."""
BELOW_ONE = 1 - 2**-24
"""What is taken from that: (m + 1/2)/2²³ is left, exactly."""


def gumbel_rows(
    seed: int, use: int, first: int, count: int, vocab: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Standard Gumbel noise −log(−log u), (l, V), of ``count`` tokens of an image from place ``first`` on.

    u = (m + 1/2)/2²³ for 23 random bits m: never 0, whose noise would be −∞, nor 1, which would always win.

    Args:
        seed: of the image; its lowest 64 bits count.
        use: noise of different uses is independent.
    """
    counters = -(-vocab // PER_COUNTER)
    # NumPy's generator counts once before its first numbers.
    source = np.random.Philox(key=seed & (2**64 - 1), counter=[first * counters, use, 0, 0])
    words_lC = source.random_raw(count * counters * 4).view(np.uint32).reshape(count, -1)
    words_lC >>= 9
    words_lC |= ONE
    noise_lC = words_lC.view(np.float32)
    noise_lC -= np.float32(BELOW_ONE)
    for _ in range(2):
        np.log(noise_lC, out=noise_lC)
        np.negative(noise_lC, out=noise_lC)
    return noise_lC[:, :vocab]


def gumbel(
    seeds: Sequence[int], use: int, first: int, count: int, vocab: int, device: torch.device
) -> Tensor:
    """``gumbel_rows`` of each image by torch, (B, l, V)."""
    counters = -(-vocab // PER_COUNTER)
    start = first * counters + 1
    places_c = torch.arange(start, start + count * counters, device=device)
    key_B1 = torch.tensor([_signed(seed) for seed in seeds], device=device)[:, None]
    words_BcN = torch.stack(_philox(places_c, use, key_B1), dim=-1)
    words_BlC = words_BcN.view(torch.int32).view(len(seeds), count, -1)[..., :vocab]
    mixed_BlV = ((words_BlC >> 9) & 0x7FFFFF) | ONE
    return (mixed_BlV.view(torch.float32) - BELOW_ONE).log_().neg_().log_().neg_()


def _philox(places_c: Tensor, use: int, key_B1: Tensor) -> list[Tensor]:
    """Four int64 words (B, c) of each counter (place, use, 0, 0) and key (key, 0)."""
    first_Bc = places_c.expand(len(key_B1), -1)
    zeros_Bc = torch.zeros_like(first_Bc)
    words = [first_Bc, torch.full_like(first_Bc, use), zeros_Bc, zeros_Bc]
    for turn in range(ROUNDS):
        high_a, low_a = _product(words[0], MULTIPLIERS[0])
        high_b, low_b = _product(words[2], MULTIPLIERS[1])
        keys = (key_B1 + _signed(turn * KEY_STEPS[0]), _signed(turn * KEY_STEPS[1]))
        words = [high_b ^ words[1] ^ keys[0], low_b, high_a ^ words[3] ^ keys[1], low_a]
    return words


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of x · factor, both without sign, by products of 32 bits."""
    x_low, x_high, low, high = x & LOW, (x >> 32) & LOW, factor & LOW, factor >> 32
    a, b, c = x_low * low, x_high * low, x_low * high
    carried = ((a >> 32) & LOW) + (b & LOW) + (c & LOW)
    upper = x_high * high + ((b >> 32) & LOW) + ((c >> 32) & LOW) + (carried >> 32)
    return upper, x * _signed(factor)


def _signed(word: int) -> int:
    """The signed number with the same lowest 64 bits, which torch has all operations for."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word
