"""Several families in one sweep: each has its own laws, and only what may be compared is compared."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import DataError, compare, fit_power_law, load_runs, make_report, ready
from analysis.families import Families, compare_families, headline
from analysis.family_plots import LOOKS, look
from analysis.report import _all_figures
from analysis.report_tables import pair_rows
from analysis.study import make_studies, make_study
from analysis.tokens import tokens_of
from scaling.records import RecordsError, write_json
from tests.analysis import fabricate
from tests.analysis.test_report import Page

FOUR = ("var", "flexvar", "flexvar-mamba", "raster")
ALIKE = ("flexvar", "flexvar-mamba", "raster")
THREE = ("var", "flexvar", "raster")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate.sweep(
        tmp_path_factory.mktemp("runs"), depths=(1, 2, 3, 4), families=FOUR, noise=5e-4, evaluations=6
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report(
        fabricate.sweep(
            tmp_path_factory.mktemp("runs"), depths=(1, 2, 3), families=THREE, noise=5e-4, pictures=True,
            tokenizer=True, fidelity=True, evaluations=4,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def compared(sweep: Path) -> Families:
    return compare_families(make_studies(sweep))


def change_config(folder: Path, family: str, section: str, **values: Any) -> None:
    """Change a section of the config of every run of a family."""
    for file in folder.glob(f"{family}-d*/config.json"):
        config = json.loads(file.read_text())
        config[section] |= values
        write_json(file, config)


# -- one family at a time ------------------------------------------------------------------------


def test_every_family_has_the_study_that_it_would_have_alone(sweep: Path, tmp_path: Path) -> None:
    studies = make_studies(sweep)
    assert tuple(studies) == FOUR
    for family, study in studies.items():
        assert set(study.frame["family"]) == {family}
        law, alone = study.law("loss_last").law, make_study(sweep, family=family).law("loss_last").law
        assert law is not None
        assert alone is not None
        assert law.params == alone.params
        truth = fabricate.ALPHA["loss_last"] * fabricate.STEEPER[family]
        low, high = law.interval(0.999)["alpha"]
        assert low < truth < high
    assert len({study.law("loss_last").law.alpha for study in studies.values()}) == 4  # type: ignore[union-attr]


def test_a_study_is_of_one_family(sweep: Path) -> None:
    with pytest.raises(RecordsError, match=r"several families \(var, flexvar, flexvar-mamba, raster\)"):
        make_study(sweep)
    with pytest.raises(RecordsError, match="no runs of family 'gpt'; there are var, flexvar"):
        make_study(sweep, family="gpt")


def test_notes_belong_to_the_family_whose_runs_they_are_about(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3), families=("var", "raster"))
    (folder / "raster-d2-s0-0123456789" / "config.json").unlink()
    studies = make_studies(folder)
    assert "raster-d2-s0-0123456789 is listed in sweep.json" in " ".join(studies["raster"].notes)
    assert "raster" not in " ".join(studies["var"].notes)


def test_a_family_without_an_evaluation_is_left_out(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2), families=("var", "raster"))
    for run in folder.glob("raster-*"):
        (run / "metrics.jsonl").unlink()
    assert list(make_studies(folder)) == ["var"]
    with pytest.raises(RecordsError, match="no evaluation of raster recorded yet"):
        make_study(folder, family="raster")
    report = make_report(folder)
    for text in (report.read_text(), (report.parent / "report.md").read_text()):
        assert "raster has no part below: none of its runs has an evaluation" in text
        for depth in (1, 2):
            assert f"raster-d{depth}-s0-0123456789 is done but recorded no evaluation" in text
    assert 'id="family-var"' in report.read_text(), "its part says whose it is"


def test_lists_of_scales_may_differ_in_length(sweep: Path) -> None:
    frame = load_runs(sweep)
    lengths = frame.groupby("family", sort=False)["loss_scales"].agg(lambda lists: {len(v) for v in lists})
    assert lengths.to_dict() == {"var": {4}, "flexvar": {4}, "flexvar-mamba": {4}, "raster": {1}}
    assert frame.attrs["notes"] == []
    with pytest.raises(DataError, match="mixes 4 model families"):
        ready(frame, ("params", "loss_last"))


# -- what is compared ----------------------------------------------------------------------------


def test_losses_are_compared_among_families_with_the_same_tokens_only(compared: Families) -> None:
    assert [group.families for group in compared.groups] == [("var",), ALIKE]
    assert [group.families for group in compared.shared] == [ALIKE]
    pairs = {(pair.first, pair.second) for pair in compared.pairs}
    assert pairs == set(itertools.combinations(ALIKE, 2))
    note = "var was trained on other tokens than flexvar, flexvar-mamba and raster"
    assert [n.startswith(note) for n in compared.notes] == [True, False, False, False]


@pytest.mark.parametrize(
    ("section", "values", "same"),
    [
        ("data", {"path": "/elsewhere"}, True),
        ("tokenizer_train", {"lpips_weights": "/elsewhere"}, True),
        ("train", {"steps": 7}, True),
        ("data", {"train_images": 1}, False),
        ("data", {"resolution": 64}, False),
        ("tokenizer", {"vocab": 7}, False),
        ("tokenizer_train", {"steps": 7}, False),
        ("tokenizer_train", {"lpips_sha256": "0"}, False),
        ("model", {"scales": [2]}, False),
    ],
)  # fmt: skip
def test_tokens_are_the_same_where_everything_that_makes_them_is(
    section: str, values: dict[str, Any], same: bool
) -> None:
    one, two = fabricate.run_config(1, family="flexvar"), fabricate.run_config(3, family="raster")
    first, second = ({"config": config, "status": {}} for config in (one, two))
    assert tokens_of(first) == tokens_of(second) is not None
    two[section] |= values
    assert (tokens_of(first) == tokens_of(second)) == same


def test_a_config_that_does_not_say_its_tokens_compares_with_none(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3), families=("flexvar", "raster"))
    assert compare_families(make_studies(folder)).shared
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        del config["tokenizer"]
        write_json(file, config)
    found = compare_families(make_studies(folder))
    assert (found.shared, found.pairs) == ((), ())
    assert "no two of them are known to have the same tokens" in headline(found)
    assert not [note for note in found.notes if "other tokens" in note]
    assert "whether the tokens of flexvar are those of raster is not known" in " ".join(found.notes)


def test_a_run_on_other_tokens_is_a_family_of_its_own(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4), families=("flexvar", "raster"))
    before = make_studies(folder)["raster"].law("loss_last").law
    odd = folder / "raster-d4-s0-0123456789" / "config.json"
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config["tokenizer"]["vocab"] = 7 if file == odd else 9
        write_json(file, config)
    studies = make_studies(folder)
    assert list(studies) == ["flexvar", "raster-vocab-9", "raster-vocab-7"]
    law = studies["raster-vocab-9"].law("loss_last").law
    assert law is not None
    assert before is not None
    assert law.x.tolist() == before.x.tolist()[:3]
    found = compare_families(studies)
    assert [group.families for group in found.shared] == [("flexvar", "raster-vocab-9")]
    said = " ".join(found.notes)
    assert "raster-vocab-7 was trained on other tokens than flexvar and raster-vocab-9" in said
    assert "with raster-vocab-9 each token on nothing but the earlier ones of the same map" in said


def test_the_next_token_baseline_is_told_apart_by_its_conditions(tmp_path: Path, compared: Families) -> None:
    (note,) = [n for n in compared.notes if "conditioned" in n]
    assert "with flexvar and flexvar-mamba the whole map is conditioned on the coarser ones" in note
    assert "with raster each token on nothing but the earlier ones of the same map" in note
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3), families=("flexvar", "flexvar-mamba"))
    assert not [n for n in compare_families(make_studies(folder)).notes if "conditioned" in n]


def test_differences_and_losses_at_equal_size_are_those_of_the_laws(compared: Families) -> None:
    for pair in compared.pairs:
        if pair.x != "params" or pair.offset:
            continue
        assert pair.found is not None
        truth = [fabricate.ALPHA["loss_last"] * fabricate.STEEPER[name] for name in (pair.first, pair.second)]
        low, high = pair.found.interval(0.999)
        assert low < truth[0] - truth[1] < high
        assert pair.apart == "differ"
        assert pair.at == 73728 * 64
        at_d4 = [fabricate.law("loss_last", pair.at, family=name) for name in (pair.first, pair.second)]
        assert pair.ratio is not None
        assert pair.ratio[0] == pytest.approx(at_d4[0] / at_d4[1], rel=2e-3)
        assert pair.lower == (pair.first if at_d4[0] < at_d4[1] else pair.second)
        for (value, bottom, top), law in zip(pair.losses, (pair.found.first, pair.found.second), strict=True):
            said = law.predict(pair.at)
            assert (value, bottom, top) == (said.value[0], said.low[0], said.high[0])


def test_equal_families_are_not_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One truth under two names: of 40 sweeps the 95 % interval excludes equal exponents in few."""
    for table in (fabricate.STEEPER, fabricate.HIGHER):
        monkeypatch.setitem(table, "raster", 1.0)
        monkeypatch.setitem(table, "flexvar", 1.0)
    apart = lower = 0
    for seed in range(40):
        folder = fabricate.sweep(
            tmp_path / str(seed), depths=(1, 2, 3, 4, 5), families=("flexvar", "raster"), noise=1e-3,
            rng_seed=seed, evaluations=2,
        )  # fmt: skip
        frame = load_runs(folder)
        last = frame[frame["final"]]
        laws = [fit_power_law(part["params"], part["loss_last"]) for _, part in last.groupby("family")]
        found = compare(*laws)
        low, high = found.interval()
        apart += low > 0 or high < 0
        ratio = found.ratio(laws[0].x.max())
        lower += bool(ratio.low[0] > 1 or ratio.high[0] < 1)
    assert apart <= 6
    assert lower <= 6


