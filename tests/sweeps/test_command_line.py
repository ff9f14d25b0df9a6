"""What the words of a command line name, and a help that fits the terminal."""

from pathlib import Path

import pytest

import run_sweep
from scaling.config import ConfigError
from scaling.records import RecordsError
from scaling.requests import FidelityRequest, SampleRequest
from sweeps.command_line import command_help, overview
from sweeps.recipe import load_recipe, shipped_recipes
from sweeps.tables import started_sweep
from sweeps.where import known_sweep, model_at, refuse_sweep, selected, sweep_at
from tests.sweeps.test_plan import planned


def started(root: Path, name: str) -> Path:
    """A sweep of the quickstart under another name."""
    planned(root, load_recipe("quickstart", {("name",): name})).write()
    return root / name


def test_a_wrong_word_of_a_list_is_told_by_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = started(tmp_path, "mine")
    assert run_sweep.main(["sync", str(mine), "--to", "tensorbord"]) == 2
    shown = capsys.readouterr().err
    assert "--to:" in shown
    assert "tensorboard" in shown


def test_a_sweep_is_found_by_its_name_its_folder_and_its_recipe(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    mine = started(root, "mine")
    for where, name in (("mine", None), (str(mine), None), ("quickstart", "mine")):
        assert known_sweep(where, str(root), name) == mine, where
    (tmp_path / "own.yaml").write_text(
        shipped_recipes()["quickstart"].read_text().replace("name: quickstart", "name: mine")
    )
    assert known_sweep(str(tmp_path / "own.yaml"), str(root), None) == mine


def test_a_recipe_with_a_name_is_not_taken_for_the_sweep_that_is_called_like_the_recipe(
    tmp_path: Path,
) -> None:
    started(tmp_path, "quickstart")
    assert sweep_at("quickstart", str(tmp_path), "mine") == tmp_path / "mine"


def test_two_sweeps_of_one_name_are_not_guessed_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = started(tmp_path, "mine"), started(tmp_path / "runs", "mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as told:
        known_sweep("mine", "runs", None)
    for folder, where in ((here, str(here)), (there, "runs/mine")):
        assert where in str(told.value)
        assert known_sweep(where, "runs", None).resolve() == folder
    monkeypatch.chdir(tmp_path / "runs")
    assert known_sweep("mine", ".", None).resolve() == there, "the same one, found twice"


def test_what_is_no_sweep_is_told_with_those_there_are(tmp_path: Path) -> None:
    started(tmp_path, "mine")
    root = str(tmp_path)
    with pytest.raises(ConfigError, match=r"mien: neither a recipe, nor .*; did you mean mine"):
        known_sweep("mien", root, None)
    with pytest.raises(ConfigError, match="--name is for a recipe, and mine is a sweep itself"):
        known_sweep("mine", root, "other")
    with pytest.raises(RecordsError, match=r"no such sweep yet; .*; sweeps in .*: mine$"):
        started_sweep(known_sweep("quickstart", root, None))


def test_a_sweep_where_a_recipe_is_needed_is_told_with_the_command_that_started_it(tmp_path: Path) -> None:
    started(tmp_path, "mine")
    with pytest.raises(
        ConfigError, match="'run' needs a recipe; mine is a sweep, which was started by: python"
    ):
        refuse_sweep("run", "mine", str(tmp_path))
    started(tmp_path, "quickstart")
    refuse_sweep("run", "quickstart", str(tmp_path))


def test_a_model_of_a_sweep_that_is_not_there_is_told_with_the_nearest(tmp_path: Path) -> None:
    started(tmp_path, "mine")
    root = str(tmp_path)
    with pytest.raises(
        ConfigError, match="mien: no such sweep, recipe, run or checkpoint; did you mean mine"
    ):
        model_at("mien", SampleRequest(root=root, depth=1))
    with pytest.raises(ConfigError, match=r"nor a run's folder; did you mean mine"):
        selected("mien", FidelityRequest(root=root))
    assert model_at("net.pth", SampleRequest(root=root)) == ("net.pth", None)
    with pytest.raises(RecordsError, match="no finished run of depth 1"):
        model_at("mine", SampleRequest(root=root, depth=1))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_help_is_as_wide_as_the_terminal(width: int) -> None:
    about = str(run_sweep.__doc__)
    texts = [overview(run_sweep.COMMANDS, run_sweep.SCRIPT, about, width)]
    for name, command in run_sweep.COMMANDS.items():
        first = "quickstart" if command.takes == "recipe" else None
        texts.append(command_help(name, command, first, run_sweep.SCRIPT, width))
    lines = [line for text in texts for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    assert max(map(len, lines)) > width - 8, "and not narrower"
    assert all(f"\n  {name} " in texts[0] for name in run_sweep.COMMANDS)
    assert not any(line.endswith("-") for line in lines if not line.startswith("  ")), "no option is cut"
