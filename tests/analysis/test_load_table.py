"""Tables of other people: any spelling and order gives one frame, and what is doubtful is refused by row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import load_table
from analysis.errors import DataError
from analysis.tables import SYNONYMS, meaning, parse_number, require
from scaling.records import RecordsError

RUNS = pd.DataFrame(
    {
        "params": [1e6, 2e6, 4.5e6], "tokens": [2e7, 3e7, 4e7], "flops": [1.3e14, 3e14, 1e15],
        "loss": [3.1, 3.0, 1 / 3], "run": ["a", "b", "c"],
    }
)  # fmt: skip


def write(frame: pd.DataFrame, file: Path) -> Path:
    if file.suffix in (".csv", ".tsv"):
        frame.to_csv(file, index=False, sep="," if file.suffix == ".csv" else "\t")
    elif file.suffix == ".parquet":
        frame.to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    return file


def notes(table: pd.DataFrame) -> str:
    return "\n".join(table.attrs["notes"])


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "ndjson", "parquet", "CSV"])
def test_tables_are_read_by_synonym(tmp_path: Path, ending: str) -> None:
    frame = pd.DataFrame(
        {"Model Size": [1e6, 2e6], "Training FLOP": [1e15, 3e15], "loss": [3.1, 1 / 3], "hue": ["a", "b"]}
    )
    file = tmp_path / f"table.{ending}"
    table = load_table(write(frame, file.with_suffix(file.suffix.lower())).rename(file))
    assert list(table.columns) == ["params", "flops", "loss", "hue"]
    np.testing.assert_array_equal(table["flops"], [1e15, 3e15])
    assert table["loss"][1] == 1 / 3
    assert table.attrs["notes"] == ["unknown columns, kept as they are: hue"]


@settings(max_examples=40)
@given(st.data())
def test_any_spelling_order_and_case_gives_the_same_frame(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A synonym, upper, lower or title case, with spaces, dashes or underscores, in any column order."""
    names = {}
    for key in RUNS.columns:
        word = data.draw(st.sampled_from((key, *SYNONYMS[key])))
        word = word.replace("_", data.draw(st.sampled_from(["_", " ", "-", "."])))
        names[key] = data.draw(st.sampled_from([word, word.upper(), word.title(), f" {word} "]))
    order = data.draw(st.permutations(list(RUNS.columns)))
    file = tmp_path_factory.mktemp("t") / "t.csv"
    table = load_table(write(RUNS[order].rename(columns=names), file))
    pd.testing.assert_frame_equal(table[list(RUNS.columns)], RUNS, check_exact=True)
    assert notes(table) == ""


def test_no_name_has_two_meanings() -> None:
    every = [*SYNONYMS, *(name for names in SYNONYMS.values() for name in names)]
    assert len(every) == len(set(every))
    assert all(meaning(name) == (key, 1) for key, names in SYNONYMS.items() for name in (key, *names))


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("eval/loss", ("loss", 1)),
        ("val/loss_last", ("loss_last", 1)),
        ("eval/flops", ("flops", 1)),
        ("val_loss_avg", ("loss_avg", 1)),
        ("test error_last", ("error_last", 1)),
        ("val_tokens", (None, 1)),
        ("Eval Steps", (None, 1)),
        ("eval_batch_size", (None, 1)),
        ("trainFLOPs", ("flops", 1)),
        ("Training compute (FLOP)", ("flops", 1)),
        ("compute (PF-days)", ("flops", 8.64e19)),
        ("Compute [EFLOPs]", ("flops", 1e18)),
        ("Params (B)", ("params", 1e9)),
        ("tokens (in millions)", ("tokens", 1e6)),
        ("tokens_B", ("tokens", 1e9)),
        ("loss (nats/token)", ("loss", 1)),
        ("loss (bits per token)", ("loss", math.log(2))),
        ("loss (bits per byte)", (None, 1)),
        ("loss (B)", (None, 1)),
        ("train/loss_avg", (None, 1)),
        ("lr_b", (None, 1)),
        ("", (None, 1)),
    ],
)
def test_prefixes_and_units_in_names(column: str, said: tuple[str | None, float]) -> None:
    assert meaning(column) == said


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.3B", 1.3e9), ("20M", 20e6), ("70b", 70e9), ("160 m", 160e6), ("3e9", 3e9), ("1,300,000", 1.3e6),
        ("6.9 billion params", 6.9e9), ("3x10^9", 3e9), ("1.2×10**18", 1.2e18), ("1_000", 1000.0),
        (" 7 ", 7.0), ("1,3", None), ("1.300,5", None), ("1B-7B", None), ("~1B", None), ("1Bx", None),
        ("B", None), ("7q", None),
    ],
)  # fmt: skip
def test_counts_with_a_unit(text: str, number: float | None) -> None:
    assert parse_number(text, count=True) == number