def test_losses_at_equal_compute_are_read_inside_the_data_of_both(compared: Families) -> None:
    for pair in compared.pairs:
        if pair.found is None or pair.at is None:
            continue
        for law in (pair.found.first, pair.found.second):
            assert law.x.min() <= pair.at <= law.x.max()


def test_families_whose_sizes_do_not_meet_have_no_losses_side_by_side(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 15, 16, 17), families=("flexvar", "raster"))
    for depth in (1, 2, 3, 15, 16, 17):
        family = "flexvar" if depth > 3 else "raster"
        (folder / f"{family}-d{depth}-s0-0123456789" / "config.json").unlink()
    found = compare_families(make_studies(folder))
    pair = next(p for p in found.pairs if p.x == "params" and not p.offset)
    assert pair.found is not None
    assert (pair.at, pair.ratio, pair.losses) == (None, None, ())
    assert pair.lower == "their X do not meet"
    assert pair.to_json()["losses"] == []
    apart = next(p for p in found.pairs if p.x == "flops" and not p.offset)
    assert apart.found is not None
    assert apart.at is None
    assert "flexvar and raster have the same tokens, but their compute does not overlap" in headline(found)


def test_too_few_runs_for_a_law_is_said_where_the_comparison_would_stand(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2), families=("flexvar", "raster"))
    found = compare_families(make_studies(folder))
    (pair,) = [p for p in found.pairs if p.x == "params"]
    assert pair.problem.startswith("flexvar: L = (βX)^α needs at least 3 points")
    assert pair.to_json()["problem"] == pair.problem
    row = next(row for row in pair_rows(found) if row["x"] == "N")
    assert (row["status"], row["difference"]) == (pair.problem, "–")


