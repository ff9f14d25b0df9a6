"""A sweep on a Slurm cluster: one job per run, handed over, watched and cancelled from a login node.

    submit    what is missing and not queued yet: tokenizers, their tokens, then the runs, with dependencies
    look      what Slurm says of every job of a sweep
    cancel    ends them

- Runs that ask for the same resources are one job array, the longest first; what else is in an array of one,
  so that every job has an id and an index. What happens inside the allocation is ``sweeps.slurm_job``'s.
- What others wait for is in an array of its own, and they depend on the array: to Slurm 22.05 an element
  that was cancelled while it waited is done.
- Slurm limits how many elements of one array run at once. Where the runs are several arrays, the limit is as
  many lanes: jobs of one name that run one after another (``--dependency=singleton``), the longest spread
  first. Slurm holds to that by itself, also when one is queued again; among an array's elements it does not.
- Every submission is a file of its own in ``<sweep>/slurm``, written before sbatch is called and again with
  the id that it gave. A launcher may be killed in between: the token in the file is also the job's comment
  in Slurm, by which the next launcher finds it. A lock on the root, which sbatch inherits, keeps a second
  launcher from looking before the first one's sbatch has ended. So nothing is submitted twice.
- A tokenizer that another sweep under the same root has queued is waited for, not queued again.
- An id alone does not make a job ours, since Slurm begins again at 1 after the last: its name and comment do.
- A sweep is not queued by half. All requests are tried first (``sbatch --test-only``), since Slurm takes what
  waits for another job as it is. When one is refused all the same, those made before it are cancelled. That
  there are no nodes for it is a note only: Slurm says the same while they are down.

Why not submitit. It would pickle a function per job and give each job its pickle only after sbatch has
returned its id: a launcher killed in between leaves jobs that fail (submitit 1.5.4). It leaves SIGTERM, which
is what a pre-empted job gets, without effect; it requeues a limited number of times, counted in the pickle;
it asks for a job's state through sacct alone, which needs a data base of accounts. What is left, an sbatch
command line and a list of its options, is shorter than its adaptation.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scaling.config import ConfigError, LaunchConfig, to_dict
from scaling.records import RecordsError, read_json, write_json
from sweeps import slurm_queue
from sweeps.jobs import PACKAGE_ROOT, Job
from sweeps.patience import Patience
from sweeps.slurm_options import Resources, SlurmOptions
from sweeps.slurm_queue import COMMENT, Seen

FOLDER = "slurm"
LOCK = ".slurm.lock"


@dataclass(frozen=True)
class Start:
    """What a branch starts from."""

    trunk: Path
    """Without links."""
    step: int


@dataclass(frozen=True)
class Submission:
    """One call of sbatch, as its file has it."""

    file: Path
    id: str | None
    """None: sbatch has not said it yet, or nobody was there any more to hear it."""
    name: str
    """Of its job in Slurm: the sweep's, or a lane's."""
    jobs: tuple[Path, ...]
    """Their folders without links, by index in the array."""
    starts: tuple[Start | None, ...]
    """Of those that are branches, likewise."""
    turn: str
    """What it waits for but for other jobs' results: its turn in its lane, or nothing."""

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
            starts = tuple(
                Start(_real(root / job["trunk"]), job["start"]) if job.get("trunk") else None
                for job in value["jobs"]
            )
            return Submission(file, value["id"], value["name"], folders, starts, value.get("turn", ""))
        except (KeyError, TypeError):
            raise RecordsError(f"{file}: expected an object with id, name and jobs with folders") from None

    def owns(self, seen: Seen) -> bool:
        """Whether this is its job, and none that got the same id later or on another cluster."""
        comment = COMMENT + self.token
        # A cluster may have its own use for comments.
        return seen.comment == comment or (seen.name == self.name and not seen.comment.startswith(COMMENT))


def _real(path: Path) -> Path:
    """One folder may be named in several ways, by links and from elsewhere."""
    return Path(os.path.realpath(path))


@dataclass(frozen=True)
class PlannedOn:
    """The machine and places of the plan, as the calibration knows them."""

    machine: str
    places: int
    threads: int


@dataclass(frozen=True)
class Group:
    """The jobs of one submission."""

    resources: Resources
    jobs: list[Job]
    lane: int | None = None
    """One of as many as may run at once; None where the array has a limit, or there is none."""

    @property
    def turn(self) -> str:
        """The dependency by which the jobs of a lane run one after another."""
        return "" if self.lane is None else "singleton"


def submissions(root: Path, sweep: str | None = None) -> list[Submission]:
    """Those of one sweep, or of all under the root, the newest last."""
    place = root.absolute()
    files = place.glob(f"*/{FOLDER}/*.json") if sweep is None else (place / sweep / FOLDER).glob("*.json")
    found = [Submission.read(file) for file in files]
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
            seen = known.get(name) or known.get(submission.id) or Seen(name)
            seen = replace(seen, id=name) if submission.owns(seen) else Seen(name)
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
        made = submissions(root, sweep)
        ended = [seen for seen in _look(made).values() if seen.active]
        _withdraw(made, ended)
    return ended


