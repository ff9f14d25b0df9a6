"""Checkpoints that survive a kill at any instant, and say when they did not.

    <folder>/step-000000200/manifest.json        step, and SHA-256 and size of every other file
    <folder>/step-000000200/<group>.safetensors  one file per group of tensors (model, optimizer, …)
    <folder>/step-000000200/state.json           everything that is not a tensor

Design choices
- A checkpoint is written aside, flushed to the disk, and renamed: a folder named ``step-…`` is whole.
- Checksums are verified on load; a damaged checkpoint is named in a warning and the one before it used. A
  checkpoint that the system cannot read now (a stale handle of a shared folder) is not damaged but an error:
  passing over it would lose its steps, and processes that read the others' folder would go on from there.
- Numbers that are not finite are never written: whatever is there can be gone on from.
- Optimiser state travels as named tensors (``exp_avg/<parameter>``), never as pickle.
- A tensor is read when it is asked for and copied straight to where it belongs, so that loading takes
  the memory of one tensor beside the model's, in each of the processes that load at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scaling.records import RecordsError, read_json

log = logging.getLogger(__name__)

Tensors = dict[str, dict[str, Tensor]]
Fill = Callable[[Tensor, Tensor], object]
"""Copies a saved tensor (the second) to where it belongs, which may be a slice of one."""


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, on the CPU; each is mapped into memory only while it is in use."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with safe_open(file, framework="pt") as opened:
            self._names = frozenset(opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        # Opened anew each time: a file's tensors share one mapping, which lives as long as any of them.
        with safe_open(self._file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: the step, the groups of tensors, and the rest."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


class NotFiniteError(ValueError):
    """Tensors that nothing can go on from; the message names one."""


class _DamagedError(Exception):
    """A checkpoint whose files are not what its manifest says."""


def save_checkpoint(
    folder: str | Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int | None = 2
) -> Path:
    """Write checkpoint ``step`` and keep the newest ``keep`` up to it; None removes nothing.

    Checkpoints of later steps are removed: a run at ``step`` has passed over them as damaged.

    Args:
        folder: the run's ``checkpoints``.
        step: optimiser steps done.
        tensors: groups of named tensors; a group's name is its file's.
        state: JSON values.

    Raises:
        NotFiniteError: a tensor holds a number that is none; nothing was written.
        OSError, SafetensorError: it could not be written (a full disk, say). The checkpoints before are
            untouched in both cases.
    """
    check_finite(tensors)
    root = Path(folder)
    target, partial = root / _name(step), root / f".partial-{_name(step)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".partial-*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        for group, values in tensors.items():
            save_file({n: _plain(v) for n, v in values.items()}, partial / f"{group}.safetensors")
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = {path.name: _seal(path) for path in sorted(partial.iterdir())}
        manifest = partial / "manifest.json"
        manifest.write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        _seal(manifest)
        _sync_folder(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync_folder(root)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if keep is None:
        return target
    older = [path for path in _checkpoints(root) if _step(path) <= step]
    for path in set(_checkpoints(root)) - set(older[-keep:]):
        shutil.rmtree(path)
    return target


def check_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """``NotFiniteError`` unless every number of every tensor is finite; synchronises once."""
    names = [f"{group}/{name}" for group, values in tensors.items() for name in values]
    if not names:
        return
    found = [value.isfinite().all() for values in tensors.values() for value in values.values()]
    device = found[0].device
    wrong = ~torch.stack([one.to(device, non_blocking=True) for one in found])
    if wrong.any():
        raise NotFiniteError(f"{names[int(wrong.int().argmax())]} holds numbers that are not finite")


def forget_newest(folder: str | Path) -> None:
    """Remove the newest of several checkpoints, to go on from the one before."""
    found = _checkpoints(Path(folder))
    if len(found) > 1:
        shutil.rmtree(found[-1])


def forget_later(folder: str | Path, step: int) -> None:
    """Remove the checkpoints after ``step``: what was done since is done again, perhaps with another end."""
    for path in _checkpoints(Path(folder)):
        if _step(path) > step:
            shutil.rmtree(path)


def load_checkpoint(folder: str | Path, upto: int | None = None) -> Checkpoint | None:
    """The newest undamaged checkpoint of a folder, or None when there is none.

    Every damaged one that is passed over is named in a warning of the log.

    Args:
        folder: the run's ``checkpoints`` or ``branches``.
        upto: those of later steps are not looked at.

    Raises:
        RecordsError: the system could not read one; it may well be sound.
    """
    for path in reversed(_checkpoints(Path(folder))):
        if upto is not None and _step(path) > upto:
            continue
        try:
            return _read(path)
        except _DamagedError as error:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path, error)
    return None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """An optimiser's state as ``<key>/<parameter>`` tensors; ``names`` are the model's named parameters.

    Raises:
        ValueError: the state holds something that is not a tensor, or a parameter not in ``names``.
    """
    known: dict[Tensor, str] = {parameter: name for name, parameter in names.items()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        if parameter not in known:
            raise ValueError("the optimiser holds a parameter that is not among the names given")
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimiser state {key!r} of {known[parameter]} is not a tensor")
            tensors[f"{key}/{known[parameter]}"] = value
    return tensors


def restore_module(module: torch.nn.Module, tensors: Mapping[str, Tensor], fill: Fill = Tensor.copy_) -> None:
    """Copy saved tensors into a module's parameters and buffers, one at a time.

    Raises:
        RecordsError: they are not those of this module, by name or by shape.
    """
    wanted = module.state_dict()
    strange = wanted.keys() ^ tensors.keys()
    if strange:
        raise RecordsError(
            f"the checkpoint is of another model: {len(strange)} tensors are only in one of the two, "
            f"such as '{min(strange)}'"
        )
    for name, target in wanted.items():
        value = tensors[name]
        if value.shape != target.shape:
            raise RecordsError(f"the checkpoint's {name} is {tuple(value.shape)}, not {tuple(target.shape)}")
        fill(target, value)


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, Tensor],
    fill: Fill = Tensor.copy_,
) -> None:
    """Put back what ``optimizer_tensors`` gave, bit for bit.

    Raises:
        RecordsError: a tensor names no parameter of this optimiser, or has another shape.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    restored: dict[Tensor, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        key, _, name = full.partition("/")
        parameter = names.get(name)
        group = groups.get(parameter) if parameter is not None else None
        if parameter is None or group is None:
            raise RecordsError(
                f"the checkpoint's optimiser state names '{name}', which this model does not train"
            )
        if value.ndim and value.shape != parameter.shape:
            raise RecordsError(
                f"the checkpoint's {full} is {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
            )
        # Adam counts steps on the CPU unless it runs fused or captured.
        counter_device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
        if value.ndim:
            kept = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            fill(kept, value)
        else:
            kept = value.to(counter_device, copy=True)
        restored.setdefault(parameter, {})[key] = kept
    optimizer.state.clear()
    optimizer.state.update(restored)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit())


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file to the disk; its checksum and size."""
    sync_file(path)
    return _digest(path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> Checkpoint:
    try:
        manifest = read_json(path / "manifest.json")
        files, step = dict(manifest["files"]), int(manifest["step"])
        for name, expected in files.items():
            if _digest(path / Path(name).name) != expected:
                raise _DamagedError(f"{name} does not match its checksum")
        tensors = {
            Path(name).stem: SavedTensors(path / Path(name).name)
            for name in files
            if name.endswith(".safetensors")
        }
        return Checkpoint(step, tensors, read_json(path / "state.json"))
    except (FileNotFoundError, RecordsError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _DamagedError(str(error)) from None
    except OSError as error:
        raise RecordsError(
            f"{path}: the checkpoint could not be read ({error}); start again, or remove it to go on from "
            "the one before"
        ) from error