def test_nothing_finished_is_reported_too(tmp_path: Path) -> None:
    folder = fabricate.sweep(
        tmp_path, depths=(1,), unfinished=(1,), families=("flexvar", "raster"), evaluations=4
    )
    text = make_report(folder).read_text()
    assert "flexvar and raster have the same tokens, but no laws yet" in text
    assert not list((folder / "report" / "figures").glob("families*")), "failed runs are on no frontier"


# -- the report ----------------------------------------------------------------------------------


def test_the_report_begins_with_the_comparison_and_has_a_part_for_each(report: Path) -> None:
    text = report.read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    places = [text.index("The families compared"), *(text.index(f'id="family-{f}"') for f in THREE)]
    assert places == sorted(places)
    assert "flexvar-loss_by_scale" in page.ids
    assert "raster-loss_by_scale" not in page.ids, "it has one scale"
    for family in THREE:
        assert {f"{family}-loss_last_vs_params", f"{family}-loss_avg_curves"} <= set(page.ids)


def test_no_figure_has_a_loss_of_other_tokens(report: Path) -> None:
    """Curves of a figure of losses belong to families that share their tokens."""
    for name in ("families1_loss_last_vs_params", "families1_loss_last_vs_compute"):
        svg = (report.parent / "figures" / f"{name}.svg").read_text()
        legend = re.findall(r">(var|flexvar|flexvar-mamba|raster): α = ", svg)
        assert legend == ["flexvar", "raster"]
        assert LOOKS[0][0] not in svg, "the colour of var"
    assert "families2_loss_last_vs_params" not in " ".join(
        p.stem for p in (report.parent / "figures").iterdir()
    )