@given(st.floats(allow_nan=False))
def test_plain_numbers_survive_as_text(value: float) -> None:
    assert parse_number(repr(value), count=False) == value


@pytest.mark.parametrize("text", ["3.1B", "3,100", "3x10^0"])
def test_a_loss_has_no_units(text: str) -> None:
    assert parse_number(text, count=False) is None


def test_units_are_applied_and_noted(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('Params (M),data tokens,tokens,loss\n1.5,x,"1,000,000",2\n2.5,y,1.3B,3\n')
    table = load_table(file)
    assert table["params"].tolist() == [1.5e6, 2.5e6]
    assert table["tokens"].tolist() == [1e6, 1.3e9]
    assert "column 'Params (M)': the unit in its name makes 1 there 1e+06" in notes(table)
    assert "column 'tokens': 2 values have a unit or marks, read like '1,000,000' as 1e+06" in notes(table)


def test_counts_beyond_64_bits(tmp_path: Path) -> None:
    file = write(
        pd.DataFrame({"N": [1, 2], "C": [10**24, 3 * 10**20], "loss": [1.0, 2.0]}), tmp_path / "t.jsonl"
    )
    assert load_table(file)["flops"].tolist() == [1e24, 3e20]
    assert (
        load_table(write(pd.DataFrame({"C": [10**24, 2]}, dtype=object), tmp_path / "t.csv"))["flops"][0]
        == 1e24
    )


def test_a_stand_in_is_used_only_without_the_thing_itself_and_said(tmp_path: Path) -> None:
    frame = pd.DataFrame({"non_embedding_params": [1, 2], "total_params": [3, 4], "train_loss": [2.0, 1.0]})
    table = load_table(write(frame, tmp_path / "a.csv"))
    assert table["params"].tolist() == table["params_non_embedding"].tolist() == [1, 2]
    assert table["params_total"].tolist() == [3, 4]
    assert table["loss"].tolist() == [2.0, 1.0]
    assert "'non_embedding_params' stands in for params" in notes(table)
    assert "'train_loss' stands in for loss" in notes(table)
    assert table.attrs["conventions"] == {"params": "column 'non_embedding_params' of the table"}

    table = load_table(write(frame.assign(N=[5, 6], **{"val/loss": [9.0, 8.0]}), tmp_path / "b.csv"))
    assert table["params"].tolist() == [5, 6]
    assert table["loss"].tolist() == [9.0, 8.0]
    assert "stands in" not in notes(table)

    names = pd.DataFrame({"id": [1, 2], "name": ["a", "b"], "loss": [2.0, 1.0]})
    table = load_table(write(names, tmp_path / "c.csv"))
    assert table["run"].tolist() == ["a", "b"]
    assert "id" in table


@pytest.mark.parametrize("missing", ["params", "tokens", "flops"])
def test_six_nd_only_when_asked(tmp_path: Path, missing: str) -> None:
    frame = RUNS.assign(flops=6 * RUNS["params"] * RUNS["tokens"])
    file = write(frame.drop(columns=missing), tmp_path / "t.csv")
    assert missing not in load_table(file)
    table = load_table(file, derive=True)
    np.testing.assert_allclose(table[missing], frame[missing], rtol=1e-15)
    assert table.attrs["conventions"][missing] == "derived: C = 6·N·D"
    assert f"{missing} derived by the convention C = 6·N·D" in notes(table)


def test_nothing_to_derive_and_nothing_to_derive_it_from(tmp_path: Path) -> None:
    assert "nothing to derive" in notes(load_table(write(RUNS, tmp_path / "a.csv"), derive=True))
    with pytest.raises(DataError, match="needs two of params, tokens, flops; there is no tokens, no flops"):
        load_table(write(RUNS[["params", "loss"]], tmp_path / "b.csv"), derive=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,params,loss\n1,1,2\n", "columns N, params all mean 'params'"),
        ("N,loss\n1,two\n2,3\n", r"column 'loss' has text where numbers belong, row 0 \('two'\)"),
        ("N,loss\n1,2\n1.3Q,3\n", r"column 'params' has text where numbers belong, row 1 \('1.3Q'\)"),
        ("N,loss\n1,True\n", r"row 0 \(True\)"),
        ("N,loss\n", "no rows"),
        ("", "not a readable csv"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(RecordsError, match=message):
        load_table(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"N": 1}\n{"N": 2', "line 2"),
        ("[1, 2]\n", "line 1: expected a JSON object"),
        ('{"N": [1]}\n', "row 0"),
    ],
)
def test_bad_json_lines_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(text)
    with pytest.raises(RecordsError, match=message):
        load_table(file)


def test_gaps_are_counted_and_other_files_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("N,loss\n1e6,2\n2e6,\n3e6,inf\n")
    assert load_table(file).attrs["notes"] == ["column 'loss': 2 rows missing or not finite (rows 1, 2)"]
    (tmp_path / "t.xlsx").touch()
    with pytest.raises(RecordsError, match=r"expected a \.csv"):
        load_table(tmp_path / "t.xlsx")
    with pytest.raises(RecordsError, match="no such file"):
        load_table(tmp_path / "none.csv")


def test_row_numbers_written_by_pandas_are_no_data(tmp_path: Path) -> None:
    RUNS.to_csv(tmp_path / "t.csv")
    table = load_table(tmp_path / "t.csv")
    assert list(table.columns) == list(RUNS.columns)
    assert "column 'Unnamed: 0' has no name; left out" in notes(table)


def test_a_missing_column_comes_with_what_is_near() -> None:
    frame = RUNS.drop(columns="tokens").assign(tokns=1.0)
    with pytest.raises(
        DataError, match=r"no column 'tokens' \(training tokens D\).*did you mean tokns.*--derive"
    ):
        require(frame, ["params", "tokens"])
    require(RUNS, ["params", "tokens"])


def test_counts_too_small_to_be_counts_are_questioned(tmp_path: Path) -> None:
    """VAR's N in billions, or a depth called d, which here is read as D."""
    file = write(pd.DataFrame({"d": [2, 30], "N": [0.1, 2.0], "loss": [3.0, 2.0]}), tmp_path / "t.csv")
    said = notes(load_table(file))
    assert "'d' as training tokens D is 30 at most" in said
    assert "'N' as parameters N is 2 at most; if it counts in another unit" in said
    assert "another unit" not in notes(load_table(write(RUNS, tmp_path / "u.csv")))


def test_tokens_of_the_validation_set_were_not_trained_on(tmp_path: Path) -> None:
    frame = RUNS[["params", "loss"]].assign(val_tokens=1e7, train_batch_size=8, eval_batch_size=16)
    table = load_table(write(frame, tmp_path / "t.csv"))
    assert "tokens" not in table
    assert table["batch"].tolist() == [8, 8, 8]
    with pytest.raises(DataError, match="there is no tokens, no flops"):
        load_table(tmp_path / "t.csv", derive=True)


@pytest.mark.parametrize(
    ("name", "dtype", "unit"),
    [("Compute (EFLOP)", "int64", 1e18), ("compute (PF-days)", "int64", 8.64e19), ("N (B)", "int8", 1e9)],
)
def test_a_unit_never_overflows_whole_numbers(tmp_path: Path, name: str, dtype: str, unit: float) -> None:
    frame = pd.DataFrame({name: np.array([5, 20, 70], dtype=dtype), "loss": [3.0, 2.0, 1.0]})
    table = load_table(write(frame, tmp_path / "t.parquet"))
    assert table[meaning(name)[0]].tolist() == [5 * unit, 20 * unit, 70 * unit]


def test_a_unit_in_name_and_values_is_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"Params (B)": ["7B", "13", "70 b"], "loss": [3.0, 2.0, 1.0]})
    with pytest.raises(
        DataError,
        match=r"'Params \(B\)' has a unit in its name and another in values, row 0 \('7B'\), 2 \('70 b'\)",
    ):
        load_table(write(frame, tmp_path / "t.csv"))


