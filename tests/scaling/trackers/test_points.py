"""A line of metrics.jsonl as names and numbers: nothing of it is lost, and its line can be told from them."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from scaling.trackers.points import AXES, flat, point_of, series_of

NAMES = st.text("abcdefgh_", min_size=1, max_size=8).filter(lambda n: n not in (*AXES, "kind", "setting"))
NUMBERS = st.one_of(st.integers(-(10**18), 10**18), st.floats(allow_nan=False))


@given(st.dictionaries(NAMES, NUMBERS, min_size=1), st.integers(0, 10**9), st.sampled_from(["train", "eval"]))
def test_every_number_of_a_line_is_in_its_point(values: dict[str, float], step: int, kind: str) -> None:
    point = point_of({"kind": kind, "step": step, "flops": 5, **values})
    assert point.numbers == {"step": step, "flops": 5} | {f"{kind}/{k}": v for k, v in values.items()}
    assert (point.step, point.series) == (step, kind)
    assert series_of(list(point.numbers)) == kind


def test_lists_nulls_and_settings() -> None:
    point = point_of(
        {"kind": "fidelity", "step": 3, "setting": "val/50, g=1.5", "fid": 8.5, "is": None, "extractor": "e",
         "loss_scales": [1.0, 2.0]}
    )  # fmt: skip
    series = "fidelity/val-50, g=1.5"
    assert point.values == {
        f"{series}/fid": 8.5,
        f"{series}/loss_scale_1": 1.0,
        f"{series}/loss_scale_2": 2.0,
    }
    assert series_of([*point.numbers]) == series


def test_a_row_that_is_no_point_has_no_series() -> None:
    assert series_of(["step", "flops"]) is None
    assert series_of(["eval/x", "train/y"]) is None


def test_configs_become_flat() -> None:
    value = {"model": {"depth": 2, "scales": [1, 2]}, "seed": 0, "data": {"path": None, "flip": True}}
    assert flat(value) == {"model.depth": 2, "model.scales": "[1, 2]", "seed": 0, "data.flip": True}
    assert json.loads(json.dumps(flat(value))) == flat(value)