def test_fits_json_holds_every_family_and_what_was_compared(report: Path) -> None:
    value = json.loads((report.parent / "fits.json").read_text())
    assert list(value["families"]) == list(THREE)
    for family in THREE:
        law = next(r for r in value["families"][family]["laws"] if r["x"] == "params" and not r["offset"])
        assert law["params"]["alpha"] == pytest.approx(
            fabricate.ALPHA["loss_last"] * fabricate.STEEPER[family], abs=3e-3
        )
    comparison = value["comparison"]
    assert comparison["same_tokens"] == [["var"], ["flexvar", "raster"]]
    assert {(p["first"], p["second"]) for p in comparison["pairs"]} == {("flexvar", "raster")}
    assert len(value["fidelity"]) == 9


def test_a_sweep_of_one_family_has_no_comparison(tmp_path: Path) -> None:
    report = make_report(fabricate.sweep(tmp_path, depths=(1, 2), evaluations=2))
    value = json.loads((report.parent / "fits.json").read_text())
    assert (list(value["families"]), value["comparison"], value["fidelity"]) == (["var"], None, [])
    assert "The families compared" not in report.read_text()
    assert "<h2>Loss and error against model size</h2>" in report.read_text()


def test_tokenizers_and_samples_of_all_families_are_shown_once(report: Path) -> None:
    text = report.read_text()
    assert "The tokenizer of var</h2>" in text
    assert "The tokenizer of flexvar, raster</h2>" in text
    assert Page(text).tags.count("img") == 2 + 9
    markdown = (report.parent / "report.md").read_text()
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown):
        assert (report.parent / picture).resolve().is_file(), picture


def test_families_keep_their_looks_in_every_figure() -> None:
    looks = [look(FOUR, family) for family in FOUR]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 4
    many = [f"f{i}" for i in range(9)]
    assert look(many, "f6") == look(many, "f0")


def test_two_groups_with_the_same_tokens_have_figures_each(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3), families=FOUR, evaluations=3)
    change_config(folder, "var", "tokenizer", vocab=9)
    change_config(folder, "flexvar-mamba", "tokenizer", vocab=9, quantizer="residual")
    studies = make_studies(folder)
    found = compare_families(studies)
    assert [g.families for g in found.groups] == [("var", "flexvar-mamba"), ("flexvar", "raster")]
    names = [name for name, _, _ in _all_figures(studies, found, (), True) if name.startswith("families")]
    assert names == [f"families{i}_loss_last_vs_{x}" for i in (1, 2) for x in ("params", "compute")]
    assert {(p.first, p.second) for p in found.pairs} == {("var", "flexvar-mamba"), ("flexvar", "raster")}
    assert re.search("var.* flexvar-mamba.*flexvar.* raster", headline(found).split("compared: ")[1])
    assert np.isfinite([p.found.difference for p in found.pairs if p.found]).all()


@pytest.mark.parametrize(("depths", "said"), [((1, 2, 3), "too few runs to tell"), (range(1, 6), "is below")])
def test_a_headline_wants_four_runs(tmp_path: Path, depths: Any, said: str) -> None:
    folder = fabricate.sweep(tmp_path, depths=depths, families=("flexvar", "raster"))
    assert said in headline(compare_families(make_studies(folder)))


def test_what_n_counts_and_unlike_training_are_said(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3), families=("flexvar", "raster"))
    alike = " ".join(compare_families(make_studies(folder)).notes)
    assert "N counts the matrices of the blocks, which are not alike: flexvar has" in alike
    assert "not trained alike" not in alike
    for file in folder.glob("raster-*/config.json"):
        config = json.loads(file.read_text())
        config.setdefault("train", {})["lr"] = 0.5
        file.write_text(json.dumps(config))
    (note,) = [n for n in compare_families(make_studies(folder)).notes if "not trained alike" in n]
    assert "0.5 (raster)" in note
