"""A sweep on a Slurm cluster: one job per run, handed over, watched and cancelled from a login node.

    submit    what is missing and not queued yet: tokenizers, their tokens, then the runs, with dependencies
    look      what Slurm says of every job of a sweep
    cancel    ends them

- Runs that ask for the same resources are one job array, the longest first; what else is in an array of one,
  so that every job has an id and an index. What happens inside the allocation is ``sweeps.slurm_job``'s.
- Every submission is a file of its own in ``<sweep>/slurm``, written before sbatch is called and again with
  the id that it gave. A launcher may be killed in between: the token in the file is also the job's comment
  in Slurm, by which the next launcher finds it. A lock on the root, which sbatch inherits, keeps a second
  launcher from looking before the first one's sbatch has ended. So nothing is submitted twice.
- A tokenizer that another sweep under the same root has queued is waited for, not queued again.
- All requests are tried (``sbatch --test-only``) before the first is made: a sweep is not queued by half.

Why not submitit. It would pickle a function per job and give each job its pickle only after sbatch has
returned its id: a launcher killed in between leaves jobs that fail (submitit 1.5.4). It leaves SIGTERM, which
is what a pre-empted job gets, without effect; it requeues a limited number of times, counted in the pickle;
it asks for a job's state through sacct alone, which needs a data base of accounts. What is left, an sbatch
command line and a list of its options, is shorter than its adaptation.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling.config import LaunchConfig, RunConfig, to_dict
from scaling.records import RecordsError, read_json, write_json
from sweeps import slurm_queue
from sweeps.jobs import PACKAGE_ROOT, Job
from sweeps.slurm_options import Resources, SlurmOptions
from sweeps.slurm_queue import COMMENT, Seen

FOLDER = "slurm"
LOCK = ".slurm.lock"


@dataclass(frozen=True)
class Submission:
    """One call of sbatch, as its file has it."""

    file: Path
    id: str | None
    """None: sbatch has not said it yet, or nobody was there any more to hear it."""
    jobs: tuple[Path, ...]
    """Their folders without links, by index in the array."""

    @property
    def token(self) -> str:
        """Its name in the sweep's folder and in Slurm's comment."""
        return self.file.stem

    @staticmethod
    def read(file: Path) -> Submission:
        """As it was recorded.

        Raises:
            RecordsError: damaged.
        """
        value, root = read_json(file), file.parents[2]
        try:
            folders = tuple(_real(root / job["folder"]) for job in value["jobs"])
            return Submission(file, value["id"], folders)
        except (KeyError, TypeError):
            raise RecordsError(f"{file}: expected an object with id and jobs with folders") from None


def _real(path: Path) -> Path:
    """One folder may be named in several ways, by links and from elsewhere."""
    return Path(os.path.realpath(path))


def submissions(root: Path, sweep: str = "*") -> list[Submission]:
    """Those of one sweep, or of all under the root, the newest last."""
    found = [Submission.read(file) for file in root.absolute().glob(f"{sweep}/{FOLDER}/*.json")]
    return sorted(found, key=lambda s: s.file.name)


def look(root: Path, folders: Collection[Path]) -> dict[Path, Seen]:
    """What Slurm says of the jobs of these folders that were ever handed to it, by any sweep.

    Raises:
        RecordsError: Slurm does not answer.
    """
    real = {_real(folder): folder for folder in folders}
    seen = _look(s for s in submissions(root) if not real.keys().isdisjoint(s.jobs))
    return {real[folder]: found for folder, found in seen.items() if folder in real}


def _look(made: Iterable[Submission]) -> dict[Path, Seen]:
    """By folder, of the newest submission of each, or of one that is still active."""
    made = [_adopted(submission) for submission in made]
    known = slurm_queue.look(s.id for s in made if s.id is not None)
    found: dict[Path, Seen] = {}
    for submission in made:
        if submission.id is None:
            continue
        for index, folder in enumerate(submission.jobs):
            name = f"{submission.id}_{index}"
            seen = replace(known.get(name) or known.get(submission.id) or Seen(name), id=name)
            if folder not in found or seen.active or not found[folder].active:
                found[folder] = seen
    return found


def cancel(root: Path, sweep: str) -> list[Seen]:
    """End all jobs of a sweep that run or wait; what they were.

    Raises:
        RecordsError: nothing of this sweep was handed to Slurm; Slurm does not answer.
    """
    if not submissions(root, sweep):
        raise RecordsError(
            f"{root / sweep}: nothing of this sweep was handed to Slurm; a local sweep is stopped by Ctrl-C"
        )
    with _lock(root):
        ended = [seen for seen in _look(submissions(root, sweep)).values() if seen.active]
        if ended:
            slurm_queue.cancel(seen.id for seen in ended)
    return ended


def submit(
    sweep: Path,
    jobs: Sequence[Job],
    launch: LaunchConfig,
    options: SlurmOptions,
    say: Callable[[str], None],
) -> None:
    """Hand over what is not done and not in Slurm's hands already.

    Args:
        jobs: all jobs of the sweep. One with ``recheck`` is handed over again although it is done, when
            something is that needs it.

    Raises:
        ConfigError: there is no Slurm here, or it refuses what is asked for. Then nothing was handed over,
            unless it refuses only in the end.
    """
    root = sweep.parent
    with _lock(root) as lock:
        _forget_what_never_was(root, sweep)
        seen = look(root, {job.folder.path for job in jobs})
        active = {path: found for path, found in seen.items() if found.active}
        for job in jobs:
            if job.folder.path in active:
                say(f"{job.name}: in Slurm's hands already: {active[job.folder.path]}")
        groups = _groups(missing(jobs, set(active)), launch, options)
        for arguments in {tuple(r.arguments(launch.threads)) for r, _ in groups}:
            slurm_queue.submit(["--test-only", *arguments, *options.arguments()], _script(sweep))
        ids = {path: found.id.partition("_")[0] for path, found in active.items()}
        for resources, group in groups:
            needs = {ids[path] for job in group for path in job.needs if path in ids}
            number = _submit(sweep, group, resources, sorted(needs), launch, options, lock)
            ids |= {job.folder.path: number for job in group}
            for index, job in enumerate(group):
                say(f"{job.name}: queued as {number}_{index}")


def missing(jobs: Sequence[Job], active: set[Path]) -> list[Job]:
    """The jobs to hand over: not done, not active, and needed by one that is handed over or not a stage.

    A cache that is whole is looked through again (``recheck``) only while no active run reads it.
    """
    wanted: dict[Path, Job] = {}
    read = {path for job in jobs if job.folder.path in active for path in job.needs}
    for job in reversed(jobs):
        path = job.folder.path
        needed = job.kind == "run" or any(path in other.needs for other in wanted.values())
        again = job.recheck and path not in read
        if needed and path not in active and (job.state != "done" or again):
            wanted[path] = job
    return [job for job in jobs if job.folder.path in wanted]


def _groups(
    jobs: Sequence[Job], launch: LaunchConfig, options: SlurmOptions
) -> list[tuple[Resources, list[Job]]]:
    """The jobs of each submission: one stage, or the runs that ask for the same and need the same."""
    groups: dict[Any, tuple[Resources, list[Job]]] = {}
    for job in sorted(jobs, key=lambda job: -job.weight if job.kind == "run" else -float("inf")):
        depth = job.config.model.depth if isinstance(job.config, RunConfig) else None
        resources = options.resources(launch, depth)
        key = (resources, job.needs) if job.kind == "run" else job.folder.path
        groups.setdefault(key, (resources, []))[1].append(job)
    return list(groups.values())


def _submit(
    sweep: Path,
    jobs: Sequence[Job],
    resources: Resources,
    needs: Sequence[str],
    launch: LaunchConfig,
    options: SlurmOptions,
    lock: int,
) -> str:
    """Record, call sbatch, record its id."""
    # Names in the order of time, so that the newest submission of a job is known without a clock in it.
    file = sweep / FOLDER / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
    value: dict[str, Any] = {
        "id": None,
        "jobs": [
            {
                "name": job.name,
                "kind": job.kind,
                "folder": os.path.relpath(job.folder.path, sweep.parent),
                "product": job.product,
                "arguments": job.arguments,
                "recheck": job.recheck,
            }
            for job in jobs
        ],
        "leave_seconds": options.leave_seconds,
        "launch": to_dict(replace(launch, processes=resources.processes, runs_at_once=None)),
    }
    logs = file.with_suffix("")
    logs.mkdir(parents=True)
    for index, job in enumerate(jobs):  # an array has one pattern for all its logs, runs a folder each
        (logs / f"{index}.txt").symlink_to(os.path.relpath(job.folder.path / "log.txt", logs))
    write_json(file, value)
    limit = "" if options.array_limit is None else f"%{options.array_limit}"
    number = slurm_queue.submit(
        [
            *(f"--job-name={sweep.name}", f"--comment={COMMENT}{file.stem}", "--requeue"),
            *(f"--array=0-{len(jobs) - 1}{limit}", "--open-mode=append"),
            f"--output={str(logs).replace('%', '%%')}/%a.txt",
            *([f"--dependency=afterok:{':'.join(needs)}", "--kill-on-invalid-dep=yes"] if needs else []),
            *resources.arguments(launch.threads),
            *options.arguments(),
        ],
        _script(file),
        lock,
    )
    write_json(file, value | {"id": number})
    return number


def _script(file: Path) -> str:
    """What runs on the first node of an allocation: this code, with the Python that submits it."""
    return (
        "#!/bin/sh\n"
        f"export PYTHONPATH={shlex.quote(str(PACKAGE_ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        f"exec {shlex.join([sys.executable, '-m', 'sweeps.slurm_job', 'lead', str(file)])}\n"
    )


def _adopted(submission: Submission) -> Submission:
    """With its id, where a launcher was killed before it could record it and Slurm has the job."""
    if submission.id is not None:
        return submission
    for seen in slurm_queue.named(submission.file.parents[1].name).values():
        if seen.comment == COMMENT + submission.token:
            number = seen.id.partition("_")[0]
            write_json(submission.file, read_json(submission.file) | {"id": number})
            return Submission(submission.file, number, submission.jobs)
    return submission


def _forget_what_never_was(root: Path, sweep: Path) -> None:
    """Remove records without a job: their launcher was killed before it called sbatch, or sbatch refused.

    Only with the lock: nobody is calling sbatch now.
    """
    for submission in submissions(root, sweep.name):
        if _adopted(submission).id is None:
            shutil.rmtree(submission.file.with_suffix(""), ignore_errors=True)
            submission.file.unlink()


@contextmanager
def _lock(root: Path) -> Iterator[int]:
    """One launcher at a time; freed by the system on any death, of its sbatch too."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
