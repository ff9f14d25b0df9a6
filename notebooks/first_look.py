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
# # A first look at a sweep
#
# What was trained, which law the losses obey, how sure that is, and where not to trust it. No torch, and a
# few seconds. Set `VARSCALE_SWEEP` to your own sweep (`runs/<recipe>`); without it this reads
# `runs/quickstart` if you have run it, and else the quickstart records that ship beside this notebook.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import analysis
from analysis import DataError, backtest, fit_power_law, load_runs, pareto_frontier
from analysis.conventions import conventions_table
from analysis.plots import (
    STYLE,
    compute_figure,
    draw_law,
    forecast_figure,
    label,
    limits,
    log_axes,
    params_figure,
)
from analysis.study import make_study

# %matplotlib inline
plt.rcParams.update(STYLE)
pd.options.display.max_colwidth = None
pd.options.display.float_format = "{:.5g}".format

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
# ## What is there
#
# One row per evaluation. A note names every run that is unfinished, failed or missing; nothing is dropped
# in silence.

# %%
runs = load_runs(sweep)
last = runs[runs["final"]].sort_values("params")
print(f"{runs['run'].nunique()} runs, {len(last)} finished, {len(runs)} evaluations")
print("\n".join(runs.attrs["notes"]) or "no notes: every run that the sweep lists is there and finished")

# %% [markdown]
# The values that the laws are fitted to: the last evaluation of every finished run. Losses are nats per
# token; `_se` is the standard error over the validation images, not over seeds.

# %%
columns = [
    "seed",
    "params",
    "tokens",
    "epochs",
    "flops",
    "loss_last",
    "loss_last_se",
    "loss_avg",
    "error_last",
]
last.set_index("depth")[columns]

# %% [markdown]
# ## Loss against model size
#
# `L = (β·N)^α` is a straight line in log-log axes. N counts the matrices of the transformer's blocks. Seeds
# of one depth are not independent, hence `groups`.

# %%
law = fit_power_law(last["params"], last["loss_last"], groups=last["depth"])
law

# %% [markdown]
# Loss cannot fall for ever: the images have an entropy, and the tokenizer adds to it. `L = L∞ + (β·N)^α`
# has that floor. Over a short range both forms fit about equally well, and they forecast differently, so
# look at both. `make_study` fits every form to every quantity, as the report does.

# %%
study = make_study(sweep)
laws = [
    (name, row.law)
    for name, offset in (("no offset: ", False), ("offset: ", True))
    if (row := study.law("loss_last", offset=offset)).law
]
params_figure(study.final("loss_last"), "loss_last", laws)

# %% [markdown]
# The exponents with their 95 % intervals. An interval of L∞ that reaches 0 means: these runs cannot say
# whether there is a floor.

# %%
rows = []
for quantity in ("loss_last", "loss_avg", "error_last", "error_avg"):
    for offset in (False, True):
        row = study.law(quantity, offset=offset)
        found = {"quantity": quantity, "form": "L∞ + (βN)^α" if offset else "(βN)^α"}
        if row.drawable and not row.law.no_interval():
            found["r"] = f"{row.law.pearson:.4f}"
            for name, key in (("α", "alpha"), ("L∞", "offset")):
                if key in row.law.params:
                    low, high = row.law.interval(0.95)[key]
                    found[f"{name} [95 %]"] = f"{row.law.params[key]:.4f} [{low:.4f}, {high:.4f}]"
        rows.append(found | {"status": row.status})
table = pd.DataFrame(rows, columns=["quantity", "form", "α [95 %]", "L∞ [95 %]", "r", "status"])
table.fillna("").set_index("quantity")

# %% [markdown]
# ## Would it have predicted?
#
# A law is trusted as far as it has predicted. Hide the largest depth, fit the others, and see what came.

# %%
forecasts = [
    (f"{'offset' if offset else 'no offset'}: ", forecast)
    for offset, forecast in study.forecasts.get("loss_last", ())
]
if forecasts:
    shown = forecast_figure(study.final("loss_last"), "loss_last", forecasts)
else:
    shown = "; ".join(study.forecast_problems)
shown

# %% [markdown]
# The same, rolled forward: every depth from all smaller ones. Few points make wide intervals; an interval
# that always covers and is wider than the whole curve has told you nothing.

# %%
try:
    rolled = backtest(last["params"], last["loss_last"], groups=last["depth"], rolling=True)
    print(rolled.summary())
    print(f"largest error {rolled.worst:.2%}; {rolled.coverage:.0%} of the runs lay inside their interval")
