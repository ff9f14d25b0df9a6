"""Stand-ins for Slurm's commands."""

from __future__ import annotations

from pathlib import Path


def fake(place: Path, name: str, script: str) -> None:
    """A command of this name that does what the shell script says."""
    (place / name).write_text(f"#!/bin/sh\n{script}\n")
    (place / name).chmod(0o755)
