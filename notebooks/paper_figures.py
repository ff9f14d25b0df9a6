# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # VAR's figures 5 and 6, for your own sweep
#
# The paper (arXiv 2404.02905) draws loss and error against model size (fig. 5) and against compute (fig.
# 6), with laws of the form `L = (β·X)^α` (eqs. 11–16). Here are the same figures for your runs, with the
# paper's laws laid over.
#
# **What may be compared, and what not.** The paper's tokenizer, data and vocabulary are not yours: it
# predicts 4096 words of a tokenizer trained on other images. A loss of 5 nats there and of 4 here says
# nothing about which model is better, so *levels cannot be compared*. *Slopes* can be set side by side: how
# fast the part of the loss that can still fall does fall. Every overlay below is therefore the paper's
# slope, moved onto your points.
#
# Set `VARSCALE_SWEEP` to your sweep (`runs/<recipe>`).

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import analysis
from analysis import DataError, fit_power_law, pareto_frontier
from analysis.paper import EXCHANGED, OFFSETS, PAPER_DEPTHS, PAPER_LAWS, compute_of
from analysis.plots import INK, MUTED, PLAIN, STYLE, depth_colours, label, limits, log_axes
from analysis.study import make_study

# %matplotlib inline
plt.rcParams.update(STYLE)
pd.options.display.max_colwidth = None
pd.options.display.float_format = "{:.4g}".format

root = Path(analysis.__file__).parents[1]
own, shipped = root / "runs" / "quickstart", root / "notebooks" / "records" / "quickstart"
if "VARSCALE_SWEEP" in os.environ:
    sweep, why = Path(os.environ["VARSCALE_SWEEP"]), "VARSCALE_SWEEP says so"
elif own.is_dir():
    sweep, why = own, "it is there, and VARSCALE_SWEEP is not set"
else:
    sweep, why = shipped, "the records that ship with the notebook"
print(f"reading {'/'.join(sweep.parts[-2:])}: {why}")

# %% [markdown]
# ## The paper's laws
#
# Their N is in billions of parameters, their C in PFLOP, and their losses are *reducible*: the authors took
# off 4.5 nats (last scale) and 5.0 (average), their estimate of what no model could do better with their
# tokenizer. `analysis.paper` holds the constants, says where they come from, and takes plain N and FLOPs.

# %%
pd.DataFrame(
    [(law.quantity, law.text, law.alpha, law.offset) for law in PAPER_LAWS.values()],
    columns=["quantity", "as printed", "slope", "nats taken off"],
).set_index("quantity")

# %% [markdown]
# A check that costs nothing: at one model size, loss and error, last scale and average, should all name the
# same compute. As printed they lie apart by factors of 16 (d6) to 11 000 (d30). With last scale and average
# exchanged in eqs. 13–16 they agree within 12 % at d16 and d30, so the labels of those equations (or of eqs.
# 11 and 12) seem to have changed places. Over compute, both readings are given below.

# %%
depths = [PAPER_DEPTHS[0], 16, PAPER_DEPTHS[1]]
pd.DataFrame(
    {
        f"d{d}, {reading}": {q: f"{compute_of(q, [73728 * d**3], laws)[0]:.2g} FLOP" for q in OFFSETS}
        for reading, laws in (("as printed", PAPER_LAWS), ("exchanged", EXCHANGED))
        for d in depths
    }
)

# %% [markdown]
# ## Your irreducible loss
#
# To draw a reducible loss one has to take something off. The 4.5 and 5.0 nats belong to the paper's
# tokenizer, so yours comes from your own runs: L∞ of `L = L∞ + (β·N)^α`, where that fit converged, and 0
# where it did not. Mind its interval: where it reaches from 0 to nearly the lowest loss, L∞ is a guess, and
# the slope goes with it.

# %%
study = make_study(sweep)
floors, rows = {}, []
for quantity in OFFSETS:
    row = study.law(quantity, offset=True)
    # The paper takes nothing off its error rates.
    use = row.drawable and quantity.startswith("loss")
    floors[quantity] = row.law.offset if use else 0.0
    said = f"{row.law.offset:.3f}" if row.drawable else ""
    if row.drawable and not row.law.no_interval():
        low, high = row.law.interval()["offset"]
        said += f" [{low:.3f}, {high:.3f}]"
    rows.append((quantity, said, f"{floors[quantity]:.3f}", row.status))
