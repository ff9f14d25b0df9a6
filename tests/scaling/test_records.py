"""A run folder is readable after a kill at any instant, and never mixes two runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.records import FolderBusyError, RecordsError, RunFolder, list_runs, read_sweep, write_json


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create({"depth": 1})
    for step in range(1, 6):
        run.append({"kind": "train", "step": step, "loss": 1.0 / step})
    run.append({"kind": "eval", "step": 5, "loss": 0.3})
    run.close()
    return run


@given(cut=st.integers(0, 10_000))
def test_metrics_cut_at_any_byte_are_a_prefix(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run = RunFolder(tmp_path_factory.mktemp("cut"))
    records = [{"kind": "train", "step": s, "loss": s / 7} for s in range(1, 9)]
    text = "".join(json.dumps(r) + "\n" for r in records).encode()
    (run.path / "metrics.jsonl").write_bytes(text[: cut % (len(text) + 1)])
    read = run.metrics()
    assert read == records[: len(read)]
    assert len(read) >= text[: cut % (len(text) + 1)].count(b"\n")


def test_numbers_that_are_none_are_null_in_json(folder: RunFolder) -> None:
    folder.append({"kind": "train", "step": 9, "grad_norm": float("inf"), "loss": float("nan"), "lr": 0.5})
    folder.sync()
    text = (folder.path / "metrics.jsonl").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    assert folder.metrics("train")[-1] == {
        "kind": "train",
        "step": 9,
        "grad_norm": None,
        "loss": None,
        "lr": 0.5,
    }


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(folder: RunFolder) -> None:
    file = folder.path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = lines[2][:10]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordsError, match=r"metrics.jsonl, line 3: not valid JSON"):
        folder.metrics()


def test_steps_written_again_count_once_with_the_last_value(folder: RunFolder) -> None:
    folder.append({"kind": "train", "step": 2, "loss": 9.0})
    train = folder.metrics("train")
    assert sorted(r["step"] for r in train) == [1, 2, 3, 4, 5]
    assert next(r["loss"] for r in train if r["step"] == 2) == 9.0


def test_truncation_goes_back_to_a_checkpoint(folder: RunFolder) -> None:
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    folder.truncate(3)
    assert [r["step"] for r in folder.metrics()] == [1, 2, 3]
    folder.append({"kind": "train", "step": 4})
    assert [r["step"] for r in folder.metrics()] == [1, 2, 3, 4]


def test_another_config_is_refused_and_the_same_is_not(folder: RunFolder) -> None:
    folder.create({"depth": 1})
    with pytest.raises(RecordsError, match="holds another config"):
        folder.create({"depth": 2})
    assert folder.config() == {"depth": 1}


def test_status_merges_and_clears_old_errors(folder: RunFolder) -> None:
    assert folder.status() == {"state": "waiting", "attempt": 0}
    folder.set_status("failed", error="it broke", step=3)
    folder.set_status("running", attempt=2)
    status = folder.status()
    assert (status["state"], status["attempt"], status["step"]) == ("running", 2, 3)
    assert "error" not in status
    with pytest.raises(ValueError, match="unknown state"):
        folder.set_status("sleeping")


def test_the_first_failure_counts_whatever_the_main_process_writes(folder: RunFolder) -> None:
    folder.set_status("running", attempt=1)
    folder.fail("the cause", 2, "refused")
    folder.fail("what followed", 1, "error")
    for state in ("running", "done", "failed"):
        folder.update_status(state, step=7)
        status = RunFolder(folder.path).status()
        assert (status["state"], status["error"], status["exit_code"]) == ("failed", "the cause", 2)
        assert status["step"] == 7
    folder.set_status("running", attempt=2)
    status = folder.status()
    assert (status["state"], status["attempt"]) == ("running", 2)
    assert not {"error", "exit_code"} & status.keys()


FAILING = """
import sys
from scaling.records import RunFolder
folder = RunFolder(sys.argv[1])
sys.stdin.readline()
folder.fail(f"error of {sys.argv[2]}", 1, "error")
"""


def test_a_failure_beside_a_busy_main_process_is_not_lost(folder: RunFolder) -> None:
    """Peers fail at the same moment while the main process writes its status as fast as it can."""
    folder.set_status("running", attempt=1)
    command = [sys.executable, "-c", FAILING, str(folder.path)]
    peers = [subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE) for n in range(3)]
    for peer in peers:
        assert peer.stdin is not None
        peer.stdin.write(b"\n")
        peer.stdin.flush()
    step = 0
    while any(peer.poll() is None for peer in peers):
        folder.update_status("running", step=step)
        step += 1
    folder.update_status("done")
    for peer in peers:
        peer.communicate()
        assert peer.returncode == 0
    status = folder.status()
    assert status["state"] == "failed"
    assert status["error"] in {f"error of {n}" for n in range(3)}
    assert json.loads((folder.path / "status.json").read_text())["state"] == "done"


def test_costs_come_back_and_an_older_run_says_so(folder: RunFolder) -> None:
    with pytest.raises(RecordsError, match=r"costs\.json: no such file: the run was trained before"):
        folder.costs()
    costs = {"params": {"qkv": 3}, "flops_per_image": {"qkv": 18}, "tokens_per_image": 1}
    folder.write_costs(costs)
    assert folder.costs() == costs
    for wrong in ([], {"params": {}}, {"params": 3, "flops_per_image": {}}):
        write_json(folder.path / "costs.json", wrong)
        with pytest.raises(RecordsError, match=r"costs\.json: expected"):
            folder.costs()


def test_a_damaged_status_is_named(folder: RunFolder) -> None:
    (folder.path / "status.json").write_text('{"state": "happy"}')
    with pytest.raises(RecordsError, match=r"status.json: expected"):
        folder.status()


def test_the_lock_is_exclusive_and_ends_with_its_process(folder: RunFolder) -> None:
    code = (
        "import sys; from scaling.records import RunFolder\n"
        "with RunFolder(sys.argv[1]).lock():\n print(1, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    assert folder.busy()
    with pytest.raises(FolderBusyError, match="in use by another process"), folder.lock():
        pass
    child.kill()
    child.wait()
    assert not folder.busy()
    with folder.lock():
        pass


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def listed(name: str, **other: object) -> dict[str, object]:
    return {"run": name, "family": "var", "tokenizer": "../tokenizers/t", "tokens": "../tokens/t"} | other


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object with a list of runs, each with run, family, tokenizer, tokens"),
        ({"runs": ["a"], "tokenizer": "../t/t", "tokens": "../t/t"}, "'run' with the same recipe"),
        ({"runs": [listed("a", family=None)]}, "expected an object with a list of runs"),
        ({"runs": [{"run": "a"}]}, "expected an object with a list of runs"),
        ({"runs": [listed("../../evil")]}, r"run '\.\./\.\./evil' is no name of a folder in"),
        ({"runs": [listed("..")]}, r"run '\.\.' is no name of a folder in"),
        ({"runs": [listed("/etc")]}, "run '/etc' is no name of a folder in"),
        ({"runs": [listed("")]}, "run '' is no name of a folder in"),
        ({"runs": [listed("a", tokenizer="../../t")]}, r"tokenizer '\.\./\.\./t' of a lies outside"),
        ({"runs": [listed("a", tokens="/etc")]}, "tokens '/etc' of a lies outside"),
    ],
)  # fmt: skip
def test_a_damaged_list_of_runs_is_told(tmp_path: Path, value: object, message: str) -> None:
    """A list without the runs' own tokenizers, as it once was, too."""
    RunFolder(tmp_path / "a").create({})
    write_json(tmp_path / "sweep.json", value)
    for read in (read_sweep, list_runs):
        with pytest.raises(RecordsError, match=message) as caught:
            read(tmp_path)
        assert "sweep.json" in str(caught.value)


