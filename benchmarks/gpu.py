"""All of the speeds that are claimed for a GPU, in one command of ten minutes at most.

    python -m benchmarks.gpu [--published FOLDER] [--parts attention train16 train8 makespan sampling
                             encoding loader startup] [--json FILE] [--seconds 600] [--device cuda] [--tiny]

The paper's setting: 256 px, ten steps to 16 × 16 tokens, vocabulary 4096, 1000 classes, bf16; weights and
pictures are random. FOLDER is a checkout of VAR's published code (github.com/FoundationVision/VAR); without
it only this project is timed. Each part is a process of its own: one that fails, runs out of memory or of
its time is named with its reason, and the others go on. A part that the time is over for is left out and
named. --tiny takes the smallest sizes of everything, on a CPU too: its numbers say nothing.

'bound' is what cannot be done without: FLOPs and bytes, and how long these take at the rates of one large
bf16 product and one large copy, measured beside the figure. --json FILE has the same, for a machine to read.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_parts import PARTS, Setting
from scaling.clock import device_name
from scaling.records import write_json

LEAST_SECONDS = 10.0
"""A part is not begun with less."""


def measure_part(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """Rows of one part, measured in a process of its own, or why there are none; and the time it took."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.json"
        words = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--json", str(target)]
        words += ["--device", setting.device.type, *(["--tiny"] if setting.tiny else [])]
        words += ["--published", str(setting.published)] if setting.published is not None else []
        # A group of its own, so that what it has started ends with it.
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            why = f"not done in {seconds:.0f} s"
        else:
            sys.stderr.write(said)
            if process.returncode == 0:
                return {"rows": json.loads(target.read_text()), "seconds": time.monotonic() - begun}
            why = (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    return {"rows": [], "failed": why, "seconds": time.monotonic() - begun}


def measure_all(names: Sequence[str], setting: Setting, seconds: float) -> dict[str, dict[str, Any]]:
    """All parts in turn, as far as the time goes."""
    found: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    for name in names:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            found[name] = {"rows": [], "failed": "no time left", "seconds": 0.0}
        else:
            found[name] = measure_part(name, setting, left)
        done = found[name].get("failed", f"{len(found[name]['rows'])} figures")
        print(f"{name}: {done} ({found[name]['seconds']:.0f} s)", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, dict[str, Any]]) -> Table:
    """One row a figure, and one for each part without any."""
    out = Table("figure", "here", "target", "bound")
    for name, part in found.items():
        for row in part["rows"]:
            out.add_row(row["what"], f"{row['value']:.3g} {row['unit']}".strip(), row["target"], row["bound"])
        if "failed" in part:
            out.add_row(name, "failed", "", part["failed"])
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Time everything on a GPU.")
    parser.add_argument("--published", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all parts together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: whether it runs")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny shows whether it would run")
    if device.type == "cpu" and not options.tiny:
        parser.error("on a CPU only --tiny ends in time; benchmarks.training and .sampling are for CPUs")
    setting = Setting(device, options.tiny, options.published)
    if options.published is not None:
        sys.path.insert(0, str(options.published))
    if options.only is not None:
        write_json(options.json, [asdict(row) for row in PARTS[options.only](setting)])
        return 0
    found = measure_all(options.parts, setting, options.seconds)
    facts = {"device": device_name(device), "torch": torch.__version__, "tiny": options.tiny, "parts": found}
    if options.json is not None:
        write_json(options.json, facts)
    print(f"{facts['device']}, torch {torch.__version__}")
    Console(width=170).print(table(found))
    return int(any("failed" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
