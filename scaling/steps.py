"""Which token maps a flexible family uses, in a training step and for other shapes of picture; no torch.

Those of training are pure functions of (seed, step). FlexVAR trains on random step schedules, so that it can
sample with any (FlexVAR 2502.20313, section 3.2).
- ``paper``: the first and the last step always, every other one dropped with probability 5 %, at most four
  in all: 6 to 10 of the usual ten.
- ``published``: what the published code does instead. With probability 5 % the usual ten; else sides 1, 2,
  five of 3 to 10, two of 11 to 15, and 16. One inner side is dropped for each of 0.90, 0.95, 0.98 and 0.99
  that one draw exceeds, and while more than 680 tokens are left one of the last four goes, which may be the
  16: it is missing from a third of the steps.

The published code draws on every process for itself; here all processes draw the same.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from scaling.config import PAPER_SCALES, PUBLISHED_SIDE, ModelConfig, require

_STREAM = 0x73746570
_BLOCK = 1024
"""Steps whose draws come from one generator; making one for each would take most of the time of a plan."""
DROP, MOST_DROPPED = 0.05, 4
"""Of the paper."""
PUBLISHED_TOKENS = 680
"""The published steps of one image have at most so many tokens."""


def step_scales(model: ModelConfig, seed: int, step: int) -> tuple[int, ...]:
    """Side lengths of the steps, coarse to fine, that training step ``step`` (from 0) uses."""
    if model.step_schedule == "fixed":
        return model.scales
    words = _words(seed, step // _BLOCK)[step % _BLOCK]
    if model.step_schedule == "published":
        return published_scales(random.Random(int(words[0])))
    uniforms = (words >> np.uint64(11)) / 2.0**53
    return paper_scales(model.scales, uniforms[: len(model.scales)])


def paper_scales(scales: tuple[int, ...], uniforms: np.ndarray) -> tuple[int, ...]:
    """The paper's random steps.

    Args:
        scales: all of them.
        uniforms: one number in [0, 1) per scale.
    """
    inner = np.arange(1, len(scales) - 1)
    dropped = inner[uniforms[inner] < DROP]
    # Of more than four the least likely to be dropped stay.
    dropped = dropped[np.argsort(uniforms[dropped], kind="stable")][:MOST_DROPPED]
    return tuple(scale for k, scale in enumerate(scales) if k not in set(dropped.tolist()))


def published_scales(draws: random.Random) -> tuple[int, ...]:
    """The published code's random steps; ``draws`` stands for Python's global generator there."""
    sides = list(PAPER_SCALES)
    if draws.random() >= DROP:
        middle = draws.sample(range(3, 11), 5) + draws.sample(range(11, 16), 2)
        sides = [1, 2, *sorted(middle), PUBLISHED_SIDE]
    chance = draws.random()
    for bound in (0.90, 0.95, 0.98, 0.99):
        if chance > bound:
            sides.pop(draws.choice(range(2, len(sides) - 1)))
    while sum(side * side for side in sides) > PUBLISHED_TOKENS:
        sides.pop(draws.choice(range(len(sides) - 4, len(sides))))
    return tuple(sides)


@lru_cache(maxsize=64)
def schedule_counts(model: ModelConfig, seed: int, steps: int) -> Counter[tuple[int, ...]]:
    """How often each schedule is used in the first ``steps`` training steps."""
    if model.step_schedule == "fixed":
        return Counter({model.scales: steps})
    return Counter(step_scales(model, seed, step) for step in range(steps))


def proportional_sizes(
    target: tuple[int, int], scales: Sequence[int], through: Sequence[int] = ()
) -> tuple[tuple[int, int], ...]:
    """Steps (h, w) that end at ``target`` and have its aspect ratio, made from square ones.

    Every step's shorter side is a square step's side; beyond the last of these, sides grow by no more than
    their last ratio. The first step is the square one, which every model starts from. A target of the last
    square size gives the square steps themselves.

    Args:
        target: tokens (h, w) of the last step.
        scales: side lengths of the square steps.
        through: further shorter sides that must be among the steps.

    Raises:
        ConfigError: a target smaller than the first square step.
    """
    first, short = scales[0], min(target)
    require(
        short >= first,
        f"a picture of {target[0]} x {target[1]} tokens is smaller than the first step, {first}",
    )
    sides = {side for side in (*scales, *through) if side < short} | {short}
    if short > scales[-1]:
        ratio = scales[-1] / scales[-2] if len(scales) > 1 else 2.0
        count = math.ceil(math.log(short / scales[-1]) / math.log(ratio))
        growth = (short / scales[-1]) ** (1 / count)
        sides |= {_half_up(scales[-1] * growth**i) for i in range(1, count)}
    h, w = target
    larger = [side for side in sorted(sides) if side > first]
    steps = ((first, first), *((_half_up(side * h / short), _half_up(side * w / short)) for side in larger))
    return steps if steps[-1] == target else (*steps, target)


def _half_up(value: float) -> int:
    # Rounding to even would treat odd and even sides differently.
    return int(value + 0.5)


def token_columns(cached: tuple[int, ...], scales: tuple[int, ...]) -> np.ndarray:
    """Where the tokens of ``scales`` stand in a row of cached ones: int64 (Σ side²,), coarse to fine.

    Args:
        cached: side lengths in the cache; ``scales`` are among them.
    """
    starts = dict(zip(cached, np.cumsum([0, *(side * side for side in cached)]), strict=False))
    return np.concatenate([np.arange(starts[side], starts[side] + side * side) for side in scales])


@lru_cache(maxsize=4)
def _words(seed: int, block: int) -> np.ndarray:
    """Random words (steps of a block, 64)."""
    # Raw words only: NumPy promises their values across releases, not those of its higher-level draws.
    generator = np.random.PCG64(np.random.SeedSequence([_STREAM, seed, block]))
    return generator.random_raw(_BLOCK * 64).reshape(_BLOCK, 64)
