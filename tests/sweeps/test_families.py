"""Recipes of several families: who differs in what, and whose tokens are whose."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from scaling.config import ConfigError, DataConfig, RunConfig
from sweeps.options import options_of, parse
from sweeps.plan import Plan, make_plan
from sweeps.recipe import Recipe, load_recipe, tokenizer_runs
from tests.sweeps.test_plan import LAPTOP

FAMILIES = ("var", "flexvar", "flexvar-mamba", "raster")
GOOD = """\
name: four
families: [var, flexvar, flexvar-mamba, raster]
depths: [1, 2]
data:
  resolution: 32
tokenizer:
  multipliers: [1, 1, 2, 2]
  channels: 32
  scales: [1, 2, 3, 4]
tokenizer_train:
  steps: 50
  adversarial: {weight: 0.4, start: 20}
train:
  steps: 10
  lr: 2e-3
by_family:
  - families: [flexvar, flexvar-mamba]
    tokenizer: {quantizer: scalable}
    tokenizer_train: {adversarial: {weight: 0.2}}
  - families: [raster]
    tokenizer: {quantizer: scalable}
    tokenizer_train: {adversarial: {weight: 0.2}}
    train: {batch: 16}
by_depth:
  - depths: [2]
    train: {batch: 8}
"""
COUNTS = {"train_images": 100, "val_images": 10, "num_classes": 5}


def written(folder: Path, text: str = GOOD) -> Path:
    file = folder / "four.yaml"
    file.write_text(text)
    return file


def runs_of(recipe: Recipe) -> list[RunConfig]:
    return recipe.runs(dataclasses.replace(recipe.data, **COUNTS))


def planned(root: Path, text: str = GOOD, **changes: object) -> Plan:
    recipe = dataclasses.replace(load_recipe(written(root, text)), **changes)
    return make_plan(recipe, dataclasses.replace(recipe.data, **COUNTS), root / "runs", LAPTOP)


# -- recipes -------------------------------------------------------------------------------------


def test_every_family_has_every_depth_in_the_order_listed(tmp_path: Path) -> None:
    runs = runs_of(load_recipe(written(tmp_path)))
    assert [(r.model.family, r.model.depth) for r in runs] == [(f, d) for f in FAMILIES for d in (1, 2)]
    assert len({r.run_id for r in runs}) == 8
    for run in runs:
        assert run.run_id.startswith(f"{run.model.family}-d{run.model.depth}-s0-")


def test_what_a_family_leaves_open_follows_from_it(tmp_path: Path) -> None:
    models = {r.model.family: r.model for r in runs_of(load_recipe(written(tmp_path)))}
    assert {f: m.scales for f, m in models.items()} == {
        "var": (1, 2, 3, 4), "flexvar": (1, 2, 3, 4), "flexvar-mamba": (1, 2, 3, 4), "raster": (4,)
    }  # fmt: skip
    assert [models[f].step_schedule for f in FAMILIES] == ["fixed", "paper", "paper", "fixed"]
    assert [models[f].adaln for f in FAMILIES] == ["own", "own", "own", "none"]
    text = GOOD.replace("train: {batch: 16}", "train: {batch: 16}\n    model: {ssm_state: 8}")
    text = text.replace("by_depth:", "model: {scales: [2, 4], step_schedule: fixed}\nby_depth:")
    recipe = load_recipe(
        written(tmp_path, text.replace("[var, flexvar, flexvar-mamba, raster]", "[flexvar]"))
    )
    model = runs_of(recipe)[0].model
    assert (model.scales, model.step_schedule) == ((2, 4), "fixed")


def test_options_of_one_family_leave_the_others_as_they_are(tmp_path: Path) -> None:
    plain = {r.run_id for r in runs_of(load_recipe(written(tmp_path)))}
    text = GOOD.replace("by_depth:", "model: {ssm_state: 8}\nby_depth:")
    changed = [r for r in runs_of(load_recipe(written(tmp_path, text))) if r.run_id not in plain]
    assert [r.model.family for r in changed] == ["flexvar-mamba", "flexvar-mamba"]


def test_values_of_a_family_hold_for_it_only_and_those_of_a_depth_win(tmp_path: Path) -> None:
    batches = {
        (r.model.family, r.model.depth): r.train.batch for r in runs_of(load_recipe(written(tmp_path)))
    }
    assert batches == {
        (family, depth): 8 if depth == 2 else 16 if family == "raster" else 256
        for family in FAMILIES
        for depth in (1, 2)
    }


def test_values_within_a_section_are_merged_at_every_level(tmp_path: Path) -> None:
    trained = {r.model.family: r.tokenizer_train for r in runs_of(load_recipe(written(tmp_path)))}
    assert (trained["var"].adversarial.weight, trained["raster"].adversarial.weight) == (0.4, 0.2)
    assert {train.adversarial.start for train in trained.values()} == {20}
    assert {train.steps for train in trained.values()} == {50}


def test_families_with_the_same_tokenizer_share_it(tmp_path: Path) -> None:
    runs = runs_of(load_recipe(written(tmp_path)))
    stages = tokenizer_runs(runs)
    assert [stage.tokenizer.quantizer for stage in stages] == ["residual", "scalable"]
    assert {r.model.family: r.tokenizer_run.run_id for r in runs} == {
        family: stages[family != "var"].run_id for family in FAMILIES
    }


def test_a_family_has_the_same_runs_alone_and_beside_others(tmp_path: Path) -> None:
    together = {r.run_id for r in runs_of(load_recipe(written(tmp_path)))}
    for family in FAMILIES:
        alone = load_recipe(written(tmp_path), {("families",): [family]})
        assert {r.run_id for r in runs_of(alone)} == {i for i in together if re.match(rf"{family}-d\d", i)}


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--train.batch 4", {("train", "batch"): {4}}),
        ("--tokenizer-train.adversarial.weight 0.1", {("tokenizer_train", "adversarial", "weight"): {0.1}}),
        ("--tokenizer-train.adversarial.start 7", {("tokenizer_train", "adversarial", "weight"): {0.4, 0.2}}),
    ],
)
def test_an_option_wins_for_every_family_and_leaves_the_rest(
    tmp_path: Path, option: str, values: dict[tuple[str, ...], set[float]]
) -> None:
    recipe = load_recipe(written(tmp_path), parse(option.split(), options_of(Recipe)))
    for path, expected in values.items():
        found = set()
        for value in runs_of(recipe):
            for key in path:
                value = getattr(value, key)
            found.add(value)
        assert found == expected


def test_families_can_be_chosen_on_the_command_line(tmp_path: Path) -> None:
    words = ["--families", "raster", "var"]
    recipe = load_recipe(written(tmp_path), parse(words, options_of(Recipe)))
    assert [r.model.family for r in runs_of(recipe)] == ["raster", "raster", "var", "var"]
    option = next(o for o in options_of(Recipe) if o.path == ("families",))
    assert option.metavar == "var|flexvar|flexvar-mamba|raster ..."
    with pytest.raises(ConfigError, match=r"^--families: expected one of .*did you mean 'raster'"):
        load_recipe(written(tmp_path), {("families",): ["rastr"]})


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("families: [var,", "families: [vra,", 2, "expected one of 'var', 'flexvar', 'flexvar-mamba', 'ra"),
        ("families: [var,", "families: [flexvar,", 2, "families has a family twice: ['flexvar', 'flexvar',"),
        ("families: [var, flexvar, flexvar-mamba, raster]", "families: []", 2, "families must not be empty"),
        ("families: [var, flexvar, flexvar-mamba, raster]", "family: var", 2, "unknown key 'family'"),
        ("- families: [raster]", "- families: [raster, flexvar]", 16, "by_family lists flexvar more than on"),
        ("- families: [raster]", "- families: [rastr]", 20, "did you mean 'raster'?"),
        ("{batch: 16}", "{batc: 16}", 23, "unknown key 'batc'; did you mean 'batch'?"),
        ("{batch: 16}", "{batch: x}", 23, "expected a whole number"),
        ("{quantizer: scalable}", "{quantiser: scalable}", 18, "did you mean 'quantizer'?"),
        ("{quantizer: scalable}", "{quantizer: residual}", 18, "tokenizer.quantizer must be 'scalable' for"),
        ("{quantizer: scalable}", "{quantizer: scalable, scales: [2]}", 18, "must end at the latent size 4"),
        ("    tokenizer: {quantizer: scalable}\n", "", 6, "tokenizer.quantizer must be 'scalable' for"),
        ("train: {batch: 16}", "model: {adaln: own}", 23, "model.adaln must be none and model.qk_norm false"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_family_is_told_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    assert old in GOOD
    file = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    text = str(caught.value)
    assert message in text
    assert re.match(rf"{re.escape(str(file))}, line {line}\b", text), text
    assert "\n" not in text


def test_a_wrong_option_is_not_blamed_on_a_line_of_a_family(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--tokenizer\.quantizer: tokenizer\.quantizer must be 'residual'"
    ):
        load_recipe(written(tmp_path), {("tokenizer", "quantizer"): "scalable"})


# -- the shipped recipe --------------------------------------------------------------------------


def test_the_shipped_recipe_of_families_compares_what_can_be_compared() -> None:
    recipe = load_recipe("families-cpu")
    runs = recipe.runs(recipe.data)
    assert [(r.model.family, r.model.depth) for r in runs] == [(f, d) for f in FAMILIES for d in (1, 2, 3, 4)]
    stages = tokenizer_runs(runs)
    assert [stage.tokenizer.quantizer for stage in stages] == ["residual", "scalable"]
    shared = {r.tokenizer_run.run_id for r in runs if r.model.family != "var"}
    assert shared == {stages[1].run_id}
    assert {r.model.scales[-1] for r in runs} == {8}
    assert {r.model.scales for r in runs if r.model.family == "raster"} == {(8,)}
    assert isinstance(recipe.data, DataConfig)
