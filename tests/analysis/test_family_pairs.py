"""Which of two families is lower: by the form that the data support, at an X that is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from analysis import compare, fit_power_law
from analysis.families import Families, compare_families, headline
from analysis.family_pairs import Pair, Standing, standing_of
from analysis.study import make_studies
from tests.analysis import fabricate

Truth = Callable[[np.ndarray], np.ndarray]
SIZES = 73728.0 * np.arange(1, 9) ** 3


def floored(x: np.ndarray) -> np.ndarray:
    """Falls steeply, then rests at 3 nats."""
    return 3.0 + 1.5 * (x / 1e6) ** -0.6


def straight(x: np.ndarray) -> np.ndarray:
    """Below ``floored`` at the largest size, above the line that is forced through it."""
    return 3.35 * (x / 1e6) ** -0.035


def pair_of(truths: tuple[Truth, Truth], *offsets: bool) -> Pair:
    """Comparison of 40 runs of two families at the same 40 sizes."""
    rng = np.random.default_rng(1)
    x = np.geomspace(SIZES[0], SIZES[-1], 40)
    laws = [
        fit_power_law(x, truth(x) * np.exp(1e-4 * rng.normal(size=40)), offset)
        for truth, offset in zip(truths, offsets, strict=True)
    ]
    found = compare(laws[0], laws[1], ("one", "two"), x_name="C")
    return Pair("one", "two", "flops", (offsets[0], offsets[1]), found, "")


def sweep_of(root: Path, truths: dict[str, Truth]) -> Path:
    """A sweep of depths 1 to 8 whose final losses lie on ``truths``, with a little noise."""
    folder = fabricate.sweep(root, depths=range(1, 9), families=tuple(truths), evaluations=2)
    rng = np.random.default_rng(0)
    for family, truth in truths.items():
        for file in folder.glob(f"{family}-d*/metrics.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            final = float(truth(np.array([float(lines[-1]["params"])]))[0] * np.exp(1e-4 * rng.normal()))
            for line, factor in zip(lines, (1.5, 1.0), strict=True):
                line["loss_last"] = final * factor
            file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def over_n(found: Families) -> Standing:
    return next(s for s in found.standings if s.x == "params")


def test_a_rejected_form_does_not_decide(tmp_path: Path) -> None:
    folder = sweep_of(tmp_path, {"flexvar": floored, "raster": lambda x: floored(x) * 0.99})
    found = compare_families(make_studies(folder))
    standing = over_n(found)
    assert (standing.offsets, standing.lower) == ((True, True), "raster")
    plain = next(p for p in found.pairs if p.x == "params" and not p.offset)
    assert set(plain.against) == {"flexvar", "raster"}
    assert plain.lower == "form rejected by flexvar and raster"
    assert standing.sentence == f"raster is below flexvar at N = {SIZES[-1]:.3g}"
    assert json.loads(json.dumps(found.to_json()))["standings"][0]["lower"] == "raster"


def test_without_a_floor_the_form_without_one_decides(tmp_path: Path) -> None:
    folder = sweep_of(tmp_path, {"flexvar": straight, "raster": lambda x: straight(x) * 0.99})
    standing = over_n(compare_families(make_studies(folder)))
    assert (standing.offsets, standing.lower) == ((False, False), "raster")


def test_two_forms_that_disagree_tell_nothing_apart() -> None:
    plain, mixed = pair_of((floored, straight), False, False), pair_of((floored, straight), True, False)
    assert plain.ratio is not None
    assert mixed.ratio is not None
    assert plain.ratio[2] < 1 < mixed.ratio[1], "each is sure of itself"
    assert standing_of(mixed, [mixed]).lower == "two"
    standing = standing_of(mixed, [plain])
    assert standing.lower == ""
    assert standing.sentence == f"one and two are not told apart at C = {SIZES[-1]:.3g}"


def test_a_form_that_does_not_compare_has_no_say() -> None:
    plain = pair_of((floored, straight), False, False)
    failed = Pair("one", "two", "flops", (True, True), None, "two: no offset found")
    assert standing_of(plain, [plain, failed]).lower == "one"
    assert (
        standing_of(failed, [plain, failed]).sentence
        == "one and two cannot be compared: two: no offset found"
    )


def test_each_family_has_the_form_that_its_own_data_support(tmp_path: Path) -> None:
    """A straight law's offset rests at 0, so that two laws with an offset would compare nothing."""
    folder = sweep_of(tmp_path, {"flexvar": floored, "raster": lambda x: 2.4 * (x / 1e6) ** -0.05})
    standing = over_n(compare_families(make_studies(folder)))
    assert (standing.offsets, standing.lower) == ((True, False), "raster")


def test_the_headline_names_the_compute_at_which_it_holds(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=range(1, 6), families=("flexvar", "raster"))
    found = compare_families(make_studies(folder))
    (standing,) = [s for s in found.standings if s.x == "flops"]
    assert standing.at is not None
    assert headline(found).endswith(f"at C = {standing.at:.3g}.")


def test_families_that_saw_other_numbers_of_images_are_not_put_over_n(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3, 4), families=("flexvar", "raster"))
    for file in folder.glob("raster-d*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(
            "".join(json.dumps(line | {"epochs": line["epochs"] * 1.02}) + "\n" for line in lines)
        )
    found = compare_families(make_studies(folder))
    (pair,) = [p for p in found.pairs if p.x == "params"]
    assert pair.problem.startswith("at depth 1 flexvar saw 1.92e+04 images in training and raster 1.96e+04")
    assert over_n(found).lower == ""
    assert all(p.found for p in found.pairs if p.x == "flops")
