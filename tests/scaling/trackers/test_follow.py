"""Copies made while a run trains: whole at its end, through kills too; and no tracker can stop the run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaling.data.cache import open_cache
from scaling.launch import Tracker
from scaling.records import RunFolder
from scaling.tokenizer.vqvae import load_tokenizer
from scaling.trackers import follow as follow_module
from scaling.trackers import mirror as mirror_module
from scaling.trackers.follow import Lines, feeds_of, follow
from scaling.trackers.ledger import entries, held, run_digest
from scaling.trackers.mirror import Mirror
from scaling.trackers.sync import sync
from tests.scaling import tiny
from tests.scaling.trackers import stores

MAIN: Any = SimpleNamespace(is_main_process=True)
KILLED = """
import os, signal, sys
from types import SimpleNamespace
from scaling.config import LaunchConfig, from_dict
from scaling.records import RunFolder, read_json
from scaling.trackers.mirror import Mirror
from tests.scaling.trackers.stores import records
folder = RunFolder(sys.argv[1])
folder.set_status("running")
launch = from_dict(LaunchConfig, read_json(folder.path / "launch.json"))
mirror = Mirror(SimpleNamespace(is_main_process=True), launch, folder, 0)
for record in records(range(1, 9)):
    mirror.log(record)
os.kill(os.getpid(), signal.SIGKILL)
"""
HANGS = "import time\ntime.sleep(1000)\n"
FAILS = "raise OSError('no route to the server')\n"


def wait_for_its_end(folder: RunFolder, trackers: int) -> None:
    """Until the process beside the run has told of all its trackers and is gone."""
    for _ in range(1000):
        if len(entries(folder.path)) == trackers:
            break
        time.sleep(0.1)
    with held(folder.path, patience=100.0) as mine:
        assert mine


def with_package(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wandb of our own making, for the process beside the run."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(text)
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}{os.pathsep}{root}")


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_leaves_every_point_once(tmp_path: Path) -> None:
    for package in stores.TRACKERS:
        pytest.importorskip(package)
    folder = stores.make_run(tmp_path / "killed" / "run")
    root = Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder.path)], cwd=root, check=False)
    assert killed.returncode < 0
    wait_for_its_end(folder, 3)
    (folder.path / "trackers.json").unlink()
    for tracker in stores.TRACKERS:
        assert len(stores.read_back(tracker, folder)) == len(folder.metrics()) == 10

    mirror = Mirror(MAIN, stores.LAUNCH, folder, 5)  # from the checkpoint of step 5
    for record in stores.records(range(6, 13)):
        mirror.log(record)
    stores.picture(folder.path / "samples.png")
    mirror.close()
    folder.set_status("done")
    wait_for_its_end(folder, 3)
    for tracker in stores.TRACKERS:
        found, wanted = stores.read_back(tracker, folder), stores.expected(folder)
        assert [(row["step"], sorted(row)) for row in found] == [(row["step"], sorted(row)) for row in wanted]
        if tracker != "tensorboard":  # which keeps single precision
            assert found == wanted
        # What the run has left is what sync would make.
        assert sync(folder.path.parent, tracker, "varscale", "offline", {}).unchanged == ["run"]


@pytest.mark.slow
def test_the_trainer_s_own_run_is_copied(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tokens, tokenizer_run = tiny.make_tokens(tmp_path)
    launch = dataclasses.replace(tiny.LAUNCH, trackers=("wandb", "tensorboard"), wandb_mode="offline")
    config = tiny.run_config(steps=8)
    folder = tiny.make_run(tmp_path / "trained" / "run", config, launch)
    from scaling.trainer import train

    tokenizer = load_tokenizer(tokenizer_run / "tokenizer")
    train(
        folder, config, launch, open_cache(tokens, tokenizer.content_hash, config.tokenizer.scales), tokenizer
    )
    wait_for_its_end(folder, 2)
    assert stores.read_back("wandb", folder) == stores.expected(folder)
    assert len(stores.read_back("tensorboard", folder)) == len(folder.metrics()) > 0
    assert sorted(entries(folder.path)) == ["tensorboard", "wandb"]


def test_a_tracker_that_hangs_neither_stops_the_run_nor_keeps_it_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_package(HANGS, tmp_path, monkeypatch)
    monkeypatch.setattr(mirror_module, "FINISH_SECONDS", 0.5)
    launch = dataclasses.replace(stores.LAUNCH, trackers=("wandb",))
    folder = stores.make_run(tmp_path / "hung" / "run", launch)
    mirror = Mirror(MAIN, launch, folder, 0)
    assert mirror._follower is not None
    try:
        for record in stores.records(range(1, 9)):
            mirror.log(record)
        mirror.close()
        assert len(folder.metrics()) == 10
        assert "the run goes on without them; 'run_sweep.py sync' completes" in capsys.readouterr().err
    finally:
        mirror._follower.kill()
        mirror._follower.wait()


HASTY = """
import sys
from scaling.trackers import follow
follow.GIVE_UP_SECONDS = 0.5
follow.main()
"""


def test_a_tracker_that_hangs_from_the_start_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_package(HANGS, tmp_path, monkeypatch)
    launch = dataclasses.replace(stores.LAUNCH, trackers=("wandb",))
    folder = stores.make_run(tmp_path / "hung" / "run", launch)
    follower = subprocess.Popen([sys.executable, "-c", HASTY, str(folder.path)], stdin=subprocess.PIPE)
    try:
        assert follower.stdin is not None
        follower.stdin.close()  # the trainer is gone
        assert follower.wait(timeout=30) == 1
    finally:
        follower.kill()
    assert entries(folder.path) == {"wandb": {"note": "was not done 0 s after the run"}}
    with held(folder.path) as mine:
        assert mine, "the next attempt has its trackers"


def test_what_a_run_has_left_is_what_sync_would_make_also_with_a_key_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    monkeypatch.setattr(follow_module, "open_copy", lambda tracker, subject: Kept())
    monkeypatch.setattr(follow_module, "check", lambda *_: None)
    launch = dataclasses.replace(stores.LAUNCH, wandb_mode="auto")
    folder = stores.make_run(tmp_path / "sweep" / "run", launch)
    follow(folder, feeds_of(folder, launch), lambda seconds: "done")
    for tracker in launch.trackers:
        digest = run_digest(folder, launch.tracker_project, tracker == "wandb", "done")
        assert entries(folder.path)[tracker]["digest"] == digest


def test_a_tracker_that_fails_leaves_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_package(FAILS, tmp_path, monkeypatch)
    launch = dataclasses.replace(stores.LAUNCH, trackers=("wandb",))
    folder = stores.make_run(tmp_path / "failed" / "run", launch)
    mirror = Mirror(MAIN, launch, folder, 0)
    for record in stores.records(range(1, 4)):
        mirror.log(record)
    mirror.close()
    wait_for_its_end(folder, 1)
    assert len(folder.metrics()) == 4
    assert entries(folder.path) == {"wandb": {"note": "OSError: no route to the server"}}


def test_a_process_that_cannot_start_is_told_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    folder = stores.make_run(tmp_path / "sweep" / "run")
    mirror = Mirror(MAIN, stores.LAUNCH, folder, 0)
    mirror.log({"kind": "train", "step": 1})
    mirror.close()
    assert folder.metrics() == [{"kind": "train", "step": 1}]
    assert "no trackers" in capsys.readouterr().err


class Kept:
    """A copy in memory."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.state = ""

    def add(self, points: list[Any]) -> None:
        self.steps += [point.step for point in points]

    def image(self, name: str, file: Path, axes: dict[str, float]) -> None:
        self.steps.append(-1)

    def close(self, state: str) -> None:
        self.state = state


