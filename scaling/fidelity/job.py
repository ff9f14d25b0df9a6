"""The job that measures the pictures of finished runs and adds the numbers to their records.

    python -m scaling.fidelity.job REQUEST.json

- ``run_sweep.py fidelity`` writes the request (``FidelityJob``) and starts it, plainly or by ``accelerate
  launch``; its folder has the job's status and, at the end, ``measured.json``: the numbers of every run.
- One line ``{"kind": "fidelity", ...}`` is appended to a run's ``metrics.jsonl``, with N, D and C of the last
  evaluation beside it, so that FID is plotted against them as loss is. Another setting (guidance,
  extractor, number of images) is another line. A run that has a line of this setting is not measured again,
  so a job that was stopped goes on with the next run.
- The reference is looked at once for all runs of the same data, and kept beside the folders of the jobs.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from scaling.config import ConfigError, DataConfig, RunConfig, from_dict, require
from scaling.data.images import SPLITS, Split
from scaling.families.registry import FAMILIES
from scaling.fidelity.classifier import find_classifier
from scaling.fidelity.collect import Share
from scaling.fidelity.features import NamedExtractor, load_extractor
from scaling.fidelity.measure import measure
from scaling.fidelity.pictures import RealImages, real_images, sampler
from scaling.fidelity.reference import Reference, load_reference, make_reference, save_reference
from scaling.pretrained import open_model
from scaling.process import Interrupted, JobProcess, recorded_failure, run_job
from scaling.records import RecordsError, RunFolder, read_json, write_json
from scaling.requests import FidelityJob, FidelityRequest

FROM_EVALUATION = (
    "step", "params", "params_total", "tokens", "unique_tokens", "epochs", "flops", "flops_6nd",
)  # fmt: skip
SAMPLING = ("guidance", "guidance_form", "top_k", "top_p", "seed")
"""How pictures are drawn: fields of ``SamplingConfig`` and of the record."""
MEASURED = "measured.json"


def read_request(file: Path) -> FidelityJob:
    """The request in ``file``.

    Raises:
        ConfigError, RecordsError: it is not there, or none.
    """
    asked = from_dict(
        FidelityJob, read_json(file), lambda path: ", ".join(filter(None, [str(file), ".".join(path)]))
    )
    _ = asked.request.chosen
    require(len(asked.runs) > 0, f"{file}: no runs in it")
    return asked


@dataclass(frozen=True)
class Subject:
    """A run to measure."""

    folder: RunFolder
    config: RunConfig
    evaluation: dict[str, Any]
    """The last line of its evaluations."""


def subject(folder: RunFolder, data_path: str | None) -> Subject:
    """A finished run.

    Raises:
        RecordsError: it is not finished, or was never evaluated.
    """
    config = from_dict(RunConfig, folder.config())
    if data_path is not None:
        config = replace(config, data=replace(config.data, path=data_path))
    state = folder.status()["state"]
    if state != "done":
        raise RecordsError(f"{folder.path} is not finished (state: {state})")
    evaluations = folder.metrics("eval")
    if not evaluations:
        raise RecordsError(f"{folder.path / 'metrics.jsonl'}: no evaluation in it to take N, D and C from")
    return Subject(folder, config, evaluations[-1])


class Counter:
    """Tells the job's progress, and notices that it is to leave."""

    def __init__(self, job: JobProcess, world: int) -> None:
        self.job, self.world = job, world
        self.total = self._before = 0
        self._started = time.monotonic()

    def update(self, mine: int, of: int) -> None:
        """This process has done ``mine`` of its share of ``of`` images.

        Raises:
            Interrupted: asked to leave.
        """
        if self.job.should_stop():
            raise Interrupted
        done = self._before + min(of, mine * self.world)
        speed = done / (time.monotonic() - self._started)
        self.job.beat(step=done, total_steps=self.total, images_per_second=round(speed, 2))
        if mine * self.world >= of:
            self._before += of


class References:
    """What runs are held against: a file, or the real images of each data set, looked at once."""

    def __init__(
        self, request: FidelityRequest, extractor: NamedExtractor, kept: Path, share: Share, counter: Counter
    ) -> None:
        self.request, self.extractor, self.kept, self.share = request, extractor, kept, share
        self.counter = counter
        self._options: dict[str, Any] = {"batch": request.batch, "keep": request.manifold, "share": share}
        self._real: dict[DataConfig, RealImages] = {}
        self._made: dict[str, Reference] = {}
        self._given: Reference | None = None
        if request.reference not in SPLITS:
            self._given = load_reference(Path(request.reference), extractor, **self._options)

    def identity(self, data: DataConfig) -> str:
        """Of the reference for runs of ``data``; no image is looked at for it."""
        return self._images(data).name if self._given is None else self._given.identity

    def to_make(self, datas: Sequence[DataConfig]) -> int:
        """Images to be looked at before runs of ``datas`` can be measured."""
        if self._given is not None:
            return 0
        wanted = {real.name: real for real in map(self._images, datas)}
        return sum(real.count for name, real in wanted.items() if not self._file(name).exists())

    def of(self, data: DataConfig) -> Reference:
        """The reference for runs of ``data``."""
        if self._given is not None:
            return self._given
        real = self._images(data)
        if real.name not in self._made:
            self._made[real.name] = self._kept_or_made(real)
        return self._made[real.name]

    def _images(self, data: DataConfig) -> RealImages:
        if data not in self._real:
            split: Split = "train" if self.request.reference == "train" else "val"
            threads = torch.get_num_threads()
            self._real[data] = real_images(data, split, self.request.reference_images, threads)
        return self._real[data]

    def _kept_or_made(self, real: RealImages) -> Reference:
        file = self._file(real.name)
        if self.share.gather(file.exists())[
            0
        ]:  # all processes do the same, whatever one sees of a shared disk
            return load_reference(file, self.extractor, **self._options)
        made = make_reference(
            real.images, real.count, self.extractor, real.name, **self._options,
            progress=lambda done: self.counter.update(done, real.count),
        )  # fmt: skip
        if self.share.rank == 0:
            save_reference(file, made, self.extractor)
        return made

    def _file(self, name: str) -> Path:
        """Where a reference is kept; its name follows from everything that decides it."""
        what = f"{name} {self.extractor.identity} {self.request.manifold}"
        return self.kept / f"reference-{hashlib.sha256(what.encode()).hexdigest()[:12]}.npz"


