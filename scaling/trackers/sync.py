"""A sweep's copy in a tracker, made from its records: every run that changed, and one run for the sweep
itself.

The sweep's own run, ``summary``, has what belongs to no single run: the report's page and figures, the
numbers of its fits, the frontier.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.config import ConfigError, LaunchConfig, from_dict
from scaling.launch import Tracker, WandbMode
from scaling.process import one_line
from scaling.records import RecordsError, RunFolder, list_runs, read_json, read_sweep
from scaling.trackers.copies import SUMMARY, Copy, Subject, open_copy, still_there
from scaling.trackers.ledger import SAMPLES, digest, entries, held, remember, run_digest
from scaling.trackers.points import Point, point_of
from scaling.trackers.targets import check, online

Frontiers = Mapping[str, Sequence[tuple[float, float]]]
"""Name of a quantity (``loss_avg``; of several families ``var/loss_avg``) -> (FLOPs, value) in order."""


@dataclass
class Synced:
    """What was done, by name of the run."""

    copied: list[str]
    unchanged: list[str]
    busy: list[str]
    """Being trained, and copied by the run itself."""

    def words(self, tracker: str) -> str:
        """One line for the terminal."""
        text = f"{tracker}: {len(self.copied)} copied, {len(self.unchanged)} unchanged"
        return text + (f"; {', '.join(self.busy)}: being trained, which copies itself" if self.busy else "")


def settings_of(sweep: Path) -> LaunchConfig:
    """The sweep's own ``launch`` where its tracker settings can be read, else the defaults."""
    with contextlib.suppress(RecordsError, ConfigError, KeyError, TypeError):
        launch = read_sweep(sweep).value["recipe"]["launch"]
        names = ("trackers", "tracker_project", "wandb_mode")
        return from_dict(LaunchConfig, {name: launch[name] for name in names if name in launch})
    return LaunchConfig()


def sync(
    sweep: Path,
    tracker: Tracker,
    project: str,
    mode: WandbMode,
    frontiers: Frontiers,
    say: Callable[[str], None] = lambda name: None,
) -> Synced:
    """Bring the tracker's copy of a sweep to what the records say.

    Args:
        frontiers: of the sweep's runs.
        say: called with the name of each run that is copied.

    Raises:
        RecordsError: no runs there, or the tracker failed (its own words); what was copied before stays.
        ConfigError: as ``check``.
    """
    check([tracker], mode)
    done = Synced([], [], [])
    for folder in list_runs(sweep):
        subject = Subject(sweep.absolute(), folder.name, folder.config(), project, mode)
        _bring(tracker, subject, _Run(folder, subject), done, say)
    material = _Sweep(sweep, frontiers)
    version = material.mark("", False)[:8]
    subject = Subject(sweep.absolute(), SUMMARY, material.config, project, mode, version)
    _bring(tracker, subject, material, done, say)
    return done


class _Run:
    """What a run's copy is made of."""

    def __init__(self, folder: RunFolder, subject: Subject) -> None:
        self._folder, self.state = folder, str(folder.status()["state"])

    def mark(self, project: str, over_network: bool) -> str:
        return run_digest(self._folder, project, over_network, self.state)

    def write(self, copy: Copy) -> int:
        points = [point_of(record) for record in self._folder.metrics()]
        copy.add(points)
        samples = self._folder.path / SAMPLES
        if self.state == "done" and samples.exists():
            copy.image("samples", samples, points[-1].axes if points else {})
        return len(points)


class _Sweep:
    """What the copy of the sweep's own run is made of: the report as it lies there, and the frontiers."""

    state = "done"

    def __init__(self, sweep: Path, frontiers: Frontiers) -> None:
        report = sweep / "report"
        self._page = report / "report.md"
        self._figures = sorted((report / "figures").glob("*.png"))
        self._fits = report / "fits.json"
        self._frontiers = frontiers
        self.config: dict[str, Any] = {"sweep": sweep.name}

    def mark(self, project: str, over_network: bool) -> str:
        lines = {name: list(points) for name, points in self._frontiers.items()}
        return digest(self._fits, self._page, *self._figures, lines, project, over_network)

    def write(self, copy: Copy) -> int:
        points = [
            Point(number, f"frontier/{name}", {"step": number, "flops": flops}, {f"frontier/{name}": value})
            for name, line in self._frontiers.items()
            for number, (flops, value) in enumerate(line, 1)
        ]
        copy.add(points)
        for figure in self._figures:
            copy.image(figure.stem, figure, {})
        if self._page.exists():
            copy.text("report", self._page.read_text(encoding="utf-8"))
        if self._fits.exists():
            copy.numbers(fit_numbers(read_json(self._fits)))
        return len(points)


def fit_numbers(fits: dict[str, Any]) -> dict[str, float]:
    """The numbers of ``fits.json`` by name, such as ``var/loss_avg ~ params final/params/beta``."""
    found: dict[str, float] = {}
    for family, study in fits.get("families", {}).items():
        for law in study.get("laws", []):
            name = f"{family}/{law.get('quantity')} ~ {law.get('x')}"
            name += f" {law['points']}" if law.get("points") else ""
            name += " with offset" if law.get("offset") is True else ""
            found |= _numbers(law, name)
        for forecast in study.get("forecasts", []):
            name = f"{family}/forecast of {forecast.get('quantity')}"
            found |= _numbers(forecast, name + (" with offset" if forecast.get("offset") is True else ""))
    return found


def _numbers(value: dict[str, Any], before: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found |= _numbers(inner, f"{before}/{key}")
        elif isinstance(inner, list) and len(inner) == 2:  # an interval
            found |= _numbers({"low": inner[0], "high": inner[1]}, f"{before}/{key}")
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            found[f"{before}/{key}"] = inner
    return found


def _bring(
    tracker: Tracker, subject: Subject, material: _Run | _Sweep, done: Synced, say: Callable[[str], None]
) -> None:
    over_network = tracker == "wandb" and online(subject.wandb_mode)
    with held(subject.place) as mine:
        if not mine:
            done.busy.append(subject.name)
            return
        mark = material.mark(subject.project, over_network)
        noisy = contextlib.redirect_stdout(io.StringIO())  # trackio tells every run on standard output
        try:
            with noisy:
                known = entries(subject.place).get(tracker, {}).get("digest") == mark
                if known and still_there(tracker, subject):
                    done.unchanged.append(subject.name)
                    return
            say(subject.name)
            with noisy:
                copy = open_copy(tracker, subject)
                points = material.write(copy)
                copy.close(material.state)
        except Exception as error:  # whatever a tracker raises
            remember(subject.place, tracker, {"note": one_line(error)})
            raise RecordsError(f"{tracker}: {subject.name}: {one_line(error)}") from error
        remember(subject.place, tracker, {"digest": mark, "points": points})
        done.copied.append(subject.name)
