"""What ``fidelity`` and ``classifier`` do: each starts one job, under the sweep's own scheduler and display.

The options come from ``scaling.requests`` and go to the job as they are, in ``launch.json`` or
``config.json`` of its folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from scaling.config import LaunchConfig, content_hash, to_dict
from scaling.records import RunFolder, read_json
from sweeps.commands import console
from sweeps.jobs import PRODUCTS, Job, command, prepare
from sweeps.single_job import run_alone
from sweeps.where import Selection

if TYPE_CHECKING:
    from scaling.requests import ClassifierRun, FidelityRequest

CLASSIFIERS = "classifiers"
"""Their folder under the root of all sweeps."""


def measure(selection: Selection, request: FidelityRequest) -> int:
    """Measure the pictures of runs and print the numbers; the exit code.

    Raises:
        ConfigError: fewer GPUs than asked for.
        RecordsError: the job refused; it says why.
    """
    out = console()
    for count, what in (
        (selection.unfinished, "not finished yet"),
        (selection.imported, "imported, and measured where its folder is given"),
    ):
        if count:
            out.print(f"left out: {count} of {selection.sweep}: {what}", highlight=False, soft_wrap=True)
    launch = LaunchConfig(
        processes=request.processes, threads=request.threads, device=request.device, runs_at_once=1
    )
    runs = [str(run.path.absolute()) for run in selection.runs]
    asked = {"request": to_dict(request), "runs": runs}
    # A folder for each request, so that two calls on one sweep tell each other's failures apart.
    folder = RunFolder(selection.sweep / "fidelity" / content_hash(asked)[:10])
    job = Job(
        "fidelity",
        "fidelity",
        folder,
        command("fidelity", [str((folder.path / "launch.json").absolute())], launch),
        PRODUCTS["fidelity"],
        launch=asked,
        alone=True,
        recheck=True,
    )
    code = run_alone(job, launch)
    if code == 0:
        rows = read_json(folder.path / PRODUCTS["fidelity"])["runs"]
        out.print(fidelity_table(rows))
        there = sum(row["there"] for row in rows)
        if there:
            out.print(
                f"{there} of {len(rows)} had a line of this setting already and were not measured again"
            )
    return code


def train_classifier(root: Path, run: ClassifierRun, launch: LaunchConfig, fingerprint: str) -> int:
    """Train the classifier of a data set, unless it is there, and print its accuracy; the exit code.

    Args:
        fingerprint: of the images.

    Raises:
        RecordsError: the folder is made from other images; the job refused.
    """
    folder = RunFolder(root.absolute() / CLASSIFIERS / run.run_id)
    folder.check_data(fingerprint)
    prepare(folder, run)
    launch = replace(launch, machines=1, machine_rank=0, processes=1, runs_at_once=1)
    job = Job(
        folder.name,
        "classifier",
        folder,
        command("classifier", [str(folder.path)], launch),
        PRODUCTS["classifier"],
        launch=to_dict(launch),
        alone=True,
    )
    code = 0 if job.state == "done" else run_alone(job, launch)
    if code == 0:
        facts = read_json(folder.path / PRODUCTS["classifier"])["facts"]
        console().print(
            f"{folder.path}: {facts['val_accuracy']:.1%} of {facts['val_images']} validation images right; "
            f"always naming the most frequent class: {facts['chance']:.1%}",
            highlight=False,
            soft_wrap=True,
        )
    return code


def fidelity_table(rows: list[dict[str, Any]]) -> Table:
    """One row per run, in the order of the sweep."""
    first = rows[0]
    table = Table(
        title=f"{first['extractor']} features of {first['images']} pictures against {first['reference']}",
        title_justify="left",
        box=None,
    )
    table.add_column("run", no_wrap=True)
    for heading in ("depth", "FID", "IS", "precision", "recall"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        is_mean = "" if row["is"] is None else f"{row['is']:.2f} ± {row['is_std']:.2f}"
        shares = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("precision", "recall")]
        state = "there already" if row["there"] else "measured"
        table.add_row(row["run"], str(row["depth"]), f"{row['fid']:.2f}", is_mean, *shares, state)
    return table
