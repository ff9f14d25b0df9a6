"""Plans: pure functions of recipe, machine and disk; folders are made, checked and never mixed up."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from scaling import flops
from scaling.config import ConfigError, DataConfig, LaunchConfig, to_dict
from scaling.records import RecordsError, RunFolder, read_json, write_json
from sweeps import commands, machine
from sweeps.jobs import command
from sweeps.machine import MEMORY_SHARE, PROCESS_BYTES, Machine, allot
from sweeps.packing import makespan
from sweeps.plan import Plan, cache_bytes, make_plan
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


@pytest.mark.parametrize("state", ["done", "interrupted", "failed", "running"])
def test_images_may_be_gone_once_the_tokens_are_there_however_a_check_of_them_ended(
    tmp_path: Path, state: str
) -> None:
    plan = planned(tmp_path)

    def gone(data: DataConfig) -> str:
        raise ConfigError("data.path: nothing there")

    for tokenizer_done, encoded in ((False, True), (True, False), (True, True)):
        stages = zip(plan.stage_jobs, (tokenizer_done, encoded), strict=True)
        for job, there in stages:
            write_json(job.folder.path / job.product, {"complete": there})
            job.folder.set_status("done" if there and job.kind == "tokenizer" else "failed")
        plan.stage_jobs[1].folder.set_status(state if encoded else "interrupted")
        if tokenizer_done and encoded:
            commands.check_images(plan, gone)
        else:
            with pytest.raises(ConfigError, match="nothing there"):
                commands.check_images(plan, gone)


def test_what_is_done_is_no_longer_to_do(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    expected_disk = plan.disk - cache_bytes(plan.jobs[1]) - plan.runs[4].disk
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
    assert [run["run"] for run in sweep["runs"]] == [c.run_id for c in plan.configs]
    for run in sweep["runs"]:
        for key in ("tokenizer", "tokens"):
            assert (tmp_path / "quickstart" / run[key] / "config.json").exists()
    assert RunFolder(tmp_path / "quickstart" / sweep["runs"][0]["run"]).config() == to_dict(plan.configs[0])
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


LISTING = """\
GPU 0: NVIDIA A (UUID: GPU-aaaa-1)
GPU 1: NVIDIA B (UUID: GPU-bbbb-2)
"""
SLICED = """\
GPU 0: NVIDIA A (UUID: GPU-aaaa-1)
  MIG 1g.18gb     Device  0: (UUID: MIG-1111)
  MIG 2g.35gb     Device  1: (UUID: MIG-2222)
"""


@pytest.mark.parametrize(
    ("listing", "visible", "gpus", "name"),
    [
        (LISTING, None, ("0", "1"), "NVIDIA A"),
        (LISTING, "1", ("1",), "NVIDIA B"),
        (LISTING, "1,0", ("1", "0"), "NVIDIA B"),
        (LISTING, "GPU-bbbb", ("GPU-bbbb",), "NVIDIA B"),
        (LISTING, "7", ("7",), "GPU 7"),
        (SLICED, None, ("MIG-1111", "MIG-2222"), "NVIDIA A MIG 1g.18gb"),
        (SLICED, "MIG-2222", ("MIG-2222",), "NVIDIA A MIG 2g.35gb"),
    ],
)
def test_a_machine_is_called_after_the_device_that_is_used(
    monkeypatch: pytest.MonkeyPatch, listing: str, visible: str | None, gpus: tuple[str, ...], name: str
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda program: program)
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listing))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for device in ("auto", "cuda"):
        found = machine.this_machine(device)
        assert (found.gpus, found.name) == (gpus, name)
    cpu = machine.this_machine("cpu")
    assert cpu.gpus == ()
    assert cpu.name == machine._cpu_name()


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
    divided = planned(
        tmp_path, load_recipe("quickstart", {("launch", "processes"): 2, ("launch", "shard"): True})
    )
    assert "a run is 2 processes, each with its part of the model" in "\n".join(plan_notes(divided))
    assert divided.runs[-1].memory < two.runs[-1].memory


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