def test_one_that_fails_does_not_take_the_others_along_and_a_file_begun_anew_is_copied_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stores.make_run(tmp_path / "sweep" / "run")
    opened: dict[str, list[Kept]] = {}

    def open_copy(tracker: Tracker, subject: object) -> Kept:
        if tracker == "tensorboard":
            raise ValueError("broken")
        opened.setdefault(tracker, []).append(Kept())
        return opened[tracker][-1]

    monkeypatch.setattr(follow_module, "open_copy", open_copy)
    monkeypatch.setattr(follow_module, "check", lambda *_: None)
    stages = iter([(0, range(1, 4)), (None, range(4, 8)), (2, range(3, 6)), (None, range(6, 7))])

    def listen(seconds: float) -> str | None:
        start, steps = next(stages, (None, range(0)))
        if start is not None:  # a loss that was no number: back to a checkpoint
            folder.truncate(start)
        for step in steps:
            folder.append({"kind": "train", "step": step})
        return None if steps else "failed"

    follow(folder, feeds_of(folder, stores.LAUNCH), listen)
    assert set(opened) == {"trackio", "wandb"}
    for copies in opened.values():
        assert [copy.state for copy in copies] == ["interrupted", "failed"]
        assert copies[-1].steps == [1, 2, 3, 4, 5, 6] == [r["step"] for r in folder.metrics()]
    written = entries(folder.path)
    assert written["tensorboard"] == {"note": "ValueError: broken"}
    assert written["wandb"]["points"] == 6


def test_torn_lines_wait_for_their_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = Lines(file)
    assert lines.new() == (False, [])
    text = json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + "\n"
    file.write_text(text[:20])
    assert lines.new() == (False, [{"step": 1}])
    with file.open("a") as out:
        out.write(text[20:])
    assert lines.new() == (False, [{"step": 2}])
    assert lines.new() == (False, [])
