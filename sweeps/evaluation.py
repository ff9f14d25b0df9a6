"""What ``evaluate`` does: it starts one job, of one process or several, and prints what that has found."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from scaling.config import LaunchConfig, to_dict
from scaling.records import RecordsError, RunFolder, read_json
from sweeps.jobs import PRODUCTS, Job, command
from sweeps.single_job import run_alone

if TYPE_CHECKING:
    from scaling.requests import EvaluateRequest


def evaluate(where: str, request: EvaluateRequest) -> int:
    """Evaluate a model and print its numbers; the exit code.

    Args:
        where: a run's folder or a checkpoint.

    Raises:
        ConfigError: fewer GPUs than asked for.
        RecordsError: the job refused; it says why.
    """
    launch = LaunchConfig(
        processes=request.processes, threads=request.threads, device=request.device, runs_at_once=1
    )
    folder = RunFolder(tempfile.mkdtemp(prefix="varscale-evaluate-"))
    job = Job(
        "evaluation",
        "evaluation",
        folder,
        command("evaluation", [str(folder.path / "launch.json")], launch),
        PRODUCTS["evaluation"],
        launch={"where": where, "request": to_dict(request)},
        alone=True,
    )
    code, keep = 1, True
    try:
        code = run_alone(job, launch, Console(stderr=True))
        keep = code == 1  # its log says what went wrong
        if code == 0:
            _print(folder.path / PRODUCTS["evaluation"], request.json)
    except RecordsError:
        keep = False
        raise
    finally:
        if not keep:
            shutil.rmtree(folder.path, ignore_errors=True)
    return code


def _print(file: Path, as_json: bool) -> None:
    found = read_json(file)
    print(json.dumps(found["values"], indent=1) if as_json else found["table"])
    if found["imported"]:
        print(found["imported"], file=sys.stderr)