except DataError as error:
    print(f"no rolling backtest: {error}")

# %% [markdown]
# ## Loss against compute
#
# Every evaluation of every run, and the best that any compute reached: the Pareto frontier.

# %%
good = study.frame[study.frame["state"] != "failed"]
front = [("", row.law) for row in [study.law("loss_last", "flops", "pareto")] if row.law]
compute_figure(good, "loss_last", study.frontiers["loss_last", "pareto"], front, "flops")

# %% [markdown]
# "The frontier" is two things. The *Pareto set* holds every evaluation that nothing cheaper matched, so it
# weighs compute by how often runs were evaluated. The *lower hull* in log-log axes is the envelope itself,
# of few points. They are different estimands with different exponents; a figure must name its own.

# %%
fig, ax = plt.subplots(figsize=(5.6, 3.6))
for kind, colour in (("pareto", "#0b6fb3"), ("hull", "#c9480b")):
    frontier = pareto_frontier(good["flops"], good["loss_last"], kind)
    names = good["run"].to_numpy()[frontier.index]
    marker = "o" if kind == "pareto" else "s"
    ax.plot(frontier.x, frontier.y, marker, ms=4 if kind == "pareto" else 7, mfc="none", color=colour)
    try:
        fitted = fit_power_law(frontier.x, frontier.y, groups=names)
        draw_law(ax, fitted, colour, f"{kind}, {len(frontier.x)} points: ", points=False)
    except DataError as error:
        print(f"{kind}: {error}")
log_axes(ax, limits(good["flops"]), limits(good["loss_last"], 0.45, 0.06))
ax.set(title="Two frontiers of the same runs", xlabel="training compute C (FLOP, exact)")
ax.set_ylabel("loss, last scale (nats per token)")
_ = ax.legend(loc="lower left")

# %% [markdown]
# ## What N and C count
#
# Exponents move with the counting alone: with or without adaLN, embeddings and head; exact FLOPs or 6·N·D.
# The difference says nothing about the model. Runs keep their parts in `costs.json`; runs without it have
# fewer conventions.

# %%
parts = sweep if all((sweep / name / "costs.json").is_file() for name in runs["run"].unique()) else None
if parts is None:
    print("these runs are older than costs.json: only blocks or all parameters, exact FLOPs or 6·N·D")
tables = [
    conventions_table(good, parts, exponent).assign(law=title)
    for exponent, title in (("params", "loss_last ∝ N^α"), ("flops", "loss_last ∝ C^α, Pareto set"))
]
shown = pd.concat(tables)[["law", "N", "C", "exponent", "low", "high", "moved", "status"]]
shown.set_index("law")

# %% [markdown]
# ## Where not to trust it
#
# What weakens the conclusions, found from the records by rule.

# %%
for note in study.notes:
    print("-", note)

# %% [markdown]
# How far the two forms part beyond the largest depth: at ten times N, a hundred, a thousand. Where the two
# intervals no longer overlap, or are wider than anything you could decide by, the runs do not reach that
# far.

# %%
beyond = last["params"].max() * np.array([10, 100, 1000])
fig, ax = plt.subplots(figsize=(5.6, 3.6))
for (name, fitted), colour in zip(laws, ("#0b6fb3", "#c9480b"), strict=False):
    draw_law(ax, fitted, colour, name, reach=(last["params"].min(), beyond[-1]), observation=True)
    if fitted.converged and not fitted.no_interval():
        said = fitted.predict(beyond, observation=True)
        for x, value, low, high in zip(beyond, said.value, said.low, said.high, strict=True):
            print(f"{name}N = {x:.2g}: {value:.3f} [{low:.3f}, {high:.3f}]")
log_axes(ax, limits([last["params"].min(), beyond[-1]]), limits(last["loss_last"], 2.6, 0.3))
label(ax, [(r["params"], r["loss_last"], f"d{r['depth']}", "#636b76") for _, r in last.iterrows()])
ax.set(title="The same runs, three decades on", xlabel="parameters N (block matrices)")
ax.set_ylabel("loss, last scale (nats per token)")
_ = ax.legend(loc="lower left")

# %% [markdown]
# Next: `notebooks/paper_figures.py` sets this sweep beside the paper's laws. How *long* to train for a
# budget needs runs of several lengths per depth; with those, `analysis.allocate(budget, runs)` answers it.
