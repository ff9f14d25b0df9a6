"""Which runs a recipe asks for: every family at every depth, for every setting, length and seed.

- ``lengths`` are multiples of ``train``'s own length, so they hold for depths of different lengths too.
- ``budgets`` are training FLOPs: the length of each depth follows from its exact cost, to the nearest
  optimiser step (an isoFLOP design). They decide the length alone.
- ``grid`` varies single values of the recipe, each with each other; ``zip`` varies several values together.
  A name has dots, ``train.lr``; what a sweep has one of (its data, its machine) cannot vary.
- ``lr_rule`` gives every depth its learning rate from that of one: lr ∝ width^−p.

A recipe stays data: it is expanded here, in the order of the tables, and checked in ``sweeps.recipe``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaling.config import Family, TrainConfig, require

Settings = Mapping[str, Any]
"""Values by dotted name."""
VARIED = ("train", "model", "tokenizer", "tokenizer_train", "evaluation")
"""Sections of a recipe whose values may differ between runs."""
LENGTHS = ("steps", "epochs", "tokens")
STEEPEST = 10
"""Of ``lr_rule``: far beyond any that was found (0 to 1), and no learning rate overflows."""
AMPLE = 10**9
"""Steps of a run whose length is not known yet: whatever is counted in steps fits."""


@dataclass(frozen=True)
class LrRule:
    """Learning rate by width: ``lr(d) = train.lr · (width(d) / width(depth))^−power``."""

    power: float
    """p; 0 leaves every depth the same rate, 1 is that of maximal update parametrisation's hidden layers."""
    depth: int
    """The depth whose rate ``train.lr`` is."""

    def __post_init__(self) -> None:
        require(
            abs(self.power) <= STEEPEST, f"lr_rule.power must be -{STEEPEST} to {STEEPEST}, got {self.power}"
        )
        require(self.depth >= 1, f"lr_rule.depth must be at least 1, got {self.depth}")

    def apply(self, train: TrainConfig, depth: int) -> TrainConfig:
        """With the learning rate of ``depth``; widths are as depths."""
        return replace(train, lr=train.peak_lr * (depth / self.depth) ** -self.power)


@dataclass(frozen=True)
class Place:
    """One run of a recipe."""

    family: Family
    depth: int
    seed: int
    length: float = 1.0
    """In units of the recipe's own."""
    budget: float | None = None
    """Training FLOPs, which then decide the length."""
    settings: Settings = field(default_factory=dict)
    """What ``grid`` and ``zip`` set."""

    @property
    def label(self) -> str:
        """The settings in words: ``train.lr 0.002``."""
        return ", ".join(f"{name} {_shown(value)}" for name, value in self.settings.items())


def expand(
    families: Sequence[Family],
    depths: Sequence[int],
    seeds: Sequence[int],
    lengths: Sequence[float],
    budgets: Sequence[float],
    settings: Sequence[Settings],
) -> Iterator[Place]:
    """Every run: by family as listed, then depth, setting as listed, length or budget, and seed."""
    sizes: list[tuple[float, float | None]] = [(length, None) for length in sorted(lengths)]
    if budgets:  # they decide the length
        sizes = [(1.0, budget) for budget in sorted(budgets)]
    for family, depth, values, (length, budget), seed in itertools.product(
        families, sorted(depths), settings, sizes, sorted(seeds)
    ):
        yield Place(family, depth, seed, length, budget, values)


def combinations(grid: Mapping[str, Sequence[Any]], together: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Every combination of a grid's values with each row of those that vary together; else one, empty."""
    rows = [dict(zip(together, row, strict=True)) for row in zip(*together.values(), strict=True)] or [{}]
    return [
        row | dict(zip(grid, values, strict=True))
        for row in rows
        for values in itertools.product(*grid.values())
    ]


def check_axes(grid: Mapping[str, Sequence[Any]], together: Mapping[str, Sequence[Any]]) -> None:
    """``ConfigError`` unless names and lists can be expanded; values are checked where they are used."""
    for part, axes in (("grid", grid), ("zip", together)):
        for name, values in axes.items():
            section, _, key = name.partition(".")
            require(
                section in VARIED and bool(key),
                f"{part}.{name}: runs of one sweep differ in values of {', '.join(VARIED)}, "
                "such as train.lr; depths, families, seeds, lengths and budgets have lists of their own",
            )
            require(len(values) > 0, f"{part}.{name} has no values")
            require(
                all(value not in values[:i] for i, value in enumerate(values)) or part == "zip",
                f"{part}.{name} has a value twice: {list(values)}",
            )
    both = [name for name in grid if name in together]
    require(not both, f"zip.{both[0] if both else ''} is varied by grid too; name it once")
    counts = {name: len(values) for name, values in together.items()}
    require(
        len(set(counts.values())) <= 1,
        f"zip takes lists of one length, got {', '.join(f'{n}: {c}' for n, c in counts.items())}",
    )


def nested(settings: Settings) -> dict[str, dict[str, Any]]:
    """Settings by section, keys within keys: ``{"train": {"lr": 0.002}}``."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        *way, last = name.split(".")
        inner: dict[str, Any] = found
        for key in way:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return found


def lengthened(train: TrainConfig, length: float) -> TrainConfig:
    """The training, ``length`` times as long.

    Raises:
        ConfigError: that is no whole number of ``steps``.
    """
    if length == 1.0:
        return train
    name = next(name for name in LENGTHS if getattr(train, name) is not None)
    value = getattr(train, name) * length
    if name == "steps":
        require(
            abs(value - round(value)) < 1e-6,
            f"lengths {length:g} of train.steps {train.steps} is {value:g} steps; whole ones are needed",
        )
        value = round(value)
    return replace(train, **{name: value})


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
