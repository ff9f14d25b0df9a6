"""A recipe: one family, many depths, one data set and tokenizer; read strictly from YAML.

- A recipe is data. ``load_recipe`` reads it into frozen dataclasses and refuses, with file and line, what
  it does not know; the same values can be set on the command line (``sweeps.options``).
- ``by_depth`` holds what differs between depths (the paper's batches, learning rates and epochs). A value
  set on the command line wins for every depth: it is dropped from ``by_depth``.
- Everything that a run's shape can be wrong about is checked when the recipe is read, with stand-ins for
  the counts that only the data knows.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling.config import (
    AdaLN,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Family,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerRunConfig,
    TokenizerTrainConfig,
    TrainConfig,
    from_dict,
    require,
    to_dict,
)
from sweeps.source import Keys, Source, read_source

SHIPPED = Path(__file__).parent
RESERVED = ("tokenizers", "tokens")


@dataclass(frozen=True)
class ModelOptions:
    """What a model may vary beside its depth; the rest follows from the depth."""

    adaln: AdaLN | None = None
    """own: a matrix per layer; shared: one for all layers, N = 49152·d³ instead of 73728·d³; none: plain
    layer norms. By default own, and none for raster."""
    qk_norm: bool | None = None
    """Unit-length queries and keys with a learned scale per head."""
    label_drop: float = 0.1
    """Share of training images whose class is hidden, for guidance."""
    drop_path: float | None = None
    """Of the last layer; by default 0.1·d/24."""
    mlp_ratio: int = 4
    init_adaln: float = 0.5
    """Factor on the initial adaLN matrices."""
    init_adaln_gamma: float = 1e-5
    """Factor on their γ rows."""
    init_head: float = 0.02
    """Factor on the initial head."""


@dataclass(frozen=True)
class DepthOverride:
    """Keys of ``train`` and ``model`` that are different at some depths."""

    depths: tuple[int, ...]
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A sweep: every depth with every seed is one run."""

    name: str
    """The sweep's folder under the root."""
    depths: tuple[int, ...]
    """One run per depth and seed; width 64d, N ≈ 73728·d³."""
    train: TrainConfig
    family: Family = "var"
    seeds: tuple[int, ...] = (0,)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokenizer_train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    model: ModelOptions = field(default_factory=ModelOptions)
    by_depth: tuple[DepthOverride, ...] = ()
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None,
            f"name must be a folder name of letters, digits, '.', '_' and '-', got {self.name!r}",
        )
        require(
            self.name not in RESERVED, f"name must not be one of {', '.join(RESERVED)}, got {self.name!r}"
        )
        require(len(self.depths) > 0, "depths must not be empty")
        require(min(self.depths) >= 1, f"depths must be at least 1, got {min(self.depths)}")
        require(len(set(self.depths)) == len(self.depths), f"depths has a depth twice: {list(self.depths)}")
        require(len(self.seeds) > 0, "seeds must not be empty")
        require(min(self.seeds) >= 0, f"seeds must not be negative, got {min(self.seeds)}")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds has a seed twice: {list(self.seeds)}")
        listed = [d for override in self.by_depth for d in override.depths]
        twice = sorted({d for d in listed if listed.count(d) > 1})
        require(not twice, f"by_depth lists depth {', '.join(map(str, twice))} more than once")

    def run(self, depth: int, seed: int, data: DataConfig) -> RunConfig:
        """One run, with ``data`` as ``scaling.data`` has resolved it (all counts known).

        Raises:
            ConfigError: the values do not fit together.
        """
        train, options = to_dict(self.train), to_dict(self.model)
        for override in self.by_depth:
            if depth in override.depths:
                train |= override.train
                options |= override.model
        chosen = dataclasses.asdict(from_dict(ModelOptions, options))
        if data.num_classes is None:
            raise ConfigError("data.num_classes is not known yet")
        model = ModelConfig.from_depth(
            depth,
            vocab=self.tokenizer.vocab,
            latent_channels=self.tokenizer.latent_channels,
            scales=self.tokenizer.scales,
            num_classes=data.num_classes,
            family=self.family,
            **{key: value for key, value in chosen.items() if value is not None},
        )
        return RunConfig(
            model=model,
            data=data,
            tokenizer=self.tokenizer,
            tokenizer_train=self.tokenizer_train,
            train=from_dict(TrainConfig, train),
            evaluation=self.evaluation,
            seed=seed,
        )

    def runs(self, data: DataConfig) -> list[RunConfig]:
        """Every run, by depth and then by seed."""
        return [self.run(depth, seed, data) for depth in sorted(self.depths) for seed in sorted(self.seeds)]

    def tokenizer_run(self, data: DataConfig) -> TokenizerRunConfig:
        """The stage-1 run that all runs share."""
        return TokenizerRunConfig(data, self.tokenizer, self.tokenizer_train)


def load_recipe(name: str | Path, overrides: Mapping[Keys, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        name: a file, or the name of a shipped recipe.
        overrides: plain values in place of the file's, by path (``("train", "lr")``).

    Raises:
        ConfigError: no such recipe (with the nearest name); anything wrong in it (with file and line).
    """
    source = read_source(find_recipe(name))
    source.override(overrides or {})
    _drop_from_depths(source.data, overrides or {})
    try:
        recipe = from_dict(Recipe, source.data, source.locate)
        _check_depth_overrides(recipe, source)
        recipe.runs(_stand_in(recipe.data))
    except ConfigError as error:
        raise source.blame(error) from None
    return recipe


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a recipe; shipped recipes: {', '.join(shipped)}")
    beside = {str(f): f for f in sorted(path.parent.glob("*.y*ml"))} if path.parent.is_dir() else {}
    near = difflib.get_close_matches(str(name), [*shipped, *beside], n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped recipes: {', '.join(shipped)}"
    raise ConfigError(f"{name}: no such recipe file; {hint}")


def _drop_from_depths(data: Any, overrides: Mapping[Keys, Any]) -> None:
    """An option holds for every depth, so it also replaces the values of single depths."""
    entries = data.get("by_depth") if isinstance(data, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        for section, *key in overrides:
            values = entry.get(section) if isinstance(entry, dict) else None
            if key and isinstance(values, dict):
                values.pop(key[0], None)


def _check_depth_overrides(recipe: Recipe, source: Source) -> None:
    for number, override in enumerate(recipe.by_depth):
        path = ("by_depth", str(number))
        from_dict(TrainConfig, to_dict(recipe.train) | override.train, source.locate, (*path, "train"))
        from_dict(ModelOptions, to_dict(recipe.model) | override.model, source.locate, (*path, "model"))


def _stand_in(data: DataConfig) -> DataConfig:
    """The data with a count of one wherever only the data knows."""
    return dataclasses.replace(
        data,
        train_images=data.train_images or 1,
        val_images=data.val_images or 1,
        num_classes=data.num_classes or 1,
    )
