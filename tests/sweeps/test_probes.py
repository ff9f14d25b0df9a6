"""A calibration: which depths are timed, what is remembered of it, and what is refused."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling.config import ConfigError
from scaling.flops import forward_flops, spent
from scaling.records import RunFolder
from sweeps import calibration, probes, speed_store
from sweeps.calibration import ImageSpeed, RunSpeed
from sweeps.jobs import Job
from sweeps.machine import Machine
from sweeps.plan import Plan, stage_of, stage_threads
from sweeps.recipe import load_recipe
from sweeps.tables import plan_notes
from tests.sweeps.test_calibration import speed_of
from tests.sweeps.test_plan import LAPTOP, planned

FAKE = """
import json, sys, pathlib
from scaling.records import RunFolder
folder = RunFolder(sys.argv[1])
with folder.lock():
    folder.set_status("running", attempt=1)
    (folder.path / "speed.json").write_text(sys.argv[2])
    folder.set_status("done")
"""
RUN = {
    "flops_per_second": 1e9, "evaluation_flops_per_second": 2e9, "checkpoint_seconds": 0.5, "steps": 7,
    "inside_seconds": 0.0, "peak_memory": 400 * 2**20, "waited": None,
}  # fmt: skip
TOKENIZER = {
    "images_per_second": 50.0, "steps": 9, "evaluation_seconds": 200.0, "checkpoint_seconds": 100.0,
    "once_seconds": 300.0, "inside_seconds": -1000.0, "waited": 0.02,
}  # fmt: skip
TOKENS = {"sequences_per_second": 200.0, "inside_seconds": -500.0}
"""Seconds inside are subtracted from the clock's: below 0 they are the start of a job that takes so long. All
are long beside the start of a python, which is in the results too."""
ANSWERS = {"run": RUN, "tokenizer": TOKENIZER, "tokens": TOKENS}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Probes that answer at once; the jobs that were started."""
    started: list[Job] = []

    def fake(what: Any, *args: Any) -> Job:
        job = real(what, *args)
        answer = json.dumps(ANSWERS[what])
        started.append(job)
        return dataclasses.replace(job, command=(sys.executable, "-c", FAKE, str(job.folder.path), answer))

    real = probes._job
    monkeypatch.setattr(probes, "_job", fake)
    return started


def probe(plan: Plan, root: Path, machine: Machine = LAPTOP, **more: Any) -> probes.Probed:
    launch = plan.recipe.launch
    stages = [stage_of(job) for job in plan.stage_jobs if job.kind == "tokenizer"]
    return probes.probe_machine(
        root, machine, launch, plan.configs, stages, plan.allotment, stage_threads(launch, machine),
        more.pop("better", lambda speeds, number: False), **more,
    )  # fmt: skip


def test_the_ends_and_the_middle_are_timed() -> None:
    assert probes.probe_depths([1, 2, 3, 4, 5], 3) == [1, 2, 5]
    assert probes.probe_depths([6, 8, 12, 16, 20, 24, 30], 3) == [6, 12, 30]
    assert probes.probe_depths([1, 2, 3, 4], 2) == [1, 4]
    assert probes.probe_depths([3, 3], 3) == [3]


