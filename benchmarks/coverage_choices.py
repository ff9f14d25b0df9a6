"""How often what is chosen and compared is right: simulated studies with known laws.

    python benchmarks/coverage_choices.py allocate --studies 300
    python benchmarks/coverage_choices.py compare --studies 1000
    python benchmarks/coverage_choices.py broken --studies 400
    python benchmarks/coverage_choices.py choose --studies 40
    python benchmarks/coverage_choices.py next_run --studies 2000

Each prints a line per design: shares of 95 % intervals that held the truth (``compare``, ``broken``,
``allocate``), shares of forms chosen (``choose``), half-widths promised over those that came
(``next_run``). Free offsets are slow; their designs do a tenth or a seventh. The figures stand in the
docstrings of ``analysis.allocation``, ``comparison``, ``broken`` and ``design``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.allocation import allocate
from analysis.broken import choose_form, fit_broken_power_law
from analysis.comparison import compare
from analysis.design import next_run
from analysis.errors import DataError, Floats
from analysis.powerlaw import PowerLaw, fit_power_law
from scaling.config import ModelConfig
from scaling.flops import params, train_flops

Lines = Iterator[str]


def ladder(n: int) -> Floats:
    """N of d = 1 … n."""
    return np.asarray(73728.0 * np.arange(1, n + 1) ** 3.0)


def shares(names: str, hits: Sequence[Sequence[float]]) -> str:
    """``name share`` of every column, and of how many studies."""
    said = np.nanmean(np.array(hits), 0)
    told = [f"{name.strip()} {share:.1%}" for name, share in zip(names.split(","), said, strict=True)]
    return f"{', '.join(told)} of {len(hits)}"


# -- allocate ----------------------------------------------------------------------------------

SCALES, IMAGES = (1, 2, 3, 4), 50_000
TOKENS = sum(s * s for s in SCALES)


def surface(N: Floats, D: Floats) -> Floats:
    """The true L(N, D)."""
    return np.asarray(2.0 + 40.0 * N**-0.30 + 120.0 * D**-0.32)


def allocations(studies: int) -> Lines:
    """4 depths × 3 lengths at 0.2 % noise, a budget 41 times the largest run's."""
    rng = np.random.default_rng(0)
    deep = range(1, 60)
    models = {d: ModelConfig.from_depth(d, scales=SCALES, vocab=512) for d in deep}
    N = np.array([params(models[d]) for d in deep], dtype=np.float64)
    cost = np.array([train_flops(models[d]) for d in deep], dtype=np.float64) / TOKENS
    runs = pd.DataFrame(
        [
            {"run": f"d{d}-e{e}", "depth": d, "params": N[d - 1], "tokens": e * IMAGES * TOKENS, "epochs": e,
             "final": True, "flops": cost[d - 1] * e * IMAGES * TOKENS}
            for d in (1, 2, 3, 4) for e in (5, 20, 80)
        ]
    )  # fmt: skip
    C = 41 * float(runs["flops"].max())
    reached = surface(N, C / cost)
    best = int(np.argmin(reached)) + 1
    exact = surface(runs["params"].to_numpy(), runs["tokens"].to_numpy(dtype=np.float64))
    hits = []
    refused = 0
    for _ in range(studies):
        noise = 0.002 * rng.normal(size=len(runs) + 1)
        try:
            found = allocate(C, runs.assign(loss_last=exact * np.exp(noise[:-1])))
        except DataError:
            refused += 1
            continue
        table = found.table[(found.table["depth"] != found.depth) & (found.table["depth"] < deep[-1])]
        if found.depth_interval is None or found.depth > deep[-1]:
            refused += 1
            continue
        worse = reached[table["depth"].to_numpy(dtype=int) - 1] / reached[found.depth - 1] - 1
        inside = (table["worse_low"] <= worse) & (worse <= table["worse_high"])
        low, high = found.depth_interval
        new = reached[found.depth - 1] * np.exp(noise[-1])
        hits.append([inside.mean(), low <= best <= high, found.low <= new <= found.high])
    yield shares("differences, best depth, new run", hits) + f"; without an interval {refused}"


# -- compare -----------------------------------------------------------------------------------

MEET = 2e6


def drawn(rng: np.random.Generator, n: int, alpha: float, noise: float, offset: float) -> PowerLaw:
    """A law fitted to one noisy run at each of n depths; with an offset it is fitted free."""
    x = ladder(n)
    y = (offset + (3 - offset) * (x / MEET) ** alpha) * np.exp(noise * rng.normal(size=n))
    return fit_power_law(x, y, offset=offset > 0)