def test_a_sweep_reached_through_a_link_keeps_its_tokenizers(tmp_path: Path) -> None:
    """Where the folders really lie is a person's own affair."""
    (tmp_path / "disk" / "sweep").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sweep").symlink_to(tmp_path / "disk" / "sweep")
    write_json(tmp_path / "runs" / "sweep" / "sweep.json", {"runs": [listed("a")]})
    assert [run.run for run in read_sweep(tmp_path / "runs" / "sweep").runs] == ["a"]


def test_measurements_drawn_otherwise_are_lines_of_their_own(folder: RunFolder) -> None:
    for guidance, fid in ((1.0, 30.0), (2.0, 20.0), (1.0, 31.0)):
        setting = f"guidance={guidance}"
        folder.append({"kind": "fidelity", "step": 5, "setting": setting, "guidance": guidance, "fid": fid})
    folder.append({"kind": "eval", "step": 5})
    assert [(r["guidance"], r["fid"]) for r in folder.metrics("fidelity")] == [(2.0, 20.0), (1.0, 31.0)]


def test_runs_are_listed_in_the_sweeps_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        RunFolder(tmp_path / name).create({})
    assert [r.name for r in list_runs(tmp_path)] == ["a", "b"]
    write_json(tmp_path / "sweep.json", {"runs": [listed(name) for name in ("b", "a", "not-started")]})
    assert [r.name for r in list_runs(tmp_path)] == ["b", "a"]


def test_no_sweep_and_no_runs_are_said(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="no such sweep folder"):
        list_runs(tmp_path / "nothing")
    with pytest.raises(RecordsError, match="no runs in it yet"):
        list_runs(tmp_path)


def test_a_failure_that_is_forgotten_while_it_is_read_is_none(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was there a moment ago: the file itself decides."""
    folder.set_status("running", attempt=2)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert folder.status()["state"] == "running"
    assert RunFolder(folder.path / "new").status()["state"] == "waiting"


def test_a_folder_made_from_other_images_is_told(folder: RunFolder) -> None:
    folder.check_data("a")
    folder.claim_data("a")
    folder.claim_data("a")
    for ask in (folder.check_data, folder.claim_data):
        with pytest.raises(RecordsError, match=r"other images .* --data\.name"):
            ask("b")
    folder.check_data("a")


def test_a_root_with_dots_in_it_is_a_root(tmp_path: Path) -> None:
    sweep = tmp_path / "runs" / "study"
    run = {"run": "var-d1", "family": "var", "tokenizer": "../tokenizers/a", "tokens": "../tokens/a"}
    write_json(sweep / "sweep.json", {"runs": [run]})
    (tmp_path / "other").mkdir()
    assert [r.run for r in read_sweep(tmp_path / "other" / ".." / "runs" / "study").runs] == ["var-d1"]
