"""What the analysis writes beside text: strict JSON values and whole pictures."""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The value as strict JSON has it: keys are text, numbers that are not finite null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """As ``scaling.records.write_atomic`` writes text: the old or the new file, never a part."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
