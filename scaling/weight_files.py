"""Tensors out of files that others made: ``.pth``, ``.pt``, ``.safetensors``, on this disk or on the hub.

- Nothing is ever unpickled but tensors and plain values (``torch.load(weights_only=True)``): a file that
  holds more is refused, and none of it has run then.
- Files are mapped into memory, not read: what is opened takes the memory of the weights once, in pages that
  the system can drop, and converting names and shapes copies nothing.
- Training checkpoints of published trainers hold several state dicts; those under the keys that these
  trainers use (``NESTINGS``) are found. ``module.`` and ``_orig_mod.`` before every key, which data-parallel
  and compiled models leave, are taken away. What was done is told in ``WeightFile.notes``.
"""

from __future__ import annotations

import importlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scaling.schema import ConfigError

NESTINGS = (
    "trainer", "var_wo_ddp", "vae_local", "state_dict", "model_state_dict", "model", "module", "ema",
)  # fmt: skip
"""Keys under which published trainers keep state dicts, the preferred first."""
DEPTH = 3
"""Nestings within one another, at most."""
PREFIXES = ("module.", "_orig_mod.")
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
HUB = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)[:/]([^:]+)")
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError),
    *(TypeError, AttributeError, AssertionError, struct.error, zipfile.BadZipFile, SafetensorError),
)
"""What the readers raise on files that are damaged or none of theirs."""


@dataclass(frozen=True)
class WeightFile:
    """The state dicts of one file."""

    path: Path
    states: dict[str, dict[str, Tensor]]
    """By the keys that lead to them, joined by dots; ``""`` is the file itself."""
    notes: dict[str, tuple[str, ...]]
    """What was done to get at each of them."""

    @property
    def name(self) -> str:
        """The file's name without suffix."""
        return self.path.stem


def read_weights(where: str | Path) -> WeightFile:
    """All state dicts of a file, in fp32, mapped into memory.

    Args:
        where: a path, or ``owner/repo:file`` (also ``hf://owner/repo/file``) of the Hugging Face hub.

    Raises:
        ConfigError: no such file; damaged; more in it than tensors and plain values; no state dict in it.
    """
    path = find_file(where)
    content = _load(path)
    states: dict[str, dict[str, Tensor]] = {}
    notes: dict[str, tuple[str, ...]] = {}
    for keys, found in _state_dicts(content):
        state, prefix = _without_prefix(found)
        name = ".".join(keys)
        states[name] = {key: _plain(path, key, value) for key, value in state.items()}
        said = [f"read from '{name}' in {path.name}"] if keys else []
        notes[name] = (*said, *([f"'{prefix}' before every key was taken away"] if prefix else []))
    if not states:
        what = (
            ", ".join(list(map(str, content))[:8]) if isinstance(content, Mapping) else type(content).__name__
        )
        raise ConfigError(
            f"{path}: no state dict in it, at the top or under {', '.join(NESTINGS)}; it holds "
            f"{what or 'nothing'}"
        )
    return WeightFile(path, states, notes)


def find_file(where: str | Path) -> Path:
    """The file itself, fetched from the hub where it is a hub name.

    Raises:
        ConfigError: neither a file nor a hub name; the hub cannot be reached or has no such file.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{where}: a folder, expected a file of weights ({', '.join(SUFFIXES)})")
    if not is_hub_name(where):
        raise ConfigError(f"{where}: no such file (files of the hub are named owner/repo:file)")
    match = HUB.fullmatch(str(where))
    assert match is not None
    return _from_hub(match[1], match[2])


def is_hub_name(where: str | Path) -> bool:
    """Whether it names a file of the hub and is none of this disk."""
    match = HUB.fullmatch(str(where))
    named = match is not None and ":" in str(where) and match[2].endswith(SUFFIXES)
    return named and not Path(where).expanduser().exists()


def _from_hub(repo: str, file: str) -> Path:
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ConfigError(
            f"{repo}:{file} is on the hub: pip install huggingface_hub, or give a file"
        ) from None
    try:
        return Path(hub.hf_hub_download(repo_id=repo, filename=file))
    # The library's own errors are OSErrors or ValueErrors; unreachable servers raise its HTTP client's.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{repo}:{file} could not be had from the Hugging Face hub ({type(error).__name__}: {reason}); "
            "download the file where there is a connection and give its path"
        ) from None


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 are no archives
        with warnings.catch_warnings(action="ignore"):  # what is wrong is told below, in one line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _UNREADABLE as error:
        text = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())
        if named := re.search(r"GLOBAL ([\w.]+)", text):
            raise ConfigError(
                f"{path}: holds more than tensors and plain values ({named[1]}); it was not unpickled, since "
                "that can run any code. Have its maker save the state dict alone"
            ) from None
        raise ConfigError(f"{path}: not readable as weights; damaged or cut short? ({text[:160]})") from None


def _state_dicts(content: Any, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The state dicts in what was loaded, and the keys to them."""
    if not isinstance(content, Mapping) or not content:
        return []
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return [(keys, dict(content))]
    if len(keys) == DEPTH:
        return []
    inner = [_state_dicts(content[name], (*keys, name)) for name in NESTINGS if name in content]
    return [found for several in inner for found in several]


def _without_prefix(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Without what data-parallel and compiled models put before every key, and what that was."""
    removed = ""
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        removed += prefix
    return state, removed


def _plain(path: Path, key: str, value: Tensor) -> Tensor:
    if value.layout != torch.strided or value.is_quantized:
        raise ConfigError(f"{path}: {key} is sparse or quantised; expected an ordinary tensor")
    return value.float() if value.is_floating_point() else value