def test_a_plan_after_a_calibration_knows_every_time_and_every_memory(
    tmp_path: Path, timed: list[Job]
) -> None:
    recipe = load_recipe(
        "quickstart", {("launch", "runs_at_once"): 2, ("launch", "checkpoint_seconds"): 60.0}
    )
    plan = planned(tmp_path, recipe)
    found = probe(plan, tmp_path)
    assert [job.name for job in timed].count("timing var depth 1") == 2, "every place is taken"
    assert len(timed) == 2 + 3 * 2
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    speed_store.replace_all(found.speeds)
    after = planned(tmp_path, recipe)
    assert after.seconds is not None
    for row, config, estimate in zip(after.runs, after.configs, after.estimates[2:], strict=True):
        assert estimate is not None
        training, images = row.flops / 1e9, len(config.eval_steps) * 512
        evaluating = forward_flops(config.model) * images / 2e9
        beside = row.seconds - training - evaluating - 0.5 * (training // 60)  # type: ignore[operator]
        assert 0 <= beside < 20, "the start of a python"
        assert estimate.measured == (row.depth in (1, 2, 5))
        assert row.memory_measured
    assert after.runs[0].memory_per_process == RUN["peak_memory"]
    growth = [row.memory_per_process - calibration.closed_memory(c, LAPTOP, recipe.launch)
              for row, c in zip(after.runs, after.configs, strict=True)]  # fmt: skip
    assert growth == sorted(growth, reverse=True), "between depths that lacked less and less"


def test_what_a_killed_calibration_left_goes_and_a_live_one_stays(tmp_path: Path, timed: list[Job]) -> None:
    plan = planned(tmp_path)
    live, dead = RunFolder(tmp_path / ".calibration-live"), RunFolder(tmp_path / ".calibration-dead")
    for folder in (live, dead):
        with folder.lock():
            (folder.path / "checkpoint").write_text("x")
    with live.lock():
        probe(plan, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [live.name]
        assert (live.path / "checkpoint").exists()


def test_what_a_tokenizer_needs_beside_its_steps_is_counted(tmp_path: Path, timed: list[Job]) -> None:
    plan = planned(tmp_path)
    found = probe(plan, tmp_path)
    (tokenizer,) = [s for s in found.speeds if isinstance(s, ImageSpeed) and s.job == "tokenizer"]
    (tokens,) = [s for s in found.speeds if isinstance(s, ImageSpeed) and s.job == "tokens"]
    # 600 steps, an evaluation and a checkpoint every 200: the first evaluation after 100 steps of none.
    assert tokenizer.other_seconds == pytest.approx(1000 + 300 + 3 * 200 + 3 * 100, abs=20)
    assert tokens.other_seconds == pytest.approx(500, abs=20), "each has the start of its own job"
    assert (tokenizer.images_per_second, tokens.images_per_second) == (50.0, 200.0)


def test_a_calibration_replaces_what_other_days_left_at_any_depth(tmp_path: Path, timed: list[Job]) -> None:
    plan = planned(tmp_path)
    speed_store.add(speed_of(plan, 4, 1e12, 1.0))
    speed_store.add(dataclasses.replace(speed_of(plan, 4, 1e12, 1.0), device="another"))
    speed_store.replace_all(probe(plan, tmp_path).speeds)
    runs = speed_store.load().runs
    assert {r.depth for r in runs if r.device == LAPTOP.name} == {1, 2, 5}
    assert [r.depth for r in runs if r.device == "another"] == [4]


def test_a_probe_that_fails_is_told_and_the_others_count(
    tmp_path: Path, timed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = probes._job

    def failing(what: Any, name: str, *args: Any) -> Job:
        job = fine(what, name, *args)
        broken = (sys.executable, "-c", "import sys; print('no memory left'); sys.exit(1)")
        return dataclasses.replace(job, command=broken) if name.endswith("depth 5") else job

    monkeypatch.setattr(probes, "_job", failing)
    found = probe(planned(tmp_path), tmp_path)
    assert {s.depth for s in found.speeds if isinstance(s, RunSpeed)} == {1, 2}
    assert any("var depth 5" in note and "no memory left" in note for note in found.notes)


def test_a_tokenizer_that_could_not_be_timed_is_told_once(
    tmp_path: Path, timed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever became of the probes of runs, which come after it."""
    fine = probes._job

    def failing(what: Any, name: str, *args: Any) -> Job:
        job = fine(what, name, *args)
        broken = (sys.executable, "-c", f"import sys; print('{what} broke'); sys.exit(1)")
        return (
            job if what == "tokens" or name.endswith("depth 1") else dataclasses.replace(job, command=broken)
        )

    monkeypatch.setattr(probes, "_job", failing)
    plan = planned(tmp_path, load_recipe("quickstart", {("launch", "runs_at_once"): 1}))
    found = probe(plan, tmp_path)
    assert [s.job for s in found.speeds if isinstance(s, ImageSpeed)] == ["tokens"]
    for what, times in (("tokenizer broke", 1), ("run broke", 2)):
        assert sum(what in note for note in found.notes) == times, found.notes


def test_a_probe_that_hangs_is_ended(
    tmp_path: Path, timed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = probes._job

    def hanging(what: Any, name: str, *args: Any) -> Job:
        job = fine(what, name, *args)
        still = (sys.executable, "-c", "import time; time.sleep(600)")
        return dataclasses.replace(job, command=still) if what == "tokenizer" else job

    monkeypatch.setattr(probes, "_job", hanging)
    plan = planned(tmp_path, load_recipe("quickstart", {("launch", "hang_seconds"): 8.0}))
    found = probe(plan, tmp_path)
    assert {s.depth for s in found.speeds if isinstance(s, RunSpeed)} == {1, 2, 5}
    (note,) = found.notes
    assert "tokenizer" in note or "timing tok" in note
    assert "no progress" in note


def test_depths_that_do_not_fit_are_not_tried(tmp_path: Path, timed: list[Job]) -> None:
    plan = planned(tmp_path, load_recipe("quickstart", {("launch", "runs_at_once"): 1}))
    closed = [calibration.closed_memory(c, LAPTOP, plan.recipe.launch) for c in plan.configs]
    small = dataclasses.replace(
        LAPTOP, memory=int((closed[3] + probes.PROCESS_BYTES) / probes.MEMORY_SHARE) + 1
    )
    found = probe(plan, tmp_path, small)
    assert {s.depth for s in found.speeds if isinstance(s, RunSpeed)} == {1, 2, 4}
    assert found.notes == ("var depth 5: not timed, it does not fit into this machine's memory",)
    with pytest.raises(ConfigError, match="no depth of the recipe fits"):
        probe(plan, tmp_path, dataclasses.replace(LAPTOP, memory=2**20))


def test_sharing_is_timed_on_gpus_for_as_long_as_it_gains(tmp_path: Path, timed: list[Job]) -> None:
    gpu = Machine("a GPU", 8, 2**36, ("0",), 80 * 10**9)
    plan = planned(tmp_path, load_recipe("quickstart", {("seeds",): [0, 1]}), gpu)
    asked: list[int] = []

    def better(speeds: Any, number: int) -> bool:
        asked.append(number)
        return number == 2

    found = probe(plan, tmp_path, gpu, better=better)
    numbers = [s.runs_per_gpu for s in found.speeds if isinstance(s, RunSpeed)]
    assert numbers == [1] * 3 + [2] * 3 + [4] * 3
    assert asked == [2, 4], "four gained nothing over two, so eight are not tried"
    fixed = planned(tmp_path, load_recipe("quickstart", {("launch", "runs_per_gpu"): 1}), gpu)
    assert {s.runs_per_gpu for s in probe(fixed, tmp_path, gpu).speeds if isinstance(s, RunSpeed)} == {1}


def test_measured_sharing_decides_the_places_and_a_number_in_the_recipe_wins(tmp_path: Path) -> None:
    gpu = Machine("a GPU", 8, 2**36, ("0",), 80 * 10**9)
    first = planned(tmp_path, machine=gpu)
    assert len(first.allotment.slots) == 1
    alone = dataclasses.replace(speed_of(first, 3, 1e12, 0.0), device="a GPU", threads=8)
    speed_store.add(alone)
    speed_store.add(dataclasses.replace(alone, runs_per_gpu=2, threads=4, flops_per_second=0.9e12))
    assert planned(tmp_path, machine=gpu).allotment.slots == (("0",), ("0",))
    one = load_recipe("quickstart", {("launch", "runs_per_gpu"): 1})
    assert planned(tmp_path, one, gpu).allotment.slots == (("0",),)
    speed_store.add(dataclasses.replace(alone, runs_per_gpu=2, threads=4, flops_per_second=0.5e12))
    assert planned(tmp_path, machine=gpu).allotment.slots == (("0",),), "nothing gained"


def test_a_busy_machine_is_told_and_a_quiet_one_is_not(
    tmp_path: Path, timed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("quickstart", {("launch", "runs_at_once"): 1})
    plan = planned(tmp_path, recipe)

    def told() -> list[str]:
        speed_store.replace_all(probe(plan, tmp_path).speeds)
        (note,) = [n for n in plan_notes(planned(tmp_path, recipe)) if n.startswith("time: ")]
        return [line.strip() for line in note.splitlines() if "busy" in line]

    assert told() == []
    monkeypatch.setitem(ANSWERS, "run", RUN | {"waited": 0.09})
    assert told() == []
    monkeypatch.setitem(ANSWERS, "run", RUN | {"waited": 0.34})
    (line,) = told()
    assert line.startswith("calibrated while the machine was busy: other programs had its cores 34% of")
    for job, config in zip(plan.run_jobs, plan.configs, strict=True):  # a run that finishes tells anew
        job.folder.append({"kind": "train", "step": 10, "images_per_second": 100.0})
        speed = calibration.measure_run(job.folder, config, LAPTOP, plan.allotment, recipe.launch, 200.0)
        assert speed is not None
        speed_store.add(dataclasses.replace(speed, points=50))
    (note,) = [n for n in plan_notes(planned(tmp_path, recipe)) if n.startswith("time: ")]
    assert "busy" not in note


def test_several_machines_are_not_calibrated(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", {("launch", "machines"): 2, ("launch", "main_address"): "host"})
    with pytest.raises(ConfigError, match="times one machine"):
        probe(planned(tmp_path, recipe), tmp_path)


def test_a_finished_runs_own_account_tells_evaluation_from_training(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    folder, config = plan.jobs[2].folder, plan.configs[0]
    folder.append({"kind": "train", "step": 10, "images_per_second": 100.0})
    folder.set_status("done", seconds={"train": 150.0, "evaluation": 20.0}, peak_memory=5 * 10**8)
    speed = calibration.measure_run(folder, config, LAPTOP, plan.allotment, plan.recipe.launch, 200.0)
    assert speed is not None
    assert speed.evaluation_flops_per_second == pytest.approx(calibration.evaluation_flops(config) / 20)
    training = spent(config, config.total_steps).flops / speed.flops_per_second
    assert speed.other_seconds == pytest.approx(200 - 20 - training)
    speed_store.add(speed)
    again = planned(tmp_path)
    assert again.runs[0].seconds == pytest.approx(200.0)
    assert again.runs[0].memory == 5 * 10**8
