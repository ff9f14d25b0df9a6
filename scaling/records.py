"""What a run leaves on disk, and reading and writing it so that a kill at any instant is harmless.

    <folder>/config.json       what the run is; never changes
    <folder>/costs.json        a transformer run's parameters and FLOPs by part (scaling.flops)
    <folder>/metrics.jsonl     one JSON object a line, appended; a torn last line is ignored
    <folder>/status.json       state, attempt, step, heartbeat, error; replaced atomically, by one process
    <folder>/failure.json      error, exit code and cause of the process that failed first, in this attempt
    <folder>/memory.json       the micro-batch that fitted into a device's memory (scaling.memory)
    <folder>/attention.json    the attention back end chosen on a GPU, and its timings (scaling.backends)
    <folder>/data.json         fingerprint of the images that a tokenizer or a token cache is made from
    <folder>/checkpoints/      step-<n>/ folders of safetensors and JSON (scaling.checkpoint)
    <folder>/branches/         step-<n>/ checkpoints that shorter runs start from (scaling.branches)
    <folder>/shared.json       the part of a run that another did for it: which run, steps, tokens, FLOPs
    <folder>/snapshots/        step-<n>.safetensors: weights along the way, if the config asks for any
    <folder>/final/            weights.safetensors

The same layout serves tokenizer runs, token caches and transformer runs. No torch. A sweep's folder holds
``sweep.json`` beside its runs, with the list of them (``read_sweep``).

A job of several processes has one that writes ``status.json``, over and over; an error of another one
would be lost between its reading and its writing. So a failure has a file of its own, that only the first
to fail can make, and ``status`` reads both.

Kinds of lines in ``metrics.jsonl`` of a transformer run (DESIGN's words and units):
    {"kind": "train", "step", "loss_avg", "loss_last", "error_avg", "error_last", "lr", "grad_norm",
     "images_per_second", "tokens", "epochs", "flops"}
    {"kind": "eval", "step", "params", "params_total", "tokens", "unique_tokens", "epochs", "flops",
     "flops_6nd", "loss_avg", "loss_avg_se", "loss_last", "loss_last_se", "error_avg", "error_avg_se",
     "error_last", "error_last_se", "loss_scales": [...], "error_scales": [...], "eval_images"}
    {"kind": "fidelity", "setting", "step", "params", "params_total", "tokens", "unique_tokens", "epochs",
     "flops", "flops_6nd", "fid", "is", "is_std", "precision", "recall", "images", "manifold_images",
     "extractor", "reference", "reference_images", "guidance", "guidance_form", "top_k", "top_p",
     "seed", "drawn_in" (absent for fp32)}
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

IMPORTED = "imported-"
"""Begins the names of folders that hold an evaluation of a published checkpoint (``scaling.imported``): no
run of the sweep's recipe, so ``sweep.json`` does not list them."""
STATES = ("waiting", "running", "interrupted", "done", "failed")


class RecordsError(RuntimeError):
    """A folder that does not hold what it should; the message says which and what to do."""


class FolderBusyError(RecordsError):
    """Another live process works in the folder."""


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are for their owner alone, and a report is for others to read.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of pretty JSON."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The file's value; ``RecordsError`` naming the file when it is missing or not JSON."""
    missing = object()
    value = _read_if_there(path, missing)
    if value is missing:
        raise RecordsError(f"{path}: no such file")
    return value


