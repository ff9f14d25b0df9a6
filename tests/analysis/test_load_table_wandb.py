"""Weights & Biases: our own mirror gives back what metrics.jsonl holds, and torn files give what is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import load_runs, load_table
from analysis.errors import DataError
from analysis.records import LISTS, NUMBERS
from analysis.wandb_runs import BLOCK, HEADER, WandbRun
from scaling.records import RecordsError, RunFolder
from tests.analysis import fabricate

wandb = pytest.importorskip("wandb")
SHARED = ["run", "family", "depth", "width", "seed", "batch", "state", "final", *NUMBERS]


def mirror(sweep: Path, root: Path, failed: tuple[str, ...] = ()) -> Path:
    """The sweep's records copied as beside a training run, with wandb offline."""
    from scaling.trackers.copies import Subject, open_copy
    from scaling.trackers.points import point_of

    for path in sorted(sweep.glob("*/config.json")):
        old, new = RunFolder(path.parent), RunFolder(root / sweep.name / path.parent.name)
        new.create(old.config())
        copy = open_copy("wandb", Subject(root / sweep.name, new.name, old.config(), "varscale", "offline"))
        for record in old.metrics():
            new.append(record)
            copy.add([point_of(record | {"kind": "train", "lr": 0.1}), point_of(record)])
        new.close()
        copy.close("failed" if old.name in failed else "done")
        new.set_status(**{k: v for k, v in old.status().items() if k in ("state", "step", "total_steps")})
    return root / sweep.name


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    sweep = fabricate.sweep(root, depths=(1, 2, 3), evaluations=9, noise=0.01, unfinished=(3,))
    fabricate.change(sweep, 2, line=0, loss_avg_se=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        mirrored = mirror(sweep, root / "mirrored", failed=("var-d3-s0-0123456789",))
    wandb.teardown()  # its service goes on writing after the runs have ended
    return mirrored


def test_our_own_mirror_gives_the_evaluations_of_load_runs(swept: Path) -> None:
    table, runs = load_table(swept), load_runs(swept)
    assert len(table) == len(runs) == 9 + 9 + 4
    for frame in (table, runs):
        frame.sort_values(["run", "step"], inplace=True, ignore_index=True)
    pd.testing.assert_frame_equal(table[SHARED], runs[SHARED], check_exact=True, check_dtype=False)
    assert set(LISTS).isdisjoint(table.columns)
    assert f"{len(runs)} records without an evaluation left out" in table.attrs["notes"]


def wandb_file(swept: Path, depth: int) -> Path:
    (file,) = swept.glob(f"var-d{depth}-*/wandb/offline-run-*/*.wandb")
    return file


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.99])
def test_of_a_torn_file_what_is_whole_is_read_and_the_rest_named(
    swept: Path, tmp_path: Path, cut: float
) -> None:
    data = wandb_file(swept, 1).read_bytes()
    file = tmp_path / "run-torn.wandb"
    file.write_bytes(data[: int(len(data) * cut)])
    whole, torn = load_table(wandb_file(swept, 1)), load_table(file)
    assert 0 < len(torn) <= len(whole)
    shared = [c for c in torn.columns if c not in ("state", "final")]
    pd.testing.assert_frame_equal(torn[shared], whole[shared][: len(torn)], check_dtype=False)
    said = "\n".join(torn.attrs["notes"])
    assert "var-d1-s0-0123456789: no end recorded; it was killed or still runs" in said
    assert "bytes are torn or damaged; left out" in said
    assert not torn["final"].any()
    assert set(torn["state"]) == {"interrupted"}


