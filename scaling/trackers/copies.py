"""A run's copy in one tracker, begun anew from nothing: what ``follow`` and ``sync`` write to.

Through Accelerate's tracker classes, one at a time: a tracker that fails must not take the others with it,
and none of them may sit in the process that trains.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scaling.launch import Tracker, WandbMode
from scaling.trackers.points import Point, flat, series_of
from scaling.trackers.targets import online

INIT_SECONDS = 30.0
"""wandb online is given up when it has not answered for so long."""
SUMMARY = "summary"
"""The name of the run that stands for its sweep: laws, figures, frontier."""


@dataclass(frozen=True)
class Subject:
    """What a copy is of."""

    sweep: Path
    """The sweep's folder; its name groups the runs."""
    name: str
    """The run's id, or ``SUMMARY``."""
    config: dict[str, Any]
    project: str
    wandb_mode: WandbMode = "auto"
    version: str = ""
    """Of a summary: which. wandb takes nothing back, so another version is another run."""

    @property
    def place(self) -> Path:
        """Where its own files lie."""
        return self.sweep / self.name

    @property
    def wandb_id(self) -> str:
        """Stable; two sweeps may hold the same run."""
        return f"{self.sweep.name}.{self.name}{self.version and '-' + self.version}"

    @property
    def trackio_project(self) -> str:
        """One page per sweep: trackio shows a project's runs together. It drops dots from file names."""
        return trackio_project(self.project, self.sweep.name)

    @property
    def tensorboard(self) -> Path:
        """``tensorboard --logdir runs/<sweep>/tensorboard`` shows all runs."""
        return self.sweep / "tensorboard" / self.name


def trackio_project(project: str, sweep: str) -> str:
    """The project of a sweep in trackio's store."""
    return f"{project}-{sweep}".replace(".", "_")


class Copy(Protocol):
    """One run in one tracker."""

    def add(self, points: Sequence[Point]) -> None:
        """Log these lines."""

    def image(self, name: str, file: Path, axes: dict[str, float]) -> None:
        """Log a picture, at a place on the axes."""

    def text(self, name: str, markdown: str) -> None:
        """Log a page of text."""

    def numbers(self, values: dict[str, float]) -> None:
        """What the whole comes to, beside the history."""

    def close(self, state: str) -> None:
        """Hand everything over; ``state`` as in ``status.json``."""


class WandbCopy:
    """Offline: a folder ``wandb/offline-run-…`` beside the run, in place of those of earlier copies.

    Online, where history cannot be taken back, only the lines that are not there yet. wandb's own steps count
    rows; the run's ``step`` is a value as ``flops`` and ``tokens`` are, and each of them an axis.
    """

    def __init__(self, subject: Subject) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        self._online = online(subject.wandb_mode)
        subject.place.mkdir(exist_ok=True)
        if not self._online:
            for earlier in subject.place.glob("wandb/offline-run-*"):
                shutil.rmtree(earlier)
        self._tracker = WandBTracker(
            subject.project,
            id=subject.wandb_id,
            name=subject.name,
            group=subject.sweep.name,
            job_type=SUMMARY if subject.name == SUMMARY else "train",
            dir=str(subject.place),
            mode="online" if self._online else "offline",
            resume="allow",
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS,
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
            ),
        )
        self._tracker.start()
        self._tracker.store_init_configuration(subject.config)
        run = self._tracker.run
        for axis in ("step", "tokens", "flops", "params"):
            run.define_metric(axis)
        for pattern, axis in (
            ("train/*", "step"),
            ("eval/*", "flops"),
            ("fidelity/*", "flops"),
            ("frontier/*", "flops"),
        ):
            run.define_metric(pattern, step_metric=axis)
        self._there = self._logged(subject) if self._online and run.resumed else set()
        if self._online and subject.name == SUMMARY:
            self._remove_earlier(subject)

    def _logged(self, subject: Subject) -> set[tuple[int, str | None]]:
        import wandb

        run = wandb.Api().run(f"{self._tracker.run.entity}/{subject.project}/{subject.wandb_id}")
        rows = [{k: v for k, v in row.items() if v is not None} for row in run.scan_history()]
        return {(int(row["step"]), series_of(list(row))) for row in rows if "step" in row}

    def _remove_earlier(self, subject: Subject) -> None:
        import wandb

        wanted = {"group": subject.sweep.name, "jobType": SUMMARY}
        for run in wandb.Api().runs(f"{self._tracker.run.entity}/{subject.project}", filters=wanted):
            if run.id != subject.wandb_id:
                run.delete()

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            if (point.step, point.series) not in self._there:
                self._tracker.log(point.numbers)

    def image(self, name: str, file: Path, axes: dict[str, float]) -> None:
        import wandb

        if (axes.get("step"), "media") not in self._there:
            self._tracker.log(axes | {f"media/{name}": wandb.Image(str(file))})

    def text(self, name: str, markdown: str) -> None:
        import wandb

        # Html without a script: wandb has no panel for Markdown.
        page = f"<pre>{markdown.replace('&', '&amp;').replace('<', '&lt;')}</pre>"
        self._tracker.log({f"media/{name}": wandb.Html(page)})

    def numbers(self, values: dict[str, float]) -> None:
        self._tracker.run.summary.update(values)

    def close(self, state: str) -> None:
        run = self._tracker.run
        if state not in ("done", "failed"):
            run.mark_preempting()  # then a run that left is 'preempted', not 'failed'
        run.finish(exit_code=0 if state == "done" else 1)


