"""Plans: pure functions of recipe, machine and disk; folders are made, checked and never mixed up."""

import dataclasses
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from scaling import flops
from scaling.config import ConfigError, DataConfig, LaunchConfig, to_dict
from scaling.records import RecordsError, RunFolder, read_json
from sweeps import calibration
from sweeps.calibration import ImageSpeed, RunSpeed
from sweeps.jobs import command
from sweeps.machine import MEMORY_SHARE, PROCESS_BYTES, Allotment, Machine, allot
from sweeps.plan import Plan, make_plan, makespan
from sweeps.recipe import Recipe, load_recipe
from sweeps.tables import duration, number, plan_notes, plan_table, size

LAPTOP = Machine("a laptop", cores=4, memory=16 * 2**30, gpus=())
NODE = Machine("a node", cores=64, memory=2**40, gpus=("0", "1", "2", "3"))


def planned(root: Path, recipe: Recipe | None = None, machine: Machine = LAPTOP) -> Plan:
    recipe = recipe or load_recipe("quickstart")
    data = dataclasses.replace(recipe.data, num_classes=recipe.data.num_classes or 9)
    return make_plan(recipe, data, root, machine)


def finish(plan: Plan, index: int) -> None:
    """Leave what the job would have left."""
    job = plan.jobs[index]
    (job.folder.path / job.product).parent.mkdir(parents=True, exist_ok=True)
    (job.folder.path / job.product).write_text("")
    job.folder.set_status("done")


