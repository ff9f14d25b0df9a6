"""Reading sweeps: nothing dropped in silence, bad records named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from analysis import load_runs, make_report
from analysis.records import COLUMNS
from scaling.records import RecordsError, RunFolder
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


def test_a_diverged_run_is_never_fitted_and_named_in_the_report(tmp_path: Path) -> None:
    sound, folder = (
        fabricate.sweep(tmp_path / "sound", depths=(1, 2, 3, 4)),
        fabricate.sweep(tmp_path / "all"),
    )
    name = "var-d5-s0-0123456789"
    run = RunFolder(folder / name)
    run.set_status("running", step=150, total_steps=300)
    run.fail("the loss is 91.2 at step 150", 1, "diverged")
    frame = load_runs(folder)
    (note,) = frame.attrs["notes"]
    assert note == f"{name} diverged at step 150 of 300: the loss is 91.2 at step 150; it is never fitted"
    assert set(frame[frame["run"] == name]["state"]) == {"failed"}
    fits = [
        json.loads((make_report(f).parent / "fits.json").read_text())["families"]["var"]["laws"]
        for f in (sound, folder)
    ]
    assert fits[0] == fits[1], "its evaluations count nowhere, in the frontiers neither"
    report = folder / "report"
    assert note in (report / "report.md").read_text().replace("\\", "")
    assert f"{name} diverged at step 150 of 300" in (report / "report.html").read_text()


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
        ({"loss_avg_se": "4.2"}, "has loss_avg_se = '4.2'"),
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


def test_a_standard_error_of_null_is_nan_and_nothing_else_is(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    fabricate.change(folder, 2, loss_avg_se=None, error_last_se=None)
    frame = load_runs(folder)
    changed = frame[frame["final"] & (frame["depth"] == 2)]
    assert changed[["loss_avg_se", "error_last_se"]].isna().all(axis=None)
    assert frame.drop(index=changed.index).drop(columns=["schedule"]).notna().all(axis=None)
    assert frame.attrs["notes"] == []


def test_schedule_and_batch_come_from_the_config(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    file = folder / "var-d2-s0-0123456789" / "config.json"
    config = json.loads(file.read_text())
    config["train"]["schedule"] = "cos"
    file.write_text(json.dumps(config))
    frame = load_runs(folder)
    assert (frame["batch"] == fabricate.BATCH).all()
    assert frame[frame["depth"] == 2]["schedule"].eq("cos").all()
    assert frame[frame["depth"] == 1]["schedule"].isna().all()


def test_a_loss_that_is_no_number_comes_back_as_nan(tmp_path: Path) -> None:
    """``RunFolder.append`` writes it as null; the run's other quantities keep their laws."""
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4))
    run = RunFolder(folder / "var-d3-s0-0123456789")
    *before, last = run.metrics()
    (run.path / "metrics.jsonl").unlink()
    for record in (*before, last | {"loss_last": math.nan}):
        run.append(record)
    run.close()
    frame = load_runs(folder)
    assert frame["loss_last"].isna().sum() == 1
    assert "var-d3" in frame.attrs["notes"][0]
    assert make_report(folder).is_file()