class TrackioCopy:
    """A run in trackio's own store (``TRACKIO_DIR``), in place of the one of an earlier copy."""

    def __init__(self, subject: Subject) -> None:
        from accelerate.tracking import TrackioTracker
        from trackio.media import get_project_media_path
        from trackio.sqlite_storage import SQLiteStorage

        project, name = subject.trackio_project, subject.name
        while SQLiteStorage.delete_run(project, name):
            pass
        shutil.rmtree(get_project_media_path(project, name), ignore_errors=True)
        model = subject.config.get("model", {})
        self._tracker = TrackioTracker(
            project,
            name=name,
            group=model.get("family", subject.sweep.name),
            config=flat(subject.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._tracker.start()

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            axes = {axis: value for axis, value in point.axes.items() if axis != "step"}
            self._tracker.log(axes | point.values, step=point.step)

    def image(self, name: str, file: Path, axes: dict[str, float]) -> None:
        import trackio

        self._tracker.log({f"media/{name}": trackio.Image(str(file))}, step=int(axes.get("step", 0)))

    def text(self, name: str, markdown: str) -> None:
        import trackio

        self._tracker.log({f"media/{name}": trackio.Markdown(markdown)}, step=0)

    def numbers(self, values: dict[str, float]) -> None:
        self._tracker.log(dict(values), step=0)

    def close(self, state: str) -> None:
        self._tracker.finish()


class TensorboardCopy:
    """Event files in ``runs/<sweep>/tensorboard/<run>``, in place of those of an earlier copy.

    tensorboard keeps numbers in single precision and has steps alone for an axis.
    """

    def __init__(self, subject: Subject) -> None:
        from accelerate.tracking import TensorBoardTracker

        shutil.rmtree(subject.tensorboard, ignore_errors=True)
        self._tracker = TensorBoardTracker(subject.name, subject.tensorboard.parent)
        self._tracker.start()
        values = flat(subject.config)
        self.text("config", "| key | value |\n|---|---|\n" + _rows(values))
        # Not Accelerate's store_init_configuration, which makes a run more, named after the time.
        from torch.utils.tensorboard.summary import hparams

        kept = {k: v for k, v in values.items() if k.startswith(("model.", "train.")) or k == "seed"}
        for part in hparams(kept, {"eval/loss_avg": 0.0, "eval/loss_last": 0.0}):
            self._tracker.writer.file_writer.add_summary(part)

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            axes = {f"{point.series}/{axis}": v for axis, v in point.axes.items() if axis != "step"}
            self._tracker.log(axes | point.values, step=point.step)

    def image(self, name: str, file: Path, axes: dict[str, float]) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as picture:
            pixels_HWC = np.asarray(picture.convert("RGB"))
        step = int(axes.get("step", 0))
        self._tracker.writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def text(self, name: str, markdown: str) -> None:
        self._tracker.writer.add_text(name, markdown)

    def numbers(self, values: dict[str, float]) -> None:
        self.text("numbers", "| name | value |\n|---|---|\n" + _rows(values))

    def close(self, state: str) -> None:
        self._tracker.finish()


def _rows(values: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    return "\n".join(f"| {cell(key)} | {cell(value)} |" for key, value in values.items())


def still_there(tracker: Tracker, subject: Subject) -> bool:
    """Whether a copy that was made before has not been removed since; of wandb online it is believed."""
    if tracker == "tensorboard":
        return any(subject.tensorboard.glob("events.*"))
    if tracker == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        return subject.name in SQLiteStorage.get_runs(subject.trackio_project)
    return online(subject.wandb_mode) or any(subject.place.glob("wandb/offline-run-*/*.wandb"))


def open_copy(tracker: Tracker, subject: Subject) -> Copy:
    """Begin the copy; raises whatever the tracker raises."""
    from accelerate import PartialState

    PartialState(cpu=True)  # Accelerate's logger asks for it
    made: dict[Tracker, type[Copy]] = {
        "wandb": WandbCopy,
        "trackio": TrackioCopy,
        "tensorboard": TensorboardCopy,
    }
    return made[tracker](subject)  # type: ignore[call-arg]
