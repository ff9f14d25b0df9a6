"""Plans: pure functions of recipe, machine and disk; folders are made, checked and never mixed up."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling import flops
from scaling.config import ConfigError, DataConfig, LaunchConfig, to_dict
from scaling.records import RecordsError, RunFolder, read_json
from sweeps import calibration
from sweeps.jobs import command
from sweeps.machine import MEMORY_SHARE, PROCESS_BYTES, Machine, allot
from sweeps.plan import Plan, make_plan, makespan
from sweeps.recipe import Recipe, load_recipe
from sweeps.tables import duration, number, size

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


def test_without_a_measurement_no_time_is_told(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert plan.seconds is None
    assert [r.seconds for r in plan.runs] == [None] * 5


def test_times_come_from_the_nearest_depth_measured_on_the_same_device(tmp_path: Path) -> None:
    first = planned(tmp_path)
    threads = first.allotment.threads
    near = calibration.RunSpeed("a laptop", threads, 1, "fp32", 4, 30, 1e11, 7.0)
    for speed in (
        near,
        dataclasses.replace(near, depth=1, flops_per_second=1e9, other_seconds=3.0),
        dataclasses.replace(near, device="another", depth=5, flops_per_second=1.0),
        dataclasses.replace(near, threads=threads + 1, depth=5, flops_per_second=1.0),
        calibration.ImageSpeed(
            "tokenizer", "a laptop", 4, calibration.image_shape(first.tokenizer_run), 100.0
        ),
        calibration.ImageSpeed("tokens", "a laptop", 4, calibration.image_shape(first.tokenizer_run), 1000.0),
    ):
        calibration.add(tmp_path, speed)
    plan = planned(tmp_path)
    assert plan.runs[4].seconds == pytest.approx(plan.runs[4].flops / 1e11 + 7)
    assert plan.runs[1].seconds == pytest.approx(plan.runs[1].flops / 1e9 + 3)
    stage = plan.recipe.tokenizer_train
    assert plan.jobs[0].seconds == pytest.approx(stage.steps * stage.batch / 100)
    assert plan.jobs[1].seconds == pytest.approx((plan.data.train_images + plan.data.val_images) / 1000)
    runs = sorted((r.seconds or 0 for r in plan.runs), reverse=True)
    assert plan.seconds == pytest.approx(plan.jobs[0].seconds + plan.jobs[1].seconds + makespan(runs, 4))


def test_a_newer_measurement_replaces_the_older_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    speed = calibration.RunSpeed("a laptop", 1, 1, "bf16", 4, 30, 1e11, 7.0)
    calibration.add(tmp_path, speed)
    calibration.add(tmp_path, dataclasses.replace(speed, flops_per_second=2e11))
    assert [r.flops_per_second for r in calibration.load(tmp_path).runs] == [2e11]
    (tmp_path / "calibration.json").write_text('{"rums": []}')
    with pytest.raises(RecordsError, match=r"calibration\.json.*did you mean 'runs'.*remove the file"):
        planned(tmp_path)


def test_a_finished_run_gives_its_speed(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    folder, config = plan.jobs[2].folder, plan.configs[0]
    for step, speed in ((10, 50.0), (20, 100.0), (30, 100.0)):
        folder.append({"kind": "train", "step": step, "images_per_second": speed})
    measured = calibration.measure_run(folder, config, LAPTOP, plan.allotment, 1, seconds=250.0)
    assert measured is not None
    assert measured.flops_per_second == pytest.approx(100 * flops.train_flops(config.model))
    assert measured.other_seconds == pytest.approx(250 - config.total_steps * 64 / 100)
    calibration.add(tmp_path, measured)
    assert planned(tmp_path).runs[0].seconds == pytest.approx(250)


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
