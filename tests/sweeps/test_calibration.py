"""Times of a plan: from speeds that belong to the machine, and marked where they are not of the same kind."""

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling import flops
from scaling.config import LaunchConfig, RunConfig, to_dict
from scaling.records import RecordsError
from sweeps import calibration, speed_store
from sweeps.calibration import ImageSpeed, RunSpeed
from sweeps.machine import Allotment, Machine
from sweeps.packing import makespan
from sweeps.plan import Plan, stage_of
from sweeps.recipe import load_recipe
from sweeps.tables import duration, plan_notes
from tests.sweeps.test_plan import LAPTOP, planned, printed


def speed_of(plan: Plan, depth: int, flops_per_second: float, other: float, seq_len: int = 30) -> RunSpeed:
    """A finished run on the plan's machine, as the plan would start it."""
    return RunSpeed(
        plan.machine.name, plan.allotment.threads, 1, 1, "fp32", depth, seq_len, flops_per_second, other, 9,
        calibration.run_settings(plan.configs[0], plan.allotment, plan.recipe.launch),
    )  # fmt: skip


def stage_speed(plan: Plan, job: Literal["tokenizer", "tokens"], images_per_second: float) -> ImageSpeed:
    stage = stage_of(plan.jobs[0])
    shape = calibration.image_shape(stage)
    settings = calibration.image_settings(job, stage, plan.recipe.launch)
    return ImageSpeed(job, plan.machine.name, 4, 1, "fp32", shape, images_per_second, 0.0, 9, settings)


def time_note(plan: Plan) -> str:
    (note,) = [n for n in plan_notes(plan) if n.startswith("time: ")]
    return note


def work(config: RunConfig) -> float:
    """FLOPs of a run's training and evaluations."""
    return flops.spent(config, config.total_steps).flops + calibration.evaluation_flops(config)