columns = ["quantity", "L∞ [95 %]", "taken off here", "status of the fit"]
pd.DataFrame(rows, columns=columns).set_index("quantity")

# %% [markdown]
# ## Figure 5: against model size
#
# Points: the last evaluation of every finished run. Blue: your law. Its interval of α is that of the fit
# with a free L∞; the much shorter one at a fixed L∞ would pretend that L∞ is known. A band is drawn where
# nothing was taken off. Grey: the paper's slope through the middle of your points.

# %%
TITLES = {
    "loss_last": ("Loss, last scale", "loss"),
    "loss_avg": ("Loss, average", "loss"),
    "error_last": ("Error, last scale", "token error rate"),
    "error_avg": ("Error, average", "token error rate"),
}
slopes = []


def panel(ax, quantity, law, bounds, readings, x_label):
    """Your law and the paper's slopes; ``bounds`` of α are shown, or the reason why there are none."""
    floor, reducible = floors[quantity], law.y - floors[quantity]
    title, noun = TITLES[quantity]
    x = np.geomspace(law.x.min(), law.x.max(), 100)
    log_axes(ax, limits(x, 0.06, 0.1), limits(reducible, 0.4, 0.16))
    said = bounds if isinstance(bounds, str) else "[{:.3g}, {:.3g}]".format(*bounds)
    said = f"yours: α = {law.alpha:.3g} {said}".replace("-", "−")
    ax.plot(x, law.value(x) - floor, color=PLAIN, label=said)
    if not floor and not law.no_interval():
        band = law.predict(x)
        ax.fill_between(x, band.low, band.high, color=PLAIN, alpha=0.14, lw=0)
    middle = float(np.exp(np.log(law.x).mean())), float(np.exp(np.log(reducible).mean()))
    for reading, colour, style in readings:
        said = f"the paper's slope: {reading.alpha:g} (eq. {reading.equation})".replace("-", "−")
        ax.plot(x, reading.through(x, *middle), style, color=colour, lw=1.2, label=said)
    unit = " (nats per token)" if noun == "loss" else ""
    ax.set(title=title, xlabel=x_label, ylabel=f"{noun}{f' − {floor:.3g}' if floor else ''}{unit}")
    ax.legend(loc="lower left")


fig, axes = plt.subplots(2, 2, figsize=(9.4, 7), layout="constrained")
for ax, quantity in zip(axes.flat, OFFSETS, strict=True):
    row = study.law(quantity, offset=floors[quantity] > 0)
    if row.law is None:
        ax.set(title=TITLES[quantity][0], xlabel=row.problem)
        continue
    why = row.law.no_interval()
    bounds = f"({why})" if why else row.law.interval()["alpha"]
    slopes.append(("N", quantity, row.law.alpha, *((None, None, why) if why else (*bounds, "95 % interval"))))
    readings = [(PAPER_LAWS[quantity, "params"], MUTED, "-.")]
    panel(ax, quantity, row.law, bounds, readings, "parameters N (block matrices)")
    final = study.final(quantity).assign(y=lambda f, q=quantity: f[q] - floors[q])
    depths = sorted(final["depth"].unique())
    colours = dict(zip(depths, depth_colours(len(depths)), strict=True))
    ax.scatter(final["params"], final["y"], s=28, color=final["depth"].map(colours), zorder=3)
    label(ax, [(r["params"], r["y"], f"d{r['depth']}", colours[r["depth"]]) for _, r in final.iterrows()])

# %% [markdown]
# ## Figure 6: against compute
#
# Curves: every evaluation of every run, coloured by depth. Circles: the Pareto set, which the law is fitted
# to, at the L∞ above. That L∞ is itself a guess, so the bounds given are not an interval but the slopes
# that the two ends of its 95 % interval would give. The paper's slope is drawn twice: as printed, and with
# last scale and average exchanged. Compute is exact here (3 × forward, allowed attention pairs only); how
# the paper counted is not said.

