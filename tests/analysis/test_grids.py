"""Sweeps of several lengths and settings: which runs laws take, the surface, and what frontiers leave out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.report import make_report
from analysis.study import ANNEALED_CAUTION, FRONTIER_CAUTION, Study, make_study
from scaling.records import RunFolder, write_json
from tests.analysis.fabricate import BATCH, IMAGES, SEQ, run_config

E, A, B, ALPHA, BETA = 3.0, 40.0, 900.0, 0.35, 0.45


def loss(params: float, tokens: float) -> float:
    return float(E + A / params**ALPHA + B / tokens**BETA)


def write_run(
    sweep: Path, depth: int, steps: int, seed: int, schedule: str, setting: Mapping[str, Any], factor: float
) -> str:
    params, rate = 73728 * depth**3, round(setting.get("lr", 0) * 1e6)
    name = f"var-d{depth}-s{seed}-{steps:04d}{rate:06d}"
    run = RunFolder(sweep / name)
    config = run_config(depth, seed)
    config["train"] = {"steps": steps, "batch": BATCH, "schedule": schedule} | dict(setting)
    run.create(config)
    for done in (steps // 4, steps // 2, steps):
        tokens = done * BATCH * SEQ
        # Before its decay a run stands above what the same tokens give once annealed.
        value = loss(params, tokens) * factor * (1.0 if done == steps else 1.02)
        values = {"loss_last": value, "loss_avg": value + 0.1, "error_last": 0.9, "error_avg": 0.91}
        run.append(
            {
                "kind": "eval", "step": done, "params": params, "params_total": params + 200_000,
                "tokens": tokens, "unique_tokens": min(tokens, IMAGES * SEQ), "epochs": done * BATCH / IMAGES,
                "flops": int(4.1 * params * tokens), "flops_6nd": int(6 * params * tokens),
                "loss_scales": [value] * 4, "error_scales": [0.9] * 4,
            }
            | values
            | {f"{key}_se": 0.001 for key in values}
        )  # fmt: skip
    run.close()
    run.set_status("done", step=steps, total_steps=steps)
    return name


def write_sweep(
    root: Path,
    depths: Sequence[int] = (1, 2, 3, 4),
    steps: Sequence[int] = (100, 200, 300, 400),
    schedule: str = "wsd",
    settings: Sequence[Mapping[str, Any]] = ({},),
    penalty: Any = lambda depth, setting: 1.0,
    recipe: Mapping[str, Any] | None = None,
    noise: float = 0.0,
) -> Path:
    sweep, rng, names = root / "grid", np.random.default_rng(0), []
    for depth in depths:
        for setting in settings:
            for length in steps:
                factor = penalty(depth, setting) * float(np.exp(noise * rng.normal()))
                names.append(write_run(sweep, depth, length, 0, schedule, setting, factor))
    listed = [
        {"run": n, "family": "var", "tokenizer": "../tokenizers/t", "tokens": "../tokens/t"} for n in names
    ]
    write_json(
        sweep / "sweep.json",
        {"name": "grid", "runs": listed, "recipe": dict(recipe or {}), "command": "x", "commit": "y"},
    )
    return sweep


def noted(study: Study, text: str) -> bool:
    return any(text in note for note in study.notes)


def test_the_surface_of_a_grid_is_recovered(tmp_path: Path) -> None:
    study = make_study(write_sweep(tmp_path, noise=1e-4))
    last, _ = study.grids
    assert last.surface is not None
    assert last.surface.converged
    found = last.surface.params
    assert found["E"] == pytest.approx(E, rel=0.02)
    assert (found["alpha"], found["beta"]) == (pytest.approx(ALPHA, rel=0.05), pytest.approx(BETA, rel=0.05))
    assert len(last.surface.loss) == 16
    low, high = last.surface.interval()["alpha"]
    assert low < found["alpha"] < high
    page = make_report(study.folder).read_text()
    names = {file.name for file in (study.folder / "report" / "figures").glob("*_vs_tokens.svg")}
    assert names == {"loss_last_vs_tokens.svg", "loss_avg_vs_tokens.svg"}
    assert all(f'<figure id="{Path(name).stem}">' in page for name in names)
    assert "Loss over N and D" in page
    written = json.loads((study.folder / "report" / "fits.json").read_text())["families"]["var"]["grids"][0]
    assert written["surface"]["params"]["alpha"] == pytest.approx(found["alpha"])


def test_laws_over_size_are_of_the_longest_shared_length(tmp_path: Path) -> None:
    study = make_study(write_sweep(tmp_path))
    assert set(study.final("loss_last")["step"]) == {400}
    law = study.law("loss_last").law
    assert law is not None
    assert law.x.tolist() == [73728 * d**3 for d in (1, 2, 3, 4)]
    assert all(set(f.law.x) <= set(law.x) and f.runs == 1 for _, f in study.forecasts["loss_last"])
    assert study.conventions[0]["exponent"] == pytest.approx(law.alpha)
    assert len(study.finished) == 16
    assert noted(study, "laws over N, and forecasts by them, are of the 4 runs of 7.68e+05 training tokens")
    assert not noted(study, "mixes the effects of size and of data")


def test_frontiers_take_only_annealed_ends(tmp_path: Path) -> None:
    study = make_study(write_sweep(tmp_path))
    ends = set(study.finished["flops"])
    for (quantity, _), frontier in study.frontiers.items():
        assert len(frontier.x), quantity
        assert set(frontier.x) <= ends
    assert ANNEALED_CAUTION in study.notes
    assert FRONTIER_CAUTION not in study.notes

    other = make_study(write_sweep(tmp_path / "cos", schedule="cos"))
    assert not set(other.frontiers["loss_last", "pareto"].x) <= set(other.finished["flops"])
    assert ANNEALED_CAUTION not in other.notes
    assert FRONTIER_CAUTION in other.notes


def test_before_the_first_end_there_is_a_report_without_a_frontier(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, depths=[1], steps=[100])
    (folder,) = sweep.glob("var-*")
    RunFolder(folder).set_status("interrupted", step=50, total_steps=100)
    study = make_study(sweep)
    assert len(study.frontiers["loss_last", "pareto"].x) == 0
    assert make_report(sweep).exists()


def test_two_depths_say_why_there_is_no_surface(tmp_path: Path) -> None:
    study = make_study(write_sweep(tmp_path, depths=[1, 2]))
    assert all(grid.surface is None for grid in study.grids)
    assert "needs at least 3 distinct params, got 2" in make_report(study.folder).read_text()


def test_one_length_has_no_surface_to_speak_of(tmp_path: Path) -> None:
    study = make_study(write_sweep(tmp_path, steps=[400]))
    assert study.grids == ()
    page = make_report(study.folder).read_text()
    assert "Loss over N and D" not in page
    assert "_vs_tokens" not in page


def test_budgets_have_minima(tmp_path: Path) -> None:
    sweep, names = tmp_path / "grid", []
    for depth in (1, 2, 3, 4, 5):
        for budget in (3e11, 1e12, 3e12):
            steps = round(budget / (4.1 * 73728 * depth**3 * BATCH * SEQ))
            names.append(write_run(sweep, depth, steps, 0, "wsd", {}, 1.0))
    listed = [
        {"run": n, "family": "var", "tokenizer": "../tokenizers/t", "tokens": "../tokens/t"} for n in names
    ]
    write_json(
        sweep / "sweep.json", {"name": "grid", "runs": listed, "recipe": {"budgets": [3e11, 1e12, 3e12]}}
    )
    study = make_study(sweep)
    last, _ = study.grids
    assert last.isoflop is not None
    assert len(last.isoflop.budgets) == 3
    assert noted(study, "no training length is shared by all depths")
    assert len(study.final("loss_last")) == 5
    assert "isoFLOP" in make_report(sweep).read_text()


def test_what_was_spent_is_told_by_the_records(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, depths=[1], steps=[100, 200])
    short, long = sorted(sweep.glob("var-*"))
    at = 80 * BATCH * SEQ
    RunFolder(short).write_shared(
        {"run": long.name, "step": 80, "tokens": at, "flops": int(4.1 * 73728 * at)}
    )
    study = make_study(sweep)
    end = study.finished.set_index("run")
    assert end.loc[long.name, "flops_spent"] == end.loc[long.name, "flops"]
    assert end.loc[short.name, "flops_spent"] / end.loc[short.name, "flops"] == pytest.approx(0.2, rel=1e-4)
    before = study.frame[(study.frame["run"] == short.name) & (study.frame["step"] <= 80)]
    assert len(before) == 2
    assert (before["flops_spent"] == 0).all()
    assert noted(study, "(0.73)")  # (200 + 20) / 300


RATES = [{"lr": lr} for lr in (5e-4, 1e-3, 2e-3, 4e-3)]


def valley(depth: int, setting: Mapping[str, Any]) -> float:
    """Lowest at lr = 2e-3 / sqrt(depth)."""
    return float(1 + 0.01 * np.log(setting["lr"] / (2e-3 * depth**-0.5)) ** 2)


def test_laws_are_of_the_best_setting_and_rates_follow_the_width(tmp_path: Path) -> None:
    recipe = {"grid": {"train.lr": [s["lr"] for s in RATES]}}
    sweep = write_sweep(tmp_path, (1, 2, 4), [100, 200], settings=RATES, penalty=valley, recipe=recipe)
    study = make_study(sweep)
    assert study.settings is not None
    assert [(b.depth, b.setting, b.tried) for b in study.settings.best] == [
        (depth, f"train.lr {lr}", 4) for depth, lr in ((1, 0.002), (2, 0.001), (4, 0.001)) for _ in range(2)
    ]
    assert [r.lr for r in study.settings.rates] == [
        pytest.approx(2e-3 * depth**-0.5, rel=1e-3) for depth in (1, 2, 4)
    ]
    assert study.settings.power == pytest.approx(0.5, abs=1e-3)
    assert len(study.final("loss_last")) == 3
    page = make_report(sweep).read_text()
    assert "lr ∝ width^−0.5" in page
    assert "The best settings" in page


def test_a_best_rate_at_the_edge_is_no_optimum(tmp_path: Path) -> None:
    recipe = {"grid": {"train.lr": [5e-4, 1e-3]}}
    study = make_study(
        write_sweep(tmp_path, (1, 2), [100], settings=RATES[:2], penalty=valley, recipe=recipe)
    )
    assert study.settings is not None
    assert [r.lr for r in study.settings.rates] == [None, None]
    assert study.settings.power is None
    assert "at the edge of what was tried" in make_report(study.folder).read_text()
