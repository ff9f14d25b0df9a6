"""Designs: which runs a recipe asks for, which of them share their stable phase, and what that saves."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from scaling import flops
from scaling.config import LATEST_FIRST, MOST_POINTS, ConfigError, EvaluationConfig, RunConfig
from scaling.records import RunFolder
from sweeps.devices import DEVICES
from sweeps.jobs import Job
from sweeps.machine import Machine
from sweeps.plan import Plan, Stated, make_plan
from sweeps.recipe import Recipe, load_recipe
from sweeps.scheduler import JobState, Scheduler
from sweeps.status import read_status
from sweeps.tables import plan_notes, plan_table
from sweeps.trunks import clear, own_part, shares
from tests.sweeps.fake_sweep import fake_job

LAPTOP = Machine("a laptop", cores=4, memory=16 * 2**30, gpus=())
RECIPE = """\
name: study
depths: [1, 2]
data: {train_images: 4000, val_images: 100, num_classes: 5}
tokenizer: {multipliers: [1, 1, 2, 2], channels: 32, scales: [1, 2, 3, 4], vocab: 256}
train:
  steps: 100
  batch: 8
  lr: 2e-3
"""
WSD = RECIPE + "  schedule: wsd\n  warmup_steps: 5\n"


def recipe(folder: Path, text: str) -> Recipe:
    file = folder / "study.yaml"
    file.write_text(text)
    return load_recipe(file)


def runs(folder: Path, text: str) -> list[RunConfig]:
    read = recipe(folder, text)
    return read.runs(read.data)


def planned(root: Path, read: Recipe) -> Plan:
    data = dataclasses.replace(read.data, num_classes=read.data.num_classes or 9)
    return make_plan(read, data, root, LAPTOP)


# -- which runs --------------------------------------------------------------------------------


def test_without_a_design_the_runs_are_as_ever(tmp_path: Path) -> None:
    plain = runs(tmp_path, RECIPE)
    assert [(c.model.depth, c.total_steps) for c in plain] == [(1, 100), (2, 100)]
    assert [c.run_id for c in runs(tmp_path, RECIPE + "lengths: [1]\n")] == [c.run_id for c in plain]


@pytest.mark.parametrize(
    ("length", "steps"),
    [("steps: 100", [50, 100, 200]), ("epochs: 1", [250, 500, 1000]), ("tokens: 24e+3", [50, 100, 200])],
)
def test_lengths_are_multiples_of_the_recipes_own(tmp_path: Path, length: str, steps: list[int]) -> None:
    text = RECIPE.replace("steps: 100", length) + "lengths: [2, 0.5, 1]\n"
    found = runs(tmp_path, text)
    assert [(c.model.depth, c.total_steps) for c in found] == [(d, s) for d in (1, 2) for s in steps]


def test_lengths_hold_for_depths_of_other_lengths(tmp_path: Path) -> None:
    text = RECIPE + "lengths: [1, 2]\nby_depth:\n  - {depths: [2], train: {steps: 30}}\n"
    assert [c.total_steps for c in runs(tmp_path, text)] == [100, 200, 30, 60]


def test_a_grid_is_every_combination_and_a_zip_goes_together(tmp_path: Path) -> None:
    text = RECIPE + (
        "grid:\n  train.lr: [1e-3, 2e-3]\n  model.label_drop: [0, 0.2]\n"
        "zip:\n  train.batch: [8, 16]\n  train.weight_decay: [0.05, 0.1]\n"
    )
    found = runs(tmp_path, text)
    assert len({c.run_id for c in found}) == len(found) == 2 * 2 * 2 * 2
    of = [c for c in found if c.model.depth == 2]
    assert {(c.train.lr, c.model.label_drop) for c in of} == {
        (lr, drop) for lr in (0.001, 0.002) for drop in (0, 0.2)
    }
    assert {(c.train.batch, c.train.weight_decay) for c in of} == {(8, 0.05), (16, 0.1)}
    labels = [place.label for place in recipe(tmp_path, text).places()]
    assert labels[0] == "train.batch 8, train.weight_decay 0.05, train.lr 1e-3, model.label_drop 0"


def test_any_section_of_a_run_can_vary_down_to_nested_values(tmp_path: Path) -> None:
    text = RECIPE + (
        "grid: {tokenizer_train.adversarial.weight: [0.0, 0.1], evaluation.points: [4], "
        "tokenizer.vocab: [256, 512]}\n"
    )
    found = runs(tmp_path, text)
    assert {c.tokenizer_train.adversarial.weight for c in found} == {0.0, 0.1}
    assert {c.model.vocab for c in found} == {256, 512}
    assert {c.evaluation.points for c in found} == {4}


@pytest.mark.parametrize("family", ["var", "flexvar"])
def test_an_isoflop_design_spends_its_budgets_to_the_step(tmp_path: Path, family: str) -> None:
    text = RECIPE.replace("  steps: 100\n", "") + f"budgets: [1e11, 3e10]\nfamilies: [{family}]\n"
    if family == "flexvar":
        text = text.replace("vocab: 256", "vocab: 256, quantizer: scalable")
    found = runs(tmp_path, text)
    assert [c.model.depth for c in found] == [1, 1, 2, 2]
    for config, budget in zip(found, [3e10, 1e11] * 2, strict=True):
        steps = config.total_steps
        recorded = [flops.spent(config, n).flops for n in (steps - 1, steps, steps + 1)]
        assert recorded[0] < budget < recorded[2]
        assert (
            abs(recorded[1] - budget) <= (recorded[2] - recorded[0]) / 4 * 1.2
        )  # half a step, if steps vary


def test_rates_follow_the_width(tmp_path: Path) -> None:
    text = RECIPE.replace("[1, 2]", "[1, 2, 8]") + "lr_rule: {power: 0.5, depth: 2}\n"
    assert [c.train.peak_lr for c in runs(tmp_path, text)] == pytest.approx([2e-3 * 2**0.5, 2e-3, 1e-3])
    base = text.replace("  lr: 2e-3\n", "  lr_base: 3.2e-2\n")  # times batch / 256
    assert [c.train.peak_lr for c in runs(tmp_path, base)] == pytest.approx([1e-3 * 2**0.5, 1e-3, 5e-4])


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("lengths: []", 9, "lengths must not be empty"),
        ("lengths: [1, 0]", 9, "lengths must be positive, got [1.0, 0.0]"),
        ("lengths: [2, 2]", 9, "lengths has a value twice"),
        ("lengths: [0.333]", 9, "lengths 0.333 of train.steps 100 is 33.3 steps; whole ones are needed"),
        ("budgets: [1e12]", 6, "train.steps 100: budgets decide how long a run trains; leave it out"),
        ("grid:\n  train.lrr: [1]", 10, "unknown key 'lrr'; did you mean 'lr'?"),
        ("grid:\n  train.lr: [1e-3, fast]", 10, "expected a number, got 'fast' (str)"),
        ("grid:\n  train.lr: [1e-3, -1]", 10, "train.lr must be positive, got -1.0"),
        ("grid:\n  train.lr: 1e-3", 10, "expected a list, got '1e-3' (str)"),
        ("grid:\n  train.lr: []", 10, "grid.train.lr has no values"),
        ("grid:\n  train.lr: [1e-3, 1e-3]", 10, "grid.train.lr has a value twice"),
        ("grid:\n  train: [1]", 10, "grid.train: runs of one sweep differ in values of train, model"),
        ("grid:\n  depths: [1]", 10, "depths, families, seeds, lengths and budgets have lists of their own"),
        ("grid:\n  data.resolution: [32, 64]", 10, "runs of one sweep differ in values of train, model"),
        ("grid:\n  model.adaln: [own, both]", 10, "expected one of 'own', 'shared', 'none', got 'both'"),
        ("grid:\n  train.epochs: [1, 2]", 9, "give exactly one of train.steps, train.epochs, train.tokens"),
        ("zip:\n  train.lr: [1, 2]\n  train.batch: [8]", 9, "zip takes lists of one length, got train.lr: 2"),
        ("grid:\n  train.lr: [1e-3]\nzip:\n  train.lr: [1e-3]", 12, "zip.train.lr is varied by grid too"),
        (
            "grid:\n  train.batch: [8]\nby_depth:\n  - {depths: [2], train: {batch: 16}}",
            11,
            "by_depth sets train.batch, which grid decides; name it in one place",
        ),
        (
            "lr_rule: {power: 0.5, depth: 2}\nby_depth:\n  - {depths: [2], train: {lr: 1e-3}}",
            10,
            "by_depth sets train.lr, which lr_rule decides",
        ),
        ("lr_rule: {power: 0.5}", 9, "missing key 'depth'"),
        ("lr_rule: {power: 0.5, depth: 0}", 9, "lr_rule.depth must be at least 1, got 0"),
        ("lr_rule: {power: 5000, depth: 2}", 9, "lr_rule.power must be -10 to 10, got 5000"),
        ("lr_rule: {power: -5000, depth: 2}", 9, "lr_rule.power must be -10 to 10, got -5000"),
        ("evaluation: {first: 0.999999}", 9, "evaluation.first must be above 0 and at most 0.9, or 1"),
        ("evaluation: {points: 100000000}", 9, "evaluation.points must be 1 to 1000, got 100000000"),
        ("launch: {checkpoint_seconds: -5}", 9, "launch.checkpoint_seconds must not be negative, got -5"),
        ('seeds: [!!bool "abc"]', 9, "'abc' is no bool"),
        ('seeds: [!!timestamp "abc"]', 9, "'abc' is no timestamp"),
    ],
)  # fmt: skip
def test_every_mistake_is_told_with_file_and_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, RECIPE + text + "\n")
    assert f"study.yaml, line {line}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_of_brackets_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study\.yaml: brackets within brackets") as caught:
        recipe(tmp_path, RECIPE + "launch: " + "[" * 20000 + "]" * 20000 + "\n")
    assert "\n" not in str(caught.value)


@given(
    st.integers(1, MOST_POINTS), st.floats(1e-6, LATEST_FIRST) | st.just(1.0),
    st.sampled_from(["cos", "wsd"]),
)  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_evaluations_are_growing_steps_up_to_the_last(points: int, first: float, schedule: str) -> None:
    config = load_recipe("wsd-cpu" if schedule == "wsd" else "quickstart")
    data = dataclasses.replace(config.data, num_classes=9)
    run = config.runs(data)[0]
    chosen = EvaluationConfig(points=points, first=first)
    steps = dataclasses.replace(run, evaluation=chosen).eval_steps
    assert list(steps) == sorted(set(steps))
    assert steps[-1] == run.total_steps
    assert steps[0] >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budgets: [1e+12]\nlengths: [1, 2]", "budgets decide how long a run trains; leave lengths out"),
        ("budgets: [1e+6]", "budgets: 1e+06 FLOPs are less than one optimiser step of depth 1"),
        ("budgets: [1e+12]\nby_depth: [{depths: [2], train: {epochs: 3}}]", "which budgets decides"),
    ],
)
def test_budgets_decide_the_length_alone(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        recipe(tmp_path, RECIPE.replace("  steps: 100\n", "") + text + "\n")


def test_runs_that_come_out_the_same_are_refused(tmp_path: Path) -> None:
    text = RECIPE.replace("steps: 100", "epochs: 0.0105") + "lengths: [1, 1.1]\n"
    with pytest.raises(ConfigError, match="two runs of depth 1 come out the same, of 6 steps"):
        runs(tmp_path, text)
    with pytest.raises(ConfigError, match="two runs of depth 1 come out the same"):
        runs(tmp_path, RECIPE + "grid: {train.lr: [1e-3, 0.001]}\n")


def test_an_option_does_not_set_what_a_grid_varies(tmp_path: Path) -> None:
    recipe(tmp_path, RECIPE + "grid: {train.lr: [1e-3, 2e-3]}\n")
    file = tmp_path / "study.yaml"
    with pytest.raises(ConfigError, match=r"^--train\.lr: grid varies train\.lr \(.*study\.yaml, line 9\)"):
        load_recipe(file, {("train", "lr"): 0.1})
    assert load_recipe(file, {("lengths",): [1, 2]}).lengths == (1, 2)


# -- which of them share -----------------------------------------------------------------------


def test_the_longest_run_of_a_group_is_its_trunk(tmp_path: Path) -> None:
    configs = runs(tmp_path, WSD + "seeds: [0, 1]\nlengths: [1, 2, 4]\n")
    parts = shares(configs)
    for config, share in zip(configs, parts, strict=True):
        if config.total_steps == 400:
            assert (share.trunk, share.start, share.leave) == (None, 0, (80, 160))
        else:
            assert share.start == config.stable_steps == 0.8 * config.total_steps
            (trunk,) = [c for c in configs if c.run_id == share.trunk]
            assert (trunk.model, trunk.seed, trunk.total_steps) == (config.model, config.seed, 400)


def test_decays_of_other_share_and_shape_branch_off_one_trunk(tmp_path: Path) -> None:
    text = "grid: {train.decay: [0.1, 0.5], train.decay_shape: [linear, 1-sqrt]}\n"
    configs = runs(tmp_path, WSD.replace("[1, 2]", "[1]") + text)
    parts = shares(configs)
    assert sorted(share.start for share in parts) == [0, 50, 50, 90]
    assert sum(share.leave == (50, 90) for share in parts) == 1


@pytest.mark.parametrize(
    "text",
    [
        RECIPE + "lengths: [1, 2]\n",  # another schedule
        WSD + "seeds: [0, 1]\n",
        WSD + "grid: {train.lr: [1e-3, 2e-3]}\n",
        WSD + "lengths: [1, 2]\nevaluation: {snapshots: [0.5]}\n",
    ],
)
def test_runs_that_differ_before_their_decay_share_nothing(tmp_path: Path, text: str) -> None:
    assert all(share.trunk is None and not share.leave for share in shares(runs(tmp_path, text)))


def test_the_shipped_grid_costs_half_of_its_runs_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path, load_recipe("wsd-cpu"))
    assert [(r.depth, r.steps) for r in plan.runs] == [
        (d, s) for d in (1, 2, 3, 4) for s in (100, 200, 300, 400)
    ]
    alone = sum(flops.spent(c, c.total_steps).flops for c in plan.configs)
    assert sum(r.flops for r in plan.runs) == alone
    together = sum(r.flops_spent for r in plan.runs)
    assert together / alone == pytest.approx(0.52)
    assert together / alone <= 0.55
    (note,) = [note for note in plan_notes(plan) if note.startswith("design:")]
    assert note.startswith("design: trunks and branches 3.15e+13 FLOPs, as independent runs 6.06e+13 (0.52)")
    assert plan.to_json()["total"]["flops_spent"] == plan.to_json()["total"]["flops_to_do"] == together


def test_a_trunk_keeps_its_branches_checkpoints_and_weighs_as_much_as_hangs_on_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, recipe(tmp_path, WSD + "lengths: [1, 2, 4]\n"))
    *branches, trunk = plan.run_jobs[:3]
    size = flops.checkpoint_bytes(plan.configs[0].model)
    assert plan.runs[2].disk - plan.runs[0].disk == 2 * size
    assert trunk.behind == sum(job.weight for job in branches)
    assert [job.weight for job in branches] == [own_part(c, c.stable_steps).flops for c in plan.configs[:2]]
    assert trunk.command[-3:] == ("--leave", "80", "160")
    assert branches[0].command[-2:] == ("--trunk", str(trunk.folder.path))


def test_what_a_finished_trunk_did_not_leave_is_planned_as_work(tmp_path: Path) -> None:
    read = recipe(tmp_path, WSD.replace("[1, 2]", "[1]") + "lengths: [1, 2, 4]\n")
    trunk = planned(tmp_path, read).run_jobs[-1]
    trunk.folder.weights.parent.mkdir(parents=True)
    trunk.folder.weights.write_text("")
    trunk.folder.set_status("done")
    trunk.folder.branch(80).mkdir(parents=True)
    again = planned(tmp_path, read)
    assert [run.start for run in again.runs] == [80, 80, 0]
    branch = again.run_jobs[1].folder
    (branch.checkpoints / "step-000000100").mkdir(parents=True)
    branch.write_shared({"run": trunk.name, "step": 160, "tokens": 1, "flops": 1})
    assert [run.start for run in planned(tmp_path, read).runs] == [80, 160, 0]


def test_a_length_that_its_trunk_is_past_is_planned_as_work(tmp_path: Path) -> None:
    """Whether the trunk is going or was stopped; what it has still before it, it leaves."""
    read = recipe(tmp_path, WSD.replace("[1, 2]", "[1]") + "lengths: [1, 2, 4]\n")
    trunk = planned(tmp_path, read).run_jobs[-1].folder
    trunk.set_status("running", step=100, total_steps=400)
    assert [run.start for run in planned(tmp_path, read).runs] == [0, 160, 0]
    trunk.set_status("interrupted", step=100, total_steps=400)
    (trunk.checkpoints / "step-000000080").mkdir(parents=True)
    assert [run.start for run in planned(tmp_path, read).runs] == [80, 160, 0], "it goes on from there"
    (trunk.checkpoints / "step-000000100").mkdir()
    assert [run.start for run in planned(tmp_path, read).runs] == [0, 160, 0]
    trunk.branch(80).mkdir(parents=True)
    assert [run.start for run in planned(tmp_path, read).runs] == [80, 160, 0]


@pytest.mark.parametrize("branch", [False, True])
def test_what_a_checkpoint_holds_is_not_to_do(tmp_path: Path, branch: bool) -> None:
    read = recipe(tmp_path, WSD.replace("[1, 2]", "[1]") + "lengths: [1, 4]\n")

    def plan() -> Plan:
        data = dataclasses.replace(read.data, num_classes=5)
        return make_plan(read, data, tmp_path / "runs", LAPTOP, Stated(DEVICES["h100"], 0.5))

    before = plan()
    row, config = before.runs[0 if branch else 1], before.configs[0 if branch else 1]
    folder, steps = before.run_jobs[0 if branch else 1].folder, row.steps - 10
    if branch:
        folder.write_shared({"run": before.runs[1].run, "step": row.start, "tokens": 1, "flops": 1})
    else:
        folder.branch(before.runs[0].start).mkdir(parents=True)
    (folder.checkpoints / f"step-{steps:09d}").mkdir(parents=True)
    folder.set_status("interrupted", step=steps, total_steps=row.steps)
    after = plan()
    done = own_part(config, row.start).flops - own_part(config, steps).flops
    totals = [made.to_json()["total"] for made in (before, after)]
    assert totals[0]["flops_to_do"] - totals[1]["flops_to_do"] == done
    assert totals[0]["flops_spent"] == totals[1]["flops_spent"]
    saved = totals[0]["seconds_to_do_sum"] - totals[1]["seconds_to_do_sum"]
    assert saved == pytest.approx(done / (0.5 * DEVICES["h100"].peak(config.train.precision)))
    assert sum(run.seconds_to_do or 0.0 for run in after.runs) == pytest.approx(
        totals[1]["seconds_to_do_sum"]
    )
    assert not any(note.startswith("begun:") for note in plan_notes(before))
    left, own = (totals[1][name] for name in ("flops_to_do", "flops_spent"))
    assert any(note.startswith(f"begun: {left:.3g} of {own:.3g} FLOPs") for note in plan_notes(after))


def test_status_counts_of_a_branch_what_is_its_own(tmp_path: Path) -> None:
    read = recipe(tmp_path, WSD.replace("[1, 2]", "[1]") + "lengths: [1, 2, 4]\n")
    plan = planned(tmp_path, read)
    plan.write()
    found = {job.name: job for job in read_status(plan.folders.sweep).jobs}
    for run in plan.runs:
        assert found[run.run].left({"var": 1e9}) == pytest.approx(run.flops_spent / 1e9)
    branch = plan.run_jobs[0].folder
    branch.set_status("interrupted", step=90, total_steps=100)
    (left,) = [j.left({"var": 1e9}) for j in read_status(plan.folders.sweep).jobs if j.name == branch.name]
    assert left == pytest.approx(own_part(plan.configs[0], 90).flops / 1e9)


def test_settings_stand_in_the_table(tmp_path: Path) -> None:
    plan = planned(tmp_path, recipe(tmp_path, WSD + "grid: {train.lr: [1e-3, 2e-3]}\nlengths: [1, 2]\n"))
    out = Console(file=io.StringIO(), width=240)
    out.print(plan_table(plan, 240))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("train.lr 2e-3") == 4
    assert "setting" in text
    assert "spent" in text


def test_checkpoints_are_cleared_when_no_branch_needs_them(tmp_path: Path) -> None:
    plan = planned(tmp_path, recipe(tmp_path, WSD.replace("[1, 2]", "[1]") + "lengths: [1, 2]\n"))
    branch, trunk = plan.run_jobs
    trunk.folder.branch(80).mkdir(parents=True)
    for job in (trunk, branch):
        clear(plan.run_jobs)
        assert trunk.folder.branch(80).exists()
        job.folder.weights.parent.mkdir(parents=True)
        job.folder.weights.write_text("")
        job.folder.set_status("done")
    clear(plan.run_jobs)
    assert not trunk.folder.branches.exists()


def test_checkpoints_stay_for_branches_of_a_launch_with_other_lengths(tmp_path: Path) -> None:
    def of(lengths: str) -> list[Job]:
        plan = planned(tmp_path, recipe(tmp_path, WSD.replace("[1, 2]", "[1]") + f"lengths: {lengths}\n"))
        plan.write()
        return list(plan.run_jobs)

    *branches, trunk = of("[1, 2, 4]")
    for job in branches:
        trunk.folder.branch(job.start).mkdir(parents=True)
    for job in (trunk, *branches):
        job.folder.weights.parent.mkdir(parents=True)
        job.folder.weights.write_text("")
        job.folder.set_status("done")
        (alone,) = of("[4]")
        assert alone.folder.path == trunk.folder.path
        clear([alone])
        assert trunk.folder.branches.exists() == (job is not branches[-1])


# -- the scheduler -----------------------------------------------------------------------------


def branching(root: Path, trunk: Job, names: Sequence[str], at: int) -> list[Job]:
    jobs = [fake_job(root, name, 2, weight=1.0) for name in names]
    return [dataclasses.replace(job, trunk=trunk.folder, start=at) for job in jobs]


def leave(root: Path, name: str, step: int) -> None:
    RunFolder(root / name).branch(step).mkdir(parents=True, exist_ok=True)


def test_a_branch_starts_beside_its_trunk_as_soon_as_it_can(tmp_path: Path) -> None:
    trunk = dataclasses.replace(fake_job(tmp_path, "trunk", 30, weight=5.0), behind=3.0)
    heavier = fake_job(tmp_path, "other", 1, weight=6.0)
    began: dict[str, tuple[float, int]] = {}

    def watch(states: Sequence[JobState]) -> None:
        step = int(trunk.folder.status().get("step", 0))
        if step >= 10:
            leave(tmp_path, "trunk", 10)
        for state in states:
            if state.started:
                began.setdefault(state.job.name, (state.started, step))

    jobs = [*branching(tmp_path, trunk, "ab", 10), heavier, trunk]
    result = Scheduler(jobs, [(), ()], on_tick=watch).run()
    assert result.exit_code == 0
    assert sorted(began, key=lambda name: began[name])[:2] == ["trunk", "other"], "what hangs on it counts"
    assert 10 <= began["a"][1] < 30
    assert 10 <= began["b"][1] <= 30


def test_a_trunk_that_fails_takes_down_only_branches_without_their_checkpoint(tmp_path: Path) -> None:
    trunk = fake_job(tmp_path, "trunk", behaviour="--fail")
    leave(tmp_path, "trunk", 10)
    early, late = (
        *branching(tmp_path, trunk, ["early"], 10),
        *branching(tmp_path, trunk, ["late"], 20),
    )
    begun = dataclasses.replace(fake_job(tmp_path, "begun", 2), trunk=trunk.folder, start=20)
    (begun.folder.checkpoints / "step-000000021").mkdir(parents=True)
    result = Scheduler([trunk, early, late, begun], [(), ()]).run()
    assert {s.job.name: s.phase for s in result.states} == {
        "trunk": "failed", "early": "done", "late": "blocked", "begun": "done"
    }  # fmt: skip
    (blocked,) = [s for s in result.states if s.phase == "blocked"]
    assert blocked.reason == "needs step 20 of trunk, which is failed"
    assert result.exit_code == 1


def test_a_branch_that_a_finished_trunk_left_nothing_trains_all_the_same(tmp_path: Path) -> None:
    trunk = fake_job(tmp_path, "trunk", 1)
    assert Scheduler([trunk, *branching(tmp_path, trunk, "ab", 10)], [()]).run().exit_code == 0