def comparisons(studies: int) -> Lines:
    """Exponents −0.10 and −0.14, 6 + 6 runs; with free offsets −0.20 and −0.30, 10 + 10 runs."""
    for n, alphas, noises, offset, fewer in (
        (6, (-0.10, -0.14), (0.002, 0.002), 0.0, 1),
        (6, (-0.10, -0.14), (0.002, 0.004), 0.0, 1),
        (10, (-0.20, -0.30), (0.001, 0.001), 2.0, 10),
    ):
        rng = np.random.default_rng(0)
        hits, refused = [], 0
        for _ in range(studies // fewer):
            try:
                laws = [drawn(rng, n, a, e, offset) for a, e in zip(alphas, noises, strict=True)]
                found = compare(laws[0], laws[1])
            except DataError:
                refused += 1
                continue
            low, high = found.interval()
            crossing = any(start <= MEET <= stop for start, stop in found.undecided)
            hits.append([low <= alphas[0] - alphas[1] <= high, crossing])
        kind = "free offsets" if offset else "no offset"
        yield f"{n} + {n} runs, {kind}, noise {noises[0]:.1%} and {noises[1]:.1%}: " + (
            f"{shares('difference, crossing', hits)}; without a law {refused}"
        )


# -- broken ------------------------------------------------------------------------------------


def bent(x: Floats, at: float, before: float, after: float) -> Floats:
    """Caballero et al. 2022, eq. 1, one break."""
    return np.asarray(5 * (x / at) ** before * (1 + (x / at) ** (1 / 0.3)) ** ((after - before) * 0.3))


def breaks(studies: int) -> Lines:
    """A break from −0.05 to −0.1 half way, noise 0.2 %, and a forecast at twice the largest X."""
    for n in (8, 12):
        rng = np.random.default_rng(0)
        x = ladder(n)
        at = float(np.sqrt(x[1] * x[-2]))
        far = 2 * x[-1:]
        truth, ahead = bent(x, at, -0.05, -0.1), float(bent(far, at, -0.05, -0.1)[0])
        hits = []
        for _ in range(studies):
            law = fit_broken_power_law(x, truth * np.exp(0.002 * rng.normal(size=n)))
            bounds, said = law.interval(), law.predict(far)
            true = {"alpha": -0.05, "alpha_after": -0.1, "break": at}
            held = [bounds[name][0] <= value <= bounds[name][1] for name, value in true.items()]
            hits.append([*held, said.low[0] <= ahead <= said.high[0]])
        yield f"{n} rungs: {shares('alpha, alpha after, break, forecast', hits)}"


def choices(studies: int) -> Lines:
    """What ``choose_form`` calls a power law of −0.05, and one that doubles half way."""
    for name, after in (("power", -0.05), ("broken", -0.1)):
        rng = np.random.default_rng(0)
        right = total = 0
        for n in (8, 12, 16):
            for noise in (0.001, 0.003):
                x = ladder(n)
                truth = bent(x, float(np.sqrt(x[1] * x[-2])), -0.05, after)
                for _ in range(studies):
                    right += choose_form(x, truth * np.exp(noise * rng.normal(size=n))).chosen == name
                    total += 1
        yield f"{name} laws of 8, 12, 16 rungs, noise 0.1 and 0.3 %: called so {right / total:.1%} of {total}"


# -- next_run ----------------------------------------------------------------------------------


def promises(studies: int) -> Lines:
    """The half-width of α's interval promised for depth 12, over the one that came."""
    added = pd.DataFrame({"params": [73728.0 * 12**3], "flops": [1.0]})
    for offset, depths, noise, fewer in (
        (False, (1, 2, 3, 4, 5), 0.003, 1),
        (True, (1, 2, 3, 4, 5, 6, 7, 9), 0.001, 7),
    ):
        rng = np.random.default_rng(11)
        x = 73728.0 * np.array([*depths, 12.0]) ** 3.0
        truth = (2.0 if offset else 0.0) + (1e-9 * x) ** (-0.2 if offset else -0.05)
        promised, came = [], []
        for _ in range(studies // fewer):
            y = truth * np.exp(noise * rng.normal(size=len(x)))
            law, after = fit_power_law(x[:-1], y[:-1], offset), fit_power_law(x, y, offset)
            if law.converged and after.converged:
                promised.append(next_run(law, added).best["half_width"])
                low, high = after.interval()["alpha"]
                came.append((high - low) / 2)
        yield (
            f"{'free' if offset else 'no'} offset: mean {np.mean(promised) / np.mean(came):.3f}, "
            f"median {np.median(promised) / np.median(came):.3f} of {len(came)}"
        )


STUDIES: dict[str, tuple[Callable[[int], Lines], int]] = {
    "allocate": (allocations, 300), "compare": (comparisons, 1000), "broken": (breaks, 400),
    "choose": (choices, 40), "next_run": (promises, 2000),
}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--studies", type=int, help="of each design; by default as in the docstring")
    options = parser.parse_args()
    make, usual = STUDIES[options.study]
    for line in make(options.studies or usual):
        print(line, flush=True)
