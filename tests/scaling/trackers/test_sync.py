"""Copies are made from the records alone: whole, once, and only where something changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scaling.config import ConfigError, LaunchConfig
from scaling.launch import Tracker
from scaling.records import RecordsError, RunFolder, write_json
from scaling.trackers import copies, targets
from scaling.trackers import sync as sync_module
from scaling.trackers.copies import SUMMARY
from scaling.trackers.ledger import entries, held
from scaling.trackers.sync import Synced, fit_numbers, settings_of, sync
from tests.scaling.trackers import stores

FRONTIERS = {"loss_avg": [(1e12, 3.0), (2e12, 2.5)]}
PACKAGES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard"}


def bring(tracker: Tracker, sweep: Path, project: str = "varscale") -> Synced:
    return sync(sweep, tracker, project, "offline", FRONTIERS)


def holds_all(tracker: Tracker, folder: RunFolder) -> None:
    found, wanted = stores.read_back(tracker, folder), stores.expected(folder)
    assert [sorted(row) for row in found] == [sorted(row) for row in wanted]
    for row, line in zip(found, wanted, strict=True):
        exact = {k: float(np.float32(v)) for k, v in line.items()} if tracker == "tensorboard" else line
        assert row == exact | {"step": line["step"]}


@pytest.mark.parametrize("tracker", stores.TRACKERS)
def test_a_copy_holds_every_point_once_however_often_it_is_made(tracker: Tracker, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGES[tracker])
    sweep = tmp_path / f"sweep-{tracker}"
    first, second = stores.make_sweep(sweep)
    stores.make_report(sweep)
    assert bring(tracker, sweep).copied == [first.name, second.name, SUMMARY]
    for folder in (first, second):
        holds_all(tracker, folder)

    assert bring(tracker, sweep).unchanged == [first.name, second.name, SUMMARY]

    # Killed and resumed: some steps were written twice, and one run goes further than before.
    for record in stores.records(range(7, 14)):
        second.append(record)
    second.close()
    again = bring(tracker, sweep)
    assert (again.copied, again.unchanged) == ([second.name], [first.name, SUMMARY])
    for folder in (first, second):
        holds_all(tracker, folder)


def test_a_copy_that_was_removed_or_goes_elsewhere_is_made_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sweep = tmp_path / "sweep"
    (folder,) = stores.make_sweep(sweep, runs=1)
    bring("tensorboard", sweep)
    for file in (sweep / "tensorboard" / folder.name).iterdir():
        file.unlink()
    assert bring("tensorboard", sweep).copied == [folder.name]
    assert bring("tensorboard", sweep, project="other").copied == [folder.name, SUMMARY]


def test_the_sweep_itself_has_figures_numbers_and_frontier(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    from analysis.wandb_runs import _log

    sweep = tmp_path / "sweep"
    stores.make_sweep(sweep, runs=1)
    stores.make_report(sweep)
    bring("wandb", sweep)
    (file,) = (sweep / SUMMARY).glob("wandb/offline-run-*/*.wandb")
    summary, history, axes = {}, [], set()
    for data in _log(file, []):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        if record.WhichOneof("record_type") == "history":
            history.append({(i.key or ".".join(i.nested_key)): i.value_json for i in record.history.item})
        if record.WhichOneof("record_type") == "metric":
            axes.add(record.metric.name)
        if record.WhichOneof("record_type") == "run":
            assert record.run.run_group == "sweep"
    assert summary["var/loss_avg ~ params final/params/alpha"] == -0.5
    assert summary["var/loss_avg ~ params final/interval/alpha/low"] == -0.6
    names = {name for row in history for name in row}
    assert {"frontier/loss_avg", "flops"} <= names
    assert any(name.startswith("media/loss_avg_vs_compute") for name in names)
    assert any(name.startswith("media/report") for name in names)
    assert {"step", "flops", "tokens", "params"} <= axes
    (page,) = file.parent.rglob("*.html")
    assert "&lt;b>report" in page.read_text()


def test_fit_numbers_are_named_by_what_they_are_of() -> None:
    forecast = {"quantity": "loss_last", "offset": True, "predicted": 2.0, "inside": True, "status": "ok"}
    value = {"families": {"var": {"laws": [{"quantity": "q", "x": "flops", "offset": True, "n": 4}],
                                  "forecasts": [forecast]}}}  # fmt: skip
    assert fit_numbers(value) == {
        "var/q ~ flops with offset/n": 4, "var/forecast of loss_last with offset/predicted": 2.0,
    }  # fmt: skip
    assert fit_numbers({}) == {}


def test_a_run_that_copies_itself_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sweep = tmp_path / "sweep"
    first, second = stores.make_sweep(sweep)
    with held(first.path) as mine:
        assert mine
        done = bring("tensorboard", sweep)
    assert (done.busy, done.copied) == ([first.name], [second.name, SUMMARY])
    assert "run-0: being trained" in done.words("tensorboard")


def test_a_tracker_that_fails_says_so_and_leaves_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    sweep = tmp_path / "sweep"
    (folder,) = stores.make_sweep(sweep, runs=1)

    def fail(*_: object) -> None:
        raise OSError("no\nroute")

    monkeypatch.setattr(sync_module, "open_copy", fail)
    with pytest.raises(RecordsError, match="tensorboard: run-0: OSError: no route"):
        bring("tensorboard", sweep)
    assert entries(folder.path) == {"tensorboard": {"note": "OSError: no route"}}
    monkeypatch.undo()
    assert bring("tensorboard", sweep).copied == [folder.name, SUMMARY]


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'tracker trackio: .*; pip install "varscale\[trackio\]"'):
        targets.check(["trackio"])


def test_online_without_a_key_is_refused_and_auto_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        targets.check(["wandb"], "online")
    targets.check(["wandb"], "auto")
    assert not targets.online("auto")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert targets.online("auto")
    assert not targets.online("offline")


def test_the_key_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    sweep = tmp_path / "sweep"
    stores.make_sweep(sweep, runs=1)
    bring("wandb", sweep)
    files = [file for file in sweep.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert not [file for file in files if key.encode() in file.read_bytes()]


def test_a_sweep_names_its_project_itself(tmp_path: Path) -> None:
    launch = {"trackers": ["trackio"], "tracker_project": "mine", "unknown": 1}
    write_json(tmp_path / "sweep" / "sweep.json", {"recipe": {"launch": launch}, "runs": []})
    assert settings_of(tmp_path / "sweep").tracker_project == "mine"
    assert settings_of(tmp_path / "sweep").trackers == ("trackio",)
    assert settings_of(tmp_path / "none") == LaunchConfig()
    with pytest.raises(ConfigError, match="tracker_project must be of letters"):
        LaunchConfig(tracker_project="a/b")
    with pytest.raises(ConfigError, match="trackers names wandb more than once"):
        LaunchConfig(trackers=("wandb", "wandb"))


def test_online_only_lines_that_are_missing_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = stores.make_sweep(tmp_path / "sweep", runs=1)
    there = stores.expected(folder)[:5]
    wandb = pytest.importorskip("wandb")
    sent: list[dict[str, float]] = []
    copy = copies.WandbCopy.__new__(copies.WandbCopy)

    class Api:
        def run(self, path: str) -> Api:
            assert path == "me/varscale/sweep.run-0"
            return self

        def scan_history(self) -> list[dict[str, float | None]]:
            return [row | {"eval/absent": None} if "train/lr" in row else row for row in there]

    class Tracker:
        class run:  # noqa: N801
            entity = "me"

        def log(self, values: dict[str, float]) -> None:
            sent.append(values)

    monkeypatch.setattr(wandb, "Api", Api)
    copy._tracker = Tracker()
    copy._there = copy._logged(copies.Subject(tmp_path / "sweep", folder.name, {}, "varscale"))
    copy.add([stores.point_of(record) for record in folder.metrics()])
    assert stores.ordered(there + sent) == stores.expected(folder)
    assert sent
