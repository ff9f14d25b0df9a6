"""Runs of Weights & Biases: a project online, or the files that an offline run leaves.

- Offline files are read here: wandb's command that prints them takes a second per run and is not
  in every version, and its Python reader left with version 0.31. What has stayed the same is the
  file: LevelDB's log format (blocks of 32 KiB; github.com/google/leveldb, doc/log_format.md) behind
  a header of 7 bytes, with records of ``wandb.proto``, which wandb itself decodes.
- A run that was killed leaves a torn end. What is whole is read, the rest is named.
- A run that was resumed offline has several files, in which wandb's own steps start from 0 again.
  Where the run logged a ``step`` of its own, as this project's do, the last record of each step
  counts; elsewhere the rows follow each other without a step.
- Where a project logged evaluations (``eval/…``, ``val/…``), only those records are rows; the
  records of training in between are counted and left out.
- Of a run's config only what has a meaning here becomes a column: ``model.depth``, ``seed``, …;
  text where a number belongs (``model_size: small``) is left out and noted.
- This project names a run on wandb ``<group>.<run>``, the group being its sweep; here it has its own name
  again. What stands for a sweep as a whole (job type ``summary``), and pictures, are no records.
- The end of a run is its last record that has the quantity to be fitted: summaries and other
  evaluations may follow it.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from scaling.records import RecordsError

if TYPE_CHECKING:
    import pandas as pd

HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
STATES = {
    "finished": "done", "running": "running", "pending": "waiting", "crashed": "failed", "failed": "failed",
    "killed": "interrupted", "preempted": "interrupted", "preempting": "interrupted",
}  # fmt: skip
"""wandb's word -> this project's."""
NOT_OF_A_CONFIG = ("run", "state", "final", "step", "tokens", "epochs", "flops", "flops_6nd", "loss")
"""There they are what the run was to do, not what it had done at a record."""
SUMMARY = "summary"
EVALUATION = re.compile(r"(?:eval|val|valid|validation|test)[/_.]", re.I)


@dataclass
class WandbRun:
    """One run: its config and its history in order."""

    name: str
    """wandb's id of the run; of this project's runs the folder's name."""
    state: str = "interrupted"
    """done, failed, running, waiting or interrupted; an offline run that was asked to leave is failed."""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    summary: bool = False
    """Whether it stands for a whole sweep."""


