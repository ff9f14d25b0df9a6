"""Sweeps on a real Slurm: nodes that die, pre-emption, cancellation, launchers that are killed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scaling.records import RunFolder, list_runs
from sweeps.jobs import Job
from sweeps.slurm import arguments, groups
from sweeps.slurm_options import Resources, SlurmOptions
from tests.slurm.cluster import Cluster, freeze, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = """
name: tiny
depths: [1, 2, 3, 4, 5, 6]
data: {source: photos, resolution: 16, train_images: 48, val_images: 16}
tokenizer:
  {vocab: 32, latent_channels: 4, channels: 32, multipliers: [1, 1, 1], res_blocks: 1, scales: [1, 2, 4]}
tokenizer_train: {steps: 6, batch: 8, warmup: 2, log_every: 2, eval_images: 8, revive_every: 2}
train: {steps: 3, batch: 8, lr: 1.0e-3, precision: fp32}
model: {adaln: shared, mlp_ratio: 1}
by_depth: [{depths: [1, 2], train: {steps: 120}}]
evaluation: {points: 2}
launch: {device: cpu, threads: 1, checkpoint_seconds: 0.2, log_every: 4, sampling: {images: 0}}
"""
BRANCHING = (
    RECIPE.replace("depths: [1, 2, 3, 4, 5, 6]", "depths: [1]\nlengths: [1, 6, 8]")
    .replace(
        "train: {steps: 3, batch: 8, lr: 1.0e-3, precision: fp32}",
        "train: {steps: 20, batch: 8, lr: 1.0e-3, precision: fp32, schedule: wsd, warmup_steps: 4}",
    )
    .replace("by_depth: [{depths: [1, 2], train: {steps: 120}}]\n", "")
)
"""A trunk of 160 steps, which leaves checkpoints after 16 and 96 for its two branches."""
FIRST, SECOND, TRUNK = 20, 120, 160
"""Their steps."""
LONG, TWO_NODES = (1, 2), 3
"""Depths of the runs that are disturbed, and of the one on two nodes."""
TIMES = {"images_per_second", "seconds"}


class Sweep:
    """The recipe in a folder, and the command line."""

    def __init__(self, folder: Path, cluster: Cluster | None = None, recipe: str = RECIPE) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.runs, self.sweep = folder, folder / "runs", folder / "runs" / "tiny"
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(recipe)
        # No speed that a test measures is taken for this machine's.
        self.environment = os.environ | {"VARSCALE_CACHE": str(folder / "cache")}
        self.environment |= {"SLURM_CONF": cluster.config} if cluster else {}

    def command(self, name: str, *options: str) -> list[str]:
        script = str(REPOSITORY / "run_sweep.py")
        return [sys.executable, script, name, str(self.recipe), "--root", str(self.runs), *options]

    def call(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, *options), capture_output=True, text=True, env=self.environment, timeout=600
        )

    def do(self, name: str, *options: str) -> str:
        done = self.call(name, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def queue(self, *options: str) -> str:
        return self.do("run", "--executor", "slurm", *options)

    def status(self) -> dict[str, dict[str, Any]]:
        return {n.split("-s0-")[0]: found for n, found in json.loads(self.do("status", "--json")).items()}

    def run(self, depth: int) -> RunFolder:
        return next(r for r in list_runs(self.sweep) if r.config()["model"]["depth"] == depth)

    def job(self, depth: int) -> str:
        return str(self.status()[f"var-d{depth}"]["slurm"]["id"])

    def of_length(self, steps: int) -> RunFolder:
        return next(r for r in list_runs(self.sweep) if r.config()["train"]["steps"] == steps)

    def slurm(self, run: RunFolder) -> dict[str, Any]:
        return json.loads(self.do("status", "--json"))[run.name]["slurm"]

    def freeze_at_checkpoint(self, launcher: subprocess.Popen[str], *depths: int) -> None:
        """Stop these runs where they are as soon as each has a checkpoint."""
        wait_for(lambda: (self.sweep / "sweep.json").exists())
        left = [self.run(depth) for depth in depths]

        def all_frozen() -> bool:
            assert launcher.poll() is None, launcher.communicate()[0]
            for run in [run for run in left if any(run.checkpoints.glob("step-*"))]:
                freeze(run.path)
                left.remove(run)
            return not left

        wait_for(all_frozen)

    def numbers(self, depth: int) -> list[dict[str, Any]]:
        return numbers(self.run(depth))


def numbers(run: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in run.metrics()]


@pytest.fixture
def held(cluster: Cluster, tmp_path: Path) -> Iterator[Sweep]:
    """Nothing of it runs: Slurm holds what is queued."""
    sweep = Sweep(tmp_path, cluster)
    yield sweep
    cluster.ask("scancel", "--user=root")


HOLD = "--sbatch=--hold"


@pytest.fixture(scope="module")
def disturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A finished sweep: one run was pre-empted, and the node of another one died."""
    folder = tmp_path_factory.mktemp("there") / "it's 100%j there"
    there = Sweep(folder, cluster)
    asked = ("--nodes-per-run", "1", f"{TWO_NODES}=2", "--sbatch=--exclusive", "--wait")
    launcher = subprocess.Popen(
        there.command("run", "--executor", "slurm", *asked),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=there.environment,
    )
    try:
        there.freeze_at_checkpoint(launcher, *LONG)
        cluster.preempt(there.job(LONG[0]))
        node = cluster.node_of(there.job(LONG[1]))
        cluster.kill_node(node)
        output = launcher.communicate(timeout=600)[0]
    finally:
        launcher.kill()
        cluster.ask("scancel", "--name=tiny")  # what is left, if that was not all
    cluster.revive_node(node)
    assert launcher.returncode == 0, output
    assert "report: " in output
    return there