def _withdraw(made: Iterable[Submission], active: Sequence[Seen]) -> None:
    """Cancel these jobs of these submissions.

    That is recorded first: one that is about to have itself queued again does so no more, or leaves as soon
    as it starts.
    """
    numbers = {seen.id.partition("_")[0] for seen in active}
    for file in (submission.file for submission in made):
        value = read_json(file)
        if value["id"] in numbers:
            write_json(file, value | {"cancelled": True})
    if active:
        slurm_queue.cancel(seen.id for seen in active)


def submit(
    sweep: Path,
    jobs: Sequence[Job],
    asked: Mapping[Path, Resources],
    launch: LaunchConfig,
    plan: PlannedOn,
    options: SlurmOptions,
    say: Callable[[str], None],
) -> bool:
    """Hand over what is not done and not in Slurm's hands already.

    Args:
        jobs: all jobs of the sweep. One with ``recheck`` is handed over again although it is done, when
            something is that needs it.
        asked: what each asks for, by its folder.
        plan: under what their speeds are remembered.

    Returns:
        Whether Slurm has anything of it now.

    Raises:
        ConfigError: there is no Slurm here, or it refuses what is asked for; then nothing is queued.
        RecordsError: Slurm does not answer.
    """
    root = sweep.parent
    with _lock(root, say) as lock:
        _forget_what_never_was(root, sweep)
        active = {path: s for path, s in look(root, {job.folder.path for job in jobs}).items() if s.active}
        for job in jobs:
            if job.folder.path in active:
                say(f"{job.name}: in Slurm's hands already: {active[job.folder.path]}")
        ids = {path: found.id.partition("_")[0] for path, found in active.items()}
        made: list[str] = []
        for job in diverged(jobs, launch):
            if job.folder.path not in active:
                say(f"{job.name}: not queued again: {job.folder.status().get('error')}")
        to_make = groups(missing(jobs, set(active), launch), asked, options.array_limit)
        for resources in dict.fromkeys(group.resources for group in to_make):
            _try(resources, options, say)
        for group in to_make:
            try:
                number = _submit(sweep, group, ids, launch, plan, options, lock)
            except ConfigError:
                _withdraw(submissions(root, sweep.name), [Seen(number) for number in made])
                raise
            made.append(number)
            ids |= {job.folder.path: number for job in group.jobs}
        for job in jobs:
            if (number := ids.get(job.folder.path, "")) in made:
                say(f"{job.name}: queued as {number}")
        return bool(ids)


def _try(resources: Resources, options: SlurmOptions, say: Callable[[str], None]) -> None:
    """Ask Slurm whether it can meet a request.

    Raises:
        ConfigError: what is asked for does not exist.
    """
    try:
        slurm_queue.submit(["--test-only", *resources.arguments(), *options.arguments()], "#!/bin/sh\n")
    except ConfigError as error:
        if "not available" not in str(error):
            raise
        asked = shlex.join(resources.arguments())
        say(f"note: {error}, for {asked}; queued all the same, since nodes that are down come back")


def diverged(jobs: Sequence[Job], launch: LaunchConfig) -> list[Job]:
    """Those that are not trained again, since they diverged as often as they may."""
    patience = Patience.of(launch)
    return [job for job in jobs if patience.given_up(job.folder.status())]


def missing(jobs: Sequence[Job], active: set[Path], launch: LaunchConfig) -> list[Job]:
    """The jobs to hand over: not done, not active, and needed by one that is handed over or not a stage.

    A cache that is whole is looked through again (``recheck``) only while no active run reads it. What has
    diverged is left, and so is what needs it.
    """
    lost = {job.folder.path for job in diverged(jobs, launch)} - active
    jobs = [job for job in jobs if lost.isdisjoint((job.folder.path, *job.needs))]
    wanted: dict[Path, Job] = {}
    read = {path for job in jobs if job.folder.path in active for path in job.needs}
    for job in reversed(jobs):
        path = job.folder.path
        needed = job.kind == "run" or any(path in other.needs for other in wanted.values())
        again = job.recheck and path not in read
        if needed and path not in active and (job.state != "done" or again):
            wanted[path] = job
    return [job for job in jobs if job.folder.path in wanted]


