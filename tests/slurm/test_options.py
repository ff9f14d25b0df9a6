"""What is asked of Slurm, and which jobs are handed to it; no Slurm needed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from scaling.config import ConfigError, DataConfig, LaunchConfig, TokenizerConfig, TrainConfig
from scaling.records import RecordsError, RunFolder, read_json
from sweeps import slurm, slurm_commands, slurm_queue, speed_store
from sweeps.calibration import measure_images
from sweeps.jobs import Job, Kind
from sweeps.machine import PROCESS_BYTES
from sweeps.recipe import Recipe
from sweeps.slurm_options import LEAST_MEMORY, MARGIN, Resources, SlurmOptions, limit_seconds, rounded_up
from sweeps.slurm_queue import Seen, standing, words
from sweeps.stage_memory import encoding_memory, training_memory
from tests.slurm.stand_ins import fake

LAUNCH = LaunchConfig(processes=2, threads=3)
SLURM = SlurmOptions(executor="slurm")
SLURM_2 = replace(SLURM, array_limit=2)


def test_single_depths_may_ask_for_more() -> None:
    options = replace(SLURM, gpus_per_run=("1", "6=8"), nodes_per_run=("1", "6=2"), time=("60", "6=2-0"))
    assert options.resources(LAUNCH, 4) == Resources(1, 1, 1, 3, time="60")
    assert options.resources(LAUNCH, 6) == Resources(2, 4, 4, 12, time="2-0")
    assert options.resources(LAUNCH, 6).arguments() == [
        *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=12", "--gpus-per-node=4", "--time=2-0")
    ]


def test_without_gpus_a_node_runs_the_recipes_processes_and_a_tokenizer_has_one_node() -> None:
    options = replace(SLURM, nodes_per_run=("3",))
    assert options.resources(LAUNCH, 4) == Resources(3, 2, None, 6)
    assert options.resources(LAUNCH, None) == Resources(1, 2, None, 6)
    assert options.resources(replace(LAUNCH, threads=None), None).arguments() == [
        *("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2")
    ]


def test_memory_and_time_follow_from_the_plan_with_a_margin() -> None:
    asked = SLURM.sized(SLURM.resources(LAUNCH, 4), 3 * 2**30, 4 * 3600.0)
    assert asked.arguments()[-2:] == ["--mem=6144M", "--time=384"]  # 4.5 GiB; 362 minutes with those to leave
    tiny = SLURM.sized(SLURM.resources(LAUNCH, 4), 1, 1.0)
    assert tiny.arguments()[-2:] == ["--mem=1024M", "--time=32"]
    month = SLURM.sized(SLURM.resources(LAUNCH, 4), None, 30 * 86400.0)
    assert month.arguments()[-1] == "--time=1440"  # a day, after which it goes on
    unknown = SLURM.resources(LAUNCH, 4)
    assert SLURM.sized(unknown, None, None) == unknown
    own = replace(SLURM, time=("90",), sbatch="--mem-per-cpu=2G")
    assert own.sized(own.resources(LAUNCH, 4), 3 * 2**30, 9e9) == own.resources(LAUNCH, 4)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("2-0", 172800), ("1-2:30", 95400)),
        *(("1-0:0:1", 86401), ("UNLIMITED", math.inf)),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: float) -> None:
    assert limit_seconds(text) == seconds


@given(st.floats(0, 1e15), st.integers(4, 2**30))
def test_sizes_are_few_and_at_most_half_too_large(value: float, least: int) -> None:
    size = rounded_up(value, least)
    assert max(value, least) <= size
    assert size == least or size <= max(2 * least, 1.51 * value)


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
        (replace(SLURM, time=("2",)), "--time 2 is no longer than the 120 seconds before its end"),
        (replace(SLURM, time=("soon",)), "--time soon: expected minutes, H:M:S, D-H or D-H:M:S"),
        (replace(SLURM, sbatch="--comment=mine"), "--sbatch: --comment cannot be set here"),
        (replace(SLURM, sbatch="-N2"), "--sbatch: --nodes cannot be set here: use --nodes-per-run"),
        (replace(SLURM, sbatch="--mem='4G"), "--sbatch --mem='4G: No closing quotation"),
    ],
)
def test_what_has_no_meaning_is_refused(options: SlurmOptions, said: str) -> None:
    def ask() -> None:
        options.check()
        options.resources(LAUNCH, 4)

    with pytest.raises(ConfigError, match=said):
        ask()


def test_gpus_are_asked_for_if_and_only_if_the_recipe_uses_them() -> None:
    with pytest.raises(ConfigError, match=r"--gpus-per-run asks for GPUs, but launch.device is 'cpu'"):
        replace(SLURM, gpus_per_run=("1",)).resources(replace(LAUNCH, device="cpu"), 4)
    with pytest.raises(ConfigError, match=r"launch.device is 'cuda'; --gpus-per-run says how many"):
        SLURM.resources(replace(LAUNCH, device="cuda"), 4)


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


def test_what_goes_on_without_slurm_is_running() -> None:
    assert standing("running", Seen("1_0", "CANCELLED"), beats=True)[0] == "running"
    assert standing("running", Seen("1_0", "PENDING"), beats=True)[0] == "queued"
    assert standing("running", Seen("1_0", "TIMEOUT"))[1].startswith("ended by Slurm: TIMEOUT (with more")


def test_slurm_speaks_for_itself() -> None:
    said = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: no\n"
    assert words(said) == "invalid partition specified: x: Batch job submission failed: no"
    assert words("") == "it did not say why"


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
        return [j.name for j in slurm.missing(jobs, set(active), launch)]

    launch = LaunchConfig()
    assert names() == ["tokens", "b", "c"]  # a whole cache is looked through before anything is trained
    assert names(tmp_path / "b") == ["c"]  # but not while a run reads it
    assert names(tokens) == ["b", "c"]
    assert names(tmp_path / "b", tmp_path / "c") == []
    # What has diverged is left alone, and so is what would start from it.
    jobs += [
        job(tmp_path / "trunk", "run", "failed", (tokens,)),
        job(tmp_path / "branch", "run", "waiting", (tokens, tmp_path / "trunk")),
    ]
    assert names() == ["tokens", "b", "c", "trunk", "branch"]
    jobs[-2].folder.set_status("failed", cause="diverged")
    assert names() == ["tokens", "b", "c"]
    assert names(tmp_path / "trunk") == ["b", "c", "branch"]
    launch = LaunchConfig(retry_diverged=True)
    assert names() == ["tokens", "b", "c", "trunk", "branch"]


def runs(tmp_path: Path, *weights: float, needs: tuple[Path, ...] = ()) -> list[Job]:
    return [
        Job(f"{w:g}", "run", RunFolder(tmp_path / f"{w:g}"), (), "product", needs=needs, weight=w)
        for w in weights
    ]


def test_what_asks_for_the_same_is_one_array_and_what_is_needed_comes_first(tmp_path: Path) -> None:
    tokens = job(tmp_path / "tokens", "tokens", "waiting")
    trunk, other = runs(tmp_path, 1.0, 2.0, needs=(tokens.folder.path,))
    branches = runs(tmp_path, 9.0, 8.0, needs=(trunk.folder.path,))
    jobs = [*branches, trunk, other, tokens]
    asked = {j.folder.path: Resources(1, 1, None, 1) for j in jobs}
    found = [[j.name for j in group.jobs] for group in slurm.groups(jobs, asked, None)]
    assert found == [["tokens"], ["2"], ["1"], ["9", "8"]]


def test_a_limit_over_several_arrays_is_as_many_lanes(tmp_path: Path) -> None:
    jobs = runs(tmp_path, 1.0, 2.0, 3.0, 4.0, 5.0, 12.0)
    asked = {j.folder.path: Resources(1, 1, None, 1) for j in jobs}
    (one,) = slurm.groups(jobs, asked, 2)
    assert "--array=0-5%2" in slurm.arguments(tmp_path, one, [], SLURM_2)
    asked[jobs[0].folder.path] = Resources(2, 1, None, 1)
    found = slurm.groups(jobs, asked, 2)
    assert [[g.jobs[0].name for g in found if g.lane == lane] for lane in (0, 1)] == [
        *(["12", "2"], ["5", "4", "3", "1"])
    ]
    said = slurm.arguments(tmp_path, found[-1], ["7"], SLURM_2)
    assert {"--array=0-0", "--dependency=afterok:7,singleton"} <= set(said)
    names = {word for g in found for word in slurm.arguments(tmp_path, g, [], SLURM_2) if "job-name" in word}
    assert len(names) == 2


def test_what_squeue_has_forgotten_sacct_tells(commands: Path) -> None:
    fake(
        commands,
        "squeue",
        "echo 'CLUSTER: one'; echo '8|1|RUNNING|None|tiny|varscale:a'; echo 'of two lines'",
    )
    fake(commands, "sacct", "echo '7_0|FAILED|None|tiny'; echo '7_1|CANCELLED by 1000|None|tiny'")
    seen = slurm_queue.look(["7", "8"])
    states = {name: found.state for name, found in seen.items()}
    assert states == {"7_0": "FAILED", "7_1": "CANCELLED", "8_1": "RUNNING"}
    fake(commands, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert set(slurm_queue.look(["7", "8"])) == {"8_1"}
    fake(commands, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(RecordsError, match=r"Slurm does not answer: .*Unable to contact slurm controller"):
        slurm_queue.look(["7", "8"])


def test_a_job_that_ends_while_it_is_cancelled_is_no_error(commands: Path) -> None:
    fake(
        commands,
        "scancel",
        "echo 'scancel: error: Kill job error on job id 5: Invalid job id specified' >&2; exit 1",
    )
    slurm_queue.cancel(["5"])
    fake(commands, "scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(RecordsError, match="scancel refused: Access/permission denied"):
        slurm_queue.cancel(["5"])


def test_an_allocation_around_the_launcher_is_not_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SQUEUE_PARTITION", "SLURM_CONF", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "x")
    kept = slurm_queue.environment()
    assert [
        name in kept for name in ("SLURM_NTASKS", "SQUEUE_PARTITION", "SLURM_CONF", "SBATCH_ACCOUNT")
    ] == [*(False, False, True, True)]


def test_when_one_submission_is_refused_those_before_it_are_cancelled(commands: Path, tmp_path: Path) -> None:
    asked = {path: Resources(nodes, 1, None, 1) for nodes, path in ((1, tmp_path / "2"), (2, tmp_path / "1"))}
    calls = tmp_path / "calls"
    fake(
        commands,
        "sbatch",
        """case "$*" in
            *--test-only*) exit 0;;
            *--nodes=2*) echo "sbatch: error: no" >&2; exit 1;;
        esac
        echo 7""",
    )
    fake(commands, "scancel", f"echo $* >> {calls}")
    sweep, jobs = tmp_path / "tiny", runs(tmp_path, 1.0, 2.0)
    planned = slurm.PlannedOn("Slurm", 1, 1)
    jobs = [replace(j, command=("-m", "scaling.trainer")) for j in jobs]
    with pytest.raises(ConfigError, match="sbatch refused: no"):
        slurm.submit(sweep, jobs, asked, LAUNCH, planned, SLURM, print)
    assert calls.read_text().split() == ["7"]
    assert [read_json(f).get("cancelled", False) for f in sorted(sweep.glob("slurm/*.json"))] == [True, False]


def test_every_job_asks_for_memory_and_what_it_took_before_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VARSCALE_CACHE", str(tmp_path / "cache"))
    data = DataConfig(resolution=32, train_images=100, val_images=10, num_classes=18)
    tokenizer = TokenizerConfig(
        vocab=256, latent_channels=16, channels=64, norm_groups=4, multipliers=(1, 2, 2, 2), scales=(1, 2, 4)
    )
    train, launch = TrainConfig(steps=10, batch=8), LaunchConfig(device="cpu")
    recipe = Recipe("x", (1, 2), train, data=data, tokenizer=tokenizer, launch=launch)

    options = replace(SLURM, nodes_per_run=("1", "2=2"))

    def asked() -> dict[str, int]:
        made = slurm_commands.plan(recipe, tmp_path, lambda data: data, options)
        found = slurm_commands.requests(made, options)
        return {job.name: found[job.folder.path].memory or 0 for job in made.jobs}

    def expected(size: float) -> int:
        return rounded_up(MARGIN * size, LEAST_MEMORY)

    before = asked()
    stage = recipe.runs(data)[0].tokenizer_run
    assert before["tokenizer"] == expected(training_memory(stage, stage.train.batch) + PROCESS_BYTES)
    assert before["tokens"] == expected(encoding_memory(stage) + PROCESS_BYTES)
    assert all(before.values())
    machine = slurm_commands.plan(recipe, tmp_path, lambda data: data, SLURM).machine
    folder = RunFolder(tmp_path / "done")
    folder.set_status("done", images_per_second=9.0, host_memory=20 * 2**30)
    speed = measure_images("tokenizer", folder, stage, machine, 1, recipe.launch, 60.0)
    assert speed is not None
    speed_store.add(speed)
    assert asked() == before | {"tokenizer": expected(20 * 2**30)}