def _read_if_there(path: Path, otherwise: Any) -> Any:
    """The file's value; asked for once, since another process may remove the file at any time."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return otherwise
    except json.JSONDecodeError as error:
        raise RecordsError(f"{path}: not valid JSON ({error})") from None


class RunFolder:
    """One folder of the layout above."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._metrics: IO[str] | None = None

    @property
    def name(self) -> str:
        """The run's id."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def branches(self) -> Path:
        """Where the checkpoints lie that shorter runs of the same config start from."""
        return self.path / "branches"

    def branch(self, step: int) -> Path:
        """The folder of one of them; whole once it is there."""
        return self.branches / f"step-{step:09d}"

    @property
    def weights(self) -> Path:
        """The file of a finished run's weights."""
        return self.path / "final" / "weights.safetensors"

    def snapshot(self, step: int) -> Path:
        """The file of the weights after ``step`` optimiser steps."""
        return self.path / "snapshots" / f"step-{step:09d}.safetensors"

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder with its ``config.json``.

        Raises:
            RecordsError: the folder exists and holds another config.
        """
        file = self.path / "config.json"
        if file.exists():
            if read_json(file) != config:
                raise RecordsError(
                    f"{self.path} holds another config (its config.json differs from the recipe's); "
                    "choose another sweep name or remove the folder"
                )
            return
        write_json(file, config)

    def config(self) -> dict[str, Any]:
        """The plain values of ``config.json``."""
        value = read_json(self.path / "config.json")
        if not isinstance(value, dict):
            raise RecordsError(f"{self.path / 'config.json'}: expected a JSON object")
        return value

    def write_costs(self, costs: dict[str, Any]) -> None:
        """Write ``costs.json``: what ``scaling.flops.costs`` gave for the run's model."""
        write_json(self.path / "costs.json", costs)

    def costs(self) -> dict[str, Any]:
        """``params`` and ``flops_per_image`` (training) by part, and ``tokens_per_image``.

        Raises:
            RecordsError: the run is older than this record, or the file is not of this form.
        """
        file = self.path / "costs.json"
        if not file.exists():
            raise RecordsError(
                f"{file}: no such file: the run was trained before costs were recorded by part; "
                "only N and FLOPs as in metrics.jsonl are known"
            )
        value = read_json(file)
        parts = ("params", "flops_per_image")
        if not isinstance(value, dict) or not all(isinstance(value.get(part), dict) for part in parts):
            raise RecordsError(f"{file}: expected a JSON object with {' and '.join(parts)} by part")
        return value

    def write_shared(self, shared: dict[str, Any] | None) -> None:
        """Write ``shared.json``; None for a run that did all of its steps itself."""
        if shared is None:
            (self.path / "shared.json").unlink(missing_ok=True)
        else:
            write_json(self.path / "shared.json", shared)

    def shared(self) -> dict[str, Any]:
        """``run``, ``step``, ``tokens`` and ``flops`` of the part that another run did; zeros if none did.

        Raises:
            RecordsError: the file is not of this form.
        """
        value = _read_if_there(self.path / "shared.json", {"run": None, "step": 0, "tokens": 0, "flops": 0})
        keys = ("step", "tokens", "flops")
        if not isinstance(value, dict) or not all(isinstance(value.get(key), int) for key in keys):
            raise RecordsError(
                f"{self.path / 'shared.json'}: expected a JSON object with run and whole {', '.join(keys)}"
            )
        return value

    # -- images ------------------------------------------------------------------------------

    def claim_data(self, fingerprint: str) -> None:
        """Record, in ``data.json``, the fingerprint of the images that this folder is made from.

        Raises:
            RecordsError: as ``check_data``.
        """
        self.check_data(fingerprint)
        write_json(self.path / "data.json", {"fingerprint": fingerprint})

    def check_data(self, fingerprint: str) -> None:
        """Compare with what was claimed; a folder without a claim agrees with any images.

        Where images lie is no part of a config, so other images with equal counts have the same folder.

        Raises:
            RecordsError: the folder is made from other images.
        """
        file = self.path / "data.json"
        if file.exists() and read_json(file).get("fingerprint") != fingerprint:
            raise RecordsError(
                f"{self.path} was made from other images (their fingerprint differs); give these a name of "
                "their own with --data.name NAME, or move that folder away to make it again"
            )

    def encoded(self) -> bool:
        """Whether a token cache was finished once; its shards may be damaged by now."""
        return _read_if_there(self.path / "manifest.json", {}).get("complete") is True

    def unreadable(self) -> dict[str, int]:
        """Images of each split that a token cache had to skip; none named for a split without any."""
        file = self.path / "manifest.json"
        splits = read_json(file).get("splits", {}) if file.exists() else {}
        return {name: len(split["skipped"]) for name, split in splits.items() if split["skipped"]}

    # -- metrics -----------------------------------------------------------------------------

    def append(self, record: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system; a number that is none becomes null."""
        if self._metrics is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._metrics.write(json.dumps(plain, allow_nan=False) + "\n")
        self._metrics.flush()

    def sync(self) -> None:
        """Flush the appended lines to the disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All complete lines in order, of one kind if given.

        A run that was killed and resumed writes some steps twice, with equal values; the last
        line of each (kind, step, setting) counts: one step may be measured in several settings. A torn last
        line is ignored; a broken line elsewhere is an error.
        """
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        found: dict[tuple[Any, Any, Any], dict[str, Any]] = {}
        lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                if number == len(lines):
                    continue
                raise RecordsError(f"{file}, line {number}: not valid JSON") from None
            key = (record.get("kind"), record.get("step"), record.get("setting"))
            found.pop(key, None)
            found[key] = record
        return [r for r in found.values() if kind is None or r.get("kind") == kind]

    def truncate(self, step: int) -> None:
        """Drop lines after ``step`` and a torn last line, so that a resumed run goes on from there."""
        self.close()
        file = self.path / "metrics.jsonl"
        if file.exists():
            kept = [r for r in self.metrics() if r.get("step", 0) <= step]
            write_atomic(file, "".join(json.dumps(r) + "\n" for r in kept))

    def close(self) -> None:
        """Close the metrics file; the next append opens it again."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    # -- status ------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """``state`` and what else was set; ``{"state": "waiting"}`` before the first start.

        After a failure the state is ``failed``, with the ``error``, ``exit_code`` and ``cause`` of the
        process that failed first, whatever the others went on to write.
        """
        failure = _read_if_there(self._failure, {})  # before the rest: it may be forgotten at this moment
        return self._own_status() | failure

    def _own_status(self) -> dict[str, Any]:
        file = self.path / "status.json"
        value = _read_if_there(file, {"state": "waiting", "attempt": 0})
        if not isinstance(value, dict) or value.get("state") not in STATES:
            raise RecordsError(f"{file}: expected a JSON object with a state of {', '.join(STATES)}")
        return value

    def set_status(self, state: str, **more: Any) -> None:
        """Replace the state and merge ``more`` into ``status.json``; sets ``heartbeat`` (Unix time).

        A failure recorded before is forgotten; of a run that diverged, ``divergences`` counts how often, and
        ``go_back`` stays true until an attempt has. Only for who has the folder alone: before a job's
        processes work in it, and after.
        """
        before = self.status()
        if before.get("cause") == "diverged":
            more = {"go_back": True, "divergences": before.get("divergences", 0) + 1} | more
        self.update_status(state, **more)
        self._failure.unlink(missing_ok=True)

    def update_status(self, state: str, **more: Any) -> None:
        """As ``set_status``, for the main process of a job: a failure of its peers stays recorded."""
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}")
        known = self._own_status()
        if state != "failed":
            for name in ("error", "exit_code", "cause"):
                known.pop(name, None)
        write_json(self.path / "status.json", known | more | {"state": state, "heartbeat": time.time()})

    def fail(self, error: str, exit_code: int, cause: str) -> None:
        """Record a failure, from any process of a job and at any time; only the first one counts."""
        value = {"state": "failed", "error": error, "exit_code": exit_code, "cause": cause}
        value["heartbeat"] = time.time()
        with (self.path / ".failure.lock").open("a") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not self._failure.exists():
                write_json(self._failure, value)

    @property
    def _failure(self) -> Path:
        return self.path / "failure.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; released by the system even on SIGKILL.

        Raises:
            FolderBusyError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderBusyError(f"{self.path} is in use by another process") from None
            yield

    def busy(self) -> bool:
        """Whether a live process holds the folder's lock."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with self.lock():
                return False
        except FolderBusyError:
            return True


@dataclass(frozen=True)
class ListedRun:
    """One run as ``sweep.json`` lists it; the fields are the keys there."""

    run: str
    family: str
    tokenizer: str
    """Folder of the tokenizer's run, from the sweep's folder: ``../tokenizers/<id>``."""
    tokens: str
    """Folder of the token cache, likewise."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep's ``sweep.json``."""

    value: dict[str, Any]
    """All of it: name, recipe, runs, command, commit."""
    runs: tuple[ListedRun, ...]


def read_sweep(sweep: str | Path) -> SweepRecord:
    """``sweep.json`` of a sweep folder.

    Raises:
        RecordsError: not there, or not of this form; a run outside the sweep's folder, a tokenizer or tokens
            outside the folder of all sweeps.
    """
    root = Path(sweep)
    file = root / "sweep.json"
    value = read_json(file)
    keys = tuple(ListedRun.__dataclass_fields__)
    listed = value.get("runs") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not all(
        isinstance(run, dict) and all(isinstance(run.get(key), str) for key in keys) for run in listed
    ):
        raise RecordsError(
            f"{file}: expected an object with a list of runs, each with {', '.join(keys)}; "
            "'run' with the same recipe and --root writes it again"
        )
    runs = tuple(ListedRun(**{key: run[key] for key in keys}) for run in listed)
    home = Path(os.path.normpath(root.absolute()))
    everything = home.parent
    for run in runs:
        if run.run in ("", "..") or Path(run.run).name != run.run:
            raise RecordsError(f"{file}: run {run.run!r} is no name of a folder in {home.name}/")
        for key, link in (("tokenizer", run.tokenizer), ("tokens", run.tokens)):
            if not Path(os.path.normpath(home / link)).is_relative_to(everything):
                raise RecordsError(f"{file}: {key} {link!r} of {run.run} lies outside {everything.name}/")
    return SweepRecord(value, runs)


def list_runs(sweep: str | Path) -> list[RunFolder]:
    """The transformer runs of a sweep folder, in the order of its ``sweep.json`` (else by name), and imported
    checkpoints after them.

    Raises:
        RecordsError: no such folder, no runs in it, or a damaged ``sweep.json``.
    """
    root = Path(sweep)
    if not root.is_dir():
        raise RecordsError(f"{root}: no such sweep folder; run the sweep first")
    if (root / "sweep.json").exists():
        names = [listed.run for listed in read_sweep(root).runs]
        runs = [RunFolder(root / name) for name in names if (root / name / "config.json").exists()]
    else:
        runs = [RunFolder(p.parent) for p in sorted(root.glob("*/config.json"))]
        runs = [run for run in runs if not run.name.startswith(IMPORTED)]
    runs += [RunFolder(p.parent) for p in sorted(root.glob(f"{IMPORTED}*/config.json"))]
    if not runs:
        raise RecordsError(f"{root}: no runs in it yet")
    return runs


def finite(value: float) -> bool:
    """Whether a recorded number is a real one."""
    return isinstance(value, int | float) and math.isfinite(value)
