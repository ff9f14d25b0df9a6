"""``sample`` and ``stages`` of the command line on tiny runs: pictures, going on, one-line refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

import run_sweep
from scaling.config import Family, RunConfig
from scaling.pretrained import open_weights, save_model
from scaling.records import write_json
from tests.scaling import tiny
from tests.scaling.test_trainer import run

BLACK = "tests.end_to_end.test_sample:darkness"


class Darkness:
    """The darker an image, the surer of every class."""

    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        return (-images_B3HW.mean((1, 2, 3))).sigmoid()[:, None].expand(-1, 3)


def darkness() -> Darkness:
    return Darkness()


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def with_snapshots(config: RunConfig) -> RunConfig:
    evaluation = dataclasses.replace(config.evaluation, snapshots=(0.25, 0.5))
    return dataclasses.replace(config, evaluation=evaluation)


def deeper(config: RunConfig) -> RunConfig:
    options: dict[str, Any] = {"depth": 2, "width": 128, "heads": 2}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **options))


def make_sweep(root: Path, family: Family) -> Path:
    """A sweep of depths 1 and 2 with snapshots, as ``run`` leaves it."""
    chain = tiny.make_tokens(root, config=tiny.TOKENIZER if family == "var" else tiny.SCALABLE)
    sweep, runs = root / "sweep", []
    for config in (tiny.run_config(family, steps=4), deeper(tiny.run_config(family, steps=4))):
        folder = run(sweep / config.run_id, chain, with_snapshots(config))
        folder.set_status("done")
        runs.append(
            {"run": folder.name, "family": family, "tokenizer": "../tokenizer-run", "tokens": "../tokens"}
        )
    write_json(sweep / "sweep.json", {"name": "sweep", "runs": runs})
    return sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("var"), "var")


@pytest.fixture(scope="module")
def flexvar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("flexvar"), "flexvar")


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("raster"), "raster")


def command(*words: object) -> None:
    assert run_sweep.main([str(word) for word in words]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run_sweep.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("error: ").strip()


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.png"))


def test_a_sweep_a_folder_and_any_batch_give_the_same_pictures(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--classes", 2, 0, "--count", 3, "--seed", 5, "--top-p", 0.9)
    command("sample", sweep, "--depth", 1, *options, "--out", tmp_path / "a")
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "a" / "grid.png"))
    wanted = ["00000-class2-seed5.png", "00001-class0-seed6.png", "00002-class2-seed7.png", "grid.png"]
    assert names(tmp_path / "a") == wanted
    assert pixels(tmp_path / "a" / wanted[0]).shape == (8, 8, 3)
    assert Image.open(tmp_path / "a" / "grid.png").size == (2 * 64 + 2, 2 * 64 + 2)
    folder = next(path for path in sweep.iterdir() if path.name.startswith("var-d1"))
    tokenizer = sweep.parent / "tokenizer-run"
    command("sample", folder, "--tokenizer", tokenizer, *options, "--batch", 1, "--out", tmp_path / "b")
    for name in wanted:
        assert np.abs(pixels(tmp_path / "a" / name).astype(int) - pixels(tmp_path / "b" / name)).max() <= 1
    command("sample", folder, "--tokenizer", tokenizer, *options)
    command("sample", folder, "--tokenizer", tokenizer, *options, "--guidance-form", "constant")
    own = list(folder.glob("samples-cfg1.5-k0-p0.9-seed5-class2-0-*"))
    assert len(own) == 2, "settings that the name does not show have their own folder too"
    for path in own:
        assert names(path) == wanted


def test_pictures_that_are_there_are_not_drawn_again(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("sample", sweep, "--depth", 1, "--out", out)
    command(*words, "--count", 4)
    marked, lost = out / "00001-class1-seed1.png", out / "00002-class2-seed2.png"
    before = pixels(lost)
    Image.new("RGB", (8, 8), "red").save(marked)
    lost.unlink()
    command(*words, "--count", 6)
    assert "3 of 6 pictures were there already" in capsys.readouterr().out
    assert (pixels(marked) == (255, 0, 0)).all(), "kept"
    assert np.abs(pixels(lost).astype(int) - before).max() <= 1, "drawn again, the same"
    assert len(names(out)) == 7
    message = refused(capsys, *words, "--cfg", 3)
    assert message == f"{out} holds pictures with cfg 1.5, not 3.0; give another --out, or remove the folder"


def test_other_weights_of_the_same_name_do_not_go_on(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = next(path for path in sweep.iterdir() if path.name.startswith("var-d1"))
    for parent, factor in (("one", 1.0), ("other", 1.5)):
        config, weights = open_weights(folder)
        changed = {name: factor * value for name, value in weights.items()}
        save_model(config, changed, tmp_path / parent / "model", "a test")
    out, options = tmp_path / "out", ("--tokenizer", sweep.parent / "tokenizer-run", "--count", 1)
    command("sample", tmp_path / "one" / "model", *options, "--out", out)
    capsys.readouterr()
    message = refused(capsys, "sample", tmp_path / "other" / "model", *options, "--out", out)
    assert message.startswith(f"{out} holds pictures with weights ")


def test_the_classifier_keeps_the_best(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("sample", sweep, "--depth", 1, "--classes", 1)
    command(*common, "--count", 8, "--out", tmp_path / "all")
    best = (*common, "--count", 2, "--classifier", BLACK, "--keep", 0.25, "--out", tmp_path / "best")
    command(*best)
    assert "class 1: 2 of 8 kept" in capsys.readouterr().out
    kept = names(tmp_path / "best")[:-1]
    means = {file.name.partition("-")[2]: pixels(file).mean() for file in (tmp_path / "all").glob("0*.png")}
    assert [name.partition("-")[2] for name in kept] == sorted(means, key=lambda name: means[name])[:2]
    facts = json.loads((tmp_path / "best" / "acceptance.json").read_text())
    assert facts["1"]["mean_kept"] > facts["1"]["mean"]
    command(*best)
    assert names(tmp_path / "best")[:-1] == kept


def test_other_sizes_and_shapes_of_a_flexible_model(
    flexvar: Path, sweep: Path, raster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(
        "sample", flexvar, "--depth", 1, "--scales", "1", "2x1", "3x2", "--count", 2, "--smooth",
        "--out", tmp_path / "tall",
    )  # fmt: skip
    assert pixels(tmp_path / "tall" / "00000-class0-seed0.png").shape == (12, 8, 3)
    message = refused(capsys, "sample", flexvar, "--depth", 1, "--scales", 2, 3)
    assert message == "the first step must be (1, 1) as trained, got (2, 2)"
    for family in (sweep, raster):
        message = refused(capsys, "sample", family, "--depth", 1, "--scales", 1, 3)
        assert "has steps of one size only; other sizes and shapes need flexvar" in message
    assert "none to smooth" in refused(capsys, "sample", raster, "--depth", 1, "--smooth", "--out", tmp_path)


def test_one_line_refusals(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ("sample", sweep, "--depth", 1)
    cases = [
        (("sample", sweep), "is a sweep: --depth says which of its runs"),
        (("sample", sweep, "--depth", 7), "no finished run of depth 7; finished depths: 1, 2"),
        (("sample", tmp_path / "absent"), "absent"),
        ((*sample, "--classes", 1, 3), "class 3 is not one of the model's 3 (0 to 2)"),
        ((*sample, "--scales", 1, 3, 2), "--scales must grow, got 3x3 before 2x2"),
        (
            (*sample, "--scales", "1", "2y3"),
            "--scales takes sides or height x width, such as 1 2 4x6, got '2y3'",
        ),
        ((*sample, "--count", 0), "--count must be at least 1, got 0"),
        ((*sample, "--keep", 0.5), "--classifier and --keep go together"),
        ((*sample, "--classifier", "nowhere", "--keep", 0.5), "nowhere/classifier.json: no such file"),
        ((*sample, "--top-p", 1.5), "--top-p must be 0 to 1, got 1.5"),
        (("stages", sweep, "--depths", 3), "has no depth 3; it has 1, 2"),
        (("stages", sweep, "--first", 3), "--first 3: a var of scales [1, 2] has 2 steps"),
        (("stages", sweep, "--classes", 9), "class 9 is not one of the model's 3 (0 to 2)"),
    ]
    if not torch.cuda.is_available():
        cases.append(((*sample, "--device", "cuda"), "--device cuda: torch sees no GPU here"))
    for words, message in cases:
        assert message in refused(capsys, *words)


def test_stages_is_one_sheet_of_depths_and_stages(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("stages", sweep, "--classes", 0, 1, "--seed", 3, "--out", tmp_path / "drawn.png")
    # The tile of a cell: two pictures, enlarged to 64 pixels, and a gap.
    width, height = Image.open(tmp_path / "drawn.png").size
    assert width > 3 * (2 * 64 + 2)
    assert height > 2 * 64
    command("stages", sweep, "--classes", 0, 1, "--seed", 3, "--out", tmp_path / "again.png", "--batch", 1)
    difference = pixels(tmp_path / "drawn.png").astype(int) - pixels(tmp_path / "again.png")
    assert np.abs(difference).max() <= 1
    command("stages", sweep)
    assert (sweep / "stages-var.png").exists()
    (sweep / "stages-var.png").unlink()


@pytest.mark.parametrize("family", ["sweep", "flexvar", "raster"])
def test_with_all_tokens_known_every_cell_is_the_tokenizers_picture(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from scaling.requests import StagesRequest
    from scaling.stages_command import StagedRun, draw_stages

    folder: Path = request.getfixturevalue(family)
    runs = [
        StagedRun(path, folder.parent / "tokenizer-run", folder.parent / "tokens")
        for path in sorted(folder.iterdir())
        if path.is_dir()
    ]
    sheets = []
    for seed in (1, 2):
        sheet = draw_stages(
            runs, StagesRequest(classes=(1,), first=2, seed=seed, cfg=float(seed)), tmp_path / f"{seed}.png"
        )
        sheets.append(pixels(sheet)[44:])
    assert np.array_equal(*sheets)
    assert len(np.unique(sheets[0])) > 10


def test_first_steps_of_runs_with_other_steps_are_refused(
    flexvar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same first steps would be other tokens."""
    copy = tmp_path / "sweep"
    shutil.copytree(flexvar.parent, tmp_path, dirs_exist_ok=True)
    (file,) = copy.glob("flexvar-d2*/config.json")
    config = json.loads(file.read_text())
    config["model"]["scales"] = config["model"]["scales"][-1:]
    write_json(file, config)
    message = refused(capsys, "stages", copy, "--first", 1)
    assert message == (
        "--first 1 needs runs of the same steps, these have [1, 2] and [2]; choose with --depths"
    )
    command("stages", copy, "--first", 1, "--depths", 1)


def test_a_damaged_snapshot_is_one_line(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "sweep"
    shutil.copytree(sweep.parent, tmp_path, dirs_exist_ok=True)
    snapshot = next(copy.glob("var-d1*/**/*.safetensors"))
    snapshot.write_bytes(b"damaged")
    assert str(snapshot) in refused(capsys, "stages", copy)
