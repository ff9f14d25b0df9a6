"""Tables at any width: nothing is cut, nothing is lost."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.costs import Rates
from sweeps.fold import Line, folded
from sweeps.recipe import load_recipe
from sweeps.tables import plan_table
from tests.sweeps.test_devices import stated
from tests.sweeps.test_plan import planned


def shown(table: object, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_every_cell_is_there_and_no_line_is_too_long(width: int) -> None:
    headings = ["run", *(f"column {i}" for i in range(12)), "state"]
    lines = [Line({h: f"{h[-2:]}.{r}" for h in headings} | {"run": f"run-{r}"}) for r in range(3)]
    text = shown(folded("title", lines, headings, ["state", "column 11"], width), width)
    assert max(map(len, text)) <= width
    words = " ".join(text).split()
    for line in lines:
        assert all(part in words for value in line.cells.values() for part in value.split())
    assert not any("…" in line for line in text)
    first = text[1]
    assert "state" in first
    assert "column 11" in first, "by rank, not by place"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_plan_is_whole_at_common_widths(tmp_path: Path, width: int) -> None:
    plans = [
        planned(tmp_path),
        stated(tmp_path),
        planned(tmp_path, load_recipe("quickstart", {("launch", "processes"): 2})),
    ]
    for plan in plans:
        text = shown(plan_table(plan, width, Rates(2.5, 700.0)), width)
        assert max(map(len, text[1:])) <= width, "but for the title, which is a path"
        assert not any("…" in line for line in text)
        for heading in ("N", "tokens", "epochs", "FLOPs", "memory/run", "disk", "time", "steps", "state"):
            assert any(heading in line.split() for line in text), heading


def test_names_are_short_only_while_they_tell_runs_apart(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert any(line.startswith("var-d3-s0 ") for line in shown(plan_table(plan, 80), 80))
    assert any(plan.runs[2].run in line for line in shown(plan_table(plan, 200), 200))