def test_the_numbers_are_those_of_the_closed_forms(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert [r.depth for r in plan.runs] == [1, 2, 3, 4, 5]
    for row, config in zip(plan.runs, plan.configs, strict=True):
        assert row.params == flops.params(config.model) == 73728 * row.depth**3
        assert row.flops == flops.train_flops(config.model) * 64 * config.total_steps
        assert row.tokens == config.total_steps * 64 * 30
        assert row.epochs == config.total_steps * 64 / config.data.train_images
        assert row.state == "waiting"
    assert plan.runs[-1].params / plan.runs[0].params >= 100


def test_a_plan_is_the_same_every_time_and_survives_json(tmp_path: Path) -> None:
    one, two = planned(tmp_path).to_json(), planned(tmp_path).to_json()
    assert json.loads(json.dumps(one)) == json.loads(json.dumps(two)) == one


def test_what_is_done_is_no_longer_to_do(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    expected_disk = plan.disk - plan.cache_bytes - plan.runs[4].disk
    finish(plan, 1)
    finish(plan, 6)
    after = planned(tmp_path)
    assert [j.state for j in after.jobs] == ["waiting", "done", *["waiting"] * 4, "done"]
    total = after.to_json()["total"]
    assert total["flops_to_do"] == sum(r.flops for r in after.runs[:4])
    assert total["disk_to_do"] == expected_disk


def test_sweep_json_lists_the_runs_and_points_to_tokenizer_and_tokens(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    plan.write()  # the same again is no conflict
    sweep = read_json(tmp_path / "quickstart" / "sweep.json")
    assert sweep["runs"] == [c.run_id for c in plan.configs]
    for key in ("tokenizer", "tokens"):
        assert (tmp_path / "quickstart" / sweep[key] / "config.json").exists()
    assert RunFolder(tmp_path / "quickstart" / sweep["runs"][0]).config() == to_dict(plan.configs[0])
    assert sweep["recipe"]["data"]["num_classes"] == 9


def test_a_folder_of_another_config_is_refused_before_anything_starts(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    file = plan.jobs[3].folder.path / "config.json"
    other = to_dict(plan.configs[1])
    other["train"]["batch"] = 1
    file.write_text(json.dumps(other))
    with pytest.raises(RecordsError, match="another config"):
        plan.write()
    file.write_text(json.dumps({"a": "folder of something else"}))
    with pytest.raises(RecordsError, match=r"config\.json.*unknown key 'a'"):
        plan.write()


def test_data_that_was_moved_is_the_same_data(tmp_path: Path) -> None:
    recipe = load_recipe("cifar10")
    before = make_plan(recipe, dataclasses.replace(recipe.data, path="here"), tmp_path, LAPTOP)
    before.write()
    after = make_plan(recipe, dataclasses.replace(recipe.data, path="there"), tmp_path, LAPTOP)
    after.write()
    assert [j.folder.path for j in before.jobs] == [j.folder.path for j in after.jobs]
    assert after.jobs[2].folder.config()["data"]["path"] == str(Path("there").absolute())


def test_runs_of_a_plan_share_one_tokenizer_whatever_the_sweep(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart")
    other = dataclasses.replace(recipe, name="other", train=dataclasses.replace(recipe.train, lr=1e-3))
    one, two = planned(tmp_path, recipe), planned(tmp_path, other)
    assert [j.folder.path for j in one.jobs[:2]] == [j.folder.path for j in two.jobs[:2]]
    assert not {j.folder.name for j in one.jobs[2:]} & {j.folder.name for j in two.jobs[2:]}


# -- the machine ---------------------------------------------------------------------------------


@given(
    cores=st.integers(1, 64),
    memory=st.integers(2**30, 2**38),
    needs=st.lists(st.integers(0, 2**34), min_size=1, max_size=8),
)
def test_runs_at_once_fit_into_cores_and_memory(cores: int, memory: int, needs: list[int]) -> None:
    allotment = allot(Machine("", cores, memory, ()), LaunchConfig(), needs)
    count = len(allotment.slots)
    assert 1 <= count <= min(cores, len(needs))
    assert allotment.threads * count <= cores
    if count > 1:
        largest = sorted(needs, reverse=True)[:count]
        assert sum(largest) + count * PROCESS_BYTES <= MEMORY_SHARE * memory


def test_gpus_are_dealt_out_whole_and_shared_only_when_asked() -> None:
    needs = [1] * 8
    assert allot(NODE, LaunchConfig(), needs).slots == (("0",), ("1",), ("2",), ("3",))
    assert allot(NODE, LaunchConfig(processes=2), needs).slots == (("0", "1"), ("2", "3"))
    assert allot(NODE, LaunchConfig(processes=3), needs).slots == (("0", "1", "2"),)
    assert allot(NODE, LaunchConfig(processes=2, runs_at_once=3), needs).slots[2] == ("0", "1")
    assert allot(NODE, LaunchConfig(device="cpu"), needs).slots == ((),) * 8
    with pytest.raises(ConfigError, match=r"launch\.processes is 5, but this machine shows 4 GPUs"):
        allot(NODE, LaunchConfig(processes=5), needs)
    with pytest.raises(ConfigError, match="no GPU"):
        allot(LAPTOP, LaunchConfig(device="cuda"), needs)


def test_threads_do_not_depend_on_what_is_left_to_do(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    for index in range(2, 6):
        finish(plan, index)
    assert planned(tmp_path).allotment == plan.allotment
    assert plan.jobs[2].environment["OMP_NUM_THREADS"] == str(plan.allotment.threads)
    assert plan.jobs[0].environment["OMP_NUM_THREADS"] == "4", "stage 1 has the machine to itself"


def test_several_processes_are_started_through_accelerate() -> None:
    assert command("run", ["folder"], LaunchConfig())[1:] == ("-m", "scaling.trainer", "folder")
    words = command("run", ["folder"], LaunchConfig(processes=2))
    assert words[1:6] == ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    assert "--cpu" not in words
    assert words[-3:] == ("-m", "scaling.trainer", "folder")


# -- time ----------------------------------------------------------------------------------------


def speed_of(plan: Plan, depth: int, flops_per_second: float, other: float, seq_len: int = 30) -> RunSpeed:
    """A finished run on the plan's machine, as the plan would start it."""
    return RunSpeed(
        plan.machine.name, plan.allotment.threads, 1, 1, "fp32", depth, seq_len, flops_per_second, other
    )


def stage_speed(plan: Plan, job: Literal["tokenizer", "tokens"], images_per_second: float) -> ImageSpeed:
    shape = calibration.image_shape(plan.tokenizer_run)
    return ImageSpeed(job, plan.machine.name, 4, 1, "fp32", shape, images_per_second)


def time_note(plan: Plan) -> str:
    return plan_notes(plan)[-1]


def test_without_a_measurement_no_time_is_told_and_the_note_says_for_what(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert plan.seconds is plan.seconds_sum is None
    assert [r.seconds for r in plan.runs] == [None] * 5
    assert "unknown for tokenizer and tokens" in time_note(plan)
    missing = "no run has finished on this machine with 1 process of 1 thread in fp32"
    assert f"unknown for depths 1, 2, 3, 4, 5: {missing}" in time_note(plan)


def test_speeds_belong_to_the_machine_whatever_the_root(tmp_path: Path) -> None:
    plan = planned(tmp_path / "one")
    calibration.add(speed_of(plan, 4, 1e11, 7.0))
    assert planned(tmp_path / "two").runs[3].seconds == planned(tmp_path / "one").runs[3].seconds is not None
    assert list(tmp_path.iterdir()) == [], "nothing is written below a root"


def test_speeds_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARSCALE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert calibration.speeds_file() == tmp_path / "here" / "calibration.json"
    monkeypatch.delenv("VARSCALE_CACHE")
    assert calibration.speeds_file() == tmp_path / "xdg" / "varscale" / "calibration.json"
    for none in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert calibration.speeds_file() == tmp_path / "home" / ".cache" / "varscale" / "calibration.json"


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
        calibration.add(dataclasses.replace(good, **other))
    assert planned(tmp_path).runs[2].seconds is None
    calibration.add(good)
    assert planned(tmp_path).runs[2].seconds is not None


def test_a_depth_that_finished_gives_its_own_time_and_the_others_are_told_by_their_flops(
    tmp_path: Path,
) -> None:
    first = planned(tmp_path)
    work = [calibration.run_flops(config) for config in first.configs]
    assert work[0] == pytest.approx(first.runs[0].flops * (1 + 12 * 512 / 3 / (250 * 64)))
    calibration.add(speed_of(first, 2, 1e9, 3.0))
    calibration.add(speed_of(first, 4, 1e11, 7.0))
    calibration.add(speed_of(first, 3, 1.0, 1.0, seq_len=680))  # far from 30 tokens: not used
    calibration.add(stage_speed(first, "tokenizer", 100.0))
    calibration.add(stage_speed(first, "tokens", 1000.0))
    plan = planned(tmp_path)
    seconds = [r.seconds for r in plan.runs]
    assert seconds[1] == pytest.approx(work[1] / 1e9 + 3)
    assert seconds[3] == pytest.approx(work[3] / 1e11 + 7)
    assert seconds[0] == pytest.approx(work[0] / 1e9 + 3), "the nearest depth's speed"
    assert seconds[4] == pytest.approx(work[4] / 1e11 + 7)
    between = 1e9 ** (1 - math.log2(1.5)) * 1e11 ** math.log2(1.5)
    assert seconds[2] == pytest.approx(work[2] / between + 3 + 4 * math.log2(1.5))
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
    assert "depths 2, 4 at the speed of the last run of that depth finished on this machine" in note
    assert "~ depths 1, 3, 5 by FLOPs, from the speed of 2 finished runs (depths 2, 4)" in note
    assert "unknown" not in note
    stage = plan.recipe.tokenizer_train
    assert plan.jobs[0].seconds == pytest.approx(stage.steps * stage.batch / 100)
    assert plan.jobs[1].seconds == pytest.approx((plan.data.train_images + plan.data.val_images) / 1000)


def test_the_sum_and_the_time_on_the_clock_are_both_told(tmp_path: Path) -> None:
    first = planned(tmp_path)
    calibration.add(speed_of(first, 4, 1e11, 7.0))
    calibration.add(stage_speed(first, "tokenizer", 100.0))
    calibration.add(stage_speed(first, "tokens", 1000.0))
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
        "seconds": plan.runs[4].seconds, "depths": [4], "measured": False
    }  # fmt: skip


def test_estimated_times_are_marked_in_the_table(tmp_path: Path) -> None:
    first = planned(tmp_path)
    calibration.add(speed_of(first, 4, 1e11, 700.0))
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
    known = calibration.Calibration(
        tuple(RunSpeed("x", 1, 1, 1, "fp32", d, 30, speed, 0.0) for d, speed in speeds.items())
    )
    found = known.run(run, Machine("x", 1, 1, ()), allotment, LaunchConfig())
    assert found is not None
    speed = calibration.run_flops(run) / found.seconds
    used = [speeds[d] for d in found.depths]
    assert min(used) * (1 - 1e-9) <= speed <= max(used) * (1 + 1e-9)
    assert found.measured == (depth in speeds)
    assert set(found.depths) <= speeds.keys()


def test_a_newer_measurement_replaces_the_older_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    speed = speed_of(planned(tmp_path), 4, 1e11, 7.0)
    calibration.add(speed)
    calibration.add(dataclasses.replace(speed, flops_per_second=2e11))
    assert [r.flops_per_second for r in calibration.load().runs] == [2e11]
    calibration.speeds_file().write_text('{"rums": []}')
    with pytest.raises(RecordsError, match=r"calibration\.json.*did you mean 'runs'.*remove the file"):
        planned(tmp_path)


def test_launchers_that_end_at_once_keep_each_others_speeds(tmp_path: Path) -> None:
    speed = speed_of(planned(tmp_path), 1, 1e11, 7.0)
    speeds = [dataclasses.replace(speed, depth=depth) for depth in range(1, 17)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(calibration.add, speeds))
    assert {r.depth for r in calibration.load().runs} == set(range(1, 17))


def test_a_finished_run_gives_its_speed(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    folder, config = plan.jobs[2].folder, plan.configs[0]
    for step, speed in ((10, 50.0), (20, 100.0), (30, 100.0)):
        folder.append({"kind": "train", "step": step, "images_per_second": speed})
    measured = calibration.measure_run(folder, config, LAPTOP, plan.allotment, LaunchConfig(), seconds=250.0)
    assert measured is not None
    assert measured.flops_per_second == pytest.approx(100 * flops.train_flops(config.model))
    assert measured.other_seconds == pytest.approx(250 - (config.total_steps * 64 + 12 * 512 / 3) / 100)
    calibration.add(measured)
    assert planned(tmp_path).runs[0].seconds == pytest.approx(250)


# -- the table -----------------------------------------------------------------------------------


def printed(plan: Plan, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(plan_table(plan, width))
    return out.getvalue()


def test_memory_is_told_per_run_and_per_process_when_a_run_has_several(tmp_path: Path) -> None:
    one = planned(tmp_path)
    assert "memory/run" in printed(one)
    assert "memory/process" not in printed(one)
    assert "a run is one process" in "\n".join(plan_notes(one))
    two = planned(tmp_path, load_recipe("quickstart", {("launch", "processes"): 2}))
    for run in two.runs:
        assert run.memory == 2 * run.memory_per_process
    assert "memory/process" in printed(two)
    row = next(line for line in printed(two).splitlines() if "var-d5" in line)
    assert size(two.runs[-1].memory) in row
    assert size(two.runs[-1].memory_per_process) in row
    assert "a run is 2 processes, each with its own copy" in "\n".join(plan_notes(two))


def test_the_classes_of_the_photographs_are_explained(tmp_path: Path) -> None:
    note = plan_notes(planned(tmp_path))[0]
    assert "9 photographs that ship with scikit-image and scikit-learn, class = photograph" in note
    assert "4096 training and 512 validation crops" in note
    recipe = load_recipe("cifar10", {("data", "path"): "x"})
    assert (
        "50000 training and 10000 validation images, 10 classes, 32 px"
        in plan_notes(make_plan(recipe, recipe.data, tmp_path, LAPTOP))[0]
    )


@given(st.lists(st.floats(0, 1e6), max_size=12), st.integers(1, 5))
def test_makespan_is_between_its_bounds(seconds: list[float], places: int) -> None:
    result = makespan(seconds, places)
    assert result >= max([sum(seconds) / places, *seconds]) * (1 - 1e-12)
    assert result <= sum(seconds) * (1 + 1e-12)


def test_numbers_are_written_for_people() -> None:
    assert [number(v) for v in (7, 850.26, 73728, 1.274e8, 2.4e12)] == ["7", "850", "73.7k", "127M", "2.4T"]
    assert [size(v) for v in (10, 2048, 3 * 2**30)] == ["10 B", "2.0 KiB", "3.0 GiB"]
    assert [duration(v) for v in (45, 600, 9000, 864000)] == ["45 s", "10 min", "2.5 h", "10.0 days"]


def test_data_counts_may_be_left_to_the_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.num_classes is not known yet"):
        make_plan(load_recipe("quickstart"), DataConfig(train_images=1, val_images=1), tmp_path, LAPTOP)