@pytest.mark.parametrize("dtype", ["Int64", "Float64"])
def test_columns_of_pandas_own_numbers_become_plain_ones(tmp_path: Path, dtype: Any) -> None:
    frame = RUNS.assign(tokens=pd.Series([1, None, 3]).astype(dtype))
    frame["step"] = pd.Series([np.nan] * 3).astype(dtype)
    table = load_table(write(frame, tmp_path / "t.parquet"))
    np.testing.assert_array_equal(table["tokens"], [1, np.nan, 3])
    assert table["step"].dtype == np.float64
    assert table.attrs["notes"].count("column 'tokens': 1 row missing or not finite (row 1)") == 1


def test_lines_of_json_end_at_line_feeds_only(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes('{"N": 1e6, "loss": 3, "note": "a\u2028b\u0085c"}\r\n{"N": 2e6, "loss": 2}\n'.encode())
    assert load_table(file)["note"].tolist()[0] == "a\u2028b\u0085c"


def test_of_two_columns_of_one_meaning_the_caller_chooses(tmp_path: Path) -> None:
    frame = RUNS.drop(columns="loss")
    sections: Any = {"eval/loss": [3.0, 2.0, 1.0], "test/loss": [4.0, 3.0, 2.0]}
    sections |= {"eval/step": 1, "test/step": 2}
    frame = frame.assign(**sections)
    file = write(frame, tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"all mean '(step|loss)'; keep one, or name the one to fit by --y"):
        load_table(file)
    for section, losses, step in (("eval", [3, 2, 1], 1), ("test", [4, 3, 2], 2)):
        table = load_table(file, quantity=f"{section}/loss")
        assert table["loss"].tolist() == losses
        assert set(table["step"]) == {step}
        assert f"columns eval/loss, test/loss all mean 'loss'; '{section}/loss' is taken" in notes(table)
    bare = load_table(write(frame.assign(step=7), tmp_path / "b.csv"), quantity="eval/loss")
    assert set(bare["step"]) == {7}


def test_a_models_name_is_no_run_where_it_says_nothing(tmp_path: Path) -> None:
    frame = RUNS.drop(columns="run").assign(experiment="baseline")
    assert "run" not in load_table(write(frame, tmp_path / "a.csv"))
    seeds = pd.DataFrame({"name": ["a", "a", "b"], "seed": [0, 1, 0], "loss": [2.0, 1.9, 1.0]})
    table = load_table(write(seeds, tmp_path / "b.csv"))
    assert table["run"].tolist() == ["a seed 0", "a seed 1", "b seed 0"]


def test_names_of_columns_do_not_reach_the_terminal(tmp_path: Path) -> None:
    frame = pd.DataFrame({"N\x1b[2J": [1.0, 2.0], "N (B)": [1.0, 2.0], "N (M)": [1.0, 2.0]})
    with pytest.raises(RecordsError) as caught:
        load_table(write(frame.rename(columns={"N\x1b[2J": "\x1b[2J"}), tmp_path / "t.csv"))
    assert "\x1b" not in str(caught.value)
    with pytest.raises(DataError, match="it has ") as caught_too:
        require(frame, ["params"])
    assert "\x1b" not in str(caught_too.value)
