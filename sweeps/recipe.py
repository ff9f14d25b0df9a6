"""A recipe: families, many depths of each, one data set; read strictly from YAML.

- A recipe is data. ``load_recipe`` reads it into frozen dataclasses and refuses, with file and line, what
  it does not know; the same values can be set on the command line (``sweeps.options``).
- ``by_family`` holds what differs between families (their tokenizers above all), ``by_depth`` what differs
  between depths (the paper's batches, learning rates and epochs) and wins over ``by_family``. A value set on
  the command line wins for every family and depth: it is dropped from both.
- Lengths, budgets, grids and the rule of learning rates are expanded by ``sweeps.designs``. What they decide
  must not stand in ``by_family`` or ``by_depth`` too.
- A family whose tokenizer, its training and data are the same as another's shares its tokens.
- Everything that a run's shape can be wrong about is checked when the recipe is read, with stand-ins for
  the counts that only the data knows.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    StepSchedule,
    TokenizerConfig,
    TokenizerRunConfig,
    TokenizerTrainConfig,
    TrainConfig,
    from_dict,
    require,
    to_dict,
)
from scaling.flops import steps_within
from sweeps.designs import (
    AMPLE,
    LENGTHS,
    LrRule,
    Place,
    Settings,
    check_axes,
    combinations,
    expand,
    lengthened,
    nested,
)
from sweeps.source import Keys, Source, read_source

SHIPPED = Path(__file__).parent
RESERVED = ("tokenizers", "tokens", "classifiers")


@dataclass(frozen=True)
class ModelOptions:
    """What a model may vary beside its depth; the rest follows from the depth."""

    scales: tuple[int, ...] | None = None
    """Side lengths of the model's own steps; by default all of its tokenizer's (raster: the last one)."""
    step_schedule: StepSchedule | None = None
    """Which steps a training step uses; by default paper for flexvar and flexvar-mamba, else fixed."""
    adaln: AdaLN | None = None
    """own: a matrix per layer, N = 73728·d³; shared: one for all, none: plain layer norms, N = 49152·d³. By
    default own, and none for raster."""
    qk_norm: bool | None = None
    """Unit-length queries and keys with a learned scale per head; by default true, and false for raster."""
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
    ssm_state: int = 16
    """flexvar-mamba: states per channel."""
    ssm_expand: int = 2
    """flexvar-mamba: channels of the scan, in units of the width."""
    ssm_conv: int = 4
    """flexvar-mamba: taps of the convolution before the scan."""


@dataclass(frozen=True)
class FamilyOverride:
    """Keys that are different for some families."""

    families: tuple[Family, ...]
    tokenizer: dict[str, Any] = field(default_factory=dict)
    tokenizer_train: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DepthOverride:
    """Keys of ``train`` and ``model`` that are different at some depths."""

    depths: tuple[int, ...]
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A sweep: every family at every depth, in every setting and length, with every seed is one run."""

    name: str
    """The sweep's folder under the root."""
    depths: tuple[int, ...]
    """One run per family, depth and seed; width 64d, N ≈ 73728·d³."""
    train: TrainConfig
    families: tuple[Family, ...] = ("var",)
    """Model families; the report of several compares them."""
    seeds: tuple[int, ...] = (0,)
    lengths: tuple[float, ...] = (1.0,)
    """A run for each of these multiples of train's own length; with train.schedule wsd the shorter ones
    branch off the longest."""
    budgets: tuple[float, ...] = ()
    """A run for each of these training FLOPs, in place of a length in train: isoFLOP designs."""
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values by name (train.lr), each with each other."""
    zip: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values by name that vary together, the first of each, the second of each, …"""
    lr_rule: LrRule | None = None
    """Learning rates by width; by default every depth has that of train."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokenizer_train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    model: ModelOptions = field(default_factory=ModelOptions)
    by_family: tuple[FamilyOverride, ...] = ()
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
        require(len(self.families) > 0, "families must not be empty")
        require(
            len(set(self.families)) == len(self.families),
            f"families has a family twice: {list(self.families)}",
        )
        require(len(self.depths) > 0, "depths must not be empty")
        require(min(self.depths) >= 1, f"depths must be at least 1, got {min(self.depths)}")
        require(len(set(self.depths)) == len(self.depths), f"depths has a depth twice: {list(self.depths)}")
        require(len(self.seeds) > 0, "seeds must not be empty")
        require(min(self.seeds) >= 0, f"seeds must not be negative, got {min(self.seeds)}")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds has a seed twice: {list(self.seeds)}")
        for name, listed in (
            ("by_depth lists depth", [str(d) for override in self.by_depth for d in override.depths]),
            ("by_family lists", [str(f) for override in self.by_family for f in override.families]),
        ):
            twice = [value for value in dict.fromkeys(listed) if listed.count(value) > 1]
            require(not twice, f"{name} {', '.join(twice)} more than once")
        for name in ("lengths", "budgets"):
            values = getattr(self, name)
            require(all(value > 0 for value in values), f"{name} must be positive, got {list(values)}")
            require(len(set(values)) == len(values), f"{name} has a value twice: {list(values)}")
        require(len(self.lengths) > 0, "lengths must not be empty; [1] is train's own")
        require(
            not self.budgets or self.lengths == (1.0,),
            "budgets decide how long a run trains; leave lengths out",
        )
        check_axes(self.grid, self.zip)
        self._check_parts_of_designs()

    def _check_parts_of_designs(self) -> None:
        """What a design decides stands in no part for single families or depths."""
        decided = [(name.split("."), part) for part in ("grid", "zip") for name in getattr(self, part)]
        decided += [(["train", "lr"], "lr_rule")] if self.lr_rule else []
        decided += [(["train", name], "budgets") for name in LENGTHS] if self.budgets else []
        for keys, by in decided:
            for part in ("by_family", "by_depth"):
                for override in getattr(self, part):
                    require(
                        keys[1] not in getattr(override, keys[0], {}),
                        f"{part} sets {'.'.join(keys[:2])}, which {by} decides; name it in one place",
                    )

    def run(self, place: Place, data: DataConfig) -> RunConfig:
        """One run, with ``data`` as ``scaling.data`` has resolved it (all counts known).

        Raises:
            ConfigError: the values do not fit together.
        """
        family, depth = place.family, place.depth
        tokenizer, tokenizer_train = self._tokenizer_of(family, place.settings)
        train, options = to_dict(self.train), to_dict(self.model)
        parts: list[FamilyOverride | DepthOverride] = [*self._of_family(family), *self._of_depth(depth)]
        for part in parts:
            train, options = _merged(train, part.train), _merged(options, part.model)
        varied = nested(place.settings)
        train, options = _merged(train, varied.get("train", {})), _merged(options, varied.get("model", {}))
        chosen = dataclasses.asdict(from_dict(ModelOptions, options))
        if data.num_classes is None:
            raise ConfigError("data.num_classes is not known yet")
        model = ModelConfig.from_depth(
            depth,
            vocab=tokenizer.vocab,
            latent_channels=tokenizer.latent_channels,
            num_classes=data.num_classes,
            family=family,
            **{"scales": tokenizer.scales} | {key: v for key, v in chosen.items() if v is not None},
        )
        evaluation = _merged(to_dict(self.evaluation), varied.get("evaluation", {}))
        if place.budget is not None:
            train |= dict.fromkeys(LENGTHS) | {"steps": AMPLE}
        run = RunConfig(
            model=model,
            data=data,
            tokenizer=tokenizer,
            tokenizer_train=tokenizer_train,
            train=self._train(from_dict(TrainConfig, train), place),
            evaluation=from_dict(EvaluationConfig, evaluation),
            seed=place.seed,
        )
        if place.budget is None:
            return run
        steps = steps_within(run, place.budget)
        return replace(run, train=replace(run.train, steps=steps))

    def _train(self, train: TrainConfig, place: Place) -> TrainConfig:
        train = lengthened(train, place.length)
        return self.lr_rule.apply(train, place.depth) if self.lr_rule else train

    def runs(self, data: DataConfig) -> list[RunConfig]:
        """Every run, in the order of ``places``.

        Raises:
            ConfigError: as ``run``; two of them are the same.
        """
        places = self.places()
        found: dict[RunConfig, Place] = {}
        runs = [self.run(place, data) for place in places]
        for place, run in zip(places, runs, strict=True):
            # However the length is given.
            train = replace(run.train, steps=run.total_steps, epochs=None, tokens=None)
            other = found.setdefault(replace(run, train=train), place)
            require(
                other is place,
                f"two runs of depth {place.depth} come out the same, of {run.total_steps} steps (lengths "
                f"{other.length:g} and {place.length:g}, budgets {other.budget} and {place.budget}, settings "
                f"'{other.label}' and '{place.label}'); set them further apart",
            )
        return runs

    def _tokenizer_of(
        self, family: Family, settings: Settings
    ) -> tuple[TokenizerConfig, TokenizerTrainConfig]:
        """A family's tokenizer and its training, in a setting."""
        tokenizer, train, varied = to_dict(self.tokenizer), to_dict(self.tokenizer_train), nested(settings)
        for override in self._of_family(family):
            tokenizer = _merged(tokenizer, override.tokenizer)
            train = _merged(train, override.tokenizer_train)
        tokenizer = _merged(tokenizer, varied.get("tokenizer", {}))
        train = _merged(train, varied.get("tokenizer_train", {}))
        return from_dict(TokenizerConfig, tokenizer), from_dict(TokenizerTrainConfig, train)

    def places(self) -> list[Place]:
        """Where every run stands in the design, in the order of ``runs``."""
        settings = combinations(self.grid, self.zip)
        return list(expand(self.families, self.depths, self.seeds, self.lengths, self.budgets, settings))

    def _of_family(self, family: Family) -> list[FamilyOverride]:
        return [override for override in self.by_family if family in override.families]

    def _of_depth(self, depth: int) -> list[DepthOverride]:
        return [override for override in self.by_depth if depth in override.depths]


