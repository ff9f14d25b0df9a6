"""Every notebook runs from start to end in a kernel of this Python, and writes nothing outside its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks.build import read_source, run, texts
from tests.notebooks.conftest import NOTEBOOKS, RECORDS
from tests.parity.reference import SHARED

CHINCHILLA = SHARED / "data" / "chinchilla" / "svg_extracted_data.csv"
FACTS = """
import json
print(json.dumps({
    "objective": [surface.objective, everything.objective],
    "params": dict(surface.params), "a": surface.compute_exponents.a,
    "errors": dict(zip(names, surface.replicates.std(0).tolist())),
    "rows": [len(kept), len(table)], "same": objective(ours)[0],
    "near": {name: int((end < 1.01 * surface.objective).sum()) for name, end in reached.items()},
}))
"""


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.parametrize(("name", "drawn"), [("first_look", 5), ("paper_figures", 3)])
def test_runs_on_the_shipped_records(name: str, drawn: int, tmp_path: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in NOTEBOOKS.rglob("*") if "__pycache__" not in f.parts}
    notebook = run(read_source(name), tmp_path, VARSCALE_SWEEP=str(RECORDS))
    assert "reading records/quickstart" in texts(notebook)
    assert pictures(notebook) == drawn
    assert "Warning" not in texts(notebook)
    after = {f: f.stat().st_mtime_ns for f in NOTEBOOKS.rglob("*") if "__pycache__" not in f.parts}
    assert after == before
    assert {f.name for f in tmp_path.iterdir()} <= {"ipythondir", "mplconfigdir", "jupyter_runtime_dir"}


def test_chinchilla_without_data_stops_with_one_line(tmp_path: Path) -> None:
    notebook = read_source("chinchilla")
    with pytest.raises(CellExecutionError) as caught:
        run(notebook, tmp_path, VARSCALE_CHINCHILLA=str(tmp_path / "none.csv"))
    assert caught.value.ename == "SystemExit"
    assert "analyzing-chinchilla" in caught.value.evalue
    assert "\n" not in caught.value.evalue
    done = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert done == [1] + [None] * (len(done) - 1)


@pytest.mark.reference
@pytest.mark.skipif(
    not CHINCHILLA.is_file(), reason=f"the points are not at {CHINCHILLA} (set VARSCALE_SHARED)"
)
def test_chinchilla_meets_the_published_refit(tmp_path: Path) -> None:
    notebook = read_source("chinchilla")
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS, id="facts"))
    run(notebook, tmp_path, VARSCALE_CHINCHILLA=str(CHINCHILLA))
    facts: dict[str, Any] = json.loads(notebook.cells[-1].outputs[0].text)
    assert pictures(notebook) == 4
    assert "Warning" not in texts(notebook)
    assert facts["rows"] == [240, 245]
    assert facts["objective"] == pytest.approx([1.0182740e-3, 1.826011e-3], rel=1e-6)
    assert facts["same"] == pytest.approx(facts["objective"][0], rel=1e-9)
    wanted = {"E": 1.8172, "alpha": 0.3473, "beta": 0.3672}
    assert {key: facts["params"][key] for key in wanted} == pytest.approx(wanted, abs=6e-5)
    # Of 4000 replicates; B's have a long tail, which a standard deviation feels.
    near = {"E": 0.0257, "A": 124.5, "alpha": 0.0154, "beta": 0.0206}
    assert {key: facts["errors"][key] for key in near} == pytest.approx(near, rel=0.08)
    assert facts["errors"]["B"] == pytest.approx(1293, rel=0.25)
    assert facts["near"]["mean"] == 0 < facts["near"]["sum"]
