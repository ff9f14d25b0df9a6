"""How often the IsoFLOP intervals hold the truth, and how far off N_opt is: simulated studies.

    python benchmarks/coverage_isoflop.py --studies 1000 --seed 0   # 1½ to 3 minutes on one core

A study is a sweep of Chinchilla's surface (α 0.3473, β 0.3672 unless said), budgets × N per budget, N
evenly over the decades named around the true optimum, C from 6e18 to 1e21, noise of 0.3 % of the loss
for every point. Drift: the middle of the N leaves the optimum by so many decades more at every budget.
The last three designs read the same runs off at five budgets, C from 2e19 to 3e20: noise of 0.4 % of
the run and 0.05 % of the point. Shares of 95 % intervals, in %, ± 0.7 of 1000 studies; what it printed:

    | design | a by budget | a by run | L, E known | free | N_opt exact | N_opt | rejected | refused |
    |---|---|---|---|---|---|---|---|---|
    | 4 × 5, 1 decade | 94.6 94.6 | none | 96.5 | 93.7 | -0.4 | -0.5 ± 0.1 | 0.0 | 0 |
    | 6 × 5, 1 decade | 93.8 93.8 | none | 96.3 | none | -0.4 | -0.4 ± 0.1 | 0.0 | 0 |
    | 6 × 5, 1 decade, noise 1 % | 93.9 93.9 | none | 96.0 | none | -0.4 | +0.1 ± 0.3 | 2.6 | 0 |
    | 6 × 7, 1 decade, noise 0.1 % | 95.0 95.0 | none | 95.1 | none | -0.3 | -0.3 ± 0.0 | 0.0 | 0 |
    | 6 × 7, 2 decades | 95.0 95.0 | none | 95.0 | 95.2 | -1.4 | -1.3 ± 0.0 | 0.0 | 0 |
    | 9 × 7, 2 decades | 94.1 94.1 | none | 94.0 | 95.8 | -1.4 | -1.4 ± 0.0 | 0.0 | 0 |
    | 6 × 7, 2 decades, α 0.2, β 0.4 | 95.0 95.0 | none | 94.9 | none | -12.7 | -12.7 ± 0.0 | 0.0 | 0 |
    | the same, drift 0.02 | 94.1 95.1 | none | 88.5 | none | -12.5 | -12.5 ± 0.0 | 0.0 | 0 |
    | the same, drift 0.1 | 3.3 98.9 | none | 8.6 | none | -7.4 | -7.4 ± 0.0 | 0.0 | 0 |
    | 5 × 6, 2 decades, 6 runs | 35.6 39.4 | 99.3 99.2 | 99.7 | none | -1.1 | -1.1 ± 0.1 | 0.0 | 0 |
    | 5 × 8, 2 decades, 8 runs | 38.1 40.6 | 95.7 96.6 | 99.2 | none | -1.1 | -1.0 ± 0.1 | 0.0 | 0 |
    | 5 × 12, 2 decades, 12 runs | 45.1 47.2 | 95.1 95.4 | 97.3 | none | -1.0 | -0.9 ± 0.1 | 0.0 | 0 |

- "a by budget" and "a by run": of the true a, then of the parabola's own a without noise.
- "L, E known" and "free": of the exponent of L_opt − E, E given (by run in the last three) or fitted
  too (a third of the studies, ± 1.2). "N_opt": found / true − 1, in %, without noise and the mean with it.
- "rejected": % of budgets; "refused": studies with fewer than three left.

By budget the interval holds what it says where N is placed alike around every optimum. Where it drifts
the parabola's bias goes into a, and into L_opt, and no interval here knows of it:
``IsoFlop.bias_under`` does. Runs shared between budgets need the interval by run, wide of six of them.
Not measured: the spline, N placed at random, a surface that is not of this form.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import fit_isoflop
from analysis.errors import Floats
from analysis.isoflop import IsoFlop

E, A, B = 1.8172, 482.01, 2085.43
CHINCHILLA = (0.3473, 0.3672)
UNLIKE = (0.2, 0.4)


@dataclass(frozen=True)
class Design:
    """Budgets over ``reach`` of C, each with ``per`` N over ``decades``; C = 6ND."""

    budgets: int
    per: int
    decades: float
    noise: float = 0.003
    """Of a run."""
    law: tuple[float, float] = CHINCHILLA
    """α, β."""
    drift: float = 0.0
    """Decades by which the middle of the N leaves the optimum, from budget to budget."""
    shared: float | None = None
    """Runs serve every budget, with the same N in each: noise of a point beside its run's."""
    reach: tuple[float, float] = (6e18, 1e21)

    @property
    def a(self) -> float:
        """The true exponent, β / (α + β)."""
        alpha, beta = self.law
        return beta / (alpha + beta)

    @property
    def fall(self) -> float:
        """The true exponent of L_opt − E, −αβ / (α + β)."""
        alpha, beta = self.law
        return -alpha * beta / (alpha + beta)

    def optimum(self, flops: Floats) -> Floats:
        """The true N_opt at C."""
        alpha, beta = self.law
        return np.asarray((alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** self.a)

    def points(self) -> tuple[Floats, Floats, Floats, np.ndarray]:
        """N, C, the exact L, and the run of each point."""
        flops = np.geomspace(*self.reach, self.budgets)
        spread = np.linspace(-self.decades / 2, self.decades / 2, self.per)
        run = np.arange(self.budgets * self.per)
        if self.shared is None:
            middle = self.optimum(flops) * 10 ** (self.drift * np.arange(self.budgets))
        else:
            middle = np.full(self.budgets, self.optimum(np.sqrt(flops[:1] * flops[-1:]))[0])
            run = run % self.per
        N, C = (middle[:, None] * 10**spread).ravel(), np.repeat(flops, self.per)
        alpha, beta = self.law
        return N, C, E + A * N**-alpha + B * (C / 6 / N) ** -beta, run

    def noises(self, rng: np.random.Generator) -> Floats:
        """Of log L, one per point."""
        if self.shared is None:
            return self.noise * rng.normal(size=self.budgets * self.per)
        own = self.shared * rng.normal(size=(self.budgets, self.per))
        return (self.noise * rng.normal(size=self.per) + own).ravel()


by_run = partial(Design, 5, decades=2.0, noise=0.004, shared=0.0005, reach=(2e19, 3e20))
DESIGNS = {
    "4 × 5, 1 decade": Design(4, 5, 1.0),
    "6 × 5, 1 decade": Design(6, 5, 1.0),
    "6 × 5, 1 decade, noise 1 %": Design(6, 5, 1.0, noise=0.01),
    "6 × 7, 1 decade, noise 0.1 %": Design(6, 7, 1.0, noise=0.001),
    "6 × 7, 2 decades": Design(6, 7, 2.0),
    "9 × 7, 2 decades": Design(9, 7, 2.0),
    "6 × 7, 2 decades, α 0.2, β 0.4": Design(6, 7, 2.0, law=UNLIKE),
    "the same, drift 0.02": Design(6, 7, 2.0, law=UNLIKE, drift=0.02),
    "the same, drift 0.1": Design(6, 7, 2.0, law=UNLIKE, drift=0.1),
    "5 × 6, 2 decades, 6 runs": by_run(per=6),
    "5 × 8, 2 decades, 8 runs": by_run(per=8),
    "5 × 12, 2 decades, 12 runs": by_run(per=12),
}


FREE = ("4 × 5, 1 decade", "6 × 7, 2 decades", "9 × 7, 2 decades")
"""Where L_opt is also fitted above a free offset, which takes longer: in a third of the studies."""


def held(iso: IsoFlop, name: str, value: float) -> bool:
    """Whether the 95 % interval of the exponent ``name`` holds ``value``."""
    low, high = iso.interval()[name]
    return low <= value <= high


def bias_of(iso: IsoFlop, design: Design) -> float:
    """Geometric mean over accepted budgets of N_opt found / true, minus 1."""
    n, flops = np.array([(b.params, b.flops) for b in iso.accepted]).T
    return float(np.exp(np.log(n / design.optimum(flops)).mean()) - 1)


@dataclass(frozen=True)
class Found:
    """Of one design; shares are of studies, in 95 % intervals."""

    shares: Floats
    """(6,): the true a and the parabola's own without noise, by budget; both by run; the exponent of
    L_opt above the known E, by run where runs are shared; above a free offset. NaN where not measured."""
    exact: float
    """N_opt found / true − 1 without noise."""
    mean: float
    """The same with noise, mean over studies."""
    error: float
    """Standard error of ``mean``."""
    rejected: float
    """Share of budgets."""
    refused: int
    """Studies of fewer than three accepted budgets."""


def coverage(design: Design, studies: int, free: int, seed: int) -> Found:
    """``studies`` simulated, ``free`` of them also fitted with a free offset."""
    rng = np.random.default_rng(seed)
    N, C, exact, run = design.points()
    clean = fit_isoflop(N, exact, flops=C)
    own = clean.params["a"]
    shares, biases, rejected = [], [], 0
    for k in range(studies):
        loss = exact * np.exp(design.noises(rng))
        iso = by_unit = fit_isoflop(N, loss, flops=C, loss_offset=E)
        rejected += len(iso.budgets) - len(iso.accepted)
        if not iso.laws:
            continue
        row = np.full(6, np.nan)
        row[:2] = held(iso, "a", design.a), held(iso, "a", own)
        if design.shared is not None:
            by_unit = fit_isoflop(N, loss, flops=C, loss_offset=E, groups=run)
            row[2:4] = held(by_unit, "a", design.a), held(by_unit, "a", own)
        row[4] = held(by_unit, "loss", design.fall)
        if k < free:
            row[5] = held(fit_isoflop(N, loss, flops=C, loss_offset=True), "loss", design.fall)
        shares.append(row)
        biases.append(bias_of(iso, design))
    held_of = np.stack(shares)
    counted = (~np.isnan(held_of)).sum(0)
    return Found(
        np.where(counted > 0, np.nansum(held_of, 0) / np.maximum(counted, 1), np.nan),
        bias_of(clean, design),
        float(np.mean(biases)),
        float(np.std(biases) / np.sqrt(len(biases))),
        rejected / studies / design.budgets,
        studies - len(shares),
    )


def table(studies: int, seed: int) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| design | a by budget | a by run | L, E known | free | N_opt exact | N_opt | rejected | refused |"
    yield "|---" * 9 + "|"
    for name, design in DESIGNS.items():
        f = coverage(design, studies, studies // 3 if name in FREE else 0, seed)
        s = ["" if np.isnan(share) else f"{100 * share:.1f}" for share in f.shares]
        cells = [f"{s[0]} {s[1]}", f"{s[2]} {s[3]}".strip() or "none", s[4], s[5] or "none"]
        cells += [f"{100 * f.exact:+.1f}", f"{100 * f.mean:+.1f} ± {100 * f.error:.1f}"]
        cells += [f"{100 * f.rejected:.1f}", str(f.refused)]
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for line in table(arguments.studies, arguments.seed):
        print(line, flush=True)
