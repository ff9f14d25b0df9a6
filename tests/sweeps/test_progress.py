"""The display: it reads what jobs write, says what changed, and never invents a time."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.progress import Progress, Row, line
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