def test_six_runs_over_three_nodes_end_with_the_numbers_of_a_local_sweep(
    disturbed: Sweep, tmp_path: Path
) -> None:
    there, here = disturbed, Sweep(tmp_path)
    status = there.status()
    assert {found["state"] for found in status.values()} == {"done"}
    assert {found["slurm"]["state"] for found in status.values()} == {"COMPLETED"}
    assert [status[f"var-d{depth}"]["attempt"] for depth in (*LONG, 4, 5, 6)] == [2, 2, 1, 1, 1]
    assert status[f"var-d{TWO_NODES}"]["processes"] == 2

    for name in ("tokenizers", "tokens"):
        shutil.copytree(there.runs / name, here.runs / name)
    one = [str(depth) for depth in range(1, 7) if depth != TWO_NODES]
    here.do("run", "--depths", *one, "--launch.runs-at-once", "2")
    for depth in map(int, one):
        assert there.numbers(depth) == here.numbers(depth)
    here.do("run", "--depths", str(TWO_NODES), "--launch.processes", "2", "--launch.runs-at-once", "1")
    assert there.numbers(TWO_NODES) == here.numbers(TWO_NODES)

    # What it took there is what the next sweep asks for.
    asked = json.loads(there.do("plan", "--executor", "slurm", "--json", "--seeds", "1"))["slurm"]
    assert all("--time=32" in call["sbatch"] for call in asked)


