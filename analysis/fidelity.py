"""Generation metrics of runs: FID, inception score, precision and recall, where they were measured.

- Lines of kind ``fidelity`` in ``metrics.jsonl``. Unlike a loss they compare families whatever their tokens:
  they are of pictures.
- They compare only when measured alike (``Protocol``): the same feature extractor, number of images,
  reference, and number of images that precision and recall are of. The bias of FID alone falls with the
  number of images, and each extractor has its own scale.
- How pictures were drawn (guidance, top-k, top-p, precision) belongs to a measurement too; each way is told
  apart. Of several draws with other seeds the mean is shown, with their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.files import plain
from scaling.records import RecordsError, RunFolder

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("fid", "is", "is_std", "precision", "recall")
PLACES = ("step", "tokens", "flops", "params")
SAMPLING = ("guidance", "guidance_form", "top_k", "top_p", "drawn_in")
PROTOCOL = ("extractor", "images", "reference", "manifold_images")
DRAWS = "draws"
"""Seeds that the pictures of one measurement were drawn with, which is the mean over them."""
FACTS = ("run", "family", "depth", "seed", "state", *PLACES)
COLUMNS = (*FACTS, *METRICS, *PROTOCOL, *SAMPLING, DRAWS)
OPTIONAL = ("manifold_images", DRAWS)
"""Columns that a line may lack."""


@dataclass(frozen=True)
class Protocol:
    """Measurements that compare."""

    extractor: str
    images: int
    reference: str
    """What the pictures were held against."""
    manifold_images: int
    """Precision and recall are of so many pictures; 0 where that is not recorded, or there are none."""
    frame: pd.DataFrame
    """Rows of ``COLUMNS``, by run and step."""

    @property
    def label(self) -> str:
        """In words."""
        of = f", precision and recall of {self.manifold_images}" if self.manifold_images else ""
        return f"{self.extractor} features of {self.images} images against {self.reference}{of}"

    @property
    def settings(self) -> list[tuple[Any, ...]]:
        """The ways of drawing that occur."""
        return sorted({tuple(row) for row in self.frame[list(SAMPLING)].itertuples(index=False)})

    @property
    def last(self) -> pd.DataFrame:
        """The latest measurement of every run and way of drawing."""
        return self.frame.groupby(["run", *SAMPLING], sort=False, dropna=False).tail(1)


def read_fidelity(sweep_folder: str | Path, runs: Sequence[Mapping[str, Any]]) -> tuple[Protocol, ...]:
    """What was measured of the pictures of a sweep's runs, by protocol; empty where nothing was.

    Args:
        runs: facts of the runs (``analysis.records.Records.runs``).

    Raises:
        RecordsError: a line without one of the columns, or with text where a number should be.
    """
    import pandas as pd

    rows = [row for run in runs for row in _lines(Path(sweep_folder) / str(run["run"]), run)]
    if not rows:
        return ()
    frame = _means(pd.DataFrame(rows, columns=list(COLUMNS)))
    keys = sorted(
        {
            (str(r["extractor"]), int(r["images"]), str(r["reference"]), int(r["manifold_images"]))
            for r in rows
        }
    )
    return tuple(
        Protocol(*key, frame[(frame[list(PROTOCOL)] == key).all(axis=1)].reset_index(drop=True))
        for key in keys
    )


def _means(frame: pd.DataFrame) -> pd.DataFrame:
    """Lines that differ in their pictures' seed alone, as one."""
    same = frame.groupby([*FACTS, *PROTOCOL, *SAMPLING], sort=False, dropna=False)
    means = same[list(METRICS)].agg(_mean)
    means[DRAWS] = same.size()
    return means.reset_index()[list(COLUMNS)]


def _mean(values: pd.Series[float]) -> float:
    """Not a number where one of the values is none."""
    return float(values.to_numpy().mean())


def _lines(folder: Path, run: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    facts = {key: run[key] for key in ("run", "family", "depth", "seed", "state")}
    for record in sorted(RunFolder(folder).metrics("fidelity"), key=lambda r: r.get("step", 0)):
        values = {key: record[key] for key in COLUMNS if key in record}
        values["manifold_images"] = values.get("manifold_images") or 0
        values.setdefault("drawn_in", "fp32")
        if missing := [key for key in COLUMNS if key not in (*values, *facts, *OPTIONAL)]:
            raise RecordsError(
                f"{file}: the fidelity line at step {record.get('step')} lacks {', '.join(missing)}"
            )
        for key in (*PLACES, *METRICS, "images", "manifold_images", "guidance", "top_k", "top_p"):
            value = math.nan if values[key] is None and key in METRICS else values[key]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecordsError(
                    f"{file}: the fidelity line at step {record['step']} has {key} = {value!r}; "
                    "expected a number"
                )
            values[key] = value
        yield values | facts  # a line's seed is that of its pictures


def to_json(protocols: Sequence[Protocol]) -> list[dict[str, Any]]:
    """Plain values, a row per measurement."""
    rows: list[dict[str, Any]] = plain(
        [row for protocol in protocols for row in protocol.frame.to_dict("records")]
    )
    return rows


def drawn(frame: pd.DataFrame) -> pd.DataFrame:
    """The measurements whose FID has a place on a logarithmic axis."""
    return frame[(frame["fid"] > 0) & (frame["fid"] < math.inf)]


def drawing(setting: Sequence[Any]) -> str:
    """A way of drawing pictures in words."""
    guidance, form, top_k, top_p, drawn_in = setting
    parts = [f"guidance {guidance:g}" + (f" ({form})" if guidance > 0 else "")]
    parts += [str(drawn_in)] * (drawn_in != "fp32")
    parts += [f"top-k {top_k:g}"] * (top_k > 0) + [f"top-p {top_p:g}"] * (top_p > 0)
    return ", ".join(parts)
