"""Reading the reference numbers made with the published VAR and FlexVAR code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

SHARED = Path(os.environ.get("VARSCALE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FOLDER = SHARED / "reference" / "var"

needs_reference = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the reference numbers are not at {FOLDER} (set VARSCALE_SHARED)"
)


def tensors(name: str) -> dict[str, torch.Tensor]:
    """All tensors of one file, as stored."""
    with safe_open(FOLDER / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def metadata(name: str) -> dict[str, Any]:
    """The file's metadata; values that are JSON are parsed."""
    with safe_open(FOLDER / name, "pt") as file:
        raw = file.metadata() or {}
    parsed: dict[str, Any] = {}
    for key, text in raw.items():
        try:
            parsed[key] = json.loads(text)
        except json.JSONDecodeError:
            parsed[key] = text
    return parsed


def weights(name: str) -> dict[str, torch.Tensor]:
    """The state dict of a ``*_weights`` file; big matrices are stored as int8 on a power-of-two grid."""
    exponents = metadata(name)["int8_exp"]
    return {
        key: value.float() * 2.0 ** -exponents[key] if key in exponents else value
        for key, value in tensors(name).items()
    }


def published_shapes(file: str) -> dict[str, torch.Tensor]:
    """Keys of a published checkpoint with empty tensors of its shapes (``keys/``)."""
    state = {}
    for line in (FOLDER / "keys" / file).read_text().splitlines():
        if not line.startswith("#"):
            key, shape, *_ = line.split("\t")
            state[key] = torch.empty(
                [int(n) for n in shape.strip("()").split(",") if n.strip()], device="meta"
            )
    return state
