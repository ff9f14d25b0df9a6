"""How many runs share a GPU: as many as end the sweep soonest, by measured speeds, and fit into its memory.

A small model leaves most of a GPU idle; two of them side by side may each be nearly as fast as alone, a large
one gains nothing. The number holds for the whole sweep, since the places of a launch are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MEMORY_SHARE = 0.9
"""Share of a GPU's memory that its runs may fill together."""
GAIN = 0.05
"""Sharing must end the sweep sooner by this share: it makes each run slower, and its end less certain."""


def makespan(seconds: Sequence[float], places: int) -> float:
    """When the last of the jobs ends if each, in this order, takes the first free place."""
    free = [0.0] * places
    for duration in seconds:
        free[free.index(min(free))] += duration
    return max(free)


def runs_per_gpu(
    seconds: Mapping[int, Sequence[float | None]], memories: Sequence[int], room: int, groups: int
) -> int:
    """The number of runs that should share a GPU.

    Args:
        seconds: by that number, each run's time when so many share every GPU, heaviest run first; None for a
            run that nothing is known of.
        memories: bytes that each run needs on a GPU.
        room: bytes of a GPU.
        groups: GPUs, or groups of them that one run takes.

    Returns:
        1 where nothing was measured. A larger number only where its places do not exceed the runs, its
        largest runs fit into a GPU together, and the sweep ends sooner by ``GAIN`` than with any smaller one
        that fits.
    """
    heaviest = sorted(memories, reverse=True)
    alone = seconds.get(1, ())
    known = [s for s in alone if s is not None]
    if not known or len(known) < len(alone):
        return 1
    best, chosen = makespan(known, groups), 1
    for number in sorted(set(seconds) - {1}):
        times = [s for s in seconds[number] if s is not None]
        fits = sum(heaviest[:number]) <= MEMORY_SHARE * room
        if len(times) < len(alone) or not fits or (number - 1) * groups >= len(alone):
            continue
        ends = makespan(times, groups * number)
        if ends < (1 - GAIN) * best:
            best, chosen = ends, number
    return chosen
