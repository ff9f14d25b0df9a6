"""How right a plan is: a sweep is calibrated, planned, run at once, and compared run by run.

    python -m benchmarks.planning --rounds 2

One small sweep of photographs at depths 1 to 3, from images to the last run, in a folder of its own that is
removed afterwards; each round calibrates anew and trains anew. FLOPs must agree exactly, times are meant to
within 25 %, memory to within 15 %. Another load on the machine between calibration and end shows in the
times: the load is printed with them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scaling.records import RunFolder
from sweeps.tables import size

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = """
name: planning
depths: [1, 2, 3]
data: {source: photos, resolution: 32, train_images: 1024, val_images: 128}
tokenizer:
  vocab: 256
  latent_channels: 16
  channels: 16
  norm_groups: 4
  multipliers: [1, 2, 4, 4]
  res_blocks: 1
  scales: [1, 2, 3, 4]
tokenizer_train: {steps: 80, batch: 16, lr: 2.0e-3, codebook: 0.1, autoencode_steps: 30}
train: {steps: 60, batch: 64, lr: 2.0e-3, precision: fp32}
evaluation: {points: 6}
"""


@dataclass(frozen=True)
class Compared:
    """One row: a quantity of one job as planned and as it came."""

    job: str
    what: str
    planned: float
    real: float

    @property
    def error(self) -> float:
        """planned/real − 1."""
        return self.planned / self.real - 1


def main() -> None:
    """Make the rounds and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    for number in range(1, args.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            rows, words = one_round(Path(folder), args.depths)
            show(f"round {number}, {time.monotonic() - started:.0f} s", rows, words)


def one_round(folder: Path, depths: list[int]) -> tuple[list[Compared], list[str]]:
    """Calibrate, plan, run; the rows and a few words."""
    recipe = folder / "planning.yaml"
    recipe.write_text(RECIPE)
    words = [str(recipe), "--root", str(folder / "runs"), "--depths", *map(str, depths)]
    environment = os.environ | {"VARSCALE_CACHE": str(folder / "cache")}

    def call(command: str, *more: str) -> tuple[str, float, str]:
        begun = time.monotonic()
        script = [sys.executable, str(REPOSITORY / "run_sweep.py"), command, *words, *more]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(done.stdout + done.stderr)
        load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        return done.stdout, time.monotonic() - begun, load

    planned, calibrating, before = call("plan", "--json", "--calibrate")
    told, running, after = call("run")
    plan = json.loads(planned)
    rows = list(compare(plan, folder / "runs" / "planning"))
    wall = next(line for line in told.splitlines() if line.startswith("device time: "))
    return rows, [
        f"calibration: {calibrating:.0f} s, then {before}",
        f"'run' with start and report: {running:.0f} s, then {after}",
        wall,
    ]


def compare(plan: dict[str, Any], sweep: Path) -> Iterator[Compared]:
    """Every job's numbers, and the whole sweep's."""
    begins, ends, flops = [], [], [0, 0]
    for job in plan["jobs"]:
        begin, end = span(RunFolder(job["folder"]))
        begins.append(begin)
        ends.append(end)
        yield Compared(job["job"], "time", job["seconds"], end - begin)
    for run in plan["runs"]:
        folder = RunFolder(sweep / run["run"])
        begin, end = span(folder)
        begins.append(begin)
        ends.append(end)
        name, recorded = run["run"].rpartition("-")[0], folder.metrics("eval")[-1]["flops"]
        flops = [flops[0] + run["flops"], flops[1] + recorded]
        yield Compared(name, "FLOPs", run["flops"], recorded)
        yield Compared(name, "time", run["seconds"], end - begin)
        yield Compared(name, "memory", run["memory_per_process"], folder.status()["peak_memory"])
    yield Compared("sweep", "FLOPs", *flops)
    yield Compared("sweep", "time", plan["total"]["seconds_to_do"], max(ends) - min(begins))


def span(folder: RunFolder) -> tuple[float, float]:
    """Unix times of a job's start, as its log says, and of its end."""
    head = (folder.path / "log.txt").read_text().splitlines()[0]
    begin = time.mktime(time.strptime(" ".join(head.split()[1:3]), "%Y-%m-%d %H:%M:%S"))
    return begin, float(folder.status()["heartbeat"])


def show(title: str, rows: list[Compared], words: list[str]) -> None:
    """Print a round."""
    out = Console()
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("job", "", "planned", "real", "planned / real"):
        table.add_column(heading, justify="left" if heading in ("job", "") else "right", no_wrap=True)
    for row in rows:
        write = {"time": "{:.1f} s".format, "memory": size, "FLOPs": "{:.6g}".format}[row.what]
        error = "equal" if row.planned == row.real else f"{row.error:+.1%}"
        table.add_row(row.job, row.what, write(row.planned), write(row.real), error)
    out.print(table)
    for text in words:
        out.print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