def tokenizer_runs(runs: Sequence[RunConfig]) -> list[TokenizerRunConfig]:
    """The distinct stage-1 runs that the tokens of runs come from, in the order of the runs."""
    found: dict[str, TokenizerRunConfig] = {}
    for run in runs:
        found.setdefault(run.tokenizer_run.run_id, run.tokenizer_run)
    return list(found.values())


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
    _drop_from_parts(source.data, overrides or {})
    _open_names(source)
    try:
        _leave_length_to_budgets(source)
        recipe = from_dict(Recipe, source.data, source.locate)
        _check_parts(recipe, source)
    except ConfigError as error:
        raise source.blame(error) from None
    try:
        _check_axes_values(recipe, source)
    except ConfigError as error:
        raise source.blame(error, AXES) from None
    for place in recipe.places():
        try:
            recipe.run(place, _stand_in(recipe.data))
        except ConfigError as error:
            raise source.blame(error, _parts_of(recipe, place)) from None
    return recipe


AXES: list[Keys] = [("grid",), ("zip",)]
"""Where the values that vary stand."""


def _open_names(source: Source) -> None:
    """Let the dotted names of ``grid`` and ``zip`` be found where they stand by what they name.

    Raises:
        ConfigError: an option sets a value that one of them varies.
    """
    for part in ("grid", "zip"):
        axes = source.data.get(part) if isinstance(source.data, dict) else None
        for name in axes if isinstance(axes, dict) else ():
            keys = tuple(str(name).split("."))
            source.lines.setdefault((part, *keys), source.lines[part, name])
            if keys in source.overridden:
                raise ConfigError(
                    f"{source.locate(keys)}: {part} varies {name} ({source.file}, line "
                    f"{source.lines[part, name]}); change its values there"
                )


