"""Reading sweeps and tables: nothing dropped in silence, bad ones named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import load_runs, load_table
from analysis.records import COLUMNS
from scaling.records import RecordsError
from tests.analysis import fabricate


def test_one_row_per_evaluation_with_final_marked(tmp_path: Path) -> None:
    frame = load_runs(fabricate.sweep(tmp_path, evaluations=7))
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == 35
    assert frame[frame["final"]]["depth"].tolist() == [1, 2, 3, 4, 5]
    assert (frame[frame["final"]]["step"] == fabricate.STEPS).all()
    assert frame["loss_scales"].map(len).unique().tolist() == [4]
    assert frame.attrs["notes"] == []


def test_unfinished_runs_are_kept_flagged_and_counted(tmp_path: Path) -> None:
    frame = load_runs(fabricate.sweep(tmp_path, unfinished=[5]))
    failed = frame[frame["depth"] == 5]
    assert len(failed) > 0
    assert not failed["final"].any()
    (note,) = frame.attrs["notes"]
    assert "var-d5-s0-0123456789 is failed" in note
    assert "loss <is> not finite" in note


def test_nan_losses_are_named(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path)
    file = folder / "var-d2-s0-0123456789" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"loss_avg": float("nan")})
    file.write_text("\n".join(lines) + "\n")
    frame = load_runs(folder)
    assert frame["loss_avg"].isna().sum() == 1
    (note,) = frame.attrs["notes"]
    assert "var-d2" in note
    assert "loss_avg not finite" in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops": None}, "has flops = None; expected a number"),
        ({"loss_avg": "4.2"}, "has loss_avg = '4.2'"),
    ],
)
def test_wrong_values_name_file_step_and_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3))
    file = folder / "var-d2-s0-0123456789" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | change)
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordsError, match=message) as caught:
        load_runs(folder)
    assert "var-d2" in str(caught.value)


def test_missing_keys_and_missing_runs(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,))
    file = folder / "var-d1-s0-0123456789" / "metrics.jsonl"
    record = json.loads(file.read_text().splitlines()[0])
    del record["flops_6nd"]
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(RecordsError, match="lacks flops_6nd"):
        load_runs(folder)
    file.unlink()
    with pytest.raises(RecordsError, match="no evaluation recorded yet"):
        load_runs(folder)
    with pytest.raises(RecordsError, match="no such sweep folder"):
        load_runs(tmp_path / "nowhere")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_are_read_by_synonym(tmp_path: Path, ending: str) -> None:
    frame = pd.DataFrame(
        {"Model Size": [1e6, 2e6], "Training FLOP": [1e15, 3e15], "loss": [3.1, 3.0], "hue": ["a", "b"]}
    )
    file = tmp_path / f"table.{ending}"
    if ending == "csv":
        frame.to_csv(file, index=False)
    elif ending == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_parquet(file)
    table = load_table(file)
    assert list(table.columns) == ["params", "flops", "loss", "hue"]
    np.testing.assert_array_equal(table["flops"], [1e15, 3e15])
    assert table.attrs["notes"] == ["unknown columns, kept as they are: hue"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,params,loss\n1,1,2\n", "columns N, params all mean 'params'"),
        ("N,loss\n1,two\n2,3\n", r"column 'loss' has text where numbers belong, row 0 \('two'\)"),
        ("N,loss\n", "no rows"),
        ("", "not a readable csv"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(RecordsError, match=message):
        load_table(file)


def test_gaps_are_counted_and_other_files_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("N,loss\n1,2\n2,\n3,inf\n")
    assert load_table(file).attrs["notes"] == ["column 'loss': 2 rows missing or not finite (row 1, 2)"]
    with pytest.raises(RecordsError, match=r"expected a \.csv"):
        load_table(tmp_path / "t.xlsx")
    with pytest.raises(RecordsError, match="no such file"):
        load_table(tmp_path / "none.csv")


def test_a_listed_run_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4))
    (folder / "var-d2-s0-0123456789" / "config.json").unlink()
    frame = load_runs(folder)
    assert sorted(frame["depth"].unique()) == [1, 3, 4]
    (note,) = frame.attrs["notes"]
    assert note.startswith("var-d2-s0-0123456789 is listed in sweep.json, but")


def test_values_without_a_logarithm_are_named(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    fabricate.change(folder, 2, error_last=0.0)
    (note,) = load_runs(folder).attrs["notes"]
    assert "var-d2" in note
    assert "error_last 0 or less, which has no logarithm; left out of the laws of it" in note
