"""What is said of models that nobody trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis import make_report
from analysis.findings import sentences
from analysis.study import make_study
from scaling.records import RunFolder, read_sweep, write_json
from tests.analysis import fabricate


def test_exact_records_give_the_exact_future(tmp_path: Path) -> None:
    study = make_study(fabricate.sweep(tmp_path, depths=(1, 2, 3, 4, 5)))
    said = [o for o in study.outlook if not o.offset]
    assert sorted({o.depth for o in said}) == [8, 10, 15]
    for o in said:
        assert o.params == pytest.approx(73728 * o.depth**3, rel=1e-9)
        assert o.value == pytest.approx(fabricate.law(o.quantity, o.params), rel=1e-6)
        assert o.low <= o.value <= o.high
    largest = study.finished.iloc[-1]
    # Cost per token is proportional to N in these records.
    assert said[0].flops == pytest.approx(largest["flops"] * (8 / 5) ** 3, rel=1e-6)


def test_intervals_of_untrained_depths_hold_new_runs(tmp_path: Path) -> None:
    held = studies = 0
    for seed in range(12):
        study = make_study(
            fabricate.sweep(tmp_path / str(seed), depths=range(1, 7), noise=2e-3, rng_seed=seed)
        )
        for o in study.outlook:
            if not o.offset and o.quantity == "loss_last" and o.depth == 12:
                studies += 1
                held += o.low <= fabricate.law(o.quantity, o.params) <= o.high
    assert studies == 12
    assert held >= 10


def test_report_and_page_say_it(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4), noise=1e-3)
    page = make_report(folder).read_text()
    assert "Larger models, not trained" in page
    assert "<td>d8</td>" in page
    outlook = json.loads((folder / "report" / "fits.json").read_text())["families"]["var"]["outlook"]
    assert {o["depth"] for o in outlook} == {6, 8, 12}
    assert any("A model of depth 8" in text for text in sentences(make_study(folder)))


def test_two_depths_say_nothing_of_others(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    assert make_study(folder).outlook == ()
    assert "nothing is said of larger models" in make_report(folder).read_text()


def test_seeds_that_drew_other_steps_leave_the_outlook(tmp_path: Path) -> None:
    """With random steps a seed has its own cost per token; N still follows from the depth."""
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4), seeds=(0, 1), noise=1e-3)
    for depth in (1, 2, 3, 4):
        run = RunFolder(folder / f"var-d{depth}-s1-0123456789")
        fabricate.change(folder, depth, seed=1, flops=int(run.metrics("eval")[-1]["flops"] * 1.01))
    assert {o.depth for o in make_study(folder).outlook} == {6, 8, 12}


def test_random_steps_of_other_lengths_leave_the_outlook(tmp_path: Path) -> None:
    """Depths trained for other numbers of steps drew other steps: 4e-5 of the cost per token, as measured."""
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4, 5), noise=1e-3)
    for depth, factor in ((2, 1 + 4e-5), (4, 1 - 4e-5)):
        run = RunFolder(folder / f"var-d{depth}-s0-0123456789")
        fabricate.change(folder, depth, flops=int(run.metrics("eval")[-1]["flops"] * factor))
    study = make_study(folder)
    assert {o.depth for o in study.outlook} == {8, 10, 15}
    cost = next(o.flops / study.finished["tokens"].max() for o in study.outlook)
    assert cost == pytest.approx(4.1 * 73728 * 8**3, rel=1e-3)


def test_images_that_were_left_out_are_told(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4))
    skipped = [{"index": 3, "error": "cannot identify image file"}]
    tokens = folder / read_sweep(folder).runs[0].tokens
    tokens.mkdir(parents=True)
    write_json(
        tokens / "manifest.json",
        {"splits": {"train": {"skipped": skipped}, "val": {"skipped": []}}},
    )
    notes = make_study(folder).notes
    assert [note for note in notes if "unreadable" in note] == [
        "unreadable train images left out of the tokens: 1"
    ]
