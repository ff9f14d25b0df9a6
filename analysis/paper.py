"""The scaling laws that VAR's paper prints (arXiv 2404.02905, eqs. 11–16), in plain N and FLOPs.

- Form ``L − offset = (β·X/unit)^α`` (eq. 9). N is in billions of parameters, C in PFLOP (1e15); the
  paper names no unit of N, and only billions give its error rates (d16: 94.9 % of tokens wrong).
- The losses are reducible: 4.5 nats (last scale) and 5.0 (average) were taken off, the authors'
  estimate of the irreducible part for *their* tokenizer, data and vocabulary of 4096 (the VAR
  repository's issue 23). Levels therefore compare with no other sweep; slopes may be set beside one's own.
- The two families of eqs. do not fit together as printed. At d16 the four pairs of laws (loss and error,
  last and average) should name one C; they name 2.8e18 to 1.9e21 FLOP. With last and average
  exchanged in eqs. 13–16 they agree within 12 % (2.9e19 to 3.3e19, at d30 4.9e20 to 5.5e20), but
  by 47 % at d6, 19 % at d12: a likely reading, not a proven one. ``PAPER_LAWS`` is as printed;
  ``EXCHANGED`` is that reading.
- The constants were entered without the PDF at hand, from public notes that quote eqs. 11, 13, 14 and
  half of 12; the other half gives the 94.9 % above, and 15 and 16 rest on the agreement just named.
  Hold them against the PDF before quoting them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from analysis.errors import Floats, positive

Axis = Literal["params", "flops"]
UNITS: Mapping[Axis, float] = {"params": 1e9, "flops": 1e15}
"""What the paper's X counts."""
_WORDS = {"params": ("N", "N in billions"), "flops": ("C", "C in PFLOP")}
OFFSETS = {"loss_last": 4.5, "loss_avg": 5.0, "error_last": 0.0, "error_avg": 0.0}
"""Nats that the paper takes off its losses; none off its error rates."""
PAPER_DEPTHS = (6, 30)
"""Shallowest and deepest of the paper's sweep: 18 M to 2 B parameters."""


@dataclass(frozen=True)
class PaperLaw:
    """One printed law."""

    quantity: str
    x: Axis
    equation: int
    """Its number in the paper."""
    beta: float
    """Per ``unit``."""
    alpha: float
    unit: float
    """Parameters or FLOPs in one unit of the paper's X."""
    offset: float
    """Nats that were taken off; 0 for error rates."""

    def reducible(self, x: ArrayLike) -> Floats:
        """``(β·x/unit)^α`` at N parameters or C FLOPs: L − offset in nats, or the error rate.

        Raises:
            DataError: ``x`` is not positive.
        """
        at = positive(np.atleast_1d(x), self.x)
        return np.asarray((self.beta * at / self.unit) ** self.alpha)

    def value(self, x: ArrayLike) -> Floats:
        """The whole loss or error rate, offset included, as the paper's models would show it."""
        return self.offset + self.reducible(x)

    def through(self, x: ArrayLike, x0: float, y0: float) -> Floats:
        """A line of this law's slope through (x0, y0) in log-log axes: the slope without the level."""
        return np.asarray(y0 * (positive(np.atleast_1d(x), self.x) / x0) ** self.alpha)

    @property
    def text(self) -> str:
        """As printed: ``(2·N)^−0.23, N in billions (eq. 11)``."""
        symbol, unit = _WORDS[self.x]
        return f"({self.beta:g}·{symbol})^−{-self.alpha:g}, {unit} (eq. {self.equation})"


def _law(quantity: str, x: Axis, equation: int, beta: float, alpha: float) -> PaperLaw:
    return PaperLaw(quantity, x, equation, beta, alpha, UNITS[x], OFFSETS[quantity])


PAPER_LAWS: Mapping[tuple[str, Axis], PaperLaw] = {
    (law.quantity, law.x): law
    for law in (
        _law("loss_last", "params", 11, 2.0, -0.23),
        _law("loss_avg", "params", 11, 2.5, -0.20),
        _law("error_last", "params", 12, 4.9e2, -0.016),
        _law("error_avg", "params", 12, 6.5e2, -0.010),
        _law("loss_last", "flops", 13, 2.2e-5, -0.13),
        _law("loss_avg", "flops", 14, 1.5e-5, -0.16),
        _law("error_last", "flops", 15, 8.1e-2, -0.0067),
        _law("error_avg", "flops", 16, 4.4e-2, -0.011),
    )
}
"""(quantity, axis) -> the law, as printed."""
_SWAPPED = {
    "loss_last": "loss_avg", "loss_avg": "loss_last", "error_last": "error_avg", "error_avg": "error_last",
}  # fmt: skip
EXCHANGED: Mapping[tuple[str, Axis], PaperLaw] = {
    **PAPER_LAWS,
    **{
        (quantity, "flops"): replace(PAPER_LAWS[other, "flops"], quantity=quantity, offset=OFFSETS[quantity])
        for quantity, other in _SWAPPED.items()
    },
}
"""The same with last scale and average exchanged over C: all eight then agree within 12 % from d16 to d30,
but only within 47 % at d6."""


def compute_of(
    quantity: str, params: ArrayLike, laws: Mapping[tuple[str, Axis], PaperLaw] = PAPER_LAWS
) -> Floats:
    """FLOPs at which the law over C gives the value that the law over N gives at ``params``.

    The four quantities should name one C for one model; see the module.

    Raises:
        DataError: ``params`` are not positive.
    """
    over = laws[quantity, "flops"]
    reached = laws[quantity, "params"].reducible(params)
    return np.asarray(reached ** (1 / over.alpha) / over.beta * over.unit)
