"""Several families of one sweep side by side: what may be compared, and what comes of it.

- A loss compares where the tokens are the same: one tokenizer, trained alike on the same images, and a last
  map of the same side. Only then are two families put on one axis, and only with the loss of that last map:
  families differ in what else an image consists of.
- FlexVAR's tokenizer quantises every scale by itself, so that raster's only map is FlexVAR's last one. The
  tokens are the same; what they are predicted from is not (``CONDITIONS``).
- Whatever the tokens, an exponent belongs to a family and may be listed; a difference of exponents and a
  ratio of losses are taken among families with the same tokens alone (``analysis.comparison``).
- Losses at equal X are read from the fitted laws at the largest X that the data of both families reach, so
  that no law is used beyond its data.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from analysis.comparison import Comparison, compare
from analysis.errors import DataError
from analysis.files import plain
from analysis.powerlaw import PowerLaw
from analysis.study import LEVEL, Study

QUANTITY = "loss_last"
"""What is compared: the loss of the one map that all families of a group have."""
FEWEST = 4
"""Runs on a family's frontier before the headline says that it is lower: three cannot show that the frontier
is no line."""
NEXT_TOKEN = ("raster",)
"""Families that predict a map token by token; all others predict a whole map from the coarser ones."""
CONDITIONS = (
    "the tokens of the last map are the same, what they are predicted from is not: with {scales} the whole "
    "map is conditioned on the coarser ones, with {tokens} each token on nothing but the earlier ones of the "
    "same map; so only this map's losses stand side by side, and sums over all the tokens of an image, of "
    "which {tokens} has fewer, differ"
)
TRAINING = ("steps", "epochs", "tokens", "batch", "lr", "lr_base", "schedule", "warmup", "weight_decay")
"""Keys of ``train`` in a run's config that make its loss another one."""


