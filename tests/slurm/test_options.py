"""What is asked of Slurm, and which jobs are handed to it; no Slurm needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scaling.config import ConfigError, LaunchConfig
from scaling.records import RecordsError, RunFolder
from sweeps import slurm, slurm_queue
from sweeps.jobs import Job, Kind
from sweeps.slurm_job import own_id, seconds_left
from sweeps.slurm_options import Resources, SlurmOptions
from sweeps.slurm_queue import Seen, standing, words

LAUNCH = LaunchConfig(processes=2, threads=3)
SLURM = SlurmOptions(executor="slurm")


def test_single_depths_may_ask_for_more() -> None:
    options = replace(SLURM, gpus_per_run=("1", "6=8"), nodes_per_run=("1", "6=2"), time=("60", "6=2-0"))
    assert options.resources(LAUNCH, 4) == Resources(1, 1, 1, "60")
    assert options.resources(LAUNCH, 6) == Resources(2, 4, 4, "2-0")
    assert options.resources(LAUNCH, 6).arguments(threads=3) == [
        *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=12", "--gpus-per-node=4", "--time=2-0")
    ]


def test_without_gpus_a_node_runs_the_recipes_processes_and_a_tokenizer_has_one_node() -> None:
    options = replace(SLURM, nodes_per_run=("3",))
    assert options.resources(LAUNCH, 4) == Resources(3, 2, None, None)
    assert options.resources(LAUNCH, None) == Resources(1, 2, None, None)
    assert options.resources(LAUNCH, None).arguments(threads=None) == ["--nodes=1", "--ntasks-per-node=1"]


def test_options_of_sbatch_are_passed_through() -> None:
    options = replace(SLURM, partition="gpu", qos="long", sbatch="--mem=64G --exclude='n[1,2]'")
    assert options.arguments() == [*("--partition=gpu", "--qos=long", "--mem=64G", "--exclude=n[1,2]")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (replace(SLURM, gpus_per_run=("3",), nodes_per_run=("2",)), "cannot be shared evenly"),
        (replace(SLURM, nodes_per_run=("0",)), "--nodes-per-run must be a number from 1 on, got '0'"),
        (replace(SLURM, nodes_per_run=("1", "2")), "--nodes-per-run takes one value"),
        (replace(SLURM, nodes_per_run=("1", "six=2")), "'six' is no depth"),
        (replace(SLURM, array_limit=0), "--array-limit must be at least 1, got 0"),
        (SlurmOptions(partition="gpu"), "--partition is for --executor slurm only"),
    ],
)
def test_what_has_no_meaning_is_refused(options: SlurmOptions, said: str) -> None:
    def ask() -> None:
        options.check()
        options.resources(LAUNCH, 4)

    with pytest.raises(ConfigError, match=said):
        ask()


@pytest.mark.parametrize(
    ("recorded", "seen", "state"),
    [
        ("waiting", None, "waiting"),
        ("done", Seen("1_0", "COMPLETED"), "done"),
        ("waiting", Seen("1_0", "PENDING", "Resources"), "queued"),
        ("interrupted", Seen("1_0", "PENDING", "BeginTime"), "queued"),
        ("running", Seen("1_0", "PENDING", "BeginTime"), "queued"),
        ("waiting", Seen("1_0", "RUNNING"), "starting"),
        ("running", Seen("1_0", "RUNNING"), "running"),
        ("failed", Seen("1_0", "FAILED"), "failed"),
        ("failed", Seen("1_0", "PENDING"), "queued"),
        ("running", Seen("1_0", "OUT_OF_MEMORY"), "failed"),
        ("interrupted", Seen("1_0", "CANCELLED", "1000"), "cancelled"),
        ("waiting", Seen("1_0", "CANCELLED", "DependencyNeverSatisfied"), "blocked"),
    ],
)
def test_where_a_job_stands(recorded: str, seen: Seen | None, state: str) -> None:
    assert standing(recorded, seen)[0] == state


def test_slurm_speaks_for_itself() -> None:
    said = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: no\n"
    assert words(said) == "invalid partition specified: x: Batch job submission failed: no"
    assert words("") == "it did not say why"


@pytest.mark.parametrize(
    ("shown", "seconds"),
    [
        ("59", 59),
        ("1:30\n", 90),
        ("2:00:00", 7200),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        ("", None),
        ("1:00\n2:00", None),
    ],
)
def test_the_time_that_is_left(shown: str, seconds: float | None) -> None:
    assert seconds_left(shown) == seconds


def test_the_last_of_an_array_does_not_speak_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "5"), ("ARRAY_JOB_ID", "5"), ("ARRAY_TASK_ID", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert own_id() == "5_4"


def test_without_slurm_a_person_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch on this machine"):
        slurm_queue.submit([], "")
    with pytest.raises(RecordsError, match="there is no squeue on this machine"):
        slurm_queue.look(["1"])
    assert slurm_queue.look([]) == {}
    with pytest.raises(RecordsError, match="nothing of this sweep was handed to Slurm"):
        slurm.cancel(tmp_path, "tiny")


def job(folder: Path, kind: Kind, state: str, needs: tuple[Path, ...] = (), recheck: bool = False) -> Job:
    made = RunFolder(folder)
    made.set_status(state)
    (folder / "product").write_text("here")
    return Job(folder.name, kind, made, (), "product", needs=needs, recheck=recheck)


def test_only_what_is_missing_and_needed_is_handed_over(tmp_path: Path) -> None:
    tokenizer, tokens, other = (tmp_path / name for name in ("tokenizer", "tokens", "other"))
    jobs = [
        job(tokenizer, "tokenizer", "done"),
        job(tokens, "tokens", "done", (tokenizer,), recheck=True),
        job(other, "tokens", "waiting"),
        job(tmp_path / "a", "run", "done", (tokens,)),
        job(tmp_path / "b", "run", "failed", (tokens,)),
        job(tmp_path / "c", "run", "interrupted", (tokens,)),
        job(tmp_path / "d", "run", "done", (other,)),
    ]

    def names(*active: Path) -> list[str]:
        return [j.name for j in slurm.missing(jobs, set(active))]

    assert names() == ["tokens", "b", "c"]  # a whole cache is looked through before anything is trained
    assert names(tmp_path / "b") == ["c"]  # but not while a run reads it
    assert names(tokens) == ["b", "c"]
    assert names(tmp_path / "b", tmp_path / "c") == []
