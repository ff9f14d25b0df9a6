"""Where every job of a started sweep stands, once or over and over; read from its folders alone, no torch.

Nothing is planned, resolved or locked for it: it works from any machine that sees the folders, while runs are
going and after. A running job's time left follows from the speed that it told last, that of a waiting run
from its FLOPs at the speed of the runs of its family that are going now, or were last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.config import ConfigError, RunConfig, from_dict
from scaling.flops import spent
from scaling.records import RecordsError, RunFolder, read_json
from sweeps.fold import Line, folded
from sweeps.forecasts import Forecasts, MakeForecasts, Point, point_of, surprises
from sweeps.packing import makespan
from sweeps.slurm_queue import Seen, standing
from sweeps.tables import duration, forecast_text, number, short_names, sweep_folders

if TYPE_CHECKING:
    from rich.console import Console, Group

STALE_SECONDS = 30.0
"""A running job writes its heartbeat every few seconds; after this silence it is taken for dead."""
WATCH_SECONDS = 2.0
HEADINGS = (
    "job", "state", "step", "train loss", "images/s", "left", "heartbeat", "Slurm", "forecast of loss_last",
)  # fmt: skip
RANK = ("state", "step", "train loss", "images/s", "left", "forecast of loss_last", "Slurm", "heartbeat")


@dataclass(frozen=True)
class Standing:
    """One job at this moment."""

    name: str
    status: Mapping[str, Any]
    config: RunConfig | None
    """Of a run whose ``config.json`` this program can read."""
    seen: Seen | None = None
    """What Slurm says of it, if it was handed to Slurm."""
    whole: bool = False
    """A token cache that was finished before, so that a job on it only looks through it."""

    @property
    def age(self) -> float | None:
        """Seconds since the heartbeat."""
        return time.time() - self.status["heartbeat"] if "heartbeat" in self.status else None

    @property
    def alive(self) -> bool:
        """Running, and heard of lately."""
        return self.status["state"] == "running" and beats(self.status)

    @property
    def state(self) -> str:
        """In words; a loss that diverged is told apart from other failures."""
        state, _ = standing(str(self.status["state"]), self.seen, beats(self.status))
        if state == "failed" and self.status.get("cause") == "diverged":
            return "diverged"
        if state == "running" and self.whole and self.status.get("step") == self.status.get("total_steps"):
            return "checking"
        return "running? (no heartbeat)" if state == "running" and not beats(self.status) else state

    @property
    def reason(self) -> str:
        """Why it failed, or what Slurm says of its waiting."""
        why = standing(str(self.status["state"]), self.seen, beats(self.status))[1]
        return str(self.status.get("error", why))

    @property
    def flops_per_second(self) -> float | None:
        """Of a run that has told a speed."""
        speed = self.status.get("images_per_second")
        if self.config is None or not speed:
            return None
        images = self.config.train.batch * self.config.total_steps
        return float(speed * spent(self.config, self.config.total_steps).flops / images)

    def left(self, speeds: Mapping[str, float]) -> float | None:
        """Seconds of training left; None where no speed is known.

        Args:
            speeds: FLOP/s of runs by family, for one that waits.
        """
        state, config = self.status["state"], self.config
        if state in ("done", "failed"):
            return 0.0
        if config is None:
            return None
        speed = self.flops_per_second or speeds.get(config.model.family)
        done = self.status.get("step", 0)
        if not speed:
            return None
        cost = spent(config, config.total_steps).flops
        return cost * (1 - done / config.total_steps) / speed


@dataclass(frozen=True)
class SweepStatus:
    """All jobs of a sweep, and what their losses were forecast to be."""

    sweep: Path
    jobs: tuple[Standing, ...]
    forecasts: Forecasts | None

    @property
    def over(self) -> bool:
        """Whether nothing works on the sweep and nothing is left that could be."""
        return not any(
            job.alive or job.status["state"] == "waiting" or (job.seen is not None and job.seen.active)
            for job in self.jobs
        )

    @property
    def left(self) -> float | None:
        """Seconds until the runs are done, at the speeds seen, as many at once as now; None while unknown."""
        runs = [job for job in self.jobs if job.config is not None]
        times = [job.left(self._speeds()) for job in runs]
        if None in times:
            return None
        at_once = max(1, sum(job.alive for job in runs))
        return makespan(sorted((t or 0.0 for t in times), reverse=True), at_once)

    def _speeds(self) -> dict[str, float]:
        """FLOP/s by family: of the runs that are going, else of the one heard of last."""
        by_family: dict[str, list[Standing]] = {}
        for job in self.jobs:
            if job.config is not None and job.flops_per_second is not None:
                by_family.setdefault(job.config.model.family, []).append(job)
        speeds = {}
        for family, found in by_family.items():
            last = max(found, key=lambda job: float(job.status.get("heartbeat", 0.0)))
            recent = [job for job in found if job.alive] or [last]
            speeds[family] = statistics.median(job.flops_per_second or 0.0 for job in recent)
        return speeds

    def table(self, width: int) -> Group:
        """One row per job."""
        known = self.forecasts.runs if self.forecasts else {}
        speeds, lines = self._speeds(), []
        for job, name in zip(self.jobs, _names(self.jobs, width), strict=True):
            status = job.status
            loss, speed, age = status.get("loss"), status.get("images_per_second"), job.age
            left = job.left(speeds)
            lines.append(
                Line(
                    {
                        "job": name,
                        "state": job.state,
                        "step": f"{status['step']}/{status.get('total_steps', '-')}"
                        if "step" in status
                        else "",
                        "train loss": f"{loss:.3f}" if isinstance(loss, float) else "",
                        "images/s": number(speed) if speed and job.state != "checking" else "",
                        "left": duration(left) if left and status["state"] != "done" else "",
                        "heartbeat": f"{duration(age)} ago" if age is not None else "",
                        "Slurm": job.seen.id if job.seen is not None else "",
                        "forecast of loss_last": forecast_text(known.get(job.name)),
                    }
                )
            )
        title = f"sweep '{self.sweep.name}' in {self.sweep}"
        return folded(title, lines, HEADINGS, RANK, width)

    def words(self) -> list[str]:
        """What stands below the table: failures, the end, forecasts."""
        states = [str(job.status["state"]) for job in self.jobs]
        found = [f"{job.name}: {job.reason}" for job in self.jobs if job.reason]
        if not self.over:
            left = self.left
            end = "" if left is None else f", about {duration(left)} of training left"
            found.append(f"{states.count('done')} of {len(states)} jobs done{end}")
        else:
            missing = [f"{job.name} ({job.state})" for job in self.jobs if job.status["state"] != "done"]
            found.append(f"missing: {', '.join(missing)}" if missing else "all done")
        if self.forecasts is not None:
            found += surprises(self.forecasts)
            found += [self.forecasts.note] if self.forecasts.note and not self.over else []
        return found


def beats(status: Mapping[str, Any]) -> bool:
    """Whether a job's last sign of life is fresh."""
    return "heartbeat" in status and time.time() - status["heartbeat"] <= STALE_SECONDS


