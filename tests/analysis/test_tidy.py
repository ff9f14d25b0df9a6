"""Before a fit: every row is used or counted with its reason; what no law fits is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import load_runs
from analysis.errors import DataError
from analysis.tidy import FORMS, ready
from tests.analysis import fabricate


def table(n: int = 8, **more: Any) -> pd.DataFrame:
    """A clean power law of n sizes."""
    params = np.geomspace(1e6, 1e8, n)
    return pd.DataFrame({"params": params, "loss": 4 * (params / 1e6) ** -0.1, **more})


BAD = [np.nan, np.inf, -np.inf, 0.0, -1.5]
REASONS = {
    "loss is missing or NaN",
    "loss is infinite",
    "loss is 0 or negative",
    "params is missing or NaN",
    "params is infinite",
    "params is 0 or negative",
}


@given(st.lists(st.sampled_from([None, *BAD]), min_size=6, max_size=20), st.data())
def test_every_row_is_used_or_counted(values: list[float | None], data: st.DataObject) -> None:
    column = data.draw(st.sampled_from(["params", "loss"]))
    frame = table(len(values))
    for row, value in enumerate(values):
        if value is not None:
            frame.loc[row, column] = value
    good = [row for row, value in enumerate(values) if value is None]
    if len(good) < 3:
        with pytest.raises(DataError, match="left out: "):
            ready(frame)
        return
    found = ready(frame)
    assert list(found.frame.index) == good
    assert sorted([*found.frame.index, *found.dropped.index]) == list(range(len(frame)))
    assert set(found.counts) <= REASONS
    assert sum(found.counts.values()) == len(found.dropped)


def test_the_summary_says_rows_and_reasons() -> None:
    frame = table(run=[f"r{i}" for i in range(8)])
    frame.loc[2, "loss"] = np.nan
    frame.loc[[4, 5], "loss"] = -1.0
    assert ready(frame).summary().split("\n") == [
        "5 of 8 rows used",
        "left out: 1 because loss is missing or NaN (row 2 of r2)",
        "left out: 2 because loss is 0 or negative (rows 4, 5 of r4, r5)",
    ]


def test_nullable_columns_count_as_missing() -> None:
    frame = table().astype({"loss": "Float64"})
    frame.loc[1, "loss"] = pd.NA
    assert ready(frame).counts == {"loss is missing or NaN": 1}


@pytest.mark.parametrize(
    ("frame", "form", "message"),
    [
        (table().assign(params=3e6), "power", r"needs 2 distinct .* rows 0, 1, .* have 1 \(3e\+06\)"),
        (table(2), "power", "needs 3 points at least, got 2"),
        (table(3), "offset", "needs 4 points at least, got 3"),
        (table().assign(loss=2.5), "power", "loss is 2.5 in all 8 rows"),
        (table().assign(loss=np.nan), "power", r"no row is left.*8 because loss is missing"),
        (table().drop(columns="loss"), "power", "no column 'loss'"),
    ],
)  # fmt: skip
def test_what_no_law_can_be_fitted_to(frame: pd.DataFrame, form: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ready(frame, form=form)


def test_a_refusal_says_what_was_left_out_before() -> None:
    frame = table(4)
    frame.loc[[1, 3], "loss"] = np.nan
    with pytest.raises(DataError, match=r"got 2; left out: 2 because loss is missing or NaN \(rows 1, 3\)"):
        ready(frame)


def test_n_and_d_that_move_together_are_no_surface() -> None:
    frame = table(12)
    with pytest.raises(DataError, match="vary apart"):
        ready(frame.assign(tokens=20 * frame["params"]), ("params", "tokens", "loss"), "parametric")
    apart = frame.assign(tokens=np.tile([1e8, 2e8, 4e8], 4))
    assert len(ready(apart, ("params", "tokens", "loss"), "parametric").frame) == 12


@pytest.mark.parametrize("form", FORMS)
def test_every_form_takes_as_few_points_as_it_says(form: Any) -> None:
    _, points, _ = FORMS[form]
    columns = ("params", "loss") if form in ("power", "offset") else ("params", "tokens", "loss")
    tokens = np.resize([1e8, 2e8, 4e8, 3e8], points)
    assert len(ready(table(points, tokens=tokens), columns, form).frame) == points
    with pytest.raises(DataError):
        ready(table(points - 1, tokens=tokens[1:]), columns, form)


def test_rows_that_repeat_another_are_left_out_and_counted() -> None:
    frame = pd.concat([table(), table().iloc[[1, 5]]], ignore_index=True)
    found = ready(frame)
    assert found.counts == {"repeats another row": 2}
    assert list(found.dropped.index) == [8, 9]


def test_a_run_recorded_under_two_names_repeats_if_its_seed_says_so() -> None:
    frame = table(seed=0, run=list("abcdefgh"))
    again = frame.iloc[[3]].assign(run="copy")
    assert ready(pd.concat([frame, again], ignore_index=True)).counts == {"repeats another row": 1}
    unseeded = pd.concat([frame, again], ignore_index=True).drop(columns="seed")
    assert ready(unseeded).counts == {}


@pytest.mark.parametrize("key", ["run", "seed"])
def test_one_run_with_two_results_is_refused(key: str) -> None:
    frame = table(run=list("abcdefgh"), tokens=1e9, seed=0, schedule=None)
    again = frame.iloc[[3]].assign(loss=1.25, **({"run": "z"} if key == "seed" else {"seed": 1}))
    with pytest.raises(
        DataError, match=rf"rows 3, 8 of d.* are of one .*{key}.*, with loss .* and 1.25; keep one"
    ):
        ready(pd.concat([frame, again], ignore_index=True))


def test_seeds_and_checkpoints_are_no_contradiction() -> None:
    seeds = pd.concat([table(seed=s).assign(loss=lambda f, s=s: f["loss"] * (1 + s / 100)) for s in (0, 1)])
    assert len(ready(seeds.reset_index(drop=True)).frame) == 16
    frame = table(run=list("aabbccdd"), params=np.repeat([1e6, 2e6, 3e6, 4e6], 2), tokens=[1e8, 2e8] * 4)
    found = ready(frame)
    assert len(found.frame) == 8
    assert "8 rows of 4 runs: rows of one run are not independent" in found.summary()


def test_unfinished_runs_and_their_checkpoints_are_left_out_of_a_sweep(tmp_path: Path) -> None:
    frame = load_runs(fabricate.sweep(tmp_path, depths=range(1, 7), evaluations=5, unfinished=(6,)))
    found = ready(frame, ("params", "loss_last"))
    assert found.frame["depth"].tolist() == [1, 2, 3, 4, 5]
    assert found.frame["final"].all()
    assert found.counts == {"its run is failed": 2, "checkpoint before the end of its run": 20}


def test_states_of_a_bare_table() -> None:
    frame = table(state=["done", "finished", "Running", "done", "crashed", None, "done", "done"])
    assert ready(frame).counts == {"its run is Running": 1, "its run is crashed": 1}


def test_a_checkpoint_in_the_middle_of_a_schedule_is_no_end() -> None:
    frame = table(step=[10, 20] * 4, horizon=20)
    assert ready(frame).counts == {"checkpoint before the end of its run": 4}
    assert ready(frame.assign(schedule="constant")).counts == {}


def test_mixed_schedules_of_a_sweep_are_refused_by_row(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4))
    for depth in (1, 2, 3, 4):
        file = folder / f"var-d{depth}-s0-0123456789" / "config.json"
        config = json.loads(file.read_text())
        config["train"]["schedule"] = "cos" if depth == 3 else "lin0"
        file.write_text(json.dumps(config))
    frame = load_runs(folder)
    with pytest.raises(DataError, match=r"mixes 2 learning-rate schedules: cos \(row \d+ of var-d3.*--mixed"):
        ready(frame, ("params", "loss_last"))
    assert "mixes 2 learning-rate schedules" in ready(frame, ("params", "loss_last"), mixed=True).notes[0]
    same = frame[frame["schedule"] == "lin0"]
    assert ready(same, ("params", "loss_last")).frame["depth"].tolist() == [1, 2, 4]


def test_mixed_families_are_refused() -> None:
    with pytest.raises(DataError, match=r"mixes 2 model families: mamba .*, var "):
        ready(table(family=["var"] * 5 + ["mamba"] * 3))
    with pytest.raises(DataError, match=r"other tokens; fit one of them with --family, or pass --mixed"):
        ready(table(family=["var"] * 5 + ["mamba"] * 3))
    (note, *_) = ready(table(family=["var"] * 5 + ["mamba"] * 3), mixed=True).notes
    assert note.endswith("their losses may be of other tokens")


def test_what_weakens_a_fit_is_said() -> None:
    said = ready(table(tokens=np.linspace(1e9, 2e9, 8), batch=[64] * 4 + [128] * 4, epochs=7.0)).summary()
    assert "global batches 64, 128 in one fit" in said
    assert "tokens differ too (×2)" in said
    assert "up to 7 times" in said
    assert ready(table(tokens=1e9, batch=64, epochs=1.0)).notes == ()


def test_below_leaves_out_the_largest() -> None:
    frame = table()
    edge = float(frame["loss"][2])
    assert ready(frame, below=edge).counts == {f"loss is not below {edge:g}": 3}


@pytest.mark.parametrize("final", [pd.array([False, True] * 4, dtype="boolean"), [0, 1] * 4, [0.0, 1.0] * 4])
def test_final_in_any_spelling_of_true(final: Any) -> None:
    assert ready(table(final=final)).counts == {"checkpoint before the end of its run": 4}


@pytest.mark.parametrize("final", [["yes", "no"] * 4, pd.array([True, None] * 4, dtype="boolean"), [2] * 8])
def test_final_that_is_neither_true_nor_false_is_refused(final: Any) -> None:
    with pytest.raises(DataError, match=r"column 'final' .* must be true or false; rows "):
        ready(table(final=final))


def test_missing_values_in_pandas_own_columns() -> None:
    frame = table(
        step=pd.array([10, 10, None, 5, 10, 10, 10, 10], dtype="Int64"), horizon=10,
        state=pd.array(["done", None, *["done"] * 5, "failed"], dtype="string"),
        epochs=pd.array([None] * 8, dtype="Float64"),
    )  # fmt: skip
    frame["loss"] = frame["loss"].astype("Float64")
    frame.loc[0, "loss"] = pd.NA
    assert ready(frame, below=100.0).counts == {
        "loss is missing or NaN": 1, "its run is failed": 1, "checkpoint before the end of its run": 1,
    }  # fmt: skip
