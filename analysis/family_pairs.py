"""Two families' laws over the same X, and which of the two is lower where the data of both reach.

- Each form of a law is compared by itself (``Pair``). Which one is believed of a family is decided by its
  data (``compare_two``): the form with an offset where the family's law over that X shows a floor
  (``analysis.study.Law.floor``), else the one without.
- Every form has a veto: where both laws of it converged and lie the other way round at that X, the two
  families are not told apart.
- The verdict is about one X, the largest that the data of both reach, and names it: beyond it the forms part,
  and laws may cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.comparison import Comparison, compare
from analysis.errors import DataError
from analysis.powerlaw import PowerLaw
from analysis.study import LEVEL, Points, Study

QUANTITY = "loss_last"
"""What is compared: the loss of the one map that all families of a group have."""
FEWEST = 4
"""Runs on a family's frontier before one is said to be lower: three cannot show that the frontier
is no line."""
UNLIKE = 1.01
"""Ratio of images seen beyond which a loss over N compares training lengths as much as families."""


@dataclass(frozen=True)
class Pair:
    """Two families' laws over the same X."""

    first: str
    second: str
    x: str
    offsets: tuple[bool, bool]
    """The form of each law."""
    found: Comparison | None
    problem: str
    """Why there is no comparison."""
    against: tuple[str, ...] = ()
    """Families whose data reject this form: they show a floor, and it has none."""

    @property
    def offset(self) -> bool:
        """The form of both laws, where they have the same."""
        return all(self.offsets)

    @property
    def at(self) -> float | None:
        """The largest X that the data of both reach; None where their ranges do not meet."""
        if self.found is None:
            return None
        laws = (self.found.first, self.found.second)
        low, high = max(law.x.min() for law in laws), min(law.x.max() for law in laws)
        return float(high) if low <= high else None

    @property
    def losses(self) -> tuple[tuple[float, float, float], ...]:
        """Value and interval of both laws at ``at``; empty without one."""
        if self.found is None or self.at is None:
            return ()
        return tuple(_predicted(law, self.at) for law in (self.found.first, self.found.second))

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """first's loss over second's at ``at``, with its interval."""
        if self.found is None or self.at is None:
            return None
        said = self.found.ratio(self.at)
        return float(said.value[0]), float(said.low[0]), float(said.high[0])

    @property
    def lower(self) -> str:
        """Which one has the lower loss at ``at``, as far as this form decides that."""
        if self.ratio is None:
            return "their X do not meet" if self.found else "–"
        if self.against:
            return f"form rejected by {' and '.join(self.against)}"
        _, low, high = self.ratio
        return self.first if high < 1 else self.second if low > 1 else "undecided"

    @property
    def apart(self) -> str:
        """Whether the exponents differ."""
        assert self.found is not None
        low, high = self.found.interval()
        return "differ" if low > 0 or high < 0 else "equal exponents not excluded"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        head = {"first": self.first, "second": self.second, "x": self.x, "offset": self.offset}
        if self.found is None:
            return head | {"problem": self.problem}
        return head | {
            "difference": self.found.difference, "interval": list(self.found.interval()), "level": LEVEL,
            "method": self.found.method, "at": self.at, "losses": [list(v) for v in self.losses],
            "ratio": list(self.ratio) if self.ratio else None, "lower": self.lower,
            "rejected_by": list(self.against), "verdict": self.found.verdict,
        }  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Which of two families has the lower loss at equal X, by the form that their data support."""

    first: str
    second: str
    x: str
    at: float | None
    """The X of which this holds."""
    offsets: tuple[bool, bool]
    """The forms that the data of each support."""
    lower: str
    """A family; empty where none is told to be lower."""
    problem: str
    """Why none is; empty if one is."""

    @property
    def sentence(self) -> str:
        """In words."""
        names = f"{self.first} and {self.second}"
        if self.at is None:
            return f"{names} cannot be compared: {self.problem}"
        at = f"at {'N' if self.x == 'params' else 'C'} = {self.at:.3g}"
        if not self.lower:
            return f"{names} {self.problem} {at}"
        return f"{self.lower} is below {self.second if self.lower == self.first else self.first} {at}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "first": self.first, "second": self.second, "x": self.x, "at": self.at,
            "offsets": list(self.offsets), "lower": self.lower or None, "problem": self.problem,
            "sentence": self.sentence,
        }  # fmt: skip


def compare_two(one: Study, two: Study, x: str, points: Points) -> tuple[tuple[Pair, ...], Standing]:
    """Both forms of two families' laws over X, where they can be compared, and what comes of it.

    That laws without an offset cannot be compared is said in their pair's ``problem``; that those with one
    have no interval stands in the family's own table.
    """
    floors = [study.law(QUANTITY, x, points, True).floor for study in (one, two)]
    against = tuple(s.family for s, floor in zip((one, two), floors, strict=True) if floor)
    plain = _pair(one, two, x, points, (False, False), against)
    free = _pair(one, two, x, points, (True, True))
    supported = (floors[0], floors[1])
    believed = next((p for p in (plain, free) if p.offsets == supported), None)
    believed = believed or _pair(one, two, x, points, supported)
    return (plain, free) if free.found else (plain,), standing_of(believed, (plain, free))


def _pair(
    one: Study, two: Study, x: str, points: Points, offsets: tuple[bool, bool], against: tuple[str, ...] = ()
) -> Pair:
    rows = [study.law(QUANTITY, x, points, o) for study, o in zip((one, two), offsets, strict=True)]
    found, problem = None, _unlike(one, two) if x == "params" else ""
    for study, row in zip((one, two), rows, strict=True):
        if row.law is None:
            problem = problem or f"{study.family}: {row.problem}"
    if not problem:
        try:
            laws = [row.law for row in rows if row.law]
            names = (one.family, two.family)
            found = compare(laws[0], laws[1], names, LEVEL, "N" if x == "params" else "C")
        except DataError as error:
            problem = str(error)
    return Pair(one.family, two.family, x, offsets, found, problem, against)


def standing_of(believed: Pair, forms: Sequence[Pair]) -> Standing:
    """Which family is lower.

    Args:
        believed: the two laws that the data support.
        forms: the two families' laws of one form each, which may say the opposite.
    """
    lower, problem = "", ""
    if believed.found is None:
        problem = believed.problem
    elif believed.ratio is None:
        problem = "their compute does not overlap" if believed.x != "params" else "their sizes do not overlap"
    elif min(believed.found.first.groups, believed.found.second.groups) < FEWEST:
        problem = "have too few runs to tell"
    elif believed.lower == "undecided" or any(_contradict(believed, form) for form in forms):
        problem = "are not told apart"
    else:
        lower = believed.lower
    return Standing(
        believed.first, believed.second, believed.x, believed.at, believed.offsets, lower, problem
    )


def _contradict(one: Pair, two: Pair) -> bool:
    """Whether two comparisons put the families the other way round, at the X that the data of both reach."""
    return bool(one.ratio and two.ratio and (one.ratio[0] < 1) != (two.ratio[0] < 1))


def _unlike(one: Study, two: Study) -> str:
    """What is wrong with putting the two over N: a depth of both was trained on other numbers of images."""
    seen = [_images(study) for study in (one, two)]
    for depth in sorted(seen[0].keys() & seen[1].keys()):
        a, b = seen[0][depth], seen[1][depth]
        if max(a, b) > UNLIKE * min(a, b):
            return (
                f"at depth {depth} {one.family} saw {a:.3g} images in training and {two.family} {b:.3g}: a "
                "loss over N would compare the lengths of training"
            )
    return ""


def _images(study: Study) -> dict[int, float]:
    """Images that a family's finished runs saw in training, on average, by depth."""
    sizes = {str(run["run"]): run["config"].get("data", {}).get("train_images") for run in study.runs}
    final = study.finished
    final = final.assign(images=final["epochs"] * final["run"].map(sizes).astype(float)).dropna(
        subset=["images"]
    )
    return {int(str(depth)): float(mean) for depth, mean in final.groupby("depth")["images"].mean().items()}


def _predicted(law: PowerLaw, x: float) -> tuple[float, float, float]:
    said = law.predict(x, LEVEL)
    return float(said.value[0]), float(said.low[0]), float(said.high[0])