def read_status(
    sweep: Path, make_forecasts: MakeForecasts | None = None, seen: Mapping[Path, Seen] | None = None
) -> SweepStatus:
    """How a sweep stands.

    Args:
        seen: what Slurm says of a job, by its folder, if any was handed to it.

    Raises:
        RecordsError: the sweep was not started yet, or a file is damaged.
    """
    jobs = []
    for name, folder in sweep_folders(sweep):
        status, of_slurm = folder.status(), (seen or {}).get(folder.path)
        whole = status["state"] == "running" and _whole(folder)
        jobs.append(Standing(name, status, _config(folder), of_slurm, whole))
    forecasts = None
    if make_forecasts is not None:
        points = {job.name: point_of(job.config) for job in jobs if job.config is not None}
        forecasts = make_forecasts(sweep, points) if _done(jobs) else None
    return SweepStatus(sweep, tuple(jobs), forecasts)


def watch(
    sweep: Path,
    make_forecasts: MakeForecasts,
    out: Console,
    look: Callable[[Path], Mapping[Path, Seen]] = lambda sweep: {},
) -> None:
    """Show the sweep until nothing is left to wait for, or Ctrl-C.

    Args:
        look: asks Slurm for its jobs.

    Raises:
        RecordsError: as ``read_status``.
    """
    from rich.console import Group
    from rich.live import Live

    cache: dict[frozenset[str], Forecasts] = {}

    def remembered(sweep: Path, points: Mapping[str, Point]) -> Forecasts:
        """Forecasts change only with the runs that are done."""
        done = _done(read_status(sweep).jobs)
        if done not in cache:
            cache.clear()
            cache[done] = make_forecasts(sweep, points)
        return cache[done]

    def shown() -> tuple[Group, bool]:
        status = read_status(sweep, remembered, look(sweep))
        clock = f"{time.strftime('%H:%M:%S')}, every {WATCH_SECONDS:.0f} s; Ctrl-C leaves, the sweep goes on"
        words = [*status.words(), *([] if status.over else ["", clock])]
        return Group(status.table(out.width), *words), status.over

    first, over = shown()
    with Live(first, console=out, auto_refresh=False, vertical_overflow="visible") as live:
        while not over:
            time.sleep(WATCH_SECONDS)
            picture, over = shown()
            live.update(picture, refresh=True)


def _done(jobs: Sequence[Standing]) -> frozenset[str]:
    return frozenset(j.name for j in jobs if j.config is not None and j.status["state"] == "done")


def _config(folder: RunFolder) -> RunConfig | None:
    try:
        value = folder.config()
        return from_dict(RunConfig, value) if "model" in value else None
    except (ConfigError, RecordsError):
        return None


def _whole(folder: RunFolder) -> bool:
    """Whether it holds a token cache that was finished once."""
    manifest = folder.path / "manifest.json"
    return manifest.exists() and bool(read_json(manifest)["complete"])


def _names(jobs: Sequence[Standing], width: int) -> list[str]:
    runs = [job.name for job in jobs if job.config is not None]
    short = dict(zip(runs, short_names(runs, width), strict=True))
    return [short.get(job.name, job.name) for job in jobs]
