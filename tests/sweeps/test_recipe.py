"""Recipes: strict, and every mistake is told with file and line; options change what they name."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import ConfigError, DataConfig, to_dict
from scaling.requests import EditRequest
from sweeps.options import help_text, options_of, parse
from sweeps.recipe import Recipe, load_recipe

SHIPPED = ("quickstart", "cifar10", "imagenet256")
GOOD = """\
name: study
depths: [1, 2]
data:
  resolution: 32
tokenizer:
  multipliers: [1, 1, 2, 2]
  channels: 32
  scales: [1, 2, 3, 4]
train:
  steps: 10
  lr: 2e-3
by_depth:
  - depths: [2]
    train: {batch: 8}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(text)
    return file


def counted(recipe: Recipe) -> DataConfig:
    return dataclasses.replace(recipe.data, train_images=100, val_images=10, num_classes=5)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("depths:", "depth:", 2, "unknown key 'depth'; did you mean 'depths'?"),
        ("  lr: 2e-3", "  lrr: 2e-3", 11, "unknown key 'lrr'; did you mean 'lr'?"),
        ("  lr: 2e-3", "  lr: fast", 11, "expected a number, got 'fast' (str)"),
        ("  lr: 2e-3", "  lr: .inf", 11, "expected a finite number, got inf"),
        ("  lr: 2e-3", "  lr: -1", 11, "train.lr must be positive, got -1.0"),
        ("  lr: 2e-3", "  steps: 3", 11, "key 'steps' was already given in line 10"),
        ("  lr: 2e-3", "  schedule: lin9", 11, "unknown 'lin9'; did you mean 'lin'?"),
        ("  lr: 2e-3", "  epochs: 3", 9, "give exactly one of train.steps, train.epochs, train.tokens"),
        ("[1, 2]", "[1, x]", 2, "expected a whole number, got 'x' (str)"),
        ("[1, 2]", "[1, 1]", 2, "depths has a depth twice"),
        ("[1, 2]", "[]", 2, "depths must not be empty"),
        ("[1, 2]", "[0]", 2, "depths must be at least 1, got 0"),
        ("[1, 2]\n", "3\n", 2, "expected a list, got 3 (int)"),
        ("[1, 2, 3, 4]", "[1, 2, 3]", 8, "must end at the latent size 4 (= 32 px / 8), got [1, 2, 3]"),
        ("resolution: 32", "resolution: 36", 4, "data.resolution 36 is not a multiple"),
        ("resolution: 32", "source: foto", 4, "expected one of 'photos', 'folder'"),
        ("name: study", "name: ../study", 1, "name must be a folder name"),
        ("name: study", "name: tokens", 1, "name must not be one of tokenizers, tokens"),
        ("name: study", "name: 3", 1, "expected text, got 3 (int)"),
        ("name: study", "name: [", 3, "not valid YAML"),
        ("name: study", "name: !!python/name:os.system x", 1, "not valid YAML"),
        ("{batch: 8}", "{batc: 8}", 14, "unknown key 'batc'; did you mean 'batch'?"),
        ("{batch: 8}", "{batch: x}", 14, "expected a whole number"),
        ("- depths: [2]", "- depths: [2, 2]", 12, "by_depth lists depth 2 more than once"),
        ("scales: [1, 2, 3, 4]", "scales: &a [*a]", 8, "YAML aliases are not used in recipes"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_file_and_line(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    assert old in GOOD
    file = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    text = str(caught.value)
    assert re.match(rf"{re.escape(str(file))}, line {line}\b", text)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape("study.yaml")):
        load_recipe(written(tmp_path, text))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"no such recipe file; did you mean .*study\.yaml"):
        load_recipe(tmp_path / "stdy.yaml")
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load_recipe("quikstart")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing key 'depths'"):
        load_recipe(written(tmp_path, GOOD.replace("depths: [1, 2]\n", "")))


def test_values_of_single_depths_hold_for_these_only(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD))
    runs = recipe.runs(counted(recipe))
    assert [(r.model.depth, r.train.batch, r.train.lr) for r in runs] == [(1, 256, 2e-3), (2, 8, 2e-3)]


def test_an_option_wins_over_values_of_single_depths(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD), {("train", "batch"): 4})
    assert [r.train.batch for r in recipe.runs(counted(recipe))] == [4, 4]


def test_a_wrong_option_is_named_as_it_was_written(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"^--train\.lr-base: expected a number"):
        load_recipe(file, {("train", "lr_base"): "x"})
    with pytest.raises(ConfigError, match=r"^--tokenizer\.scales: tokenizer\.scales must end"):
        load_recipe(file, {("tokenizer", "scales"): [1, 2]})
    with pytest.raises(ConfigError, match=r"^--depths: expected a whole number, got 'x'"):
        load_recipe(file, {("depths",): [1, "x"]})