def read_online(project: str) -> list[WandbRun]:
    """All runs of ``entity/project`` with their whole history, not wandb's sample of 500 points.

    Raises:
        RecordsError: not of that form, no key, no such project, no run in it, no connection.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", project):
        raise RecordsError(f"wandb:{project}: expected wandb:entity/project")
    if not _has_key():
        raise RecordsError(
            f"wandb:{project}: no key; set WANDB_API_KEY or run 'wandb login', or name offline files"
        )
    import wandb

    try:
        runs = [
            WandbRun(
                _own_name(str(run.id), run.group),
                STATES.get(run.state, str(run.state)),
                dict(run.config),
                [_without_media(row) for row in run.scan_history()],
            )
            for run in wandb.Api().runs(project)
            if run.job_type != SUMMARY
        ]
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise RecordsError(f"wandb:{project}: {error}") from None
    if not runs:
        raise RecordsError(f"wandb:{project}: no runs in it")
    for run in runs:
        if run.state != "done":
            run.notes.append(f"{run.name} is {run.state}")
    return runs


def read_offline(path: Path) -> list[WandbRun]:
    """The runs in a .wandb file, or in all of them below a folder; files of one id are one run.

    Raises:
        RecordsError: no such files, or no whole run in any.
    """
    # By folder name, which holds the time of the start: a resumed run's files in their order.
    files = [path] if path.is_file() else sorted(path.rglob("*.wandb"), key=lambda f: (f.parent.name, f.name))
    if not files:
        raise RecordsError(f"{path}: no wandb files (*.wandb) below this folder, nor a sweep's runs in it")
    runs: dict[str, WandbRun] = {}
    parts: dict[str, list[list[dict[str, Any]]]] = {}
    lost = []
    for file in files:
        run = _read_file(file)
        if run.summary:
            continue
        if not run.name:
            lost.append(f"{file.name}: no whole run in it ({'; '.join(run.notes)}); left out")
            continue
        parts.setdefault(run.name, []).append(run.history)
        if run.name in runs:
            run.config = runs[run.name].config | run.config
            run.notes = [*runs[run.name].notes, *run.notes]
        runs[run.name] = run
    if not runs:
        raise RecordsError(f"{path}: {'; '.join(lost) or 'no run in its wandb files'}")
    for name, run in runs.items():
        run.history = _joined(run, parts[name])
    next(iter(runs.values())).notes[:0] = lost
    return list(runs.values())


def to_frame(
    runs: list[WandbRun],
    meaning: Callable[[str], str | None],
    fits: Callable[[str, Any], bool],
    quantity: str | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """One row per evaluation, or per record of the history where nothing was evaluated; and notes.

    Columns: run, state, final (the last row with the quantity of a run that is done), what ``meaning``
    knows of the config, and every number or text of the history by its own name.

    Args:
        runs: with their histories.
        meaning: a known word for a name, or None.
        fits: whether a value can stand under a known word.
        quantity: a name or a known word; by default any loss.
    """
    import pandas as pd

    notes: list[str] = []
    kept = {run.name: [row for row in run.history if _evaluation(row)] for run in runs}
    total = sum(len(run.history) for run in runs)
    if any(kept.values()):
        if left := total - sum(map(len, kept.values())):
            notes.append(f"{left} records without an evaluation left out")
    else:
        kept = {run.name: run.history for run in runs}
    names = {key for rows in kept.values() for row in rows for key in row}
    fitted = {name for name in names if quantity is not None and quantity in (name, meaning(name))}
    fitted = fitted or {name for name in names if (meaning(name) or "").startswith("loss")}
    taken = {meaning(name) for name in names}
    found: list[dict[str, Any]] = []
    dropped: set[str] = set()
    texts: dict[str, str] = {}
    for run in runs:
        facts = {k: v for k, v in _facts(run, meaning, fits, texts).items() if k not in taken}
        rows = [
            {"run": run.name, "state": run.state, "final": False, **facts, **_scalars(row, dropped)}
            for row in kept[run.name]
        ]
        if not rows:
            notes.append(f"{run.name} is {run.state} and recorded nothing")
        elif run.state == "done":
            ends = [row for row in rows if any(row.get(name) is not None for name in fitted)] or rows
            ends[-1]["final"] = True
        found += rows
    if dropped:
        notes.append(f"values that are neither numbers nor text left out: {', '.join(sorted(dropped))}")
    notes += [
        f"the config's {name} has text ('{text}') where a number belongs; left out"
        for name, text in texts.items()
    ]
    notes = [*(note for run in runs for note in run.notes), *notes]
    frame = pd.DataFrame(found)
    return frame.dropna(axis=1, how="all"), notes


def _read_file(file: Path) -> WandbRun:
    """One file; without a name if not even its run's record is whole."""
    from wandb.proto import wandb_internal_pb2

    run = WandbRun("")
    ended = False
    for data in _log(file, run.notes):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name = _own_name(record.run.run_id, record.run.run_group)
            run.summary = record.run.job_type == SUMMARY
            _update(run.config, record.run.config)
        elif kind == "config":
            _update(run.config, record.config)
        elif kind == "history":
            row = {_key(item): json.loads(item.value_json) for item in record.history.item}
            run.history.append(_without_media(row))
        elif kind == "exit":
            ended = True
            run.state = "done" if record.exit.exit_code == 0 else "failed"
    if not ended:
        run.notes.append(f"{run.name or file.name}: no end recorded; it was killed or still runs")
    return run


