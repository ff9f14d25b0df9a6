"""One line of ``metrics.jsonl`` as names and numbers for a tracker. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

AXES = ("step", "tokens", "epochs", "flops", "params")
"""Names without a kind before them: every kind of line has the same, and any can be the x of a chart."""


@dataclass(frozen=True)
class Point:
    """The numbers of one line."""

    step: int
    series: str
    """What comes before its values' names: the kind, and of ``fidelity`` the setting too. With ``step`` it
    names the line."""
    axes: dict[str, float]
    values: dict[str, float]
    """``<series>/<name>``; of a list one value per entry, ``eval/loss_scale_1`` and so on."""

    @property
    def numbers(self) -> dict[str, float]:
        """Axes and values together."""
        return self.axes | self.values


def point_of(record: dict[str, Any]) -> Point:
    """The line's numbers; texts name its series or say what is known elsewhere, null is no number."""
    series = str(record["kind"])
    if "setting" in record:
        series += "/" + str(record["setting"]).replace("/", "-")
    axes = {name: record[name] for name in AXES if _number(record.get(name))}
    values: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            one = name.removesuffix("s")
            values |= {f"{series}/{one}_{i}": v for i, v in enumerate(value, 1) if _number(v)}
        elif _number(value) and name not in axes:
            values[f"{series}/{name}"] = value
    return Point(int(record.get("step", 0)), series, axes, values)


def series_of(names: Iterator[str] | list[str]) -> str | None:
    """The series of a row that was logged, from its names; None for a row that is no point."""
    found = {name.rpartition("/")[0] for name in names if "/" in name}
    return found.pop() if len(found) == 1 else None


def flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested values under dotted names, as trackers sort and group by; a list as text, null left out."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found |= flat(inner, f"{before}{key}.")
        elif inner is not None:
            found[f"{before}{key}"] = inner if isinstance(inner, bool | int | float | str) else str(inner)
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