def test_nothing_is_queued_twice(held: Sweep, cluster: Cluster) -> None:
    resources = ("--gpus-per-run", "1", "2=4", "--nodes-per-run", "1", "2=2", "--array-limit", "3")
    asked = (*resources, "--time", "60", "2=90", "--launch.device", "auto", HOLD)
    # As from within an allocation, by a person who usually looks at one partition only.
    held.environment |= {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "1", "SQUEUE_PARTITION": "urgent"}
    assert "var-d6" in held.queue(*asked)
    shape = "%i %D %b %l %m %r"
    before = cluster.jobs(shape)
    # A process on a GPU is given some main memory.
    assert len(before) == 8
    assert sum(" 1 gres:gpu:1 1:00:00 8G " in job for job in before) == 7
    assert sum(" 2 gres:gpu:2 1:30:00 16G " in job for job in before) == 1
    ids = {name: found["slurm"]["id"] for name, found in held.status().items()}
    assert {found["state"] for found in held.status().values()} == {"queued"}

    assert "in Slurm's hands already" in held.queue(*asked)
    assert cluster.jobs(shape) == before
    # A launcher that was killed after sbatch had taken the job, and before it could write down its id.
    for file in held.sweep.glob("slurm/*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"id": None}))
    held.queue(*asked)
    assert cluster.jobs(shape) == before
    assert {name: found["slurm"]["id"] for name, found in held.status().items()} == ids
    # A launcher that was killed before it could call sbatch has left a record that stands for nothing.
    never = held.sweep / "slurm" / "1-none.json"
    never.write_text(
        json.dumps({"id": None, "name": "tiny", "jobs": [{"folder": f"tiny/{held.run(1).name}"}]})
    )
    assert {name: found["slurm"]["id"] for name, found in held.status().items()} == ids
    held.queue(*asked)
    assert not never.exists()
    assert cluster.jobs(shape) == before

    assert held.do("cancel").count("cancelled: ") == 8
    assert cluster.jobs(shape) == []
    assert {found["state"] for found in held.status().values()} == {"cancelled"}
    assert "nothing of this sweep" in held.do("cancel")
    assert "var-d1" in held.queue("--depths", "1", HOLD)
    assert len(cluster.jobs(shape)) == 3


def test_a_launcher_killed_right_after_sbatch_and_two_at_once_queue_nothing_twice(
    held: Sweep, cluster: Cluster, tmp_path: Path
) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    real = shutil.which("sbatch")
    (place / "sbatch").write_text(
        f'#!/bin/sh\n{real} "$@" || exit\ncase "$*" in *--test-only*) ;; *) kill -9 $PPID;; esac\n'
    )
    (place / "sbatch").chmod(0o755)
    path = held.environment["PATH"]
    held.environment["PATH"] = f"{place}:{path}"
    for _ in range(2):  # the tokenizer, then its tokens
        assert held.call("run", "--executor", "slurm", HOLD).returncode == -9
    held.environment["PATH"] = path
    assert len(cluster.jobs("%i", "--name=tiny")) == 2
    launchers = [
        subprocess.Popen(
            held.command("run", "--executor", "slurm", HOLD), stdout=subprocess.PIPE, env=held.environment
        )
        for _ in range(2)
    ]
    assert [launcher.wait(timeout=300) for launcher in launchers] == [0, 0]
    ids = sorted(found["slurm"]["id"] for found in held.status().values())
    assert sorted(cluster.jobs("%F_%K", "--name=tiny")) == ids
    assert len(ids) == 8


def test_another_job_with_an_id_of_ours_is_let_be(held: Sweep, cluster: Cluster) -> None:
    """As after the last possible id, or on another cluster with the same folders."""
    held.queue("--depths", "1", HOLD)
    theirs = cluster.ask("sbatch", "--parsable", "--hold", "--job-name=x|y", script="#!/bin/sh\n")
    (file,) = [f for f in held.sweep.glob("slurm/*.json") if "var-d1" in f.read_text()]
    cluster.ask("scancel", json.loads(file.read_text())["id"])
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id": theirs}))
    try:
        assert held.status()["var-d1"]["state"] == "waiting"
        held.do("cancel")
        assert len(cluster.jobs("%i", f"--jobs={theirs}")) == 1
    finally:
        cluster.ask("scancel", theirs)


def test_the_limit_holds_over_all_arrays(cluster: Cluster, tmp_path: Path) -> None:
    """Runs of two sizes, one of which is queued again; each writes when it begins and ends."""
    runs = [
        Job(f"run-{i}", "run", RunFolder(tmp_path / f"run-{i}"), (), "product", weight=float(i))
        for i in range(6)
    ]
    small, large = (Resources(nodes, 1, None, 1) for nodes in (1, 2))
    asked = {run.folder.path: large if i == 5 else small for i, run in enumerate(runs)}
    found = groups(runs, asked, 2)
    assert len(found) == 6
    log = tmp_path / "log"
    script = f"#!/bin/sh\necho begin >> {log}\nsleep 1\necho end >> {log}\n"
    options = SlurmOptions(executor="slurm", array_limit=2)
    ids = [
        cluster.ask(
            "sbatch", "--parsable", "--output=/dev/null", *arguments(tmp_path, g, [], options), script=script
        )
        for g in found
    ]
    wait_for(lambda: not cluster.jobs("%i", f"--jobs={','.join(ids)}"))
    events = log.read_text().split()
    assert len(events) == 12
    at_once = [events[:i].count("begin") - events[:i].count("end") for i in range(13)]
    assert max(at_once) == 2


def test_what_has_to_wait_for_a_node_is_queued_all_the_same(held: Sweep, cluster: Cluster) -> None:
    cluster.ask("scontrol", "update", "nodename=n[1-3]", "state=drain", "reason=repair")
    try:
        assert "queued all the same, since nodes that are down come back" in held.queue("--depths", "1")
        assert len(cluster.jobs("%i", "--name=tiny")) == 3
        held.do("cancel")
    finally:
        cluster.ask("scontrol", "update", "nodename=n[1-3]", "state=resume")
        wait_for(lambda: cluster.ask("sinfo", "-h", "-p", "main", "-o", "%T") == "idle")


def test_sweeps_with_one_tokenizer_queue_it_once(held: Sweep, cluster: Cluster) -> None:
    held.queue("--depths", "1", HOLD)
    held.queue("--depths", "4", "--name", "other", HOLD)
    try:
        assert len(cluster.jobs("%i", "--name=tiny")) == 3
        (job,) = cluster.jobs("%E", "--name=other")
        tokens = held.status()["tokens"]["slurm"]["id"].partition("_")[0]
        assert f"afterok:{tokens}" in job
    finally:
        cluster.ask("scancel", "--name=other")


def test_a_job_that_fails_is_not_queued_again_and_blocks_what_needs_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, cluster)
    uneven = ("--depths", "4", "--launch.processes", "2", "--tokenizer-train.batch", "3", "--wait")
    done = sweep.call("run", "--executor", "slurm", *uneven)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "tokenizer_train.batch 3 cannot be shared evenly by 2 processes" in done.stdout
    status = sweep.status()
    assert [status[name]["state"] for name in ("tokenizer", "tokens", "var-d4")] == [
        *("failed", "blocked", "blocked")
    ]
    (tokenizer,) = (sweep.runs / "tokenizers").iterdir()
    starts = [line for line in (tokenizer / "log.txt").read_text().splitlines() if line.startswith("--- ")]
    assert len(starts) == 1


