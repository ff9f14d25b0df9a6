"""What this machine has, and how it is divided among runs.

- Counted without torch: cores from the affinity mask and the cgroup, memory from the system and the
  cgroup, GPUs from ``CUDA_VISIBLE_DEVICES`` or ``nvidia-smi -L``.
- A speed is remembered under the model of the device that is used: the CPU's when a recipe asks for the CPU
  on a machine with GPUs, else that of the first *visible* GPU, and of a MIG slice with its size.
- The division depends on the sweep and the machine alone, never on what is left to do or on what else
  runs, so that a run gets the same number of threads, hence the same bits, when a sweep is resumed. What was
  measured decides one thing, how many runs share a GPU, where threads decide no bits.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling.config import ConfigError, LaunchConfig

PROCESS_BYTES = 360 * 2**20
"""What one training process takes beside its tensors (libraries, data), measured on the CPU (docs/LOG.md)."""
MEMORY_SHARE = 0.8
"""Share of the machine's memory that a sweep may fill."""


@dataclass(frozen=True)
class Machine:
    """The parts of a computer that a sweep can use."""

    name: str
    """CPU or GPU model; speeds are remembered by it."""
    cores: int
    memory: int
    """Bytes of main memory."""
    gpus: tuple[str, ...]
    """Identifiers for ``CUDA_VISIBLE_DEVICES``."""
    gpu_memory: int = 0
    """Bytes of the smallest GPU; 0 where it is not known."""


@dataclass(frozen=True)
class Allotment:
    """How many runs train side by side, and what each gets."""

    slots: tuple[tuple[str, ...], ...]
    """The GPUs of each place; empty tuples on the CPU."""
    threads: int
    """CPU threads per process."""
    per_gpu: int = 1
    """Places that share a GPU; where they do not come out even, of the GPUs with most."""

    @property
    def places_per_gpu(self) -> float:
        """On average: what a run's time on a place is divided by for its share of GPU-hours. 1 on a CPU."""
        return len(self.slots) / len(set(self.slots)) if any(self.slots) else 1.0


def this_machine(device: str) -> Machine:
    """The machine that this process may use; ``device`` (``launch.device``) "cpu" is one without GPUs."""
    gpus, gpu_name = ((), "") if device == "cpu" else _gpus()
    return Machine(gpu_name or _cpu_name(), _cores(), _memory(), gpus, _gpu_memory(gpu_name) if gpus else 0)


def gpu_groups(machine: Machine, launch: LaunchConfig) -> list[tuple[str, ...]]:
    """The GPUs by the run that takes them; empty when runs go on the CPU.

    Raises:
        ConfigError: more GPUs wanted than there are.
    """
    if launch.device == "cuda" and not machine.gpus:
        raise ConfigError("launch.device is 'cuda', but this machine shows no GPU")
    if not machine.gpus or launch.device == "cpu":
        return []
    per_run = launch.processes
    if per_run > len(machine.gpus):
        raise ConfigError(f"launch.processes is {per_run}, but this machine shows {len(machine.gpus)} GPUs")
    return [machine.gpus[i : i + per_run] for i in range(0, len(machine.gpus) - per_run + 1, per_run)]


def allot(machine: Machine, launch: LaunchConfig, memories: Sequence[int], per_gpu: int = 1) -> Allotment:
    """Divide the machine among runs that need ``memories`` bytes of tensors per process.

    On GPUs each run gets ``launch.processes`` of them, which ``per_gpu`` runs share; ``launch.runs_at_once``
    sets the number of places itself. The first places are on different GPUs, so that the heaviest runs, which
    start first, do not share one while another is idle. On the CPU as many runs at once as there are cores
    and as fit into memory, largest first. Several machines share one run at a time.

    Raises:
        ConfigError: more GPUs wanted than there are.
    """
    if groups := gpu_groups(machine, launch):
        at_once = _at_once(launch) or min(len(groups) * per_gpu, max(1, len(memories)))
        slots = tuple(groups[i % len(groups)] for i in range(at_once))
    else:
        at_once = _at_once(launch) or _runs_that_fit(machine, launch.processes, memories)
        slots = ((),) * at_once
    threads = launch.threads or max(1, machine.cores // (at_once * launch.processes))
    return Allotment(slots, threads, -(-at_once // len(groups)) if groups else 1)


def _at_once(launch: LaunchConfig) -> int | None:
    return 1 if launch.machines > 1 else launch.runs_at_once


def _runs_that_fit(machine: Machine, processes: int, memories: Sequence[int]) -> int:
    room, count = MEMORY_SHARE * machine.memory, 0
    for need in sorted(memories, reverse=True)[: max(1, machine.cores // processes)]:
        room -= processes * (need + PROCESS_BYTES)
        if room < 0:
            break
        count += 1
    return max(1, count)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max").strip()
    return min(memory, int(limit)) if limit.isdigit() else memory


def _cgroup(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text()
    except OSError:  # no cgroup v2 here: no limit from it
        return ""


def _gpus() -> tuple[tuple[str, ...], str]:
    """Identifiers of the visible ones and the first one's model; MIG slices count as GPUs, by their UUIDs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or (visible is not None and visible.strip() in ("", "-1")):
        return (), ""
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    models: dict[str, str] = {}  # by number and by UUID
    numbers, slices, model = list[str](), list[str](), ""
    for line in listing.splitlines():
        if gpu := re.match(r"GPU (\d+): (.+?) \(UUID: ([^)]+)\)", line):
            number, model, uuid = gpu.groups()
            numbers.append(number)
            models |= {number: model, uuid: model}
        elif part := re.match(r"\s+MIG (\S+) .*\(UUID: (MIG-[^)]+)\)", line):
            slices.append(part[2])
            models[part[2]] = f"{model} MIG {part[1]}"
    if visible is None:
        gpus = tuple(slices or numbers)
    else:
        gpus = tuple(v.strip() for v in visible.split(","))
    # A UUID may be given by its beginning.
    name = next((m for known, m in models.items() if gpus and _names(gpus[0], known)), "")
    return gpus, name or (f"GPU {gpus[0]}" if gpus else "")


def _gpu_memory(model: str) -> int:
    """Bytes of the smallest GPU, or of a MIG slice, which says so in its name; 0 when the driver does not."""
    if part := re.search(r" MIG .*?(\d+)gb", model):
        return int(part[1]) * 10**9
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return min((int(number) for number in listing if number.isdigit()), default=0) * 2**20


def _names(given: str, known: str) -> bool:
    return given == known or (not given.isdigit() and known.startswith(given))


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