@pytest.mark.parametrize("name", SHIPPED)
def test_an_option_changes_only_what_it_names(name: str) -> None:
    """Every option, set to the value that the recipe has, gives the same recipe."""
    recipe = load_recipe(name)
    arguments = []
    for option in options_of(Recipe):
        value = recipe
        for key in option.path:
            value = getattr(value, key)
        words = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
        arguments += [option.flag, *words]
    overrides = parse(arguments, options_of(Recipe))
    assert len(overrides) == len(options_of(Recipe))
    again = load_recipe(name, overrides)
    assert to_dict(dataclasses.replace(again, by_depth=())) == to_dict(
        dataclasses.replace(recipe, by_depth=())
    )

    changed = load_recipe(name, parse(["--train.lr", "3e-4", "--depths", "2", "4"], options_of(Recipe)))
    expected = dataclasses.replace(
        recipe, depths=(2, 4), train=dataclasses.replace(recipe.train, lr=3e-4), by_depth=changed.by_depth
    )
    assert changed == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.lrr", "3"], "unknown option --train.lrr; did you mean --train.lr?"),
        (["--zzzzzz", "3"], "unknown option --zzzzzz; --help lists the options"),
        (["--by-depth", "3"], "unknown option --by-depth"),
        (["--train.lr"], "--train.lr takes a value (NUMBER|none)"),
        (["--train.lr", "1", "2"], "--train.lr takes one value (NUMBER|none), got 1 2"),
        (["--train.lr", "1", "--train.lr=2"], "--train.lr is given twice"),
        (["3"], "'3' was not expected here"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words, options_of(Recipe))
    assert message in str(caught.value)


def test_a_list_that_can_be_none_takes_values() -> None:
    for words in (["--scales"], ["--scales="]):
        with pytest.raises(ConfigError, match=r"^--scales takes values \(INT \.\.\.\|none\)$"):
            parse(words, options_of(EditRequest))


def test_options_read_lists_none_flags_and_either_dash() -> None:
    words = ["--depths", "2,4", "6", "--train.steps", "none", "--train.epochs=0.5", "--data.flip"]
    assert parse([*words, "--tokenizer_train.lr", "-1"], options_of(Recipe)) == {
        ("depths",): [2, 4, 6],
        ("train", "steps"): None,
        ("train", "epochs"): 0.5,
        ("data", "flip"): True,
        ("tokenizer_train", "lr"): -1.0,
    }


def test_the_help_lists_every_option_with_its_value() -> None:
    text = help_text(options_of(Recipe), load_recipe("quickstart"), 100)
    assert all(f"  {option.flag} " in text for option in options_of(Recipe))
    assert "--train.lr NUMBER|none   [0.002]" in text
    assert "Images per optimiser step" in text


@pytest.mark.parametrize("name", [*SHIPPED, "cifar10-cpu", "cifar10-tiny", "families-cpu"])
def test_shipped_recipes_say_how_they_are_launched_and_what_they_cost(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    text = (Path(__file__).parents[2] / "sweeps" / f"{name}.yaml").read_text()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    assert f"python run_sweep.py run {name}" in header
    assert "Cost: " in header


def test_the_papers_recipe_has_the_published_values() -> None:
    """FACTS.md and the commands in the published README."""
    recipe = load_recipe("imagenet256")
    runs = {r.model.depth: r for r in recipe.runs(recipe.data)}
    assert sorted(runs) == list(range(6, 31, 2))
    assert {d: (runs[d].train.batch, runs[d].train.epochs) for d in (16, 20, 24, 30)} == {
        16: (768, 200), 20: (768, 250), 24: (768, 350), 30: (1024, 350)
    }  # fmt: skip
    assert [runs[d].train.peak_lr for d in (16, 24, 30)] == pytest.approx([3e-4, 2.4e-4, 3.2e-4])
    assert [runs[d].train.lr_end for d in (16, 20, 24, 30)] == [0.1, 0.1, 0.01, 0.01]
    assert [runs[d].model.init_adaln_gamma for d in (16, 20, 24, 30)] == [1e-3, 1e-3, 1e-4, 1e-5]
    assert [runs[d].train.weight_decay_end for d in (16, 24, 30)] == [None, None, 0.08]
    assert runs[30].model.drop_path == pytest.approx(0.125)
    assert runs[16].model.seq_len == 680


@given(
    depths=st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
)
def test_runs_are_one_per_depth_and_seed_with_ids_that_depend_on_nothing_else(
    depths: list[int], seeds: list[int]
) -> None:
    recipe = dataclasses.replace(load_recipe("quickstart"), depths=tuple(depths), seeds=tuple(seeds))
    data = counted(recipe)
    ids = [r.run_id for r in recipe.runs(data)]
    assert len(set(ids)) == len(depths) * len(seeds)
    shuffled = dataclasses.replace(recipe, depths=tuple(reversed(depths)), seeds=tuple(reversed(seeds)))
    assert [r.run_id for r in shuffled.runs(data)] == ids
    alone = dataclasses.replace(recipe, depths=(depths[0],), name="other")
    assert {r.run_id for r in alone.runs(data)} <= set(ids)