def _leave_length_to_budgets(source: Source) -> None:
    """A recipe with budgets gives no length; ``TrainConfig`` wants one, and gets one that no run has.

    Raises:
        ConfigError: it gives one.
    """
    if not isinstance(source.data, dict) or not source.data.get("budgets"):
        return
    train = source.data.setdefault("train", {})
    for name in LENGTHS if isinstance(train, dict) else ():
        if train.get(name) is not None:
            raise ConfigError(
                f"train.{name} {train[name]}: budgets decide how long a run trains; leave it out"
            )
    if isinstance(train, dict):
        train["steps"] = AMPLE


def _check_axes_values(recipe: Recipe, source: Source) -> None:
    """Every value of ``grid``, and every row of ``zip``, by itself."""
    rows = [("grid", {name: value}) for name, values in recipe.grid.items() for value in values]
    rows += [("zip", dict(row)) for row in combinations({}, recipe.zip)]
    for part, row in rows:
        for section, own in nested(row).items():
            values = _merged(to_dict(getattr(recipe, section)), own)
            cls = type(getattr(recipe, section))
            from_dict(cls, values, source.locate, (part, section))


def shipped_recipes() -> dict[str, Path]:
    """The files of the recipes that come with this program, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a recipe; shipped recipes: {', '.join(shipped)}")
    beside = {str(f): f for f in sorted(path.parent.glob("*.y*ml"))} if path.parent.is_dir() else {}
    near = difflib.get_close_matches(str(name), [*shipped, *beside], n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped recipes: {', '.join(shipped)}"
    raise ConfigError(f"{name}: no such recipe file; {hint}")


def _drop_from_parts(data: Any, overrides: Mapping[Keys, Any]) -> None:
    """An option holds for every family and depth, so it also replaces the values of single ones."""
    for part in ("by_family", "by_depth"):
        entries = data.get(part) if isinstance(data, dict) else None
        for values in entries if isinstance(entries, list) else []:
            for path in overrides:
                _drop(values, path)


def _drop(values: Any, path: Keys) -> None:
    for key in path[:-1]:
        values = values.get(key) if isinstance(values, dict) else None
    if isinstance(values, dict) and len(path) > 1:
        values.pop(path[-1], None)


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The common values with a part's own in their place, key by key at every level."""
    merged = dict(common)
    for key, value in own.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, Mapping):
            value = _merged(known, value)
        merged[key] = value
    return merged