# %%
fig, axes = plt.subplots(2, 2, figsize=(9.4, 7), layout="constrained")
for ax, quantity in zip(axes.flat, OFFSETS, strict=True):
    floor = floors[quantity]
    kept = study.frame[(study.frame["state"] != "failed") & (study.frame[quantity] > floor)]
    front = pareto_frontier(kept["flops"], kept[quantity])
    names = kept["run"].to_numpy()[front.index]
    try:
        law = fit_power_law(front.x, front.y, offset=floor or False, groups=names)
    except DataError as error:
        ax.set(title=TITLES[quantity][0], xlabel=str(error))
        continue
    bounds, meaning = law.interval()["alpha"], "95 % interval"
    if floor and (why := study.law(quantity, offset=True).law.no_interval()):
        bounds, meaning = "(L∞ has no interval)", why
    elif floor:
        # L∞ may lie above the lowest point by its noise; a line needs all points above it.
        ends = np.minimum(study.law(quantity, offset=True).law.interval()["offset"], 0.999 * front.y.min())
        laws = [fit_power_law(front.x, front.y, offset=float(end), groups=names) for end in ends]
        bounds = sorted(fixed.alpha for fixed in laws)
        meaning = f"as L∞ runs from {ends[0]:.3g} to {ends[1]:.3g}"
    slopes.append(("C", quantity, law.alpha, *((None, None) if isinstance(bounds, str) else bounds), meaning))
    readings = [(PAPER_LAWS[quantity, "flops"], MUTED, "-."), (EXCHANGED[quantity, "flops"], INK, ":")]
    panel(ax, quantity, law, bounds, readings, "training compute C (FLOP, exact)")
    kept = kept.assign(y=kept[quantity] - floor)
    log_axes(ax, limits(kept["flops"], 0.03, 0.08), limits(kept["y"], 0.5, 0.08))
    depths = sorted(kept["depth"].unique())
    colours = dict(zip(depths, depth_colours(len(depths)), strict=True))
    for _, part in kept.groupby("run", sort=False):
        ax.plot(part["flops"], part["y"], color=colours[part["depth"].iloc[0]], lw=1.2)
    ax.plot(front.x, front.y - floor, "o", ms=3.2, mfc="white", mec=INK, mew=0.7, zorder=4)
    starts = kept.groupby("depth").first()
    label(ax, [(r["flops"], r["y"], f"d{d}", colours[d]) for d, r in starts.iterrows()], dx=-3, dy=5)

# %% [markdown]
# ## Slopes side by side
#
# Slopes close to each other are no agreement, and slopes apart no contradiction: another tokenizer, other
# data, other training lengths, and another range of N.

# %%
table = pd.DataFrame(slopes, columns=["over", "quantity", "yours", "from", "to", "from and to are"])
keys = [(row.quantity, "params" if row.over == "N" else "flops") for row in table.itertuples()]
table["the paper's"] = [PAPER_LAWS[key].alpha for key in keys]
table["exchanged"] = [EXCHANGED[key].alpha for key in keys]
table["taken off"] = table["quantity"].map(floors)
table.set_index(["over", "quantity"])

# %% [markdown]
# ## How far apart the two sweeps are
#
# Where the paper's models lie (d6 to d30, solid) and where yours do. Beyond its own range each line is an
# extrapolation (dashed). The vertical distance is what must not be read: it holds two tokenizers and two
# data sets.

# %%
fig, ax = plt.subplots(figsize=(6.2, 3.8))
paper, final = PAPER_LAWS["loss_last", "params"], study.final("loss_last")
y = final["loss_last"] - floors["loss_last"]
final, y = final[y > 0], y[y > 0]
reach = np.geomspace(final["params"].min(), 73728 * PAPER_DEPTHS[1] ** 3, 100)
inside = reach >= 73728 * PAPER_DEPTHS[0] ** 3
ax.plot(reach, paper.reducible(reach), "--", color=MUTED, lw=1)
ax.plot(reach[inside], paper.reducible(reach[inside]), color=MUTED, label=f"the paper, loss − {paper.offset}")
ax.plot(final["params"], y, "o", color=INK, ms=4.5, label=f"yours, loss − {floors['loss_last']:.3g}")
law = fit_power_law(final["params"], y, groups=final["depth"])
ax.plot(reach, law.value(reach), "--", color=PLAIN, lw=1)
ax.plot(law.x, law.value(law.x), color=PLAIN)
log_axes(ax, limits([reach[0], reach[-1]]), limits([*paper.reducible(reach), *law.value(reach)]))
ax.set(title="Last scale, two sweeps", xlabel="parameters N", ylabel="reducible loss (nats per token)")
_ = ax.legend(loc="upper right")