def test_without_a_measurement_no_time_is_told_and_the_note_says_for_what(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert plan.seconds is plan.seconds_sum is None
    assert [r.seconds for r in plan.runs] == [None] * 5
    assert "- tokenizer, tokens: nothing of this shape was measured on this machine" in time_note(plan)
    missing = "no run was measured with 1 process of 1 thread in fp32"
    assert f"- depths 1, 2, 3, 4, 5: {missing}" in time_note(plan)
    assert max(map(len, time_note(plan).splitlines())) <= 80, "read at a glance, in any terminal"


def test_speeds_belong_to_the_machine_whatever_the_root(tmp_path: Path) -> None:
    plan = planned(tmp_path / "one")
    speed_store.add(speed_of(plan, 4, 1e11, 7.0))
    assert planned(tmp_path / "two").runs[3].seconds == planned(tmp_path / "one").runs[3].seconds is not None
    assert list(tmp_path.iterdir()) == [], "nothing is written below a root"


def test_speeds_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARSCALE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert speed_store.speeds_file() == tmp_path / "here" / "calibration.json"
    monkeypatch.delenv("VARSCALE_CACHE")
    assert speed_store.speeds_file() == tmp_path / "xdg" / "varscale" / "calibration.json"
    for none in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert speed_store.speeds_file() == tmp_path / "home" / ".cache" / "varscale" / "calibration.json"


def test_only_speeds_of_the_same_device_threads_processes_and_precision_count(tmp_path: Path) -> None:
    first = planned(tmp_path)
    good = speed_of(first, 3, 1e11, 7.0)
    for other in (
        {"device": "another"},
        {"threads": good.threads + 1},
        {"processes": 2},
        {"machines": 2},
        {"precision": "bf16"},
    ):
        speed_store.add(dataclasses.replace(good, **other))
    assert planned(tmp_path).runs[2].seconds is None
    speed_store.add(good)
    assert planned(tmp_path).runs[2].seconds is not None


def test_a_depth_that_finished_gives_its_own_time_and_the_others_are_told_by_their_flops(
    tmp_path: Path,
) -> None:
    first = planned(tmp_path)
    works = [work(config) for config in first.configs]
    trained = first.configs[0].total_steps * 64
    assert works[0] == pytest.approx(first.runs[0].flops * (1 + 12 * 512 / 3 / trained))
    speed_store.add(speed_of(first, 2, 1e9, 3.0))
    speed_store.add(speed_of(first, 4, 1e11, 7.0))
    speed_store.add(speed_of(first, 3, 1.0, 1.0, seq_len=680))  # far from 30 tokens: not used
    speed_store.add(stage_speed(first, "tokenizer", 100.0))
    speed_store.add(stage_speed(first, "tokens", 1000.0))
    plan = planned(tmp_path)
    seconds = [r.seconds for r in plan.runs]
    assert seconds[1] == pytest.approx(works[1] / 1e9 + 3)
    assert seconds[3] == pytest.approx(works[3] / 1e11 + 7)
    assert seconds[0] == pytest.approx(works[0] / 1e9 + 3), "the nearest depth's speed"
    assert seconds[4] == pytest.approx(works[4] / 1e11 + 7)
    between = 1e9 ** (1 - math.log2(1.5)) * 1e11 ** math.log2(1.5)
    assert seconds[2] == pytest.approx(works[2] / between + 3 + 4 * math.log2(1.5))
    assert [found and found.measured for found in plan.estimates] == [
        True,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    note = time_note(plan)
    assert [line.strip() for line in note.splitlines()[1:]] == [
        "depths 2, 4: as last measured on this machine",
        "~ depths 1, 3, 5: by FLOPs, at the speed of depths 2, 4",
    ]
    stage = plan.recipe.tokenizer_train
    assert plan.jobs[0].seconds == pytest.approx(stage.steps * stage.batch / 100)
    assert plan.jobs[1].seconds == pytest.approx((plan.data.train_images + plan.data.val_images) / 1000)


def test_the_sum_and_the_time_on_the_clock_are_both_told(tmp_path: Path) -> None:
    first = planned(tmp_path)
    speed_store.add(speed_of(first, 4, 1e11, 7.0))
    speed_store.add(stage_speed(first, "tokenizer", 100.0))
    speed_store.add(stage_speed(first, "tokens", 1000.0))
    plan = planned(tmp_path)
    stages = plan.jobs[0].seconds + plan.jobs[1].seconds
    runs = sorted((r.seconds for r in plan.runs), reverse=True)
    assert plan.seconds_sum == pytest.approx(stages + sum(runs))
    assert plan.seconds == pytest.approx(stages + makespan(runs, 4))
    assert plan.seconds < plan.seconds_sum
    shown = printed(plan)
    rows = {line[:24].strip(): line for line in shown.splitlines()}
    assert f" {duration(plan.seconds_sum)} " in rows["to do: 5 of 5 runs"]
    assert f" {duration(plan.seconds)} " in rows["wall time, 4 at once"]
    total = plan.to_json()["total"]
    assert (total["seconds_to_do_sum"], total["seconds_to_do"]) == (plan.seconds_sum, plan.seconds)
    assert plan.to_json()["runs"][4]["seconds_from"] == {
        "seconds": plan.runs[4].seconds, "depths": [4], "measured": False, "same_settings": True,
        "waited": 0.0,
    }  # fmt: skip


def test_estimated_times_are_marked_in_the_table(tmp_path: Path) -> None:
    first = planned(tmp_path)
    speed_store.add(speed_of(first, 4, 1e11, 700.0))
    lines = {line.split()[0]: line for line in printed(planned(tmp_path)).splitlines() if "var-d" in line}
    marked = {name.split("-")[1]: "~" in line for name, line in lines.items()}
    assert marked == {"d1": True, "d2": True, "d3": True, "d4": False, "d5": True}


@given(
    speeds=st.dictionaries(st.integers(1, 12), st.floats(1e6, 1e15), min_size=1, max_size=4),
    depth=st.integers(1, 40),
)
def test_an_estimate_lies_between_those_of_its_neighbours(speeds: dict[int, float], depth: int) -> None:
    recipe = dataclasses.replace(load_recipe("quickstart"), depths=(depth,))
    (run,) = recipe.runs(dataclasses.replace(recipe.data, num_classes=9))
    allotment = Allotment(((),), 1)
    settings = calibration.run_settings(run, allotment, LaunchConfig())
    known = calibration.Calibration(
        tuple(RunSpeed("x", 1, 1, 1, "fp32", d, 30, speed, 0.0, 9, settings) for d, speed in speeds.items())
    )
    found = known.run(run, Machine("x", 1, 1, ()), allotment, LaunchConfig())
    assert found is not None
    speed = work(run) / found.seconds
    used = [speeds[d] for d in found.depths]
    assert min(used) * (1 - 1e-9) <= speed <= max(used) * (1 + 1e-9)
    assert found.measured == (depth in speeds)
    assert set(found.depths) <= speeds.keys()


def test_a_newer_measurement_replaces_the_older_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    speed = speed_of(planned(tmp_path), 4, 1e11, 7.0)
    speed_store.add(speed)
    speed_store.add(dataclasses.replace(speed, flops_per_second=2e11))
    assert [r.flops_per_second for r in speed_store.load().runs] == [2e11]
    speed_store.speeds_file().write_text('{"rums": []}')
    with pytest.raises(RecordsError, match=r"calibration\.json.*did you mean 'runs'.*remove the file"):
        planned(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {("train", "batch"): 4},
        {("launch", "compile"): True},
        {("launch", "attention"): "blockwise"},
        {("launch", "recompute_activations"): True},
        {("launch", "shard"): True},
        {("launch", "micro_batch"): 1},
        {("launch", "runs_at_once"): 2, ("launch", "threads"): 1},
    ],
)
def test_a_speed_under_other_settings_is_marked(
    tmp_path: Path, changed: dict[tuple[str, ...], object]
) -> None:
    first = planned(tmp_path)
    speed_store.add(speed_of(first, 4, 1e11, 7.0))
    plan = planned(tmp_path, load_recipe("quickstart", changed))
    found = plan.estimates[5]
    assert found is not None
    assert (found.depths, found.measured, found.same_settings) == ((4,), False, False)
    assert "~ depths 1, 2, 3, 4, 5: from runs with another batch" in time_note(plan)
    own = calibration.run_settings(plan.configs[0], plan.allotment, plan.recipe.launch)
    speed_store.add(dataclasses.replace(speed_of(plan, 4, 1e11, 7.0), settings=own))
    again = planned(tmp_path, plan.recipe).estimates[5]
    assert again is not None
    assert again.measured


def test_a_tokenizer_with_other_losses_or_batch_is_told_with_a_mark(tmp_path: Path) -> None:
    speed_store.add(stage_speed(planned(tmp_path), "tokenizer", 100.0))
    assert planned(tmp_path).estimates[0].measured  # type: ignore[union-attr]
    lpips = {("tokenizer_train", "lpips_weights"): "/x", ("tokenizer_train", "lpips_sha256"): "0" * 64}
    for changed in (lpips, {("tokenizer_train", "adversarial", "weight"): 0.1},
                    {("tokenizer_train", "batch"): 8}, {("launch", "micro_batch"): 1}):  # fmt: skip
        plan = planned(tmp_path, load_recipe("quickstart", changed))
        assert plan.estimates[0] is not None
        assert not plan.estimates[0].measured
        assert "~ tokenizer: from one with another batch or other losses" in time_note(plan)


def test_a_short_run_replaces_no_better_speed(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    for speed in (speed_of(plan, 4, 1e11, 7.0), stage_speed(plan, "tokenizer", 100.0)):

        def kept(points: int, rate: float, speed: RunSpeed | ImageSpeed = speed) -> bool:
            name = "flops_per_second" if isinstance(speed, RunSpeed) else "images_per_second"
            speed_store.add(dataclasses.replace(speed, points=points, **{name: rate}))  # type: ignore[arg-type]
            known = speed_store.load()
            entries = known.runs if isinstance(speed, RunSpeed) else known.images
            return [getattr(e, name) for e in entries] == [rate]

        assert kept(1, 1.0), "better than nothing"
        assert kept(1, 2.0)
        assert kept(4, 3.0)
        assert not kept(3, 4.0)
        assert kept(60, 5.0)
        assert kept(5, 6.0), "enough"
        assert not kept(4, 7.0)


def test_speeds_from_before_settings_were_kept_are_used_with_a_mark(tmp_path: Path) -> None:
    speed = to_dict(speed_of(planned(tmp_path), 4, 1e11, 7.0))
    del speed["points"], speed["settings"]
    speed_store.speeds_file().write_text(json.dumps({"runs": [speed], "images": []}))
    found = planned(tmp_path).estimates[5]
    assert found is not None
    assert not found.measured


def test_a_tokenizers_start_is_told_apart_from_its_speed(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    stage, job = stage_of(plan.jobs[0]), plan.jobs[0]

    def measured(seconds: float) -> ImageSpeed | None:
        return calibration.measure_images("tokenizer", job.folder, stage, LAPTOP, 4, LaunchConfig(), seconds)

    assert measured(10.0) is None, "nothing logged"
    for step, speed in ((20, 50.0), (40, 1000.0), (60, 1000.0), (80, None)):
        job.folder.append({"kind": "train", "step": step, "images_per_second": speed})
    images = stage.train.steps * stage.train.batch
    found = measured(images / 1000 + 12)
    assert found is not None
    assert (found.images_per_second, found.other_seconds, found.points) == (1000.0, pytest.approx(12), 3)
    speed_store.add(found)
    longer = {("tokenizer_train", "steps"): 10 * stage.train.steps}
    assert planned(tmp_path, load_recipe("quickstart", longer)).jobs[0].seconds == pytest.approx(
        10 * images / 1000 + 12
    )


def test_a_token_jobs_speed_is_the_one_it_told(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    folder, images = plan.jobs[1].folder, calibration.cached_images(plan.data)
    folder.set_status("done", images_per_second=500.0)
    found = calibration.measure_images(
        "tokens", folder, stage_of(plan.jobs[1]), LAPTOP, 4, LaunchConfig(), images / 500 + 9
    )
    assert found is not None
    assert (found.images_per_second, found.other_seconds) == (500.0, pytest.approx(9))


def test_a_token_job_of_several_views_is_told_by_its_sequences(tmp_path: Path) -> None:
    plan = planned(tmp_path, load_recipe("quickstart", {("data", "views"): 4}))
    folder, stage = plan.jobs[1].folder, stage_of(plan.jobs[1])
    images = (stage.data.train_images or 0) + (stage.data.val_images or 0)
    folder.set_status("done", images_per_second=500.0)
    found = calibration.measure_images("tokens", folder, stage, LAPTOP, 4, LaunchConfig(), images / 500 + 9)
    assert found is not None
    assert found.other_seconds == pytest.approx(9)
    speed_store.add(found)
    again = planned(tmp_path, load_recipe("quickstart", {("data", "views"): 4}))
    assert again.jobs[1].seconds == pytest.approx(images / 500 + 9)


def test_launchers_that_end_at_once_keep_each_others_speeds(tmp_path: Path) -> None:
    speed = speed_of(planned(tmp_path), 1, 1e11, 7.0)
    speeds = [dataclasses.replace(speed, depth=depth) for depth in range(1, 17)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(speed_store.add, speeds))
    assert {r.depth for r in speed_store.load().runs} == set(range(1, 17))


def test_a_finished_run_gives_its_speed(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    folder, config = plan.jobs[2].folder, plan.configs[0]
    for step, speed in ((10, 50.0), (20, 100.0), (30, 100.0)):
        folder.append({"kind": "train", "step": step, "images_per_second": speed})
    measured = calibration.measure_run(folder, config, LAPTOP, plan.allotment, LaunchConfig(), seconds=250.0)
    assert measured is not None
    assert measured.flops_per_second == pytest.approx(100 * flops.train_flops(config.model))
    assert measured.other_seconds == pytest.approx(250 - (config.total_steps * 64 + 12 * 512 / 3) / 100)
    speed_store.add(measured)
    assert planned(tmp_path).runs[0].seconds == pytest.approx(250)
