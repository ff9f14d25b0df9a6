"""Several families of one sweep side by side: what may be compared, and what comes of it.

- A loss compares where the tokens are the same: one tokenizer, trained alike on the same images, and a last
  map of the same side. Only then are two families put on one axis, and only with the loss of that last map:
  families differ in what else an image consists of.
- FlexVAR's tokenizer quantises every scale by itself, so that raster's only map is FlexVAR's last one. The
  tokens are the same; what they are predicted from is not (``CONDITIONS``).
- A family whose own runs have several kinds of tokens is one for each kind (``analysis.tokens``).
- Whatever the tokens, an exponent belongs to a family and may be listed; a difference of exponents and a
  ratio of losses are taken among families with the same tokens alone (``analysis.comparison``).
- Losses at equal X are read from the fitted laws at the largest X that the data of both families reach, so
  that no law is used beyond its data (``analysis.family_pairs``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from analysis.family_pairs import QUANTITY, Pair, Standing, compare_two
from analysis.files import plain
from analysis.study import Points, Study
from analysis.tokens import Tokens, tokens_of

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
class Families:
    """The studies of a sweep of several families, compared."""

    studies: Mapping[str, Study]
    groups: tuple[Group, ...]
    """By tokens; a family whose tokens nobody else has is a group by itself."""
    pairs: tuple[Pair, ...]
    """Both forms of every two families' laws, over N and over C."""
    standings: tuple[Standing, ...]
    """Which family is lower, by the form that the data support."""
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
                "standings": [standing.to_json() for standing in self.standings],
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
    axes: tuple[tuple[str, Points], ...] = (
        ("params", "final"), (next(iter(studies.values())).flops, "pareto")
    )  # fmt: skip
    pairs: list[Pair] = []
    standings: list[Standing] = []
    for group in groups:
        for one, two in itertools.combinations(group.studies, 2):
            for x, points in axes:
                found, standing = compare_two(one, two, x, points)
                pairs += found
                standings.append(standing)
    notes = tuple(_notes(studies, groups))
    return Families(dict(studies), groups, tuple(pairs), tuple(standings), notes)


def _family(study: Study) -> str:
    """Of the models, whatever their tokens."""
    return str(study.runs[0]["config"]["model"]["family"])


def _kinds(study: Study) -> set[Tokens | None]:
    return {tokens_of(run) for run in study.runs}


def _groups(studies: Mapping[str, Study]) -> tuple[Group, ...]:
    by_tokens: dict[Tokens | str, list[Study]] = {}
    for family, study in studies.items():
        found = _kinds(study)
        same = found.pop() if len(found) == 1 else None
        by_tokens.setdefault(same or f"of {family} alone", []).append(study)
    return tuple(Group(tuple(group)) for group in by_tokens.values())


def _notes(studies: Mapping[str, Study], groups: tuple[Group, ...]) -> Iterator[str]:
    """What the comparison is of, and what it is not."""
    for group in groups:
        if len(group.studies) == 1:
            yield from _alone(group.families[0], studies)
            continue
        by_token = [study.family for study in group.studies if _family(study) in NEXT_TOKEN]
        by_scale = [study.family for study in group.studies if _family(study) not in NEXT_TOKEN]
        if by_token and by_scale:
            yield CONDITIONS.format(scales=listed(by_scale), tokens=listed(by_token))
        yield f"N counts the matrices of the blocks, which are not alike: {_sizes(group)}"
        if differing := _training(group):
            yield f"not trained alike, so a difference need not be the family's: {differing}"
    if sum(len(group.studies) > 1 for group in groups):
        yield "the intervals are of each pair by itself, not of all pairs together"


def _alone(family: str, studies: Mapping[str, Study]) -> Iterator[str]:
    """Why a family is compared with nothing; that tokens are other ones only where that is known."""
    mine = _kinds(studies[family])
    if len({tokens.imported for tokens in mine if tokens}) > 1:
        yield (
            f"some runs of {family} are imported and some were trained here: whether their tokens are the "
            "same is not known; compared with nothing"
        )
        return
    if len(mine) > 1:
        yield f"the runs of {family} have tokens of more than one kind: compared with nothing"
        return
    (tokens,) = mine
    theirs = {name: _kinds(study) for name, study in studies.items() if name != family}
    other = [
        name
        for name, kinds in theirs.items()
        if tokens and all(k and k.imported == tokens.imported for k in kinds)
    ]
    if other:
        yield (
            f"{family} was trained on other tokens than {listed(other)}: its loss is the "
            "cross-entropy of something else and is never put on an axis with theirs"
        )
    if unknown := [name for name in theirs if name not in other]:
        yield (
            f"whether the tokens of {family} are those of {listed(unknown)} is not known: its loss is not "
            "put on an axis with theirs"
        )


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
    return f"{names}: no two of them are known to have the same tokens, so their losses do not compare."


def _said_of(group: Group, found: Families) -> str:
    """A group's share of the headline: who is lower, or which of three things is missing."""
    at_equal = [s for s in found.standings if s.x == found.flops and s.first in group.families]
    said = [standing.sentence for standing in at_equal if standing.at is not None]
    if said:
        return "at equal compute, in the loss of the last map, whose tokens are the same, " + "; ".join(said)
    alike = f"{listed(group.families)} have the same tokens"
    if any(pair.found for pair in found.pairs if pair.x == found.flops and pair.first in group.families):
        return f"{alike}, but " + "; ".join(dict.fromkeys(s.problem for s in at_equal))
    if all(study.law(QUANTITY, found.flops, "pareto").law for study in group.studies):
        return f"{alike}, but their laws cannot be compared"
    return f"{alike}, but no laws yet"
