"""The ``.ipynb`` in the repository are made from the ``.py``, small, whole, and name no machine."""

from __future__ import annotations

import base64
import io
import re

import nbformat
import pytest
from PIL import Image

from notebooks.build import NAMES, read_source, texts, trim
from tests.notebooks.conftest import NOTEBOOKS

MOST_BYTES = 400_000


def committed(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_a_pair() -> None:
    assert {f.stem for f in NOTEBOOKS.glob("*.ipynb")} == set(NAMES)
    assert {f.stem for f in NOTEBOOKS.glob("*.py")} == {*NAMES, "build"}


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_agrees_cell_by_cell(name: str) -> None:
    """If not: ``python notebooks/build.py``."""
    source, made = (
        [(c.cell_type, c.source) for c in nb.cells] for nb in (read_source(name), committed(name))
    )
    assert made == source


@pytest.mark.parametrize("name", NAMES)
def test_it_was_run_from_start_to_end(name: str) -> None:
    notebook = committed(name)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    kinds = {o.output_type for c in code for o in c.outputs}
    assert "error" not in kinds
    assert not [o for c in code for o in c.outputs if o.get("name") == "stderr"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_names_no_folder_of_a_machine(name: str) -> None:
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < MOST_BYTES
    assert not re.search(r"/(home|Users|root|tmp|work)/|0x[0-9a-f]{8}", texts(committed(name)))


def test_trim_keeps_the_picture_and_drops_the_text_beside_html() -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = {
        "image/png": base64.b64encode(buffer.getvalue()).decode(),
        "text/html": "<b>x</b>",
        "text/plain": "<object at 0x7f0000000000>",
    }
    trim(data)
    assert set(data) == {"image/png", "text/html"}
    left = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("L")
    assert left.size == picture.size
    pairs = zip(left.tobytes(), picture.convert("L").tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 4
