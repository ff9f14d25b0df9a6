"""The display: it reads what jobs write, says what changed, and never invents a time."""

import dataclasses
import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.progress import Pace, Progress, Row, _table, line
from sweeps.scheduler import JobState, Scheduler
from tests.sweeps.fake_sweep import fake_job


def display(terminal: bool, places: int = 2) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, force_terminal=terminal, width=160), places), out


def running(folder: Path, name: str, step: int, seconds_ago: float = 0.0) -> JobState:
    """A job that started ``seconds_ago`` and has just reported its step."""
    state = JobState(fake_job(folder, name, weight=100.0), "running", started=time.time() - seconds_ago)
    state.job.folder.set_status("running", step=step, total_steps=100, loss=4.5, images_per_second=800.0)
    return state


def test_a_row_shows_what_the_job_wrote_but_nothing_of_an_earlier_attempt(tmp_path: Path) -> None:
    progress, _ = display(terminal=False)
    state = running(tmp_path, "a", 30, seconds_ago=1)
    assert progress.row(state) == Row("a", "run", "running", 30, 100, 4.5, 800.0, None)
    state.started = time.time() + 60
    assert progress.row(state).step is None


def test_time_left_follows_the_speed_that_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr("sweeps.progress.time.monotonic", lambda: clock)
    progress, _ = display(terminal=False, places=1)
    states = [running(tmp_path, "a", 20, 1), JobState(fake_job(tmp_path, "b", weight=50.0))]
    rows = [progress.row(s) for s in states]
    assert progress.time_left(states, rows) is None, "one look tells no speed"
    clock += 10.0
    states[0].job.folder.set_status("running", step=40)
    rows = [progress.row(s) for s in states]
    assert rows[0].left == pytest.approx(30.0), "2 steps a second, 60 to go"
    assert progress.time_left(states, rows) == pytest.approx(30 + 25), "half the FLOPs at the same FLOP/s"


def test_time_left_follows_a_machine_that_slows_down() -> None:
    pace, now = Pace(), 0.0
    for step in range(0, 601, 10):  # ten minutes at a step a second
        now = float(step)
        pace.see(now, step)
    assert pace.seconds_left(now, 1000) == pytest.approx(400)
    assert pace.seconds_left(now + 5, 1000) == pytest.approx(395), "time passes between two reports"
    for step in range(610, 701, 10):  # then a tenth of that speed
        now += 100
        pace.see(now, step)
    assert pace.seconds_left(now, 1000) == pytest.approx(3000), "the ten fast minutes count no more"
    late = [pace.seconds_left(now + wait, 1000) or 0.0 for wait in (100, 200, 1000, 4000)]
    assert late == sorted(late), "a report that does not come slows it down"
    assert late[0] == pytest.approx(2900)
    assert late[-1] > 3 * late[0]


def test_a_job_that_begins_again_is_not_taken_for_fast() -> None:
    pace = Pace()
    for now, step in ((0.0, 500), (10.0, 600), (20.0, 100), (30.0, 110)):
        pace.see(now, step)
    assert pace.seconds_left(30.0, 200) == pytest.approx(90)


def test_jobs_that_wait_are_told_by_how_the_machine_does_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1000.0
    monkeypatch.setattr("sweeps.progress.time.monotonic", lambda: clock)
    progress, _ = display(terminal=False, places=1)
    going = running(tmp_path, "a", 20, 1)
    going.job = dataclasses.replace(going.job, seconds=10.0)
    waiting = JobState(dataclasses.replace(fake_job(tmp_path, "b"), seconds=7.0))
    states = [going, waiting]
    assert progress.time_left(states, [progress.row(s) for s in states]) == pytest.approx(17)
    clock += 10.0
    going.job.folder.set_status("running", step=40)
    left = progress.time_left(states, [progress.row(s) for s in states])
    assert left == pytest.approx(30 + 7 * 50 / 10), "50 s for what was planned with 10"


def test_what_was_whole_before_is_told_as_checked_until_something_is_mended(tmp_path: Path) -> None:
    progress, out = display(terminal=False)
    job = dataclasses.replace(fake_job(tmp_path, "tokens"), recheck=True, seconds=600.0)
    job.folder.set_status("done", step=100, total_steps=100)
    (job.folder.path / job.product).parent.mkdir(parents=True, exist_ok=True)
    (job.folder.path / job.product).touch()
    (state,) = Scheduler([job], [()]).states
    assert progress.time_left([state], [progress.row(state)]) == 0, "it is there: no ten minutes for it"
    state.phase, state.started = "running", time.time() - 1
    progress.update([state])
    job.folder.set_status("running")
    progress._shown = 0.0
    progress.update([state])
    assert "tokens: checking what is there" in out.getvalue()
    assert "100/100" not in out.getvalue()
    job.folder.set_status("running", step=60)
    assert progress.row(state).step == 60, "a damaged shard is made again"
    state.phase = "done"
    progress.update([state])
    assert "checked and whole: tokens" in out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    rows = [
        Row("var-d12-s0-d99d50dd01", "run", "running", 12345, 20000, 4.5, 812.3, 7000.0),
        Row("tokens", "tokens", "checking", None, None, None, None, 0.0),
    ]
    out = io.StringIO()
    Console(file=out, width=width).print(_table(rows, 130.0, width))
    text = out.getvalue()
    assert "…" not in text
    assert all(word in text for word in ("left", "12345/20000", "1.9 h", "checking", "train loss"))


def test_the_line_names_runs_speed_and_time() -> None:
    rows = [
        Row("tokenizer", "tokenizer", "done", None, None, None, None, 0.0),
        Row("small", "run", "done", None, None, None, None, 0.0),
        Row("large", "run", "running", 30, 100, 4.5, 812.3, 70.0),
        Row("next", "run", "waiting", None, None, None, None, None),
    ]
    text = line(rows, 130.0)
    assert text.split("  ", 1)[1] == "1/3 runs done · large 30/100 loss 4.500 812 img/s · about 2 min left"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_whole_sweep_is_told_from_start_to_end(tmp_path: Path, terminal: bool) -> None:
    progress, out = display(terminal)
    jobs = [fake_job(tmp_path, "good", 15), fake_job(tmp_path, "bad", behaviour="--fail")]
    with progress:
        Scheduler(jobs, [(), ()], on_tick=progress.update).run()
    text = out.getvalue()
    assert "done: good in" in text
    assert "loss 0.067" in text
    assert "FAILED: bad: ValueError: loss is not a number" in text
    assert ("\x1b[" in text) == terminal, "control codes are for terminals"
