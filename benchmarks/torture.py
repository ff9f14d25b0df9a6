"""A sweep that is killed, damaged and starved of disk space ends with the numbers of one that nobody touched.

    python -m benchmarks.torture [--kills 25] [--processes 2] [--seed 0]

Trains a small sweep undisturbed; then the same one again while a process of it is killed by SIGKILL at
random instants: the launcher, a job as a whole, or one of the processes that share its batch. Whatever ends,
the same command is started again, and nothing else is done. Once, everything is killed and a bit of the
newest checkpoint flipped; once, while a run trains, the disk fills up until the launcher gives up, and is
emptied. A sweep that comes to its end before all of that is compared and begun anew. Compared bit for bit:
every line of every metrics.jsonl but for speeds and times, the tokenizer's weights, the tokens, the runs'
weights.

The disk is a tmpfs of a few hundred MB, which only root can mount; without, none is filled and the summary
says so. The instants depend on the machine's pace: the seed fixes waits and victims, not what they hit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling.records import RunFolder, list_runs

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = """
name: torture
depths: [1, 2]
data: {{source: photos, resolution: 16, train_images: 64, val_images: 16}}
tokenizer:
  {{vocab: 32, latent_channels: 4, channels: 32, multipliers: [1, 1, 1], res_blocks: 1, scales: [1, 2, 4]}}
tokenizer_train:
  {{steps: {first}, batch: 8, warmup: 2, log_every: 2, checkpoint_every: 20, eval_images: 8, revive_every: 4}}
train: {{steps: {steps}, batch: 8, lr: 1.0e-3, precision: fp32}}
evaluation: {{points: 6}}
launch:
  {{device: cpu, runs_at_once: 2, threads: 1, processes: {processes}, checkpoint_seconds: 0.2, log_every: 4,
    retry_seconds: 0.2, sampling: {{images: 4}}}}