def test_a_run_out_of_time_is_queued_again_and_a_cancelled_one_is_not(
    cluster: Cluster, disturbed: Sweep, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, cluster)
    for name in ("tokenizers", "tokens"):
        shutil.copytree(disturbed.runs / name, sweep.runs / name)
    # A minute is the least that Slurm has; of it 45 seconds are left before the run is told.
    sweep.queue("--depths", "1", "--train.steps", "100000", "--time", "1", "--leave-seconds", "15")
    job, run = sweep.job(1), sweep.run(1)
    wait_for(lambda: any(run.checkpoints.glob("step-*")))
    wait_for(lambda: run.status()["state"] == "running" and run.status()["attempt"] > 1)
    assert "it was asked to leave; queued again" in (run.path / "log.txt").read_text()
    assert sweep.job(1) == job
    sweep.do("cancel")
    wait_for(lambda: sweep.status()["var-d1"]["state"] == "cancelled")
    assert run.status()["state"] == "interrupted"
    newest = max(run.checkpoints.glob("step-*")).name
    assert int(newest.removeprefix("step-")) >= run.status()["step"] > 0


def test_branches_start_from_their_trunk_and_end_with_the_numbers_of_a_local_sweep(
    cluster: Cluster, disturbed: Sweep, tmp_path: Path
) -> None:
    """A trunk that is cancelled by hand, handed over again, then pre-empted."""
    there, here = (Sweep(tmp_path / name, at, BRANCHING) for name, at in (("there", cluster), ("here", None)))
    for sweep, name in itertools.product((there, here), ("tokenizers", "tokens")):
        shutil.copytree(disturbed.runs / name, sweep.runs / name)
    here.do("run", "--launch.runs-at-once", "2")

    there.queue()
    trunk, first, second = (there.of_length(steps) for steps in (TRUNK, FIRST, SECOND))
    wait_for(lambda: trunk.branch(16).exists())
    freeze(trunk.path)
    wait_for(lambda: first.status()["state"] == "done")  # while its trunk stands still
    assert trunk.status()["state"] == "running"
    assert (there.slurm(second)["state"], there.slurm(second)["reason"]) == ("PENDING", "Dependency")

    cluster.ask("scancel", there.slurm(trunk)["id"])
    wait_for(lambda: there.slurm(second)["reason"] == "DependencyNeverSatisfied")
    wait_for(lambda: there.slurm(trunk)["state"] == "CANCELLED")
    told = {found["state"] for found in json.loads(there.do("status", "--json")).values()}
    assert told == {"done", "cancelled", "blocked"}

    queued = [line for line in there.queue().splitlines() if ": queued as" in line]
    assert {line.partition(":")[0] for line in queued} == {"tokens", trunk.name, second.name}
    wait_for(lambda: (trunk.status()["state"], trunk.status()["attempt"]) == ("running", 2))
    freeze(trunk.path)
    cluster.preempt(there.slurm(trunk)["id"])
    wait_for(lambda: second.status()["state"] == trunk.status()["state"] == "done")

    assert [run.status()["attempt"] for run in (trunk, first, second)] == [3, 1, 1]
    assert [run.shared()["step"] for run in (trunk, first, second)] == [0, 16, 96]
    for steps in (TRUNK, FIRST, SECOND):
        assert numbers(there.of_length(steps)) == numbers(here.of_length(steps))
        assert there.of_length(steps).weights.read_bytes() == here.of_length(steps).weights.read_bytes()


