"""A sweep seen from outside: states, time left, forecasts, and a display that is refreshed until the end."""

import dataclasses
import io
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from scaling.config import to_dict
from scaling.flops import spent
from sweeps import commands, status
from sweeps.forecasts import Point
from sweeps.plan import Plan
from sweeps.presence import anyone, present
from sweeps.slurm_queue import Seen
from sweeps.status import STALE_SECONDS, SweepStatus, read_status
from sweeps.tables import duration
from tests.sweeps.fake_sweep import REPOSITORY
from tests.sweeps.test_plan import finish, planned


@dataclasses.dataclass(frozen=True)
class Said:
    """A forecast."""

    value: float
    low: float
    high: float
    level: float = 0.95
    reached: float | None = None
    outside: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Forecasts of a sweep."""

    runs: Mapping[str, Said]
    note: str = ""


def started(root: Path) -> Plan:
    """One depth done, the next running at 100 images a second, half done; the others wait."""
    plan = planned(root)
    plan.write()
    for index in (0, 1, 2):
        finish(plan, index)
    plan.jobs[2].folder.set_status("done", step=230, total_steps=230, loss=4.1, images_per_second=400.0)
    plan.jobs[3].folder.set_status("running", step=115, total_steps=230, loss=3.9, images_per_second=100.0)
    return plan


def text_of(found: SweepStatus, width: int = 160) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(found.table(width))
    for words in found.words():
        console.print(words, soft_wrap=True, highlight=False, markup=False)
    return out.getvalue()


def test_every_job_stands_there_with_what_it_wrote(tmp_path: Path) -> None:
    plan = started(tmp_path)
    found = read_status(plan.folders.sweep)
    assert [job.state for job in found.jobs] == ["done"] * 3 + ["running"] + ["waiting"] * 3
    assert not found.over
    text = text_of(found)
    assert "115/230" in text
    assert "3.900" in text
    assert "3 of 7 jobs done, about" in text


def test_time_left_follows_speeds_and_flops(tmp_path: Path) -> None:
    plan = started(tmp_path)
    found = read_status(plan.folders.sweep)
    running, waiting = found.jobs[3], found.jobs[4]
    assert running.left({}) == pytest.approx(115 * 64 / 100)
    assert waiting.left({}) is None, "nothing is known of its speed"
    cost = spent(plan.configs[2], 230).flops
    assert waiting.left({"var": 1e9}) == pytest.approx(cost / 1e9)
    assert found.left == pytest.approx(sum(job.left(found._speeds()) or 0.0 for job in found.jobs[2:]))
    assert f"about {duration(found.left)} of training left" in text_of(found)


def test_a_silent_run_is_not_taken_for_a_live_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = started(tmp_path)
    now = time.time()
    monkeypatch.setattr("sweeps.status.time.time", lambda: now + STALE_SECONDS + 1)
    assert "running? (no heartbeat)" in text_of(read_status(plan.folders.sweep))


def test_failures_are_told_in_full_below_the_table(tmp_path: Path) -> None:
    plan = started(tmp_path)
    reason = "the loss became nan at step 7, " * 5
    plan.jobs[4].folder.set_status("failed", error=reason)
    text = text_of(read_status(plan.folders.sweep), width=80)
    assert f"{plan.jobs[4].name}: {reason}" in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_nothing_is_cut(tmp_path: Path, width: int) -> None:
    plan = started(tmp_path)
    made = read_status(
        plan.folders.sweep, lambda sweep, points: Table({run: Said(3.4, 3.3, 3.5) for run in points})
    )
    out = io.StringIO()
    Console(file=out, width=width).print(made.table(width))
    lines = out.getvalue().splitlines()
    assert "…" not in out.getvalue()
    assert max(map(len, lines[1:])) <= width
    for heading in ("state", "step", "train loss", "images/s", "left", "forecast of loss_last"):
        assert any(heading in line for line in lines), heading


def test_forecasts_are_asked_for_with_every_runs_place_and_surprises_are_told(tmp_path: Path) -> None:
    plan = started(tmp_path)
    asked: list[Mapping[str, Point]] = []
    odd, coming = plan.runs[0].run, plan.runs[4].run

    def make(sweep: Path, points: Mapping[str, Point]) -> Table:
        asked.append(points)
        return Table({odd: Said(3.9, 3.8, 4.0, 0.99, 4.1, True), coming: Said(3.4, 3.3, 3.5)}, "why no more")

    text = text_of(read_status(plan.folders.sweep, make))
    assert asked[0] == {
        r.run: Point("var", r.params, r.tokens, to_dict(c), ())
        for r, c in zip(plan.runs, plan.configs, strict=True)
    }
    assert "3.400 [3.300, 3.500]" in text
    assert f"{odd}: its loss 4.100 is outside [3.800, 4.000]" in text
    assert "why no more" in text


def test_before_any_run_is_done_nothing_is_fitted(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    plan.write()

    def never(sweep: Path, points: Mapping[str, Point]) -> Table:
        raise AssertionError

    assert read_status(plan.folders.sweep, never).forecasts is None


def test_watching_ends_when_nothing_is_left_and_fits_only_when_a_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = started(tmp_path)
    fits, pauses = [0], [0]

    def make(sweep: Path, points: Mapping[str, Point]) -> Table:
        fits[0] += 1
        return Table({})

    def pause(seconds: float) -> None:
        pauses[0] += 1
        if pauses[0] == 2:
            for index in range(3, 7):
                finish(plan, index)

    monkeypatch.setattr(status.time, "sleep", pause)
    out = io.StringIO()
    status.watch(plan.folders.sweep, make, Console(file=out, force_terminal=True, width=120))
    assert pauses[0] == 2
    assert fits[0] == 2, "once for one run done, once for all"
    assert "Ctrl-C leaves" in out.getvalue()
    assert "115/230" in out.getvalue()


def test_ctrl_c_leaves_the_watch_and_not_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = started(tmp_path)

    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", pressed)
    screen = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(commands, "console", lambda: screen)
    assert commands.show_status(plan.folders.sweep, False, True, lambda sweep, points: Table({})) == 0
    assert plan.jobs[3].folder.status()["state"] == "running"


def test_what_waits_for_nobody_is_missing(tmp_path: Path) -> None:
    """A job was given up, its launcher has left or was killed; the rest will not begin by itself."""
    plan = started(tmp_path)
    plan.jobs[3].folder.set_status("failed", error="killed by SIGKILL", cause="killed")
    waiting = [job.name for job in plan.jobs[4:]]
    with present(plan.folders.sweep):
        with present(plan.folders.sweep):
            assert not read_status(plan.folders.sweep, seen={}).over, "two launchers"
        assert not read_status(plan.folders.sweep, seen={}).over, "one of them has left"
    found = read_status(plan.folders.sweep, seen={})
    assert found.over
    (missing,) = [word for word in found.words() if word.startswith("missing: ")]
    assert all(f"{name} (waiting)" in missing for name in waiting)
    assert f"{plan.jobs[3].name} (failed)" in missing
    assert not read_status(plan.folders.sweep, seen=None).over, "Slurm gave no answer"
    queued = {plan.jobs[4].folder.path: Seen("7_0", "PENDING")}
    assert not read_status(plan.folders.sweep, seen=queued).over


def test_a_launcher_that_is_killed_is_present_no_more(tmp_path: Path) -> None:
    code = "import sys, time, pathlib; from sweeps.presence import present\n"
    code += "with present(pathlib.Path(sys.argv[1])):\n    print('here', flush=True); time.sleep(600)"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "here\n"
    assert anyone(tmp_path)
    launcher.kill()
    launcher.wait()
    assert not anyone(tmp_path)
    assert not anyone(tmp_path / "never started")
