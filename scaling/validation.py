"""Loss and error of any model on validation images, encoded on the fly, by ``run_sweep.py evaluate``.

- Of a run on its own images this is the run's own last evaluation, with the same crops, batches, precision
  and threads: number by number if one process trained it on the same back end, else up to rounding.
- Processes share the work: whole batches of images to be encoded, then every W-th image to be evaluated.
  Tokens are the same however many there are, losses and errors up to rounding.
- Published accuracies are 100·(1 − error). The published evaluation drops 10 % of the labels at random; this
  one drops none, so it is a little better and the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import nn

from scaling.config import ConfigError, DataConfig, LaunchConfig, Precision, from_dict
from scaling.data.encode import batch_size, encoder
from scaling.data.images import UNREADABLE_LIMIT
from scaling.data.live import encode_validation
from scaling.data.sources import open_source, resolve
from scaling.evaluation import evaluate
from scaling.pretrained import Opened, open_model
from scaling.records import read_json
from scaling.requests import DataChoice, EvaluateRequest
from scaling.schema import require
from scaling.trainer import EVAL_BATCH, accelerator_on

PUBLISHED_NOTE = (
    "accuracies by the published convention; no label is dropped here, where published evaluations drop 10 %"
)


@dataclass(frozen=True)
class Validation:
    """One evaluation."""

    where: str
    tokenizer: str | None
    """What was opened, as it was asked for."""
    opened: Opened
    precision: Precision
    data: DataConfig
    """Counts filled in."""
    fingerprint: str
    """Of the images."""
    record: dict[str, Any]
    """Loss and error as in ``metrics.jsonl``, standard errors over images."""
    unreadable: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.opened.name,
            "scales": list(self.opened.model.config.scales),
            **self.record,
            "accuracy_avg": 100 * (1 - self.record["error_avg"]),
            "accuracy_last": 100 * (1 - self.record["error_last"]),
            "unreadable": self.unreadable,
            "notes": [*self.opened.notes, PUBLISHED_NOTE],
        }

    def table(self) -> str:
        """For people."""
        record, model = self.record, self.opened.model.config
        lines = [
            f"{self.opened.name}: {model.family} of depth {model.depth}, {record['eval_images']} images",
            *(f"note: {note}" for note in self.opened.notes),
        ]
        if self.unreadable:
            lines.append(f"note: {self.unreadable} unreadable images were skipped")
        lines.append(f"{'':>9} {'loss, nats':>20} {'error':>20} {'accuracy, %':>12}")
        for part, name in (("avg", "average"), ("last", "last")):
            cells = [
                f"{record[f'{q}_{part}']:.4f} ± {record[f'{q}_{part}_se']:.4f}" for q in ("loss", "error")
            ]
            lines.append(
                f"{name:>9} {cells[0]:>20} {cells[1]:>20} {100 - 100 * record[f'error_{part}']:12.2f}"
            )
        for side, loss, error in zip(
            model.scales, record["loss_scales"], record["error_scales"], strict=True
        ):
            lines.append(f"{f'{side} x {side}':>9} {loss:20.4f} {error:20.4f} {100 - 100 * error:12.2f}")
        return "\n".join([*lines, PUBLISHED_NOTE])


def validate(
    where: str, request: EvaluateRequest, progress: Callable[[int, int], None] = lambda done, total: None
) -> Validation:
    """Open, encode, evaluate.

    Every process calls it, and gets the same result.

    Args:
        where: as ``open_model``.
        progress: called with images encoded and their number, while they are; the model comes after.

    Raises:
        ConfigError: as ``open_model``; no data, or data of other classes; more than 1 % of it unreadable.
        RecordsError: as ``open_model``.
    """
    launch = _launch(Path(where))
    # Several processes divide the cores; one has as many threads as the run had, for the same rounding.
    threads = request.threads or (launch.threads if request.processes == 1 else None)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # a token is an argmin: the same on every device
    opened = open_model(where, request.tokenizer, scales=request.scales)
    run, model = opened.run, opened.model.config
    data = resolve(validation_data(opened, request.data))
    require(
        data.num_classes == model.num_classes,
        f"the images are of {data.num_classes} classes, {opened.name} knows {model.num_classes}: their "
        "labels would not mean the same",
    )
    source, images = open_source(data), request.images or (run.evaluation.images if run else None)
    precision = request.precision or (run.train.precision if run else "fp32")
    accelerator = accelerator_on(request.device, precision)
    device = accelerator.device
    split = encode_validation(
        source,
        data,
        encoder(opened.tokenizer, device, model.sizes),
        images=images,
        batch=batch_size(data.resolution, device.type),
        threads=threads or torch.get_num_threads(),
        progress=progress,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        gather=lambda own: list(gather_object([own])),
    )
    there = source.count("val")
    unreadable = min(images or there, there) - split.images
    require(  # each process has looked at its own only
        unreadable <= UNREADABLE_LIMIT * there,
        f"more than 1 % of the {there} val images are unreadable ({unreadable} found)",
    )
    module = cast(nn.Module, opened.model).to(device)
    evaluation = evaluate(
        module, model, opened.tokenizer.quantize, split, accelerator,
        cached=model.scales, images=None, batch=request.batch or launch.micro_batch or EVAL_BATCH,
    )  # fmt: skip
    return Validation(
        where, request.tokenizer, opened, precision, data, source.fingerprint(), evaluation.record(),
        unreadable,
    )  # fmt: skip


def validation_data(opened: Opened, choice: DataChoice) -> DataConfig:
    """The images to evaluate on; counts are not filled in unless they are a run's own.

    Raises:
        ConfigError: a published checkpoint without ``--data.source``.
    """
    own, given = opened.run, {k: v for k, v in vars(choice).items() if v is not None}
    if own is not None and choice.source is None and choice.name is None:
        return replace(own.data, **given)
    require(
        choice.source is not None,
        f"{opened.name} has no images of its own: give --data.source and --data.path",
    )
    return DataConfig(resolution=opened.tokenizer.resolution, **given)


def _launch(where: Path) -> LaunchConfig:
    """How a run was launched, which its evaluation's rounding depends on."""
    file = where / "launch.json"
    try:
        return from_dict(LaunchConfig, read_json(file)) if file.exists() else LaunchConfig()
    except ConfigError as error:
        raise ConfigError(
            f"{file}: {error}; another version has written it: remove it, nothing in it decides a result"
        ) from None
