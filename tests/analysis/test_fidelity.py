"""Generation metrics: read strictly, compared only when measured alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import make_report
from analysis.family_plots import fid_figure
from analysis.fidelity import Protocol, drawing, drawn, read_fidelity
from analysis.records import read_records
from analysis.report import _all_figures
from analysis.report_tables import fidelity_rows
from analysis.study import make_study
from scaling.records import RecordsError, RunFolder
from tests.analysis import fabricate

RNG = np.random.default_rng(0)


def measured(folder: Path) -> tuple[Protocol, ...]:
    return read_fidelity(folder, read_records(folder).runs)


def legend(protocol: Protocol, families: tuple[str, ...]) -> list[str]:
    """Title and entries."""
    found = fid_figure(protocol, "params", families).axes[0].get_legend()
    assert found is not None
    return [found.get_title().get_text(), *sorted(text.get_text() for text in found.get_texts())[::-1]]


def run(folder: Path, depth: int, family: str = "var") -> RunFolder:
    return RunFolder(folder / f"{family}-d{depth}-s0-0123456789")


def test_without_measurements_there_is_nothing(tmp_path: Path) -> None:
    assert measured(fabricate.sweep(tmp_path, depths=(1, 2))) == ()


def test_a_sweep_of_one_family_shows_what_was_measured(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3), fidelity=True, unfinished=(3,), evaluations=3)
    (protocol,) = measured(folder)
    assert protocol.label == "inception features of 5000 images against validation"
    assert protocol.frame["depth"].tolist() == [1, 2]
    report = make_report(folder)
    assert f"Pictures: {protocol.label}" in report.read_text()
    figures = {p.name for p in (report.parent / "figures").glob("fid*")}
    assert figures == {f"fid1_vs_{x}.{kind}" for x in ("params", "compute") for kind in ("svg", "png")}
    rows = json.loads((report.parent / "fits.json").read_text())["fidelity"]
    assert [(row["run"], row["family"], row["fid"]) for row in rows] == [
        (run(folder, d).name, "var", run(folder, d).metrics("fidelity")[0]["fid"]) for d in (1, 2)
    ]


@pytest.mark.parametrize("change", [{"extractor": "other"}, {"images": 50_000}, {"reference": "training"}])
def test_what_was_measured_otherwise_stands_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2), families=("var", "raster"), fidelity=True)
    for family in ("var", "raster"):
        fabricate.measure(run(folder, 1, family), family, RNG, **change)
    protocols = measured(folder)
    assert sorted(len(p.frame) for p in protocols) == [2, 4]
    assert len({p.label for p in protocols}) == 2


def test_how_many_pictures_precision_and_recall_are_of_is_said(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    for depth, of in ((1, 2000), (2, 500)):
        fabricate.measure(run(folder, depth), "var", RNG, manifold_images=of)
    labels = [p.label for p in measured(folder)]
    start = "inception features of 5000 images against validation, precision and recall of"
    assert labels == [f"{start} 500", f"{start} 2000"]


def test_of_several_seeds_of_one_setting_the_mean_is_shown_and_said(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    for seed, fid, recall in ((0, 10.0, 0.2), (1, 14.0, 0.4), (2, 18.0, 0.3)):
        fabricate.measure(run(folder, 1), "var", RNG, seed=seed, fid=fid, recall=recall)
    fabricate.measure(run(folder, 2), "var", RNG, fid=7.0)
    (protocol,) = measured(folder)
    assert protocol.last["fid"].tolist() == [14.0, 7.0]
    assert protocol.last["draws"].tolist() == [3, 1]
    first, second = fidelity_rows(protocol, ("var",))
    assert (first["fid"], first["recall"]) == ("14", "0.3")
    assert first["drawing"] == "guidance 1.5 (ramp); mean of 3 seeds"
    assert second["drawing"] == "guidance 1.5 (ramp)"


def test_families_with_other_tokens_share_an_axis(tmp_path: Path) -> None:
    """Pictures compare whatever the tokens."""
    folder = fabricate.sweep(tmp_path, depths=(1, 2), families=("var", "raster"), fidelity=True)
    (protocol,) = measured(folder)
    assert legend(protocol, ("var", "raster")) == ["guidance 1.5 (ramp)", "var", "raster"]


def test_ways_of_drawing_are_lines_of_their_own(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2), fidelity=True)
    for depth in (1, 2):
        fabricate.measure(run(folder, depth), "var", RNG, guidance=0.0, top_k=900, top_p=0.96)
    (protocol,) = measured(folder)
    assert [drawing(way) for way in protocol.settings] == [
        "guidance 0, top-k 900, top-p 0.96",
        "guidance 1.5 (ramp)",
    ]
    assert len(protocol.last) == 4
    assert legend(protocol, ("var",)) == [
        "",
        "var, guidance 1.5 (ramp)",
        "var, guidance 0, top-k 900, top-p 0.96",
    ]


def test_the_latest_measurement_of_a_run_counts(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,), fidelity=True)
    fabricate.measure(run(folder, 1), "var", RNG, step=3, fid=99.0)
    (protocol,) = measured(folder)
    assert protocol.frame["step"].tolist() == [3, fabricate.STEPS]
    assert protocol.last["fid"].tolist() != [99.0]
    (row,) = fidelity_rows(protocol, ("var",))
    assert row["depth"] == "d1"


def test_a_metric_without_a_value_is_a_dash_and_no_point(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,))
    fabricate.measure(run(folder, 1), "var", RNG, fid=math.nan, precision=math.nan, is_std=math.nan)
    (protocol,) = measured(folder)
    assert drawn(protocol.frame).empty
    (row,) = fidelity_rows(protocol, ("var",))
    assert (row["fid"], row["precision"], row["recall"]) == ("–", "–", "0.4")
    assert "±" not in row["is"]
    names = [name for name, _, _ in _all_figures({"var": make_study(folder)}, None, (protocol,), False)]
    assert not [name for name in names if name.startswith("fid")]


@pytest.mark.parametrize("fid", [0.0, None])
def test_a_latest_measurement_without_a_value_leaves_the_earlier_ones(
    tmp_path: Path, fid: float | None
) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,))
    fabricate.measure(run(folder, 1), "var", RNG, step=3)
    fabricate.measure(run(folder, 1), "var", RNG, fid=fid)
    names = {p.stem for p in (make_report(folder).parent / "figures").glob("fid*")}
    assert names == {"fid1_vs_compute"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fid": "12"}, "has fid = '12'; expected a number"),
        ({"flops": None}, "has flops = None; expected a number"),
        ({"guidance": None}, "has guidance = None"),
    ],
)
def test_a_wrong_value_names_file_step_and_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,))
    fabricate.measure(run(folder, 1), "var", RNG, **change)
    with pytest.raises(RecordsError, match=message) as caught:
        make_report(folder)
    assert "var-d1-s0-0123456789/metrics.jsonl" in str(caught.value)


def test_a_line_without_a_column_is_refused(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,), fidelity=True)
    file = run(folder, 1).path / "metrics.jsonl"
    *lines, last = file.read_text().splitlines()
    record = json.loads(last)
    del record["recall"], record["reference"]
    file.write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    with pytest.raises(RecordsError, match="fidelity line at step 300 lacks recall, reference"):
        measured(folder)
