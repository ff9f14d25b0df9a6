"""What decides the tokens that a run's loss is the cross-entropy of: losses of other tokens do not compare.

A sweep may train a family on several tokenizers (``grid: {tokenizer.vocab: [256, 4096]}``). A vocabulary of
256 has a lower loss than one of 4096 whatever the model: there is no best of the two by their losses, and no
law through both. So each kind of tokens makes the family one of its own, ``var-vocab-256`` beside
``var-vocab-4096``, with its own laws; generation metrics, which are of pictures, compare them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SECTIONS = ("tokenizer", "tokenizer_train", "data")
"""Of a config: what the tokens of a run follow from, with the side of its last map."""
PLACES = ("path", "lpips_weights")
"""Where things lie is no part of what they are, as in ``scaling.schema.identity``."""


@dataclass(frozen=True)
class Tokens:
    """What decides the tokens of a run's last map."""

    imported: bool
    text: str
    """Equal for equal tokens. Of runs trained here and of imported ones it says other things, which do not
    compare."""


def tokens_of(run: Mapping[str, Any]) -> Tokens | None:
    """What decides the tokens of a run (facts as in ``Study.runs``); None where its records do not say.

    Trained here: its config. Imported: nothing says how its tokenizer was trained, so the hash of the
    tokenizer's weights and the fingerprint of the images stand in ``status.json``.
    """
    config = run["config"]
    scales = config.get("model", {}).get("scales")
    if not scales:
        return None
    if origin := run["status"].get("imported"):
        told = [origin.get("tokenizer_hash"), origin.get("images")]
        return Tokens(True, json.dumps([*told, scales[-1]])) if all(told) else None
    values = _values(config)
    return None if values is None else Tokens(False, json.dumps(values, sort_keys=True))


def same_tokens(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two configs of runs trained here say nothing else of their tokens.

    A key that only one of them has, such as one that a later version added, is no difference.
    """
    first, second = _values(one) or {}, _values(two) or {}
    return all(json.dumps(first[n]) == json.dumps(second[n]) for n in first.keys() & second.keys())


def names_by_tokens(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By run, its family's name, with what tells its tokens from those of the family's other runs.

    Imported runs, and those whose records do not say, keep the plain name. As in ``same_tokens``, a key that
    some runs lack tells nobody apart.
    """
    found: dict[str, str] = {}
    for family in dict.fromkeys(str(run["family"]) for run in runs):
        own = [run for run in runs if run["family"] == family]
        found |= {str(run["run"]): family for run in own}
        values = {str(run["run"]): _values(run["config"]) for run in own if not run["imported"]}
        known = {run: value for run, value in values.items() if value is not None}
        names = dict.fromkeys(name for value in known.values() for name in value)
        differ = [n for n in names if len({json.dumps(v[n]) for v in known.values() if n in v}) > 1]
        for run, value in known.items():
            found[run] = "-".join([family, *(_part(name, value.get(name)) for name in differ)])
    return found


def _values(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Values by dotted name."""
    scales = config.get("model", {}).get("scales")
    parts = {name: config.get(name) for name in SECTIONS}
    if not scales or not all(isinstance(part, dict) for part in parts.values()):
        return None
    return {"side": scales[-1]} | {n: v for n, v in _leaves(parts, "") if n.rpartition(".")[2] not in PLACES}


def _leaves(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _part(name: str, value: Any) -> str:
    """``vocab-256``: letters, digits and hyphens, since it becomes part of files' names."""
    shown = f"{value:g}" if isinstance(value, float) else json.dumps(value)
    text = f"{name.removeprefix('tokenizer.')}-{shown}".lower()
    return re.sub("[^a-z0-9]+", "-", text).strip("-")
