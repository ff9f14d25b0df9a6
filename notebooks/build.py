"""Run the notebooks and write their ``.ipynb`` beside the ``.py``: ``python notebooks/build.py [NAME ...]``.

- The ``.py`` (jupytext's percent format) is the source: it is what is reviewed, linted and edited. The
  ``.ipynb`` is made from it, with outputs, so that GitHub shows the figures. A test holds the pair together.
- Equal sources and records give equal files: cell ids are numbers, no times and no Python version are kept.
- ``paper_figures`` and ``first_look`` are run on the shipped records, whatever lies in ``runs``.
- An output that names a folder of this machine is refused.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
NAMES = ("first_look", "paper_figures", "chinchilla")
WRITTEN = ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR")
"""Variables that name the folders where Jupyter and matplotlib keep things."""
SECONDS = 300
"""Longest that one cell may take."""
COLOURS = 128
"""Of a picture's palette."""


def read_source(name: str) -> nbformat.NotebookNode:
    """The ``.py`` as a notebook without outputs, its cells numbered."""
    notebook = jupytext.read(HERE / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
    # Only what a reader's Jupyter needs: jupytext's own version would change with every upgrade.
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "file_extension": ".py"},
        }
    )
    return notebook


def kernel_environment(scratch: Path) -> dict[str, str]:
    """This process's environment for a kernel that writes nothing outside ``scratch``.

    MPLBACKEND is left to the kernel, which draws into the notebook.
    """
    kept = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    folders = {key: str(scratch / key.lower()) for key in WRITTEN}
    return kept | folders | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(notebook: nbformat.NotebookNode, scratch: Path, **environment: str) -> nbformat.NotebookNode:
    """Run a notebook in place, in the folder ``scratch``.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message shows it.
    """
    env = kernel_environment(scratch) | environment
    # What starts the kernel runs here, and writes too.
    before = {key: os.environ.get(key) for key in WRITTEN}
    os.environ.update({key: env[key] for key in before})
    try:
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
            resources={"metadata": {"path": str(scratch)}},
        )  # fmt: skip
        client.execute(env=env)
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    return notebook


def texts(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells put out."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text", ""))
            found += [str(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(found)


def trim(data: dict[str, str]) -> None:
    """Make one output small and the same every time, in place.

    Pictures get a palette (a third of the size, no visible change); a table keeps its HTML only, since
    the text of an object may hold addresses in memory.
    """
    if "text/html" in data:
        data.pop("text/plain", None)
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        buffer = io.BytesIO()
        picture.quantize(COLOURS).save(buffer, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(buffer.getvalue()).decode("ascii")


def build(name: str) -> Path:
    """Run ``<name>.py`` and write ``<name>.ipynb``."""
    records = {} if name == "chinchilla" else {"VARSCALE_SWEEP": str(HERE / "records" / "quickstart")}
    with tempfile.TemporaryDirectory() as scratch:
        notebook = run(read_source(name), Path(scratch), **records)
        for private in (scratch, str(HERE.parent), str(Path.home())):
            if private in texts(notebook):
                raise SystemExit(f"{name}: an output names the folder {private}")
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            trim(output.get("data", {}))
    target = HERE / f"{name}.ipynb"
    nbformat.write(notebook, target)
    return target


if __name__ == "__main__":
    for wanted in sys.argv[1:] or NAMES:
        file = build(wanted)
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
