"""``edit`` of the command line, on tiny runs of two families: pictures, sheet, figures, one-line refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_sweep
from scaling.config import ConfigError, Family
from scaling.data.sources import open_source
from scaling.data.transforms import view_array
from scaling.edit_inputs import fit_mask, read_image
from tests.scaling import tiny
from tests.scaling.test_trainer import run


def trained(root: Path, family: Family) -> tuple[str, ...]:
    """WHERE and its tokenizer of a run of two steps on 8 px images, steps 1 and 2."""
    config = tiny.TOKENIZER if family == "var" else tiny.SCALABLE
    chain = tiny.make_tokens(root, config=config)
    folder = run(root / "run", chain, tiny.run_config(family, steps=2))
    return str(folder.path), str(chain[1])


@pytest.fixture(scope="module")
def var(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return trained(tmp_path_factory.mktemp("var"), "var")


@pytest.fixture(scope="module")
def flexvar(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return trained(tmp_path_factory.mktemp("flexvar"), "flexvar")


def picture(path: Path, height: int, width: int) -> Path:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) % 7 * 30], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def edit(where: tuple[str, ...], image: Path, out: Path, *options: str) -> list[Path]:
    """The edited pictures; the sheet comes last."""
    model, tokenizer = where
    words = ["edit", model, str(image), "--tokenizer", tokenizer, "--out", str(out), *options]
    assert run_sweep.main(words) == 0
    return sorted(out.iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_inpainting_keeps_the_images_own_pixels(
    var: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = picture(tmp_path / "image.png", 8, 8)
    options = (
        "--task",
        "inpaint",
        "--box",
        "0",
        "0",
        "0.5",
        "1",
        "--count",
        "3",
        "--seed",
        "7",
        "--feather",
        "1",
    )
    files = edit(var, image, tmp_path / "out", *options)
    assert [f.name for f in files] == ["00000-seed7.png", "00001-seed8.png", "00002-seed9.png", "sheet.png"]
    for file in files[:-1]:
        assert np.array_equal(pixels(file)[:, 5:], pixels(image)[:, 5:])
        assert not np.array_equal(pixels(file)[:, :4], pixels(image)[:, :4])
    told = capsys.readouterr().out
    assert "known pixels (50 % of the picture), as drawn: to the original" in told
    assert "to the tokenizer's reconstruction" in told
    assert told.splitlines()[-1] == str(files[-1])
    again = edit(var, image, tmp_path / "again", *options)
    alone = edit(
        var, image, tmp_path / "alone", *options[:-6], "--count", "1", "--seed", "8", "--feather", "1"
    )
    assert [f.read_bytes() for f in again] == [f.read_bytes() for f in files]
    assert np.array_equal(pixels(alone[0]), pixels(files[1]))
    plain = edit(var, image, tmp_path / "plain", *options[:-2], "--paste", "false")
    assert not np.array_equal(pixels(plain[0])[:, 5:], pixels(image)[:, 5:])


def test_a_mask_file_says_the_same_as_its_box_and_outpainting_is_the_complement(
    var: tuple[str, ...], tmp_path: Path
) -> None:
    image = picture(tmp_path / "image.png", 8, 8)
    mask = np.full((8, 8), 255, dtype=np.uint8)
    mask[2:6, 2:6] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    common = ("--count", "2", "--top-k", "8", "--class", "1", "--cfg", "3")
    boxed = edit(var, image, tmp_path / "box", "--task", "outpaint", "--box", "2", "2", "6", "6", *common)
    masked = edit(
        var, image, tmp_path / "mask", "--task", "inpaint", "--mask", str(tmp_path / "mask.png"), *common
    )
    for one, other in zip(boxed[:-1], masked[:-1], strict=True):
        assert np.array_equal(pixels(one), pixels(other))


def test_an_image_of_another_size_is_cropped_and_resized_with_its_mask_and_a_word(
    var: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = picture(tmp_path / "image.png", 32, 64)
    files = edit(
        var, image, tmp_path / "out", "--task", "class", "--box", "16", "0", "32", "32", "--class", "2"
    )
    assert Image.open(files[0]).size == (8, 8)
    told = capsys.readouterr().out
    assert f"{image}: cropped to its middle 32 x 32 and resized to 8 x 8 pixels" in told
    assert "known pixels (50 % of the picture)" in told


def test_refinement_and_expansion_of_a_flexible_model(
    flexvar: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = picture(tmp_path / "image.png", 8, 8)
    refined = edit(flexvar, image, tmp_path / "refined", "--task", "refine", "--count", "1")
    assert Image.open(refined[0]).size == (16, 16)
    assert "averaged down to the image's size: to the original" in capsys.readouterr().out
    small = edit(flexvar, image, tmp_path / "small", "--task", "refine", "--size", "16x32", "--count", "1")
    assert Image.open(small[0]).size == (32, 16)
    wide = edit(flexvar, image, tmp_path / "wide", "--task", "expand", "--size", "8x24", "--count", "2")
    assert Image.open(wide[0]).size == (24, 8)
    for file in wide[:-1]:
        assert np.array_equal(pixels(file)[:, 9:15], pixels(image)[:, 1:7])
    assert Image.open(wide[-1]).width > 3 * 24
    steps = edit(
        flexvar, image, tmp_path / "steps", "--task", "inpaint", "--box", "0", "0", "1", "1",
        "--size", "12x12", "--scales", "1", "3",
    )  # fmt: skip
    assert Image.open(steps[0]).size == (12, 12)


def test_pictures_go_beside_the_run_by_default(
    var: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = picture(tmp_path / "image.png", 8, 8)
    words = [
        "edit",
        var[0],
        str(image),
        "--tokenizer",
        var[1],
        "--task",
        "inpaint",
        "--box",
        "0",
        "0",
        "1",
        ".5",
    ]
    assert run_sweep.main(words) == 0
    (folder,) = Path(var[0]).glob("edit-image-inpaint*")
    assert (folder / "sheet.png").exists()
    # Another box is another edit: it does not write over this one.
    assert run_sweep.main([*words[:-1], ".75"]) == 0
    both = sorted(Path(var[0]).glob("edit-image-inpaint*"))
    assert len(both) == 2
    assert folder in both


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("var", (), "edit needs --task: inpaint, outpaint, class, refine, expand"),
        ("var", ("--task", "inpaint"), "--task inpaint needs --mask or --box, got none"),
        (
            "var",
            ("--task", "inpaint", "--box", "0", "0", "1", "1", "--mask", "MASK"),
            "--task inpaint needs --mask or --box, got mask and box",
        ),
        ("var", ("--task", "class", "--box", "0", "0", "1", "1"), "--task class needs --class, what to draw"),
        (
            "var",
            ("--task", "class", "--box", "0", "0", "1", "1", "--class", "3"),
            "--class 3 is not one of the model's 3 classes (0 to 2)",
        ),
        (
            "var",
            ("--task", "inpaint", "--box", "2", "0", "9", "8"),
            "--box 2 0 9 8 reaches outside the image, 8 pixels wide and 8 high",
        ),
        ("var", ("--task", "inpaint", "--box", "2", "0", "2", "8"), "--box 2 0 2 8 is empty"),
        (
            "var",
            ("--task", "inpaint", "--box", "2.5", "0", "5", "8"),
            "whole pixels, or fractions from 0 to 1",
        ),
        ("var", ("--task", "inpaint", "--box", "0", "0", "5"), "--box takes four numbers"),
        ("var", ("--task", "inpaint", "--mask", "MASK"), "has 4 x 4 pixels but"),
        ("var", ("--task", "inpaint", "--mask", "GREY"), "3 pixels are neither black nor white"),
        ("var", ("--task", "inpaint", "--mask", "NOWHERE"), "No such file"),
        ("var", ("--task", "refine"), "is a var, whose tokens are of one size; --task refine needs flexvar"),
        (
            "var",
            ("--task", "inpaint", "--box", "0", "0", "1", "1", "--size", "8x16"),
            "is a var, whose tokens are of one size; --size needs flexvar or flexvar-mamba",
        ),
        ("flexvar", ("--task", "expand"), "--task expand needs --size, such as --size 32x48"),
        (
            "flexvar",
            ("--task", "expand", "--size", "8"),
            "--size takes height x width in pixels, such as 32x48",
        ),
        ("flexvar", ("--task", "expand", "--size", "8x18"), "sides must be multiples of 4 pixels"),
        ("flexvar", ("--task", "refine", "--size", "8x16"), "1 x 2 tokens is too small to be refined"),
        ("flexvar", ("--task", "expand", "--size", "4x16"), "does not hold an image of 8 x 8"),
        (
            "flexvar",
            ("--task", "refine", "--box", "0", "0", "1", "1"),
            "keeps the whole image; it takes no --box",
        ),
        (
            "flexvar",
            ("--task", "inpaint", "--box", "0", "0", "1", "1", "--scales", "1", "3"),
            "--scales must end at 2, the result's shorter side in tokens, got 1 3",
        ),
        (
            "flexvar",
            ("--task", "inpaint", "--box", "0", "0", "1", "1", "--scales", "2", "1"),
            "--scales must grow, got 2 1",
        ),
        (
            "flexvar",
            ("--task", "inpaint", "--box", "0", "0", "1", "1", "--scales", "2"),
            "the first step must be (1, 1) as trained, got (2, 2)",
        ),
        (
            "flexvar",
            ("--task", "refine", "--paste", "false"),
            "--task refine draws every pixel anew and pastes nothing; it takes no --paste",
        ),
        (
            "flexvar",
            ("--task", "refine", "--feather", "2"),
            "--task refine draws every pixel anew and pastes nothing; it takes no --feather",
        ),
        (
            "flexvar",
            ("--task", "expand", "--size", "8x12", "--peek"),
            "--task expand hides nothing of the image; it takes no --peek",
        ),
        (
            "var",
            ("--task", "inpaint", "--box", "0", "0", "1", ".5", "--paste", "false", "--feather", "2"),
            "--feather is the seam of what is pasted; it means nothing with --paste false",
        ),
        (
            "var",
            ("--task", "inpaint", "--box", "0", "0", "1", "1", "--count", "0"),
            "--count must be at least 1",
        ),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    var: tuple[str, ...],
    flexvar: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    image = picture(tmp_path / "image.png", 8, 8)
    Image.new("L", (4, 4)).save(tmp_path / "mask.png")
    grey = np.zeros((8, 8), dtype=np.uint8)
    grey[0, :3] = 128
    Image.fromarray(grey).save(tmp_path / "grey.png")
    files = {name.upper(): str(tmp_path / f"{name}.png") for name in ("mask", "grey", "nowhere")}
    model, tokenizer = var if family == "var" else flexvar
    words = [files.get(option, option) for option in options]
    code = run_sweep.main(
        ["edit", model, str(image), "--tokenizer", tokenizer, "--out", str(tmp_path / "o"), *words]
    )
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "o").exists()


def test_unreadable_images_and_missing_words_are_told(
    var: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    box = ("--task", "inpaint", "--box", "0", "0", "1", "1")
    assert run_sweep.main(["edit", var[0], str(broken), "--tokenizer", var[1], *box]) == 2
    assert capsys.readouterr().err.startswith(f"error: {broken}: cannot identify image file")
    assert run_sweep.main(["edit", var[0], *box]) == 2
    assert capsys.readouterr().err == f"error: 'edit' needs IMAGE after {var[0]}\n"
    if not torch.cuda.is_available():
        assert (
            run_sweep.main(["edit", var[0], str(broken), "--tokenizer", var[1], *box, "--device", "cuda"])
            == 2
        )
        assert capsys.readouterr().err == "error: --device cuda: torch sees no GPU here\n"
    assert run_sweep.main(["edit", "quickstart", str(broken), *box]) == 2
    assert capsys.readouterr().err == "error: quickstart is a sweep: --depth says which of its runs\n"


def test_an_image_can_be_one_of_the_runs_own() -> None:
    plain = tiny.run_config()
    data = replace(tiny.DATA, num_classes=18)
    config = replace(plain, data=data, model=replace(plain.model, num_classes=18))
    picture, words = read_image("val:5", config)
    assert picture.size == (8, 8)
    assert words == ["val:5 is of class 5, china"]
    assert np.array_equal(np.asarray(picture), view_array(open_source(data).image("val", 5), data, None))
    with pytest.raises(ConfigError, match="val:10: the run has validation images 0 to 9"):
        read_image("val:10", config)
    with pytest.raises(ConfigError, match="a checkpoint has none, give a file"):
        read_image("val:5", None)


def test_a_single_masked_pixel_stays_masked_however_small_the_mask_becomes() -> None:
    mask = np.zeros((300, 500), dtype=bool)
    mask[150, 251] = True
    small = fit_mask(mask, (8, 8))
    assert small.shape == (8, 8)
    assert small[4, 4]
    assert not small[:3].any()


def test_guidance_without_a_class_is_told(
    var: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = picture(tmp_path / "image.png", 8, 8)
    edit(
        var,
        image,
        tmp_path / "out",
        "--task",
        "inpaint",
        "--box",
        "0",
        "0",
        "1",
        ".5",
        "--cfg",
        "3",
        "--device",
        "cpu",
        "--guidance-form",
        "constant",
    )
    assert "--cfg 3 is without effect: there is no --class to guide towards" in capsys.readouterr().out