def test_a_damaged_byte_ends_the_reading(swept: Path, tmp_path: Path) -> None:
    data = bytearray(wandb_file(swept, 1).read_bytes())
    data[len(data) // 2] ^= 1
    file = tmp_path / "run-bad.wandb"
    file.write_bytes(data)
    table = load_table(file)
    assert 0 < len(table) < 9
    assert "torn or damaged" in "\n".join(table.attrs["notes"])


def test_a_run_resumed_offline_is_one_run(swept: Path, tmp_path: Path) -> None:
    """The first file is torn; the second repeats some of its steps, as a resumed run does."""
    whole = load_table(wandb_file(swept, 1))
    data = wandb_file(swept, 1).read_bytes()
    first = tmp_path / "offline-run-20260101_000000-x" / "run-x.wandb"
    second = tmp_path / "offline-run-20260102_000000-x" / "run-x.wandb"
    first.parent.mkdir()
    first.write_bytes(data[: len(data) // 2])
    second.parent.mkdir()
    shutil.copy(wandb_file(swept, 1), second)
    pd.testing.assert_frame_equal(load_table(tmp_path), whole)


def test_records_over_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config longer than a block of 32 KiB, and more history than one block holds."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = {"n_params": 77, "train": {"lr": 0.1}, "other": {"lr": 0.2}, "text": "x" * (2 * BLOCK)}
    run = wandb.init(project="p", mode="offline", dir=str(tmp_path), config=config)
    losses = np.random.default_rng(0).random(400)
    for i, loss in enumerate(losses):
        run.log({"val/loss": loss, "tokens": 1000 * i, "picture": [1, 2]})
    run.finish()
    wandb.teardown()
    table = load_table(tmp_path)
    np.testing.assert_array_equal(table["loss"], losses)
    np.testing.assert_array_equal(table["step"], np.arange(400))
    assert set(table["params"]) == {77}
    assert set(table["lr"]) == {0.1}
    assert "values that are neither numbers nor text left out: picture" in table.attrs["notes"]


def test_folders_and_files_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match=r"no wandb files \(\*\.wandb\) below"):
        load_table(tmp_path)
    file = tmp_path / "run-a.wandb"
    file.write_bytes(b"something else")
    with pytest.raises(RecordsError, match="not a wandb file of a known version"):
        load_table(file)
    file.write_bytes(HEADER[:4])
    with pytest.raises(RecordsError, match="no whole run in it"):
        load_table(file)


def online(monkeypatch: pytest.MonkeyPatch, runs: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda project: runs(project)))


def fake_run(name: str, state: str, history: list[dict[str, Any]]) -> SimpleNamespace:
    return SimpleNamespace(
        id=name, state=state, config={"model": {"num_params": len(name)}}, scan_history=lambda: iter(history),
        group=None, job_type=None,
    )  # fmt: skip


def test_a_project_online(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [{"_step": s, "eval/loss": 3.0 - s, "lr": 0.1} for s in range(2)] + [{"_step": 2, "train/x": 1}]
    runs = [
        fake_run("aa", "finished", history),
        fake_run("bbb", "crashed", history),
        fake_run("c", "finished", []),
    ]
    online(monkeypatch, lambda project: runs if project == "me/study" else [])
    table = load_table("wandb:me/study")
    assert table["loss"].tolist() == [3.0, 2.0, 3.0, 2.0]
    assert table["params"].tolist() == [2, 2, 3, 3]
    assert table["final"].tolist() == [False, True, False, False]
    assert table["state"].tolist() == ["done", "done", "failed", "failed"]
    said = "\n".join(table.attrs["notes"])
    assert "bbb is failed" in said
    assert "c is done and recorded nothing" in said
    assert "2 records without an evaluation left out" in said
    with pytest.raises(RecordsError, match="wandb:me/other: no runs in it"):
        load_table("wandb:me/other")


def test_online_failures_are_told_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(project: str) -> None:
        raise ValueError(f"Could not find project {project}")

    online(monkeypatch, refuse)
    with pytest.raises(RecordsError, match="wandb:me/none: Could not find project me/none"):
        load_table("wandb:me/none")
    with pytest.raises(RecordsError, match="expected wandb:entity/project"):
        load_table("wandb:me")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    with pytest.raises(RecordsError, match="no key; set WANDB_API_KEY or run 'wandb login'"):
        load_table("wandb:me/study")


def faked(monkeypatch: pytest.MonkeyPatch, runs: list[WandbRun]) -> None:
    monkeypatch.setattr("analysis.tables.read_online", lambda project: runs)


def test_text_in_a_config_is_left_out_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [{"step": 1, "eval/loss": 3.0}]
    config = {"model_size": "small", "n_params": 7, "seed": 1}
    faked(monkeypatch, [WandbRun("a", "done", config, history), WandbRun("b", "done", config, history)])
    table = load_table("wandb:me/study")
    assert table["params"].tolist() == [7, 7]
    said = [n for n in table.attrs["notes"] if "model_size" in n]
    assert said == ["the config's model_size has text ('small') where a number belongs; left out"]


def test_two_losses_of_a_project_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run is its last record with the loss that is fitted, whatever follows."""
    history: list[dict[str, Any]] = [
        {"step": 1, "eval/loss": 4.0}, {"step": 1, "test/loss": 4.1}, {"step": 2, "eval/loss": 3.0},
        {"step": 2, "test/accuracy": 0.5},
    ]  # fmt: skip
    faked(monkeypatch, [WandbRun("a", "done", {}, history)])
    with pytest.raises(DataError, match="columns eval/loss, test/loss all mean 'loss'"):
        load_table("wandb:me/study")
    for name, final in (("eval/loss", 3.0), ("test/loss", 4.1)):
        table = load_table("wandb:me/study", quantity=name)
        assert table["loss"][table["final"]].tolist() == [final]


def test_a_summary_after_the_last_loss_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    history: list[dict[str, Any]] = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"total_time": 5.0}]
    runs = [WandbRun("a", "done", {}, history), WandbRun("b", "failed", {}, history)]
    faked(monkeypatch, runs)
    table = load_table("wandb:me/study")
    assert table["final"].tolist() == [False, True, False, False, False, False]
    assert (
        load_table("wandb:me/study", quantity="total_time")["final"].tolist()
        == [False, False, True] + [False] * 3
    )
