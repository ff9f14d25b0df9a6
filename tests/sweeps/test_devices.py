"""Plans for a device that is not here: its peak, its price, its power, and clear refusals."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from scaling import flops
from scaling.config import ConfigError, LaunchConfig
from sweeps.costs import Pricing, rates
from sweeps.devices import DEVICES, find_device, known_device
from sweeps.machine import Machine, allot
from sweeps.plan import Plan, Stated, make_plan
from sweeps.recipe import load_recipe
from sweeps.tables import plan_notes, plan_table
from tests.sweeps.test_plan import LAPTOP

H100 = Stated(DEVICES["h100"], 0.4)


def stated(root: Path, how: Stated = H100, **launch: object) -> Plan:
    changed = {("launch", key): value for key, value in launch.items()}
    recipe = load_recipe("imagenet256", {("data", "path"): "x", **changed})
    return make_plan(recipe, recipe.data, root, LAPTOP, how)


def test_time_on_a_stated_device_is_flops_over_its_share_of_the_peak(tmp_path: Path) -> None:
    plan = stated(tmp_path)
    for row, config in zip(plan.runs, plan.configs, strict=True):
        exact = flops.spent(config, config.total_steps).flops
        processes = plan.recipe.launch.processes
        assert row.flops == exact
        assert row.seconds == pytest.approx(exact / (0.4 * 989.5e12 * processes))
    assert plan.seconds == pytest.approx(plan.seconds_sum), "one run at a time, unless more are asked for"
    assert plan.machine.memory == LAPTOP.memory
    note = next(n for n in plan_notes(plan) if n.startswith("time: "))
    assert "0.4 of h100's dense peak (990TFLOP/s in fp16)" in note


def test_more_runs_at_once_need_more_devices_and_as_many_hours_in_all(tmp_path: Path) -> None:
    one, four = stated(tmp_path), stated(tmp_path, runs_at_once=4)
    assert four.seconds < one.seconds  # type: ignore[operator]
    assert four.device_seconds == pytest.approx(one.device_seconds)
    processes = one.recipe.launch.processes
    assert one.device_seconds == pytest.approx(sum(r.seconds for r in one.runs) * processes)  # type: ignore[misc]


@pytest.mark.parametrize(("gpus", "at_once"), [(1, 1), (2, 3), (2, 4), (3, 2), (4, 7)])
def test_an_hour_of_all_places_is_an_hour_of_every_gpu_in_use(
    tmp_path: Path, gpus: int, at_once: int
) -> None:
    plan = stated(tmp_path, processes=1)
    node = Machine("a node", 64, 2**40, tuple(map(str, range(gpus))))
    shared = dataclasses.replace(plan, allotment=allot(node, LaunchConfig(runs_at_once=at_once), [1] * 9))
    hour = dataclasses.replace(plan.runs[0], seconds=3600.0, seconds_to_do=3600.0)
    used = min(gpus, at_once)
    assert sum(rates(shared, 1.0, False, 1.0).hours(shared, hour) or 0 for _ in range(at_once)) == (
        pytest.approx(used)
    )
    full = dataclasses.replace(shared, runs=(hour,) * at_once, jobs=plan.jobs[:2] + plan.jobs[-1:] * at_once)
    assert full.device_seconds == pytest.approx(3600 * used)


def test_the_stated_machine_is_of_all_machines(tmp_path: Path) -> None:
    """Times and hours are of processes x machines; so is what the plan says it is for."""
    more = {"processes": 8, "machines": 2, "main_address": "host"}
    plan = stated(tmp_path, **more)
    assert "machine: 16 h100, as stated" in plan_notes(plan)
    exact = flops.spent(plan.configs[0], plan.configs[0].total_steps).flops
    assert plan.runs[0].seconds == pytest.approx(exact / (0.4 * 989.5e12 * 16))


def test_price_and_energy_follow_from_the_hours(tmp_path: Path) -> None:
    plan = stated(tmp_path)
    costs = rates(plan, 2.5, energy=True, pue=1.3)
    hours = plan.device_seconds / 3600  # type: ignore[operator]
    told = costs.to_json(plan)
    assert told["to_do"]["gpu_hours"] == pytest.approx(hours)
    assert told["to_do"]["cost"] == pytest.approx(2.5 * hours)
    assert told["to_do"]["kilowatt_hours"] == pytest.approx(0.7 * 1.3 * hours)
    assert sum(told[r.run]["cost"] for r in plan.runs) == pytest.approx(2.5 * hours)
    text = "\n".join(costs.notes(plan))
    assert "700 W, times a PUE of 1.3" in text
    assert "without tokenizer and tokens" in text
    out = io.StringIO()
    Console(file=out, width=240).print(plan_table(plan, 240, costs))
    shown = out.getvalue()
    assert "GPU-hours" in shown
    assert f"{2.5 * hours:,.2f}" in shown


def test_a_cpu_has_no_price_and_an_unknown_gpu_no_power(tmp_path: Path) -> None:
    recipe = load_recipe("cifar10", {("data", "path"): "x"})
    here = make_plan(recipe, recipe.data, tmp_path, LAPTOP)
    for price, energy, word in ((2.5, False, "--price"), (None, True, "--energy")):
        with pytest.raises(ConfigError, match=f"{word} is of GPU-hours.*--device h100 --mfu 0.4"):
            rates(here, price, energy, 1.2)
    with pytest.raises(ConfigError, match="--pue"):
        rates(stated(tmp_path), None, energy=True, pue=0.9)


@pytest.mark.parametrize(
    ("given", "name"),
    [("h100", "h100"), ("H100-SXM", "h100"), ("RTX 4090", "4090"), ("NVIDIA L40S", "l40s"), ("b200", "b200")],
)
def test_a_device_is_found_however_it_is_written(given: str, name: str) -> None:
    assert find_device(given).name == name


def test_an_unknown_device_is_refused_with_what_may_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"--device h10: unknown; did you mean h100"):
        find_device("h10")
    with pytest.raises(ConfigError, match=r"--device toaster: unknown; known: 3090, 4090, a10, a100"):
        find_device("toaster")


def test_drivers_names_are_known_but_not_slices() -> None:
    assert known_device("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert known_device("NVIDIA A100-SXM4-80GB") is DEVICES["a100"]
    assert known_device("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert known_device("AMD EPYC") is None


def test_what_does_not_go_together_is_refused() -> None:
    for pricing, words in (
        (Pricing(device="h100"), "needs --mfu"),
        (Pricing(mfu=0.4), "give --device too"),
        (Pricing(device="h100", mfu=1.4), "above 0 and at most 1, got 1.4"),
        (Pricing(device="h100", mfu=0.0), "above 0 and at most 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            pricing.stated()
    with pytest.raises(ConfigError, match="v100 does not compute in bf16"):
        DEVICES["v100"].peak("bf16")


def test_the_rates_are_plausible() -> None:
    for device in DEVICES.values():
        assert device.fp32 <= device.fp16 == (device.bf16 or device.fp16)
        assert 10**10 < device.memory < 10**12
        assert 1e10 < device.fp16 / device.watts < 5e12, "FLOP/s per watt"
