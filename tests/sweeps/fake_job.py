"""A job that counts instead of training: same folder, lock, status and exit codes as a real one.

python fake_job.py FOLDER STEPS [--fail | --refuse | --empty | --die | --diverge | --short | --hang | --flaky]

--flaky is killed in each of the first three attempts, a step later each time; --short runs out of memory four
times; --hang stands still with a heartbeat and a child.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scaling.process import alive
from scaling.records import FolderBusyError, RunFolder

STEP_SECONDS = 0.05


def main(folder: RunFolder, steps: int, behaviour: str) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    progress = folder.path / "step.txt"
    with folder.lock():
        status = folder.status()
        folder.set_status("running", attempt=status.get("attempt", 0) + 1)
        with (folder.path / "starts.txt").open("a") as starts:
            starts.write(f"{os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        if behaviour == "--refuse":
            folder.set_status("failed", error="data.path: nothing there")
            print("data.path: nothing there", file=sys.stderr)
            return 2
        if behaviour == "--fail":
            print("a line of the log")
            folder.set_status("failed", error="ValueError: loss is not a number")
            return 1
        if behaviour == "--die":
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour in ("--diverge", "--short"):
            cause = "diverged" if behaviour == "--diverge" else "memory"
            again = int(status.get("cause") == "diverged") + status.get("divergences", 0)
            folder.update_status("running", divergences=again)
            if cause == "diverged" or status.get("attempt", 0) < 4:
                folder.fail(f"it {cause}", 1, cause)
                return 1
        if behaviour == "--empty":
            return 0
        launcher = int(os.environ["VARSCALE_LAUNCHER_PID"])
        step = int(progress.read_text()) if progress.exists() else 0
        while step < steps:
            time.sleep(STEP_SECONDS)
            step += 1
            progress.write_text(str(step))
            folder.set_status(
                "running", step=step, total_steps=steps, loss=1.0 / step, images_per_second=20.0
            )
            if behaviour == "--hang" or (behaviour == "--flaky" and status.get("attempt", 0) < 3):
                if behaviour == "--flaky":
                    os.kill(os.getpid(), signal.SIGKILL)
                subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60) # {folder.path}"])
                while True:  # its heart beats on
                    time.sleep(0.05)
                    folder.set_status("running", progress_at=1.0)
            if asked or not alive(launcher):
                time.sleep(0.2)  # writing a checkpoint takes a while
                folder.set_status("interrupted")
                return 3
        (folder.path / "product").write_text("here")
        folder.set_status("done")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(RunFolder(Path(sys.argv[1])), int(sys.argv[2]), (sys.argv[3:] or [""])[0]))
    except FolderBusyError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