def _own_name(name: str, group: str | None) -> str:
    return name.removeprefix(f"{group}.") if group else name


def _without_media(row: dict[str, Any]) -> dict[str, Any]:
    """The row without pictures: a file has ``<name>._type`` and more of each, a server one value."""
    media = {key.removesuffix("._type") for key in row if key.endswith("._type")}
    media |= {key for key, value in row.items() if isinstance(value, dict) and "_type" in value}
    return {k: v for k, v in row.items() if k not in media and k.rpartition(".")[0] not in media}


def _log(file: Path, notes: list[str]) -> Iterator[bytes]:
    """The whole records of a log; a torn or damaged rest is named in ``notes``."""
    data = file.read_bytes()
    if not data.startswith(HEADER):
        if not HEADER.startswith(data):
            raise RecordsError(f"{file}: not a wandb file of a known version")
        notes.append(f"{file.name}: nothing was written yet")
        return
    at, whole, parts = len(HEADER), len(HEADER), b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        if at + 7 > len(data):
            break
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        if len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            break
        at += 7 + length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            whole = at
            yield parts
    if rest := len(data) - whole:
        notes.append(f"{file.name}: the last {rest} of {len(data)} bytes are torn or damaged; left out")


def _update(config: dict[str, Any], record: Any) -> None:
    for item in record.update:
        config[_key(item)] = json.loads(item.value_json)
    for item in record.remove:
        config.pop(_key(item), None)


def _key(item: Any) -> str:
    return str(item.key or ".".join(item.nested_key))


def _joined(run: WandbRun, parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The history of all files; the last record of each step and kind counts, in the order of steps."""
    history = [row for part in parts for row in part]
    if len(parts) == 1:
        return history
    if not all("step" in row for row in history):
        run.notes.append(f"{run.name} was resumed and logged no step of its own; its rows have no step")
        return [{k: v for k, v in row.items() if k != "_step"} for row in history]
    last = {(row["step"], _evaluation(row)): row for row in history}
    return sorted(last.values(), key=lambda row: row["step"])


def _evaluation(row: dict[str, Any]) -> bool:
    return any(EVALUATION.match(key) for key in row)


def _scalars(row: dict[str, Any], dropped: set[str]) -> dict[str, Any]:
    """Numbers and text of a record; wandb's own step only where the run logged none."""
    values = {k: v for k, v in row.items() if not k.startswith("_")}
    if "step" not in values and "_step" in row:
        values["step"] = row["_step"]
    kept = {k: v for k, v in values.items() if v is None or isinstance(v, int | float | str)}
    dropped |= values.keys() - kept.keys()
    return kept


def _facts(
    run: WandbRun,
    meaning: Callable[[str], str | None],
    fits: Callable[[str, Any], bool],
    texts: dict[str, str],
) -> dict[str, Any]:
    """What of the config has a meaning: the shallowest key, ``model.`` and ``train.`` before others.

    ``texts`` gathers what does not fit, by its name.
    """
    found: dict[str, dict[tuple[int, bool], list[Any]]] = {}
    for path, value in _leaves(run.config):
        key = meaning(path[-1])
        if key is None or key in NOT_OF_A_CONFIG:
            continue
        if not fits(key, value):
            texts.setdefault(".".join(path), str(value))
        else:
            rank = (len(path), path[0] not in ("model", "train"))
            found.setdefault(key, {}).setdefault(rank, []).append(value)
    facts = {}
    for key, ranks in found.items():
        first, *others = ranks[min(ranks)]
        if any(other != first for other in others):
            run.notes.append(f"{run.name}: its config has several values of {key}; none taken")
        elif isinstance(first, int | float | str) and not isinstance(first, bool):
            facts[key] = first
    return facts


def _leaves(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _has_key() -> bool:
    """Whether wandb can log in without asking: from the environment or the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
