"""The job of ``run_sweep.py evaluate``: one process, or several that share the images.

    python -m scaling.evaluate_job REQUEST.json

``run_sweep.py evaluate`` writes the request (``EvaluationJob``) and starts it, plainly or by ``accelerate
launch``; what was found is left beside it in ``evaluated.json``, as values and as a table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from scaling.config import from_dict, require
from scaling.imported import import_into, training_of
from scaling.process import Interrupted, JobProcess, recorded_failure, run_job
from scaling.records import RunFolder, read_json, write_json
from scaling.requests import EvaluationJob
from scaling.validation import validate

EVALUATED = "evaluated.json"


def evaluate(asked: EvaluationJob, place: RunFolder, job: JobProcess) -> None:
    """Evaluate, and import the result where that is asked for; every process calls it.

    Raises:
        ConfigError, RecordsError: what a person can remove.
        Interrupted: asked to leave.
    """
    where, request = asked.where, asked.request
    training = None if request.into is None else training_of(where, request)  # the cheap refusal first

    def progress(done: int, total: int) -> None:
        if job.should_stop():
            raise Interrupted
        job.beat(step=done, total_steps=total)

    result = validate(where, request, progress)
    if not job.is_main:
        return
    imported = None
    if request.into is not None and training is not None:
        run = import_into(request.into, result, training)
        imported = f"imported: {run.path}; its tokens and FLOPs: {training.told}"
    found = {"values": result.to_json(), "table": result.table(), "imported": imported}
    write_json(place.path / EVALUATED, found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the request file says; raises what ``run_job`` turns into exit codes."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    require(len(given) == 1, "usage: python -m scaling.evaluate_job REQUEST.json")
    file = Path(given[0])
    place = RunFolder(file.parent)
    with recorded_failure(place):
        asked = from_dict(EvaluationJob, read_json(file))
        state = PartialState(cpu=asked.request.device == "cpu" or not torch.cuda.is_available())
    try:
        with JobProcess(place, state.is_main_process, state.wait_for_everyone) as job:
            evaluate(asked, place, job)
            state.wait_for_everyone()
    finally:
        state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_job(main))
