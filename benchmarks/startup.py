"""How long it takes from a command to the first step of training, and where that time goes.

    python -m benchmarks.startup [--repetitions 5] [--threads 1]

The quickstart with few images and steps, in a folder of its own that is removed afterwards:
- 'tokenizer': ``run`` in an empty folder until the tokenizer has taken its first step; photographs are
  cropped before it.
- 'first run': ``run`` again, with tokenizer and tokens ready, until a run of depth 1 has taken a step.
- 'imports': of the trainer, alone in a process; 'plan' and 'help': whole commands, which import no torch.

A first step is seen by its line in ``metrics.jsonl`` (logged at every step, looked for every 2 ms). Times are
by the clock; the first repetition, which also reads the files from disk, is not counted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from scaling.clock import device_name

SMALL = (
    "--data.train-images", "256", "--data.val-images", "64", "--tokenizer-train.steps", "10",
    "--tokenizer-train.autoencode-steps", "2", "--depths", "1", "--evaluation.points", "1",
    "--launch.log-every", "1", "--tokenizer-train.log-every", "1",
)  # fmt: skip
LOOK_SECONDS = 0.002
PATIENCE_SECONDS = 300.0


def command(*words: str) -> list[str]:
    """Of the product, in this environment."""
    return [sys.executable, "run_sweep.py", *words]


def whole(words: Sequence[str]) -> float:
    """Seconds of a command from start to end."""
    start = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - start


def until_first_step(words: Sequence[str], pattern: str, root: Path) -> float:
    """Seconds from the start of a command to the first line of metrics in a folder that fits the pattern; the
    command is then left to end."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not any(file.stat().st_size for file in root.glob(pattern)):
        if process.poll() is not None or time.perf_counter() - start > PATIENCE_SECONDS:
            process.kill()
            raise SystemExit(f"no first step in {root / pattern}:\n{process.communicate()[0]}")
        time.sleep(LOOK_SECONDS)
    taken = time.perf_counter() - start
    process.communicate()
    return taken


def first_steps(threads: int) -> dict[str, float]:
    """Of a tokenizer in an empty folder, and of a run that finds it ready."""
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        root = Path(folder)
        recipe = ("quickstart", "--root", str(root), *SMALL, "--launch.threads", str(threads))
        found = {"tokenizer": until_first_step(command("run", *recipe), "tokenizers/*/metrics.jsonl", root)}
        again = (*recipe, "--train.steps", "11")  # another run: the one that was trained above is done
        found["first run"] = until_first_step(
            command("run", *again, "--name", "again"), "again/*/metrics.jsonl", root
        )
        return found


def imports() -> float:
    """Seconds of the trainer's imports, as the process itself measures them."""
    code = "import time; a = time.perf_counter(); import scaling.trainer; print(time.perf_counter() - a)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description="Time the start of training.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    parts: dict[str, Callable[[], float]] = {
        "imports of the trainer": imports,
        "plan": lambda: whole(command("plan", "quickstart")),
        "help": lambda: whole(command("--help")),
    }
    seconds: dict[str, list[float]] = {}
    for repetition in range(options.repetitions + 1):
        found = first_steps(options.threads) | {name: part() for name, part in parts.items()}
        if repetition:
            for name, value in found.items():
                seconds.setdefault(name, []).append(value)
    table = Table("from the command to", "seconds, median", "least", "most")
    for name, values in seconds.items():
        table.add_row(name, f"{np.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}")
    name = device_name(torch.device("cpu"))
    print(f"{name}, {options.threads} threads a job, {options.repetitions} repetitions")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