def test_branches_of_a_trunk_that_diverges_are_not_queued_again(
    cluster: Cluster, disturbed: Sweep, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, cluster, BRANCHING)
    for name in ("tokenizers", "tokens"):
        shutil.copytree(disturbed.runs / name, sweep.runs / name)
    done = sweep.call("run", "--executor", "slurm", "--train.lr", "1e30", "--wait")
    assert done.returncode == 1, done.stdout + done.stderr
    trunk = sweep.of_length(TRUNK)
    assert (trunk.status()["cause"], trunk.status()["attempt"]) == ("diverged", 1)
    told = {found["state"] for found in json.loads(sweep.do("status", "--json")).values()}
    assert told == {"done", "failed", "blocked"}
    again = sweep.queue("--train.lr", "1e30")
    assert f"{trunk.name}: not queued again: " in again
    assert "nothing was queued" in again
    assert cluster.jobs("%i", "--name=tiny") == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--partition", "nowhere"), "sbatch refused: invalid partition specified: nowhere"),
        (("--sbatch=--constraint=none-such",), "Invalid feature specification"),
        (("--gpus-per-run", "1"), "--gpus-per-run asks for GPUs, but launch.device is 'cpu'"),
    ],
)
def test_a_request_that_slurm_cannot_meet_queues_nothing(
    cluster: Cluster, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    sweep = Sweep(tmp_path, cluster)
    done = sweep.call("run", "--executor", "slurm", *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert cluster.jobs("%i", "--name=tiny") == []
