"""Fake jobs for the scheduler, and a launcher of its own: python fake_sweep.py ROOT PLACES NAME:STEPS ..."""

import os
import sys
from pathlib import Path

from scaling.records import RunFolder
from sweeps.jobs import Job
from sweeps.scheduler import Scheduler

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def fake_job(
    root: Path,
    name: str,
    steps: int = 3,
    behaviour: str = "",
    needs: tuple[str, ...] = (),
    weight: float = 0.0,
) -> Job:
    """A job named ``name`` in ``root``; it needs the jobs named ``needs``."""
    command = [sys.executable, str(HERE / "fake_job.py"), str(root / name), str(steps)]
    return Job(
        name,
        "run",
        RunFolder(root / name),
        tuple(command + [behaviour] * bool(behaviour)),
        "product",
        needs=tuple(root / n for n in needs),
        environment={
            "PYTHONPATH": str(REPOSITORY),
            "VARSCALE_LAUNCHER_PID": str(os.getpid()),
            "OMP_NUM_THREADS": "1",
        },
        launch={"name": name},
        weight=weight,
    )


if __name__ == "__main__":
    folder, places, *jobs = sys.argv[1:]
    split = [job.split(":") for job in jobs]
    made = [fake_job(Path(folder), name, int(steps), weight=float(steps)) for name, steps in split]
    result = Scheduler(made, [()] * int(places)).run()
    print(" ".join(f"{s.job.name}={s.phase}" for s in result.states), "started", result.started)
    sys.exit(result.exit_code)
