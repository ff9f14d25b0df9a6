"""Published checkpoints among the points of a sweep: whose tokens they have, and what they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import load_runs, make_report
from analysis.families import compare_families
from analysis.study import make_studies, make_study
from analysis.table_fit import FitOptions, fit_table
from scaling.records import RunFolder
from tests.analysis import fabricate


def imported(folder: Path, family: str, depth: int, tokenizer: str = "ab", images: str = "cd") -> None:
    """Mark a run of the sweep as a published checkpoint."""
    run = RunFolder(folder / f"{family}-d{depth}-s0-0123456789")
    origin = {"tokenizer_hash": tokenizer, "images": images, "training": "as published"}
    run.set_status("done", step=300, total_steps=300, imported=origin)


def sweep_of(root: Path, **tokenizers: tuple[str, str]) -> Path:
    """FlexVAR and raster, of which the runs of those named are imported with a tokenizer and images."""
    folder = fabricate.sweep(root, depths=(1, 2, 3, 4), families=("flexvar", "raster"))
    for family, (tokenizer, images) in tokenizers.items():
        for depth in (1, 2, 3, 4):
            imported(folder, family, depth, tokenizer, images)
    return folder


@pytest.mark.parametrize(
    ("flexvar", "raster", "same"),
    [
        (("ab", "cd"), ("ab", "cd"), True),
        (("ab", "cd"), ("ef", "cd"), False),
        (("ab", "cd"), ("ab", "ef"), False),
    ],
)
def test_imported_families_are_compared_by_their_tokenizers_weights(
    tmp_path: Path, flexvar: tuple[str, str], raster: tuple[str, str], same: bool
) -> None:
    """Their configs agree in all three cases."""
    found = compare_families(make_studies(sweep_of(tmp_path, flexvar=flexvar, raster=raster)))
    assert bool(found.shared) == bool(found.pairs) == same
    other = "flexvar was trained on other tokens than raster" in " ".join(found.notes)
    assert other == (not same)


def test_of_a_trained_and_an_imported_family_it_is_said_that_nobody_knows(tmp_path: Path) -> None:
    found = compare_families(make_studies(sweep_of(tmp_path, raster=("ab", "cd"))))
    assert not found.shared
    said = " ".join(found.notes)
    assert "whether the tokens of flexvar are those of raster is not known" in said
    assert "other tokens" not in said


def test_a_family_that_is_trained_and_imported_is_said_to_be_so(tmp_path: Path) -> None:
    folder = sweep_of(tmp_path)
    imported(folder, "raster", 4)
    found = compare_families(make_studies(folder))
    assert not found.shared
    said = " ".join(found.notes)
    assert "some runs of raster are imported and some were trained here" in said
    assert "whether the tokens of flexvar are those of raster is not known" in said
    assert "other tokens" not in said


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Depths 1 to 4 trained once, and a published checkpoint of depth 4 whose config has another seed."""
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4), noise=1e-3)
    other = fabricate.sweep(tmp_path / "other", depths=(4,), seeds=(1,), noise=1e-3, rng_seed=5)
    run = folder / "imported-var_d4-0123456789"
    (other / "var-d4-s1-0123456789").rename(run)
    RunFolder(run).set_status(
        "done", step=300, total_steps=300, imported={"tokenizer_hash": "a", "images": "b", "training": "told"}
    )
    return folder


def test_an_imported_point_is_no_seed_of_a_trained_depth(mixed: Path) -> None:
    frame = load_runs(mixed)
    assert set(frame.loc[frame["imported"], "run"]) == {"imported-var_d4-0123456789"}
    study = make_study(mixed)
    law = study.law("loss_last").law
    assert law is not None
    assert (len(law.x), law.groups) == (5, 5), "its own point, and a unit by itself"
    said = " ".join(study.notes)
    assert "one seed per depth" in said
    assert "unequal numbers of seeds" not in said
    assert "groups: none, every row is taken as independent" in fit_table(str(mixed), FitOptions())


def test_seeds_stay_seeds_beside_an_imported_point(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4), seeds=(0, 1), noise=1e-3)
    imported(folder, "var", 4)
    law = make_study(folder).law("loss_last").law
    assert law is not None
    assert (len(law.x), law.groups) == (8, 5)
    offset = make_study(folder).law("loss_last", offset=True).law
    assert offset is not None
    assert len(offset.x) == 5


def test_imported_points_have_a_marker_of_their_own(mixed: Path) -> None:
    report = make_report(mixed)
    assert "<td>imported</td>" in report.read_text()
    drawn = {file.stem: file.read_text() for file in (report.parent / "figures").glob("*.svg")}
    for name in ("loss_last_vs_params", "loss_last_vs_compute", "loss_last_curves", "loss_by_scale"):
        assert "published checkpoint, evaluated here" in drawn[name], name
    alone = make_report(fabricate.sweep(mixed.parent / "alone", depths=(1, 2, 3)))
    assert "published" not in (alone.parent / "figures/loss_last_vs_params.svg").read_text()


def test_imported_points_of_families_have_it_too(tmp_path: Path) -> None:
    report = make_report(sweep_of(tmp_path, flexvar=("ab", "cd"), raster=("ab", "cd")))
    for x in ("params", "compute"):
        text = (report.parent / "figures" / f"families1_loss_last_vs_{x}.svg").read_text()
        for family in ("flexvar", "raster"):
            assert f"{family}: published checkpoint, evaluated here" in text