"""
TIMES = {"images_per_second", "seconds"}
DISK_BYTES = 400 * 2**20
PATIENCE_SECONDS = 600.0
VICTIMS = ("launcher", "job", "one process")


@dataclass(frozen=True)
class Event:
    """One thing done to the sweep."""

    what: str
    hit: str
    """What it was at."""
    then: str
    """How the sweep went on."""


@dataclass
class Sweep:
    """The sweep in ``folder`` and its launcher."""

    folder: Path
    steps: int
    processes: int
    starts: int = 0
    launcher: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> Path:
        """The folder of all sweeps."""
        return self.folder / "runs"

    def start(self) -> None:
        """Start the command."""
        recipe = self.folder.parent / "torture.yaml"  # not on the disk that fills up
        recipe.write_text(RECIPE.format(steps=self.steps, first=self.steps // 5, processes=self.processes))
        command = [
            sys.executable,
            str(REPOSITORY / "run_sweep.py"),
            "run",
            str(recipe),
            "--root",
            str(self.root),
        ]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "VARSCALE_CACHE": str(self.folder.parent / "cache"),
        }
        with (self.folder.parent / "launcher.txt").open("ab") as output:
            self.launcher = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.starts += 1

    def code(self, seconds: float) -> int | None:
        """The launcher's exit code, or None when it has not ended within these seconds."""
        assert self.launcher is not None
        try:
            return self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def finish(self) -> None:
        """Let it come to its end, starting the command again whenever it has ended otherwise."""
        end = time.monotonic() + PATIENCE_SECONDS
        while (code := self.code(max(1.0, end - time.monotonic()))) != 0:
            assert time.monotonic() < end, (
                f"the sweep does not end (exit code {code}); see {self.folder.parent}"
            )
            self.start()

    def jobs(self) -> list[int]:
        """Process ids of the launcher's jobs."""
        return [] if self.launcher is None else children(self.launcher.pid)

    def kill(self, victim: str, draw: random.Random) -> str:
        """Kill one of ``VICTIMS``; what it was at, empty when there was none of this kind."""
        assert self.launcher is not None
        if victim == "launcher":
            at = self.present()
            self.launcher.kill()
            return at
        jobs = self.jobs()
        if not jobs:
            return ""
        job = draw.choice(jobs)
        processes = [
            pid for pid in tree(job) if "-m scaling." in words(pid) and "accelerate" not in words(pid)
        ]
        if victim == "one process" and processes:
            chosen = [draw.choice(processes)]
        else:
            chosen = [*tree(job), job]
        at = self.present()
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return at

    def kill_all(self) -> None:
        """The launcher and everything below it."""
        assert self.launcher is not None
        for pid in [*tree(self.launcher.pid), self.launcher.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def present(self) -> str:
        """The jobs that are running, with their steps."""
        found = []
        for folder in self.folders():
            status = folder.status()
            if status["state"] == "running":
                found.append(
                    f"{folder.path.parent.name}/{folder.name.rpartition('-')[0]}@{status.get('step', 0)}"
                )
        return ", ".join(found) or ("a job that starts" if self.jobs() else "between jobs")

    def folders(self) -> list[RunFolder]:
        """Of all jobs."""
        kinds = ("tokenizers", "tokens", "torture")
        return [
            RunFolder(file.parent)
            for kind in kinds
            for file in sorted(self.root.glob(f"{kind}/*/config.json"))
        ]

    def checkpoint(self) -> Path | None:
        """The newest of several checkpoints of a job that is not done."""
        unfinished = [f for f in self.folders() if f.status()["state"] != "done"]
        several = [found for f in unfinished if len(found := sorted(f.checkpoints.glob("step-*"))) > 1]
        return several[-1][-1] if several else None


def words(pid: int) -> str:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has just ended
        return ""


def children(pid: int) -> list[int]:
    """A process's own children."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def tree(pid: int) -> list[int]:
    """All processes below one."""
    return [found for child in children(pid) for found in (*tree(child), child)]


def records(root: Path) -> dict[str, Any]:
    """Everything that must come out the same, by folder: lines without times, and digests of files."""
    found: dict[str, Any] = {}
    for path in [*sorted((root / "tokenizers").iterdir()), *(r.path for r in list_runs(root / "torture"))]:
        found[path.name] = [
            {k: v for k, v in record.items() if k not in TIMES} for record in RunFolder(path).metrics()
        ]
    for pattern in (
        "tokenizers/*/tokenizer/*.safetensors",
        "tokens/*/*.bin",
        "torture/*/final/*.safetensors",
    ):
        for file in sorted(root.glob(pattern)):
            found[str(file.relative_to(root))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[bool]:
    """``folder`` as a disk of its own, if this user may make one; whether it is."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "varscale-torture", str(folder)]
    mounted = wanted and os.geteuid() == 0 and subprocess.run(command, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write a file until no byte more fits."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return ballast


@dataclass
class Torture:
    """The whole of it, and what happened."""

    place: Path
    kills: int
    processes: int
    steps: int
    seed: int
    longest_wait: float
    """Between two kills, as a share of the time that the undisturbed sweep took."""
    disk: bool = True
    """Whether to fill one."""
    events: list[Event] = field(default_factory=list)
    rounds: int = 0
    starts: int = 0

    def run(self) -> None:
        """Do everything.

        Raises:
            AssertionError: a sweep ended with other records than the undisturbed one.
        """
        draw = random.Random(self.seed)
        began = time.monotonic()
        expected = self._undisturbed()
        longest = self.longest_wait * (time.monotonic() - began)
        made, damaged, filled = 0, False, not self.disk
        while made < self.kills or not damaged or not filled:
            self.rounds += 1
            place = self.place / f"round{self.rounds}"
            place.mkdir()
            with small_disk(place / "disk", self.disk) as own:
                filled = filled or not own
                sweep = Sweep(place / "disk", self.steps, self.processes)
                sweep.start()
                while made < self.kills or not damaged or not filled:
                    code = sweep.code(draw.uniform(0, longest))
                    if code == 0:
                        break
                    if code is not None:  # a job was killed too often without getting further
                        sweep.start()
                    elif not damaged and made >= self.kills // 3 and sweep.checkpoint() is not None:
                        damaged = self._damage(sweep)
                    elif not filled and made >= self.kills // 2 and "torture/" in sweep.present():
                        filled = self._fill(sweep)
                    elif made < self.kills:
                        made += self._kill(sweep, draw)
                sweep.finish()
                self.starts += sweep.starts
                found = records(sweep.root)
                wrong = [name for name in expected if found.get(name) != expected[name]]
                assert not wrong, f"{place}: other records: {wrong}"
                assert found.keys() == expected.keys()

    def _undisturbed(self) -> dict[str, Any]:
        place = self.place / "undisturbed"
        place.mkdir()
        (place / "disk").mkdir()
        sweep = Sweep(place / "disk", self.steps, self.processes)
        sweep.start()
        sweep.finish()
        assert sweep.starts == 1, "undisturbed, it was to end at once"
        return records(sweep.root)

    def _kill(self, sweep: Sweep, draw: random.Random) -> int:
        victim = draw.choice(VICTIMS)
        hit = sweep.kill(victim, draw)
        if not hit:
            return 0
        self._tell(victim, hit, self._again(sweep))
        return 1

    def _again(self, sweep: Sweep) -> str:
        """Start the command again if it has ended by itself or was killed."""
        code = sweep.code(0.3)
        if code is None:
            return "the launcher tries again"
        sweep.start()
        return (
            f"launcher ended ({'SIGKILL' if code == -signal.SIGKILL else f'exit code {code}'}): started again"
        )

    def _damage(self, sweep: Sweep) -> bool:
        sweep.kill_all()
        newest = sweep.checkpoint()
        if newest is None:  # the job has ended meanwhile
            sweep.start()
            return False
        file = max(newest.glob("*.safetensors"), key=lambda p: p.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        run = RunFolder(newest.parents[1])
        before = (run.path / "log.txt").read_text().count("is damaged")
        sweep.start()
        end = time.monotonic() + PATIENCE_SECONDS
        while (run.path / "log.txt").read_text().count("is damaged") == before:
            assert time.monotonic() < end, f"{newest} is damaged, and nobody found out"
            time.sleep(0.1)
        self._tell(
            "all killed, a bit of the newest checkpoint flipped",
            f"{run.path.parent.name}/{run.name.rpartition('-')[0]}, {newest.name}/{file.name}",
            "started again; the damage was named in the log, the checkpoint before used",
        )
        return True

    def _fill(self, sweep: Sweep) -> bool:
        hit = sweep.present()
        ballast = fill(sweep.folder)
        code = sweep.code(PATIENCE_SECONDS)
        assert code is not None, "the launcher hangs on a full disk"
        told = (sweep.folder.parent / "launcher.txt").read_text().splitlines()
        word = next(
            (line.strip() for line in reversed(told) if "disk is full" in line), "nothing of the disk"
        )
        states = [str(folder.status()["state"]) for folder in sweep.folders()]  # readable, all of them
        ballast.unlink()
        sweep.start()
        self._tell(
            f"disk filled to the last byte, {len(states)} folders readable",
            hit,
            f"launcher ended (exit code {code}: {word.partition(': ')[2][:60]}…); emptied, started again",
        )
        return True

    def _tell(self, what: str, hit: str, then: str) -> None:
        self.events.append(Event(what, hit, then))
        print(f"{len(self.events):3}  {what:12}  {hit}  →  {then}", flush=True)

    def table(self) -> str:
        """What was done, as Markdown."""
        lines = ["| | done | to | then |", "|---|---|---|---|"]
        lines += [f"| {n} | {e.what} | {e.hit} | {e.then} |" for n, e in enumerate(self.events, 1)]
        return "\n".join(lines)

    def summary(self) -> str:
        """In a few lines."""
        counts = {v: sum(e.what == v for e in self.events) for v in VICTIMS}
        kills = ", ".join(f"{n} × {v}" for v, n in counts.items())
        filled = any("disk filled" in e.what for e in self.events)
        disk = f"a tmpfs of {DISK_BYTES // 2**20} MB filled once" if filled else "no disk filled"
        sweeps = f"{self.rounds} sweep{'s' if self.rounds > 1 else ''}"
        return (
            f"{sum(counts.values())} kills ({kills}), one checkpoint damaged, {disk}; "
            f"{sweeps} came to an end after {self.starts} starts of the command, "
            "with every record, weight and token equal to the undisturbed sweep's, bit for bit"
        )


def main() -> None:
    """Torture from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torture", description="Torture a small sweep."
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=2, help="that share each job's batch")
    parser.add_argument(
        "--steps", type=int, default=300, help="of each run; the tokenizer has a fifth of them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--longest-wait", type=float, default=0.4, help="between two kills, in times of the whole sweep"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="varscale-torture-") as place:
        torture = Torture(
            Path(place), given.kills, given.processes, given.steps, given.seed, given.longest_wait
        )
        torture.run()
    print(f"\n{torture.table()}\n\n{torture.summary()}")


if __name__ == "__main__":
    main()