def measure_runs(
    asked: FidelityJob, place: RunFolder, job: JobProcess, share: Share, device: torch.device
) -> None:
    """Measure what has no line of this setting yet, one run after another; every process calls it.

    Raises:
        ConfigError, RecordsError: what a person can remove; told before anything is drawn.
        Interrupted: asked to leave.
    """
    request = asked.request
    subjects = [subject(RunFolder(run), request.data_path) for run in asked.runs]
    extractor = load_extractor(request.chosen, _weights(request, subjects[0]), device)
    counter = Counter(job, share.world)
    references = References(request, extractor, place.path.parent, share, counter)
    known = [
        _known(
            s,
            setting(
                extractor.identity, references.identity(s.config.data), request.images, drawn_how(s, request)
            ),
            request,
        )
        for s in subjects
    ]
    known = share.gather(known)[0]
    missing = [s for s, line in zip(subjects, known, strict=True) if line is None]
    counter.total = len(missing) * request.images + references.to_make([s.config.data for s in missing])
    rows = []
    for one, line in zip(subjects, known, strict=True):
        model, name = one.config.model, one.folder.name
        there = line is not None
        if line is None:
            reference = references.of(one.config.data)
            opened = open_model(one.folder.path, request.tokenizer, device)
            result = measure(
                sampler(opened, request.sampling(request.images)), request.images, reference, extractor,
                batch=request.batch, keep=request.manifold, share=share,
                progress=lambda done: counter.update(done, request.images),
            )  # fmt: skip
            line = fidelity_line(one.evaluation, result.record() | drawn_how(one, request))
            if share.rank == 0:
                _append(one.folder, line)
                print(f"{name}: FID {line['fid']:.4g}", flush=True)
        rows.append({"run": name, "family": model.family, "depth": model.depth, "there": there} | line)
    if share.rank == 0:
        write_json(place.path / MEASURED, {"runs": rows})


def _weights(request: FidelityRequest, first: Subject) -> str | None:
    """Weights of the extractor; a classifier's are found beside the sweep where they are not given."""
    if request.extractor != "classifier" or request.weights is not None:
        return request.weights
    root = first.folder.path.absolute().parent.parent
    return str(find_classifier(root / "classifiers", first.config.data))


def drawn_how(subject: Subject, request: FidelityRequest) -> dict[str, Any]:
    """How a run's pictures are drawn: as asked, but for a family that knows one form of guidance only."""
    how = {key: getattr(request.sampling(request.images), key) for key in SAMPLING}
    if request.precision != "fp32":
        how["drawn_in"] = request.precision  # "precision" is one of the metrics
    own = FAMILIES[subject.config.model.family].guidance
    return how if own is None else how | {"guidance_form": own}


def _known(subject: Subject, wanted: str, request: FidelityRequest) -> dict[str, Any] | None:
    """The line of a setting, if the run has it, with precision and recall of as many pictures."""
    step = subject.evaluation["step"]
    pictures = (None, min(request.manifold, request.images))
    for line in subject.folder.metrics("fidelity"):
        if (line.get("setting"), line["step"]) == (wanted, step) and line["manifold_images"] in pictures:
            return line
    return None


def _append(folder: RunFolder, line: dict[str, Any]) -> None:
    with folder.lock():
        folder.append(line)
        folder.sync()
    folder.close()


def setting(extractor: str, reference: str, images: int, how: dict[str, Any]) -> str:
    """What tells lines of one step apart."""
    values = {"extractor": extractor, "reference": reference, "images": images} | how
    return " ".join(f"{key}={value}" for key, value in values.items())


def fidelity_line(evaluation: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The line for ``metrics.jsonl``."""
    how = {key: measured[key] for key in (*SAMPLING, "drawn_in") if key in measured}
    told = setting(measured["extractor"], measured["reference"], measured["images"], how)
    cost = {key: evaluation[key] for key in FROM_EVALUATION}
    return {"kind": "fidelity", "setting": told} | cost | measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the request file says; raises what ``run_job`` turns into exit codes."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    require(len(given) == 1, "usage: python -m scaling.fidelity.job REQUEST.json")
    file = Path(given[0])
    place = RunFolder(file.parent)
    with recorded_failure(place):
        asked = read_request(file)
        if asked.request.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device is cuda, but torch sees no GPU here")
        torch.backends.cudnn.allow_tf32 = False
        state = PartialState(cpu=asked.request.device == "cpu" or not torch.cuda.is_available())
    share = Share(state.process_index, state.num_processes, lambda value: list(gather_object([value])))
    try:
        with JobProcess(place, state.is_main_process, state.wait_for_everyone) as job:
            measure_runs(asked, place, job, share, state.device)
            state.wait_for_everyone()
    finally:
        state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_job(main))
