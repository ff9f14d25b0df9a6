"""From a table to a law in words: the right law, everything left out named, and the same for any order."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import fit_isoflop
from analysis.errors import DataError
from analysis.study import make_study
from analysis.table_fit import FitOptions, fit_table
from scaling.records import RecordsError
from tests.analysis import fabricate

SHARED = Path(os.environ.get("VARSCALE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FILE = SHARED / "data" / "chinchilla" / "svg_extracted_data.csv"
needs_points = pytest.mark.skipif(
    not FILE.is_file(), reason=f"Chinchilla's points are not at {FILE} (set VARSCALE_SHARED)"
)


def power(n: int = 12, noise: float = 0.01) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    N = np.geomspace(1e6, 1e9, n)
    return pd.DataFrame({"N": N, "loss": 3 * (N / 1e6) ** -0.08 * np.exp(noise * rng.normal(size=n))})


def grid() -> pd.DataFrame:
    """Seven sizes at each of five budgets, on L = 1.7 + 400/N^0.34 + 1500/D^0.37."""
    C = np.repeat(np.geomspace(1e18, 1e20, 5), 7)
    N = np.tile(np.geomspace(0.3, 3, 7), 5) * 0.1 * np.sqrt(C)
    D = C / (6 * N)
    rng = np.random.default_rng(2)
    loss = (1.7 + 400 / N**0.34 + 1500 / D**0.37) * np.exp(1e-3 * rng.normal(size=35))
    return pd.DataFrame({"Model Size": N, "Training FLOP": C, "loss": loss})


def write(frame: pd.DataFrame, folder: Path, name: str = "t.csv") -> str:
    frame.to_csv(folder / name, index=False)
    return str(folder / name)


def strict(text: str) -> dict[str, Any]:
    """JSON without NaN and Infinity, which are not JSON."""
    value: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    return value


def fitted(path: str, **options: Any) -> dict[str, Any]:
    return strict(fit_table(path, FitOptions(json=True, **options)))


def test_a_power_law_in_words(tmp_path: Path) -> None:
    frame = power().assign(hue="red")
    frame.loc[3, "loss"] = np.nan
    text = fit_table(write(frame, tmp_path), FitOptions())
    assert "L = (" in text
    assert "status: converged" in text
    assert "params: column 'N' of the table" in text
    assert "11 of 12 rows used" in text
    assert "left out: 1 because loss is missing or NaN (row 3)" in text
    assert "note: unknown columns, kept as they are: hue" in text


def test_a_power_law_in_json(tmp_path: Path) -> None:
    frame = power()
    frame.loc[3, "loss"] = -1.0
    facts = fitted(write(frame, tmp_path), level=0.9)
    assert facts["params"]["alpha"] == pytest.approx(-0.08, abs=0.01)
    low, high = facts["interval"]["alpha"]
    assert low < facts["params"]["alpha"] < high
    assert facts["converged"] is True
    assert facts["left_out"] == {"loss is 0 or negative": ["3"]}
    assert (facts["rows"], facts["used"], facts["level"]) == (12, 11, 0.9)
    assert facts["conventions"] == {"params": "column 'N' of the table"}


def test_where_there_is_no_interval_json_says_why(tmp_path: Path) -> None:
    facts = fitted(write(power(), tmp_path), loss_fn="huber")
    assert facts["interval"] is None
    assert "bootstrap" in facts["no_interval"]


@settings(max_examples=15)
@given(
    st.permutations(range(12)),
    st.sampled_from([("params", "val_loss"), ("MODEL SIZE", "eval/loss"), ("n", "L")]),
)
def test_any_order_of_rows_and_any_spelling_is_the_same_fit(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], names: tuple[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("t")
    shuffled = power().iloc[order].rename(columns=dict(zip(["N", "loss"], names, strict=True)))
    shuffled = shuffled[shuffled.columns[:: 1 if order[0] % 2 else -1]]
    straight, other = fitted(write(power(), folder, "a.csv")), fitted(write(shuffled, folder, "b.csv"))
    for key in ("alpha", "beta"):
        assert other["params"][key] == pytest.approx(straight["params"][key], rel=1e-9)
        assert other["interval"][key] == pytest.approx(straight["interval"][key], rel=1e-7)


def test_an_offset_is_found(tmp_path: Path) -> None:
    frame = power(noise=1e-4)
    frame["loss"] = frame["loss"] + 1.5
    facts = fitted(write(frame, tmp_path), offset=True)
    assert facts["params"]["offset"] == pytest.approx(1.5, abs=0.2)


def test_the_other_axes(tmp_path: Path) -> None:
    frame = power().rename(columns={"N": "compute"})
    facts = fitted(write(frame, tmp_path), x="C")
    assert facts["params"]["alpha"] == pytest.approx(-0.08, abs=0.01)
    assert "pareto_frontier" in "".join(facts["notes"])
    with pytest.raises(DataError, match="no column 'tokens'"):
        fitted(write(frame, tmp_path), x="D")


def test_a_surface_and_its_derived_tokens(tmp_path: Path) -> None:
    path = write(grid(), tmp_path)
    with pytest.raises(DataError, match=r"no column 'tokens' .*--derive"):
        fit_table(path, FitOptions(law="parametric"))
    facts = fitted(path, law="parametric", derive=True, loss_fn="squared")
    assert facts["params"]["alpha"] == pytest.approx(0.34, abs=0.05)
    assert facts["params"]["a"] == pytest.approx(0.37 / 0.71, abs=0.03)
    assert facts["conventions"]["tokens"] == "derived: C = 6·N·D"
    assert "tokens derived by the convention C = 6·N·D" in facts["notes"]


def test_isoflop(tmp_path: Path) -> None:
    facts = fitted(write(grid(), tmp_path), law="isoflop")
    assert facts["params"]["a"] == pytest.approx(0.37 / 0.71, abs=0.05)
    labelled = grid().assign(level=np.repeat(range(5), 7))
    assert fitted(write(labelled, tmp_path), law="isoflop", budget="level")["params"] == facts["params"]


def test_repeated_data(tmp_path: Path) -> None:
    frame = grid().assign(unique_tokens=1e8)
    assert "R_D" in fitted(write(frame, tmp_path), law="parametric", derive=True, repeated=True)["params"]
    with pytest.raises(DataError, match="no column 'unique_tokens'"):
        fitted(write(grid(), tmp_path), law="parametric", derive=True, repeated=True)


def test_a_sweep_is_fitted_as_in_its_report(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=range(1, 7), noise=0.002, unfinished=(6,))
    facts = fitted(str(folder))
    law = make_study(folder).law("loss_last").law
    assert law is not None
    assert facts["y"] == "loss_last"
    assert facts["params"]["alpha"] == pytest.approx(law.alpha, rel=1e-12)
    assert facts["interval"]["alpha"] == pytest.approx(law.interval(0.95)["alpha"], rel=1e-9)
    assert "blocks' matrices" in facts["conventions"]["params"]
    assert set(facts["left_out"]) == {"its run is failed", "checkpoint before the end of its run"}
    assert fitted(str(folder), y="error_avg")["params"]["alpha"] == pytest.approx(-0.01, abs=0.004)


def test_seeds_of_one_size_are_one_group(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=range(1, 6), seeds=(0, 1), noise=0.002)
    assert fitted(str(folder))["groups"] == "rows of equal params, of which some have several seeds"
    frame = power(12).assign(run=np.repeat(list("abcdef"), 2), lab=np.repeat(list("xyz"), 4))
    path = write(frame, tmp_path)
    assert fitted(path)["groups"] == "runs, of which some have several rows"
    assert fitted(path, groups="lab")["groups"] == "column 'lab'"
    with pytest.raises(DataError, match="no column 'labs'"):
        fitted(path, groups="labs")


def test_files_beside_it(tmp_path: Path) -> None:
    name = "$\\frac$ <script>alert(1)</script>"
    path = write(power().rename(columns={"loss": name}), tmp_path)
    out = tmp_path / "made" / "here"
    text = fit_table(path, FitOptions(y=name, out=str(out)))
    assert sorted(f.name for f in out.iterdir()) == ["fit.json", "fit.png", "fit.svg"]
    assert strict((out / "fit.json").read_text()) == fitted(path, y=name)
    assert (out / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert "<script" not in (out / "fit.svg").read_text()
    assert str(out / "fit.json") in text


def test_a_fit_that_did_not_converge_says_so_and_is_not_drawn(tmp_path: Path) -> None:
    """Without a floor in the data there is no offset to find."""
    frame = power(noise=0.0)
    frame["loss"] = frame["loss"] * np.where(np.arange(12) > 8, 0.7, 1.0)
    path, out = write(frame, tmp_path), tmp_path / "out"
    facts = fitted(path, offset=True, out=str(out))
    assert facts["converged"] is False
    assert facts["status"].startswith("no offset found")
    assert "no offset found" in (out / "fit.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, "--level must lie between 0 and 1, got 1"),
        ({"bootstrap": -1}, "--bootstrap must not be negative"),
        ({"delta": 0.0}, "--delta must be positive"),
        ({"law": "parametric", "offset": True}, "--offset does nothing with --law parametric"),
        ({"law": "isoflop", "bootstrap": 10}, "--bootstrap does nothing with --law isoflop"),
        ({"law": "isoflop", "x": "C"}, "--x does nothing with --law isoflop"),
        ({"tolerance": 0.1}, "--tolerance does nothing with --law power"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        FitOptions(**options)


def test_tables_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="no such file"):
        fit_table(str(tmp_path / "t.csv"), FitOptions())
    with pytest.raises(RecordsError, match="no wandb files"):
        fit_table(str(tmp_path), FitOptions())
    with pytest.raises(DataError, match="--derive does nothing for a sweep"):
        fit_table(str(fabricate.sweep(tmp_path)), FitOptions(derive=True))


@needs_points
@pytest.mark.reference
def test_chinchilla_from_its_own_file() -> None:
    """Objectives of the best fits to all 245 points and to the 240 below the fifth largest loss."""
    every = fitted(str(FILE), law="parametric", derive=True)
    assert every["objective"] <= 1.826012e-3
    assert every["used"] == 245
    fifth = float(np.sort(pd.read_csv(FILE)["loss"])[-5])
    most = fitted(str(FILE), law="parametric", derive=True, below=fifth)
    assert most["used"] == 240
    assert most["objective"] <= 1.01828e-3
    assert most["params"]["alpha"] == pytest.approx(0.3473, abs=1e-4)
    assert most["params"]["beta"] == pytest.approx(0.3672, abs=1e-4)


def test_rows_named_by_a_fit_are_told_to_be_counted_otherwise(tmp_path: Path) -> None:
    """IsoFLOP names rows of what it was given, from which a row is missing."""
    frame = grid().rename(columns={"Training FLOP": "C"})
    frame["C"] = np.geomspace(1e18, 1.2e18, 35)
    frame.loc[0, "loss"] = np.nan
    with pytest.raises(DataError, match=r"run into one another.*\(counting rows without the 1 left out\)"):
        fit_table(write(frame, tmp_path), FitOptions(law="isoflop"))


@pytest.mark.parametrize("law", ["parametric", "isoflop"])
def test_pictures_of_the_other_laws(tmp_path: Path, law: Any) -> None:
    options = FitOptions(law=law, derive=True, out=str(tmp_path / "out"))
    fit_table(write(grid(), tmp_path), options)
    assert "<svg" in (tmp_path / "out" / "fit.svg").read_text()


def test_hostile_names_stay_on_their_line(tmp_path: Path) -> None:
    frame = power().assign(**{"x\x1b[2Jy\nL = forged": 1})
    text = fit_table(write(frame, tmp_path), FitOptions())
    assert "\x1b" not in text
    assert not any(line.startswith("L = forged") for line in text.split("\n"))


def test_isoflop_takes_the_tables_own_tokens(tmp_path: Path) -> None:
    """C/(N·D) is not 6 everywhere: D_opt of C/6N would be another."""
    frame = grid()
    N, C = frame["Model Size"], frame["Training FLOP"]
    D = C / (N * (6 - 3 * np.log(N / N.min()) / np.log(N.max() / N.min())))
    facts = fitted(write(frame.assign(tokens=D), tmp_path), law="isoflop")
    law = fit_isoflop(N, frame["loss"], D, C)
    assert facts["params"] == pytest.approx(dict(law.params), rel=1e-12)
    assert facts["conventions"]["tokens"] == "column 'tokens' of the table"
    without = fitted(write(frame, tmp_path), law="isoflop")
    assert without["conventions"]["tokens"] == "D = C/6N"
    assert abs(without["params"]["b"] - facts["params"]["b"]) > 0.01
    D[3] = np.nan
    facts = fitted(write(frame.assign(tokens=D), tmp_path), law="isoflop")
    assert facts["left_out"] == {"tokens is missing or NaN": ["3"]}


def seeded(rng: np.random.Generator) -> pd.DataFrame:
    """Three seeds of five D that are 1 % off the law, seed by seed alike; one N."""
    D = np.repeat(np.geomspace(1e8, 1e10, 5), 3)
    off = np.repeat(0.01 * rng.normal(size=5), 3) + 0.0002 * rng.normal(size=15)
    seed = np.tile([0, 1, 2], 5)
    return pd.DataFrame({"N": 1e8, "D": D, "seed": seed, "loss": 3 * (D / 1e8) ** -0.05 * np.exp(off)})


def test_seeds_are_grouped_by_the_place_of_the_fit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        facts = fitted(write(seeded(rng), tmp_path), x="D")
        low, high = facts["interval"]["alpha"]
        hits += low <= -0.05 <= high
    assert facts["groups"] == "rows of equal tokens, of which some have several seeds"
    assert hits >= 53  # 58; 35 with rows taken as independent
    twice = pd.concat([grid().assign(seed=0), grid().assign(seed=1)], ignore_index=True)
    twice["loss"] *= np.exp(1e-4 * rng.normal(size=len(twice)))
    surface = fitted(write(twice, tmp_path), law="parametric", derive=True, loss_fn="squared")
    assert surface["groups"] == "rows of equal params and tokens, of which some have several seeds"
    assert surface["interval"]


def test_two_places_with_many_seeds_are_two_points(tmp_path: Path) -> None:
    frame = seeded(np.random.default_rng(1))
    with pytest.raises(DataError, match="at least 3 independent groups"):
        fitted(write(frame[frame["D"] < 1e9].iloc[:6], tmp_path), x="D")


def test_seeds_with_an_offset_are_fitted_as_in_the_report(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=range(1, 8), seeds=(0, 1, 2), noise=2e-3)
    facts = fitted(str(folder), offset=True)
    law = make_study(folder).law("loss_last", offset=True).law
    assert law is not None
    assert facts["params"] == pytest.approx(dict(law.params), rel=1e-12)
    assert facts["no_interval"] == (law.no_interval() or None)
    assert facts["groups"].endswith("several seeds; the law goes through their geometric means")


def test_seeds_of_named_models_are_runs(tmp_path: Path) -> None:
    frame = seeded(np.random.default_rng(2)).assign(experiment="baseline")
    frame["name"] = [f"pythia-{d:.0e}" for d in frame["D"]]
    assert fitted(write(frame, tmp_path), x="D")["groups"].startswith("rows of equal tokens")
    again = pd.concat([frame, frame.iloc[[0]].assign(loss=2.5)], ignore_index=True)
    with pytest.raises(DataError, match="keep one"):
        fitted(write(again, tmp_path), x="D")


def test_options_know_the_tables_own_names(tmp_path: Path) -> None:
    frame = grid().rename(columns={"loss": "val_loss", "Training FLOP": "compute_budget"})
    path = write(frame.assign(run_id=np.arange(35)), tmp_path)
    facts = fitted(path, law="isoflop", y="val_loss", budget="compute_budget", groups="run_id")
    assert facts["y"] == "loss"
    assert facts["params"] == fitted(write(grid(), tmp_path, "b.csv"), law="isoflop")["params"]


def test_groups_with_gaps_are_refused(tmp_path: Path) -> None:
    frame = power().assign(lab=np.array([*"aabbccddee", None, None], dtype=object))
    with pytest.raises(DataError, match="'lab' is missing in rows 10, 11"):
        fitted(write(frame, tmp_path), groups="lab")


@pytest.mark.parametrize("out", ["t.csv", "t.csv/below"])
def test_a_file_where_a_folder_belongs_is_refused_before_the_work(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(power(), tmp_path)
    monkeypatch.setattr("analysis.table_fit._fit", lambda *_: pytest.fail("fitted first"))
    with pytest.raises(DataError, match=r"--out .*t\.csv is a file, expected a folder"):
        fit_table(path, FitOptions(out=str(tmp_path / out)))


def test_a_law_is_asked_what_comes_next(tmp_path: Path) -> None:
    path = write(power(), tmp_path)
    found = fitted(path, at=(1e10, 1e11))
    law = found["params"]
    assert [f["x"] for f in found["at"]] == [1e10, 1e11]
    for f in found["at"]:
        assert f["value"] == pytest.approx((law["beta"] * f["x"]) ** law["alpha"], rel=1e-9)
        assert f["low"] < f["value"] < f["high"]
    assert "at N = 1e+10: " in fit_table(path, FitOptions(at=(1e10,)))
    with pytest.raises(DataError, match="--at: expected positive numbers, got -1"):
        FitOptions(at=(-1.0,))
    with pytest.raises(DataError, match="--at does nothing with --law isoflop"):
        FitOptions(law="isoflop", at=(1e9,))


def test_one_family_of_a_sweep_is_fitted_as_if_it_were_alone(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4), families=("var", "raster"), unfinished=(4,))
    with pytest.raises(DataError, match="fit one of them with --family"):
        fit_table(str(folder), FitOptions())
    alone = make_study(folder, family="raster").law("loss_last").law
    assert alone is not None
    facts = fitted(str(folder), family="raster")
    assert (facts["used"], facts["params"]["alpha"]) == (3, alone.alpha)
    assert not [note for note in facts["notes"] if note.startswith("var-")]
    with pytest.raises(DataError, match=r"--family gpt: not in .*; there are var, raster"):
        fit_table(str(folder), FitOptions(family="gpt"))


def test_one_family_of_a_table_is_fitted(tmp_path: Path) -> None:
    frame = pd.concat([power().assign(family="a"), power(noise=0.0).assign(family="b")])
    assert fitted(write(frame, tmp_path), family="b")["params"]["alpha"] == pytest.approx(-0.08)
    with pytest.raises(DataError, match="family"):
        fit_table(write(power(), tmp_path), FitOptions(family="b"))
