"""A sweep that varies settings (``grid``, ``zip`` of its recipe): the best of them at each depth and length.

- Laws compare sizes at their best setting: of each depth and length, the one with the lowest last-scale loss,
  the mean over seeds. A minimum of noisy values is a little low, and lower the more settings there are.
- A recipe's learning rate may be null, which leaves it to ``lr_base`` and the batch: what is compared is the
  peak rate that applied. A run whose config gives none takes no part in the best rate of its depth.
- The best learning rate of a depth: the vertex of the parabola in log lr through the best point and its two
  neighbours, where it has both; at the edge of what was tried nothing is said. p of lr ∝ width^−p: least
  squares over depths. It is the ``power`` of a recipe's ``lr_rule``.
- Values of the tokenizer are no setting to be chosen: losses of other tokens do not compare, and runs with
  them are families of their own (``analysis.tokens``).
- Imported checkpoints have no settings and are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.grids import imported, lengths
from analysis.tokens import SECTIONS

if TYPE_CHECKING:
    import pandas as pd

QUANTITY = "loss_last"
RATE = "train.lr"
LENGTHS = ("train.steps", "train.epochs", "train.tokens")
"""Names of what D tells by itself."""


@dataclass(frozen=True)
class Best:
    """The best setting of a depth and length."""

    depth: int
    width: int
    tokens: float
    setting: str
    loss: float
    tried: int
    second: float
    """The next best setting's loss; NaN with one."""


@dataclass(frozen=True)
class BestRate:
    """The best learning rate of a depth, at its longest length."""

    depth: int
    width: int
    lr: float | None
    """None at the edge of what was tried."""
    tried: tuple[float, ...]


@dataclass(frozen=True)
class Settings:
    """What was found."""

    names: tuple[str, ...]
    best: tuple[Best, ...]
    rates: tuple[BestRate, ...]
    power: float | None
    """p of lr ∝ width^−p; None from fewer than two depths."""


def varied(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """Dotted names of what a recipe varies among runs whose losses compare."""
    names = [str(name) for part in ("grid", "zip") for name in recipe.get(part) or {}]
    return tuple(name for name in names if name.partition(".")[0] not in SECTIONS)


def setting_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A run's values of these names, from its config."""
    found = {}
    for name in names:
        value: Any = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        found[name] = value
    return found


def peak_rate(config: Mapping[str, Any]) -> float:
    """Learning rate after warm-up (``scaling.config.TrainConfig.peak_lr``); NaN where a config lacks it."""
    train = config.get("train", {})
    if train.get("lr") is not None:
        return float(train["lr"])
    base, batch = train.get("lr_base"), train.get("batch")
    return float("nan") if base is None or batch is None else base * batch / 256


def alike_in(config: Mapping[str, Any], names: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """Equal for runs of one setting, whatever their depth, length and seed.

    The learning rate is the one that applied, without what an ``lr_rule`` makes of it at each depth.
    """
    setting = setting_of(config, [name for name in names if name not in LENGTHS])
    if RATE in setting:
        rule, rate = recipe.get("lr_rule"), peak_rate(config)
        if isinstance(rule, Mapping):
            rate *= (config["model"]["depth"] / rule["depth"]) ** rule["power"]
        setting[RATE] = f"{rate:.6g}"
    return json.dumps(setting, sort_keys=True)


def in_words(setting: Mapping[str, Any]) -> str:
    """``train.lr 0.002, train.batch 64``; null as in the recipe."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in setting.items())


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def of_best_settings(
    final: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> tuple[pd.DataFrame, Settings | None]:
    """The rows of the best setting of each depth and length, and what was found; all rows without names.

    Args:
        final: last evaluations of finished runs.
        configs: by run.
        names: from ``varied``.
    """
    own = final[~imported(final)]
    if not names or not len(own):
        return final, None
    settings = {run: setting_of(configs[run], names) for run in own["run"]}
    keyed = own.assign(
        setting=[json.dumps(settings[run], sort_keys=True) for run in own["run"]], length=lengths(own)
    )
    best, kept = list[Best](), list[Any]()
    for _, part in keyed.groupby(["depth", "length"]):
        means = part.groupby("setting")[QUANTITY].mean().sort_values(kind="stable")
        rows = part[part["setting"] == means.index[0]] if means.notna().any() else part
        kept += rows.index.tolist()
        first = rows.iloc[0]
        best.append(
            Best(
                int(first["depth"]), int(first["width"]), float(first["tokens"]),
                in_words(settings[first["run"]]),
                float(means.iloc[0]), len(means), float(means.iloc[1]) if len(means) > 1 else float("nan"),
            )
        )  # fmt: skip
    rates = (
        _rates(keyed.assign(rate=[peak_rate(configs[run]) for run in own["run"]])) if RATE in names else ()
    )
    known = [r for r in rates if r.lr is not None]
    power = None
    if len(known) > 1:
        slope = np.polyfit(np.log([r.width for r in known]), np.log([r.lr or 1.0 for r in known]), 1)[0]
        power = -float(slope)
    return final[imported(final) | final.index.isin(kept)], Settings(tuple(names), tuple(best), rates, power)


def _rates(keyed: pd.DataFrame) -> tuple[BestRate, ...]:
    """By depth, at its longest length; the best of the other settings for each learning rate."""
    found = []
    for _, part in keyed.groupby("depth"):
        part = part[part["length"] == part["length"].max()]
        means = part.groupby(["rate", "setting"])[QUANTITY].mean()
        lowest = means.groupby(level=0).min().dropna()
        tried = tuple(float(v) for v in lowest.index)
        depth, width = (int(part[name].iloc[0]) for name in ("depth", "width"))
        found.append(BestRate(depth, width, _vertex(tried, lowest.tolist()), tried))
    return tuple(found)


def _vertex(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The minimum of the parabola in log lr through the lowest point and its neighbours."""
    if len(rates) < 3:
        return None
    i = int(np.argmin(losses))
    if i in (0, len(rates) - 1):
        return None
    u = np.log(rates[i - 1 : i + 2])
    a, b, _ = np.polyfit(u - u[1], losses[i - 1 : i + 2], 2)
    # Flat to the last digit: the point itself.
    return float(np.exp(u[1] - b / (2 * a))) if a > 0 else rates[i]
