"""Tables that a terminal of any width shows whole: columns that do not fit stand in a second table below.

The first column, which says what a row is, stands in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len

if TYPE_CHECKING:
    from rich.console import Group

GAP = 2
"""Characters between columns."""


@dataclass(frozen=True)
class Line:
    """One row, its cells by heading."""

    cells: Mapping[str, str]
    bold: bool = False
    space: bool = False
    """An empty line before it."""


def folded(
    title: str, lines: Sequence[Line], headings: Sequence[str], rank: Sequence[str], width: int
) -> Group:
    """One table, or several one below the other, of at most ``width`` characters.

    Args:
        headings: the columns in the order in which they are shown; the first is in every table. Columns
            with no entry are left out.
        rank: headings by what a reader wants to see first; what is not named comes last, in its own order.
    """
    from rich.console import Group
    from rich.table import Table

    key, *others = headings
    used = [h for h in others if any(line.cells.get(h) for line in lines)]
    order = sorted(used, key=lambda h: rank.index(h) if h in rank else len(rank))
    parts = _parts({h: _width(lines, h) for h in order}, width - _width(lines, key))
    tables: list[Table | str] = []
    for number, part in enumerate(parts):
        table = Table(
            title=title if number == 0 else None, title_justify="left", box=None, pad_edge=False,
            padding=(0, GAP, 0, 0),
        )  # fmt: skip
        shown = [key, *(h for h in used if h in part)]
        for heading in shown:
            words = heading in (key, "state")
            table.add_column(heading, justify="left" if words else "right", no_wrap=True)
        for line in lines:
            if line.space:
                table.add_row()
            if number == 0 or any(line.cells.get(h) for h in shown[1:]):
                table.add_row(*(line.cells.get(h, "") for h in shown), style="bold" if line.bold else None)
        tables += [table] if number == 0 else ["", table]
    return Group(*tables)


def _parts(widths: Mapping[str, int], room: int) -> list[set[str]]:
    """Which columns stand together: each table takes the next by rank that still fits, at least one."""
    parts: list[set[str]] = [set()]
    left = room
    for heading, needed in widths.items():
        if parts[-1] and GAP + needed > left:
            parts.append(set())
            left = room
        parts[-1].add(heading)
        left -= GAP + needed
    return parts


def _width(lines: Sequence[Line], heading: str) -> int:
    return max(cell_len(heading), *(cell_len(line.cells.get(heading, "")) for line in lines))
