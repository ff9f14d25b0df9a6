"""Plans, launches, finished runs and times of recipes of several families."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from scaling import flops
from scaling.config import ConfigError
from scaling.records import RecordsError, RunFolder, read_json, read_sweep
from sweeps import calibration, commands, speed_store, where
from sweeps.calibration import ImageSpeed, RunSpeed
from sweeps.jobs import Job
from sweeps.plan import Plan, cache_bytes, make_plan, stage_of
from sweeps.recipe import load_recipe
from sweeps.scheduler import Result, Scheduler
from sweeps.status import read_status
from sweeps.tables import plan_notes, sweep_folders
from tests.sweeps.fake_sweep import fake_job
from tests.sweeps.test_calibration import work
from tests.sweeps.test_families import COUNTS, FAMILIES, GOOD, planned, written
from tests.sweeps.test_plan import LAPTOP, NODE, finish, printed

# -- plans ---------------------------------------------------------------------------------------


def by_kind(plan: Plan, kind: str) -> list[Job]:
    return [job for job in plan.jobs if job.kind == kind]


def test_each_tokenizer_and_token_cache_is_planned_once(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert [job.kind for job in plan.jobs] == [*["tokenizer", "tokens"] * 2, *["run"] * 8]
    assert plan.stage_jobs + plan.run_jobs == plan.jobs
    assert len({job.folder.path for job in plan.jobs}) == 12
    assert len({job.name for job in plan.jobs}) == 12
    for job in plan.stage_jobs:
        assert job.name == f"{job.kind} {stage_of(job).run_id}"
        assert job.folder.name in " ".join(job.command)
    assert [plan.families_of(stage_of(job)) for job in by_kind(plan, "tokens")] == [
        ["var"],
        list(FAMILIES[1:]),
    ]


def test_a_run_needs_and_is_given_its_own_tokens_only(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    tokenizers, tokens = by_kind(plan, "tokenizer"), by_kind(plan, "tokens")
    assert [job.needs for job in tokens] == [(job.folder.path,) for job in tokenizers]
    for job, run in zip(plan.run_jobs, plan.runs, strict=True):
        own = int(run.family != "var")
        assert job.needs == (tokens[own].folder.path,)
        words = " ".join(job.command)
        assert f"--tokens {tokens[own].folder.path} --tokenizer {tokenizers[own].folder.path}" in words


def test_one_family_is_planned_as_ever(tmp_path: Path) -> None:
    plan = planned(tmp_path, families=("var",))
    assert [job.name for job in plan.jobs] == ["tokenizer", "tokens", *(r.run for r in plan.runs)]
    assert not [note for note in plan_notes(plan) if note.startswith("tokenizers")]


def test_sweep_json_says_which_tokens_each_run_is_trained_on(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    sweep = plan.folders.sweep
    listed = read_sweep(sweep).runs
    assert [run.run for run in listed] == [r.run for r in plan.runs]
    assert [run.family for run in listed] == [r.family for r in plan.runs]
    for run, job in zip(listed, plan.run_jobs, strict=True):
        assert (sweep / run.tokens).resolve() == job.needs[0].resolve()
        assert RunFolder(sweep / run.tokenizer).config() == RunFolder(sweep / run.tokens).config()
    assert not {"tokenizer", "tokens"} & read_json(sweep / "sweep.json").keys()
    names = [name for name, _ in sweep_folders(sweep)]
    assert names == [job.name for job in plan.jobs]


def test_disk_and_costs_are_of_what_is_left(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    whole, caches = plan.disk, [cache_bytes(job) for job in plan.stage_jobs]
    assert caches == [0, flops.token_bytes(stage_of(plan.jobs[1]).tokenizer, 110)] * 2
    finish(plan, 1)
    assert planned(tmp_path).disk == whole - caches[1]
    finish(plan, 3)
    assert planned(tmp_path).disk == whole - 2 * caches[1]


def test_tokens_and_flops_are_those_that_a_run_will_record(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    for row, config in zip(plan.runs, plan.configs, strict=True):
        total = flops.spent(config, config.total_steps)
        assert (row.tokens, row.flops) == (total.tokens, total.flops)
    rows = {row.family: row for row in plan.runs if row.depth == 1}
    assert rows["raster"].tokens == 10 * 16 * 16
    assert rows["flexvar"].tokens < rows["var"].tokens, "some of its steps are dropped"


def test_the_table_has_the_families_apart_and_every_tokenizer(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    text = printed(plan)
    for job in plan.stage_jobs:
        assert f"{job.name} " in text
    places = [text.index(f"\n {family}-d1") if f"\n {family}-d1" in text else text.index(f"{family}-d1")
              for family in ("var", "flexvar", "raster")]  # fmt: skip
    assert places == sorted(places)
    narrow = printed(plan, width=80)
    assert all(f"{family}-d2-s0" in narrow for family in FAMILIES)
    (note,) = [n for n in plan_notes(plan) if n.startswith("tokenizers: ")]
    one, two = (job.folder.name for job in by_kind(plan, "tokens"))
    assert note == f"tokenizers: {one} for var; {two} for flexvar, flexvar-mamba, raster"
    jobs = plan.to_json()["jobs"]
    assert [job["families"] for job in jobs] == [["var"]] * 2 + [list(FAMILIES[1:])] * 2
    assert [run["family"] for run in plan.to_json()["runs"]] == [f for f in FAMILIES for _ in (1, 2)]


def test_a_status_names_every_job(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    plan.jobs[2].folder.set_status("running", step=3, total_steps=50)
    found = read_status(plan.folders.sweep)
    assert [job.name for job in found.jobs] == [job.name for job in plan.jobs]
    assert found.jobs[2].state == "running"


def test_only_tokens_that_something_is_still_trained_from_are_looked_through(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    for index, run in enumerate(plan.runs):
        if run.family == "var":
            finish(plan, len(plan.stage_jobs) + index)
    checked = {job.name for job in commands.recheck_tokens(planned(tmp_path).jobs) if job.recheck}
    assert checked == {plan.jobs[3].name}
    for index in range(len(plan.jobs)):
        finish(plan, index)
    assert not [job for job in commands.recheck_tokens(planned(tmp_path).jobs) if job.recheck]
    alone = commands.recheck_tokens(planned(tmp_path).stage_jobs)
    assert [job.recheck for job in alone] == [False, True, False, True]


def test_weights_of_lpips_are_read_once_and_belong_to_the_families_that_use_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.pth").write_text(name)
    text = GOOD.replace("  steps: 50\n", f"  steps: 50\n  lpips_weights: {tmp_path}/a.pth\n").replace(
        "tokenizer_train: {adv", f"tokenizer_train: {{lpips_weights: {tmp_path}/b.pth, adv"
    )
    plan = planned(tmp_path, text)
    digests = {c.model.family: c.tokenizer_train.lpips_sha256 for c in plan.configs}
    assert digests["var"] != digests["raster"] == digests["flexvar"]
    assert None not in digests.values()


# -- launches ------------------------------------------------------------------------------------


def test_a_tokenizer_that_fails_takes_down_its_own_families_only(tmp_path: Path) -> None:
    def alone(job: Job) -> Job:
        return dataclasses.replace(job, alone=True)

    jobs = [
        alone(fake_job(tmp_path, "tok-a", behaviour="--fail")),
        alone(fake_job(tmp_path, "tokens-a", needs=("tok-a",))),
        alone(fake_job(tmp_path, "tok-b")),
        alone(fake_job(tmp_path, "tokens-b", needs=("tok-b",))),
        fake_job(tmp_path, "run-a", needs=("tokens-a",), weight=9),
        fake_job(tmp_path, "run-b", needs=("tokens-b",), weight=1),
    ]
    result = Scheduler(jobs, [(), ()]).run()
    assert {s.job.name: s.phase for s in result.states} == {
        "tok-a": "failed", "tokens-a": "blocked", "run-a": "blocked",
        "tok-b": "done", "tokens-b": "done", "run-b": "done",
    }  # fmt: skip


def test_tokenizers_and_caches_have_the_machine_to_themselves(tmp_path: Path) -> None:
    jobs = [
        fake_job(tmp_path, "early", 4, weight=5),
        dataclasses.replace(fake_job(tmp_path, "tok-a", 3), alone=True),
        dataclasses.replace(fake_job(tmp_path, "tok-b", 3), alone=True),
        fake_job(tmp_path, "run-a", 3, needs=("tok-a",), weight=1),
        fake_job(tmp_path, "run-b", 3, needs=("tok-b",), weight=1),
    ]
    together: list[set[str]] = []

    def watch(states: list) -> None:  # type: ignore[type-arg]
        together.append({s.job.name for s in states if s.process is not None})

    result = Scheduler(jobs, [(), ()], on_tick=watch).run()  # type: ignore[arg-type]
    assert result.exit_code == 0
    for names in together:
        assert len(names) == 1 or not names & {"tok-a", "tok-b"}, names
    began = {s.job.name: s.started for s in result.states}
    assert max(began["tok-a"] or 0, began["tok-b"] or 0) < min(
        began[name] or 0 for name in ("early", "run-a", "run-b")
    )
    assert Scheduler(jobs, [(), ()]).run().started == 0, "a second launch runs nothing"


def test_a_second_launch_of_several_families_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tmp_path)
    plan.write()
    for index in range(len(plan.jobs)):
        finish(plan, index)
    result = commands.launch(planned(tmp_path), planned(tmp_path).jobs, lambda data: "fingerprint")
    assert isinstance(result, Result)
    assert (result.started, result.exit_code) == (0, 0)
    assert "everything is done already" in capsys.readouterr().out


def test_images_are_held_against_every_tokenizer_and_cache(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    plan.jobs[3].folder.claim_data("of other photographs")
    with pytest.raises(RecordsError, match=r"made from other images"):
        commands.launch(planned(tmp_path), plan.jobs, lambda data: "of these")


def test_other_machines_join_the_runs_of_every_family(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path),
        {("launch", "machines"): 2, ("launch", "main_address"): "first", ("launch", "processes"): 4},
    )
    data = dataclasses.replace(recipe.data, **COUNTS)
    shared = make_plan(recipe, data, tmp_path / "runs", NODE)
    assert [r.run for r in shared.runs] == [r.run for r in planned(tmp_path).runs]
    for job in shared.stage_jobs:
        assert "--num_machines 1" in " ".join(job.command), "machine 0 alone"
    for job in shared.run_jobs:
        assert "--num_processes 8 --num_machines 2" in " ".join(job.command)


# -- finished runs -------------------------------------------------------------------------------


def test_a_finished_run_is_found_by_family_and_depth_with_its_own_tokenizer(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()
    for index, run in enumerate(plan.runs):
        if run.depth == 2 or run.family == "raster":
            finish(plan, len(plan.stage_jobs) + index)
    sweep = plan.folders.sweep
    for family in ("var", "raster"):
        folder, tokenizer = where.finished_run(sweep, 2, family)
        assert folder.name.startswith(f"{family}-d2-")
        assert tokenizer.name == by_kind(plan, "tokenizer")[family != "var"].folder.name
    with pytest.raises(
        ConfigError, match=r"--family is needed too: .* has var, flexvar, flexvar-mamba, raster"
    ):
        where.finished_run(sweep, 2)
    with pytest.raises(ConfigError, match="has no gpt; it has var"):
        where.finished_run(sweep, 2, "gpt")
    with pytest.raises(RecordsError, match="no finished run of var of depth 1; finished depths: 2"):
        where.finished_run(sweep, 1, "var")


def test_of_one_family_the_depth_is_enough(tmp_path: Path) -> None:
    plan = planned(tmp_path, families=("raster",))
    plan.write()
    finish(plan, 2)
    assert where.finished_run(plan.folders.sweep, 1)[0].name.startswith("raster-d1-")
    with pytest.raises(RecordsError, match="no finished run of depth 7; finished depths: 1"):
        where.finished_run(plan.folders.sweep, 7)


@pytest.mark.parametrize("value", ['{"runs": ["a"], "tokenizer": "t", "tokens": "t"}', "[]", "{"])
def test_a_damaged_list_of_runs_is_told_by_every_reader(tmp_path: Path, value: str) -> None:
    sweep = tmp_path / "four"
    sweep.mkdir()
    (sweep / "sweep.json").write_text(value)
    for read in (sweep_folders, read_status, lambda s: where.finished_run(s, 1)):
        with pytest.raises(RecordsError, match=r"four/sweep\.json: "):
            read(sweep)


# -- times ---------------------------------------------------------------------------------------


def test_a_runs_speed_belongs_to_its_family(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    config = next(c for c in plan.configs if c.model.family == "raster")
    settings = calibration.run_settings(config, plan.allotment, plan.recipe.launch)
    speed = RunSpeed(
        plan.machine.name, plan.allotment.threads, 1, 1, config.train.precision, 1, 16, 1e9, 3.0, 9, settings,
        "raster",
    )  # fmt: skip
    speed_store.add(dataclasses.replace(speed, family="flexvar", seq_len=30, flops_per_second=1e6))
    speed_store.add(speed)
    again = planned(tmp_path)
    seconds = {(r.family, r.depth): r.seconds for r in again.runs}
    assert seconds["raster", 1] == pytest.approx(work(config) / 1e9 + 3)
    assert seconds["var", 1] is None is seconds["flexvar-mamba", 1]
    assert seconds["flexvar", 1] is not None
    (note,) = [n for n in plan_notes(again) if n.startswith("time: ")]
    lines = [line.strip() for line in note.splitlines()]
    assert "raster depth 1: as last measured on this machine" in lines
    assert "~ raster depth 2: by FLOPs, at the speed of depth 1" in lines
    assert "- var depths 1, 2, flexvar-mamba depths 1, 2: no run of the family was measured with" in note


def test_a_run_with_random_steps_gives_the_speed_that_it_had(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    index = next(i for i, c in enumerate(plan.configs) if c.model.family == "flexvar")
    config, folder = plan.configs[index], plan.run_jobs[index].folder
    for step in (2, 4, 6):
        folder.append({"kind": "train", "step": step, "images_per_second": 100.0})
    found = calibration.measure_run(folder, config, LAPTOP, plan.allotment, plan.recipe.launch, seconds=500.0)
    assert found is not None
    assert found.family == "flexvar"
    images = config.total_steps * config.train.batch
    assert found.flops_per_second == pytest.approx(100 * plan.runs[index].flops / images)
    speed_store.add(found)
    assert planned(tmp_path).runs[index].seconds == pytest.approx(500.0)


def test_a_speed_of_a_tokenizer_is_not_taken_for_the_others(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    residual, scalable = (stage_of(job) for job in by_kind(plan, "tokenizer"))
    assert calibration.image_shape(residual) == calibration.image_shape(scalable)
    settings = calibration.image_settings("tokenizer", scalable, plan.recipe.launch)
    speed_store.add(
        ImageSpeed(
            "tokenizer", LAPTOP.name, 4, 1, "fp32", calibration.image_shape(scalable), 100.0, 0.0, 9,
            settings, "scalable",
        )
    )  # fmt: skip
    seconds = [job.seconds for job in by_kind(planned(tmp_path), "tokenizer")]
    assert seconds == [None, pytest.approx(scalable.train.steps * scalable.train.batch / 100)]


def test_speeds_from_before_there_were_families_are_of_var(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    entry = {
        "device": LAPTOP.name, "threads": plan.allotment.threads, "processes": 1, "machines": 1,
        "precision": plan.configs[0].train.precision, "depth": 1, "seq_len": 30, "flops_per_second": 1e9,
        "other_seconds": 1.0,
    }  # fmt: skip
    speed_store.speeds_file().parent.mkdir(parents=True, exist_ok=True)
    speed_store.speeds_file().write_text(json.dumps({"runs": [entry], "images": []}))
    known = {r.family for r in planned(tmp_path).runs if r.seconds is not None}
    assert known == {"var"}