SECTIONS: dict[str, type] = {
    "tokenizer": TokenizerConfig,
    "tokenizer_train": TokenizerTrainConfig,
    "train": TrainConfig,
    "model": ModelOptions,
}
"""What single families and depths may set."""


def _check_parts(recipe: Recipe, source: Source) -> None:
    """Every value of ``by_family`` and ``by_depth``, those of families and depths that are not run too."""
    for part in ("by_family", "by_depth"):
        for number, override in enumerate(getattr(recipe, part)):
            for section, cls in SECTIONS.items():
                if own := getattr(override, section, None):
                    values = _merged(to_dict(getattr(recipe, section)), own)
                    from_dict(cls, values, source.locate, (part, str(number), section))


def _parts_of(recipe: Recipe, place: Place) -> list[Keys]:
    """Where the values of a run may stand beside the common ones, the strongest first."""
    depths = [("by_depth", str(i)) for i, o in enumerate(recipe.by_depth) if place.depth in o.depths]
    families = [("by_family", str(i)) for i, o in enumerate(recipe.by_family) if place.family in o.families]
    return [*AXES, *depths, *families]


def _stand_in(data: DataConfig) -> DataConfig:
    """The data with a count of one wherever only the data knows; of many training images, since a run must
    not seem too short for what is counted in steps."""
    return replace(
        data,
        train_images=data.train_images or AMPLE,
        val_images=data.val_images or 1,
        num_classes=data.num_classes or 1,
    )