@dataclass(frozen=True)
class Group:
    """Families with the same last map of the same tokens, in the sweep's order."""

    studies: tuple[Study, ...]

    @property
    def families(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(study.family for study in self.studies)

    @property
    def side(self) -> int:
        """Of the last map."""
        return int(self.studies[0].runs[0]["config"]["model"]["scales"][-1])


@dataclass(frozen=True)
class Pair:
    """Two families' laws over the same X, of the same form."""

    first: str
    second: str
    x: str
    offset: bool
    found: Comparison | None
    problem: str
    """Why there is no comparison."""

    @property
    def at(self) -> float | None:
        """The largest X that the data of both reach; None where their ranges do not meet."""
        if self.found is None:
            return None
        laws = (self.found.first, self.found.second)
        low, high = max(law.x.min() for law in laws), min(law.x.max() for law in laws)
        return float(high) if low <= high else None

    @property
    def losses(self) -> tuple[tuple[float, float, float], ...]:
        """Value and interval of both laws at ``at``; empty without one."""
        if self.found is None or self.at is None:
            return ()
        return tuple(_predicted(law, self.at) for law in (self.found.first, self.found.second))

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """first's loss over second's at ``at``, with its interval."""
        if self.found is None or self.at is None:
            return None
        said = self.found.ratio(self.at)
        return float(said.value[0]), float(said.low[0]), float(said.high[0])

    @property
    def lower(self) -> str:
        """Which one has the lower loss at ``at``, as far as that is decided."""
        if self.ratio is None:
            return "their X do not meet" if self.found else "–"
        _, low, high = self.ratio
        return self.first if high < 1 else self.second if low > 1 else "undecided"

    @property
    def apart(self) -> str:
        """Whether the exponents differ."""
        assert self.found is not None
        low, high = self.found.interval()
        return "differ" if low > 0 or high < 0 else "equal exponents not excluded"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        head = {"first": self.first, "second": self.second, "x": self.x, "offset": self.offset}
        if self.found is None:
            return head | {"problem": self.problem}
        return head | {
            "difference": self.found.difference, "interval": list(self.found.interval()), "level": LEVEL,
            "method": self.found.method, "at": self.at, "losses": [list(v) for v in self.losses],
            "ratio": list(self.ratio) if self.ratio else None, "lower": self.lower,
            "verdict": self.found.verdict,
        }  # fmt: skip


@dataclass(frozen=True)
class Families:
    """The studies of a sweep of several families, compared."""

    studies: Mapping[str, Study]
    groups: tuple[Group, ...]
    """By tokens; a family whose tokens nobody else has is a group by itself."""
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    @property
    def shared(self) -> tuple[Group, ...]:
        """Groups of more than one family."""
        return tuple(group for group in self.groups if len(group.studies) > 1)

    @property
    def flops(self) -> str:
        """The compute convention."""
        return next(iter(self.studies.values())).flops

    def to_json(self) -> dict[str, Any]:
        """Plain values, with null where a number is not finite."""
        value: dict[str, Any] = plain(
            {
                "quantity": QUANTITY,
                "same_tokens": [list(group.families) for group in self.groups],
                "pairs": [pair.to_json() for pair in self.pairs],
                "notes": list(self.notes),
            }
        )
        return value


def compare_families(studies: Mapping[str, Study]) -> Families:
    """Compare what may be compared.

    Args:
        studies: by family, in the sweep's order, of one compute convention (``make_studies``).
    """
    groups = _groups(studies)
    pairs = [
        pair
        for group in groups
        for one, two in itertools.combinations(group.studies, 2)
        for x, points in (("params", "final"), (one.flops, "pareto"))
        for offset in (False, True)
        for pair in [_pair(one, two, x, points, offset)]
        # That a form with an offset has no interval stands in the family's own table.
        if pair.found or not offset
    ]
    return Families(dict(studies), groups, tuple(pairs), tuple(_notes(studies, groups)))


def tokens_of(config: Mapping[str, Any]) -> str | None:
    """What decides the tokens of a run's last map, as text to compare; None where its config does not say.

    Where images and LPIPS weights lie is no part of what they are, as in ``scaling.schema.identity``.
    """
    scales = config.get("model", {}).get("scales")
    parts = [config.get(part) for part in ("data", "tokenizer", "tokenizer_train")]
    if not scales or not all(isinstance(part, dict) for part in parts):
        return None
    kept = [{k: v for k, v in part.items() if k not in ("path", "lpips_weights")} for part in parts if part]
    return json.dumps([*kept, scales[-1]], sort_keys=True)


def _groups(studies: Mapping[str, Study]) -> tuple[Group, ...]:
    by_tokens: dict[str, list[Study]] = {}
    for family, study in studies.items():
        found = {tokens_of(run["config"]) for run in study.runs}
        same = found.pop() if len(found) == 1 else None
        by_tokens.setdefault(same or f"of {family} alone", []).append(study)
    return tuple(Group(tuple(group)) for group in by_tokens.values())


def _pair(one: Study, two: Study, x: str, points: Any, offset: bool) -> Pair:
    rows = [study.law(QUANTITY, x, points, offset) for study in (one, two)]
    found, problem = None, ""
    for study, row in zip((one, two), rows, strict=True):
        if row.law is None:
            problem = problem or f"{study.family}: {row.problem}"
    if not problem:
        try:
            laws = [row.law for row in rows if row.law]
            names = (one.family, two.family)
            found = compare(laws[0], laws[1], names, LEVEL, "N" if x == "params" else "C")
        except DataError as error:
            problem = str(error)
    return Pair(one.family, two.family, x, offset, found, problem)


def _predicted(law: PowerLaw, x: float) -> tuple[float, float, float]:
    said = law.predict(x, LEVEL)
    return float(said.value[0]), float(said.low[0]), float(said.high[0])


def _notes(studies: Mapping[str, Study], groups: tuple[Group, ...]) -> Iterator[str]:
    """What the comparison is of, and what it is not."""
    for group in groups:
        if len({tokens_of(run["config"]) for study in group.studies for run in study.runs}) > 1:
            yield f"the runs of {group.families[0]} have tokens of more than one kind: compared with nothing"
            continue
        if len(group.studies) == 1:
            others = [name for name in studies if name not in group.families]
            yield (
                f"{group.families[0]} was trained on other tokens than {listed(others)}: its loss is the "
                "cross-entropy of something else and is never put on an axis with theirs"
            )
            continue
        by_token = [family for family in group.families if family in NEXT_TOKEN]
        by_scale = [family for family in group.families if family not in NEXT_TOKEN]
        if by_token and by_scale:
            yield CONDITIONS.format(scales=listed(by_scale), tokens=listed(by_token))
        yield f"N counts the matrices of the blocks, which are not alike: {_sizes(group)}"
        if differing := _training(group):
            yield f"not trained alike, so a difference need not be the family's: {differing}"
    if sum(len(group.studies) > 1 for group in groups):
        yield "the intervals are of each pair by itself, not of all pairs together"


def _sizes(group: Group) -> str:
    """What a layer's N is in each family, from the runs' own numbers."""
    parts = []
    for study in group.studies:
        run = study.frame.sort_values("params").iloc[-1]
        per_layer = run["params"] / (run["depth"] * run["width"] ** 2)
        adaln = study.runs[0]["config"].get("model", {}).get("adaln") == "own"
        share = ", 6·w² of it adaLN at next to no compute" if adaln else ""
        parts.append(f"{run['family']} has {per_layer:.3g}·w² a layer{share}")
    return "; ".join(parts)


def _training(group: Group) -> str:
    """Training values that differ between the families of a group, in words; empty when none do."""
    found: dict[str, dict[str, str]] = {}
    for study in group.studies:
        configs = [run["config"].get("train", {}) for run in study.runs]
        for key in TRAINING:
            values = sorted({str(config.get(key)) for config in configs})
            found.setdefault(key, {})[study.frame["family"].iloc[0]] = "/".join(values)
    return "; ".join(
        f"{key} " + ", ".join(f"{value} ({family})" for family, value in by_family.items())
        for key, by_family in found.items()
        if len(set(by_family.values())) > 1
    )


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Names in a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def headline(found: Families) -> str:
    """One sentence: which family is lower at equal compute, where that can be said."""
    names = listed(tuple(found.studies))
    said = [_said_of(group, found) for group in found.shared]
    if said:
        return f"{names} compared: {'; '.join(said)}."
    return f"{names}: no two of them were trained on the same tokens, so their losses do not compare."


def _said_of(group: Group, found: Families) -> str:
    """A group's share of the headline: who is lower, or which of three things is missing."""
    at_equal = [
        pair
        for pair in found.pairs
        if pair.x == found.flops and not pair.offset and pair.found and pair.first in group.families
    ]
    said = [_who_is_lower(pair) for pair in at_equal if pair.ratio]
    if said:
        return "at equal compute, in the loss of the last map, whose tokens are the same, " + "; ".join(said)
    alike = f"{listed(group.families)} have the same tokens"
    if at_equal:
        return f"{alike}, but their compute does not overlap"
    if all(study.law(QUANTITY, found.flops, "pareto").law for study in group.studies):
        return f"{alike}, but their laws cannot be compared"
    return f"{alike}, but no laws yet"


def _who_is_lower(pair: Pair) -> str:
    assert pair.found is not None
    if min(pair.found.first.groups, pair.found.second.groups) < FEWEST:
        return f"{pair.first} and {pair.second} have too few runs to tell"
    if pair.lower == "undecided":
        return f"{pair.first} and {pair.second} are not told apart"
    return f"{pair.lower} is below {pair.second if pair.lower == pair.first else pair.first}"