def groups(jobs: Sequence[Job], asked: Mapping[Path, Resources], limit: int | None) -> list[Group]:
    """The jobs of each submission, in the order in which they can be made: what is needed comes first.

    Args:
        limit: most runs at once.
    """
    needed = {path for job in jobs for path in job.needs}
    found: dict[Any, Group] = {}
    for job in sorted(jobs, key=lambda job: (_level(job, jobs), -job.weight)):
        resources, path = asked[job.folder.path], job.folder.path
        alone = job.kind != "run" or path in needed
        key = path if alone else (_level(job, jobs), resources, job.needs)
        found.setdefault(key, Group(resources, [])).jobs.append(job)
    runs = [group for group in found.values() if group.jobs[0].kind == "run"]
    if limit is None or len(runs) <= 1:
        return list(found.values())
    others = [group for group in found.values() if group.jobs[0].kind != "run"]
    return others + _in_lanes([(job, group.resources) for group in runs for job in group.jobs], limit)


def _level(job: Job, jobs: Sequence[Job]) -> int:
    """How many jobs must be done before it, one after another."""
    return max((1 + _level(other, jobs) for other in jobs if other.folder.path in job.needs), default=0)


def _in_lanes(runs: Sequence[tuple[Job, Resources]], limit: int) -> list[Group]:
    """Each run to the lane that has least to do, in time if all processes are equally fast."""
    load, found = [0.0] * limit, []
    jobs = [job for job, _ in runs]
    for job, asked in sorted(runs, key=lambda r: (_level(r[0], jobs), -r[0].weight / r[1].all_processes)):
        lane = load.index(min(load))
        load[lane] += job.weight / asked.all_processes
        found.append(Group(asked, [job], lane))
    return found


def arguments(sweep: Path, group: Group, needs: Sequence[str], options: SlurmOptions) -> list[str]:
    """The options of sbatch for one submission, but for those that tell it from others.

    Args:
        needs: ids of the jobs that it waits for.
    """
    limit = f"%{options.array_limit}" if options.array_limit is not None and len(group.jobs) > 1 else ""
    waits = [f"afterok:{':'.join(needs)}"] if needs else []
    waits += [group.turn] if group.turn else []
    return [
        *(f"--job-name={_name(sweep, group)}", f"--array=0-{len(group.jobs) - 1}{limit}", "--requeue"),
        *([f"--dependency={','.join(waits)}"] if waits else []),
        *(["--kill-on-invalid-dep=yes"] if needs else []),
        *group.resources.arguments(),
        *options.arguments(),
    ]


def _name(sweep: Path, group: Group) -> str:
    """The sweep's; a lane's is no other's, be there a sweep of the same name elsewhere."""
    if group.lane is None:
        return sweep.name
    place = hashlib.sha256(os.fsencode(_real(sweep))).hexdigest()[:6]
    return f"{sweep.name}-{place}-{group.lane + 1}"


def _submit(
    sweep: Path,
    group: Group,
    ids: Mapping[Path, str],
    launch: LaunchConfig,
    plan: PlannedOn,
    options: SlurmOptions,
    lock: int,
) -> str:
    """Record, call sbatch, record its id."""
    jobs = group.jobs
    # Names in the order of time, so that the newest submission of a job is known without a clock in it.
    file = sweep / FOLDER / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
    value: dict[str, Any] = {
        "id": None,
        "name": _name(sweep, group),
        "turn": group.turn,
        "jobs": [_entry(job, sweep.parent) for job in jobs],
        "leave_seconds": options.leave_seconds,
        "launch": to_dict(replace(launch, processes=group.resources.processes, runs_at_once=None)),
        "plan": asdict(plan),
    }
    logs = file.with_suffix("")
    logs.mkdir(parents=True)
    for index, job in enumerate(jobs):  # an array has one pattern for all its logs, runs a folder each
        (logs / f"{index}.txt").symlink_to(os.path.relpath(job.folder.path / "log.txt", logs))
    write_json(file, value)
    needs = sorted({ids[path] for job in jobs for path in job.needs if path in ids})
    number = slurm_queue.submit(
        [
            *arguments(sweep, group, needs, options),
            *(f"--comment={COMMENT}{file.stem}", "--open-mode=append"),
            f"--output={str(logs).replace('%', '%%')}/%a.txt",
        ],
        script(file),
        lock,
    )
    write_json(file, value | {"id": number})
    return number


def _entry(job: Job, root: Path) -> dict[str, Any]:
    """What is recorded of a job: all that is needed where it runs."""
    return {
        "name": job.name,
        "kind": job.kind,
        "folder": os.path.relpath(job.folder.path, root),
        "product": job.product,
        "arguments": job.arguments,
        "recheck": job.recheck,
        "leaves": bool(job.leave),
        "trunk": None if job.trunk is None else os.path.relpath(job.trunk.path, root),
        "start": job.start,
    }


def script(file: Path) -> str:
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
    for seen in slurm_queue.named(submission.name).values():
        if seen.comment == COMMENT + submission.token:
            number = seen.id.partition("_")[0]
            write_json(submission.file, read_json(submission.file) | {"id": number})
            return replace(submission, id=number)
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
def _lock(root: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[int]:
    """One launcher at a time; freed by the system on any death, of its sbatch too."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another launcher is handing jobs to Slurm; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
