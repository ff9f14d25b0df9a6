"""Published checkpoints as points of a sweep's laws, without training them: ``evaluate … --into SWEEP``.

The evaluation is written as a finished run's folder, ``imported-<name>-<hash>``. What it is not is said in
``status.json`` under ``imported``: not trained by the sweep's recipe; its file and tokenizer; who says how
long it was trained. D and C follow from that by the same closed forms as for runs trained here.

Published training crops an image anew in every epoch, so every token counts as seen once: U = D.

Losses can be compared only where the tokens are the same: a sweep whose runs of the family have tokens of
another tokenizer or other steps is refused, and so is one whose imported points are of other images.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import nn

from scaling import flops
from scaling.config import (
    EvaluationConfig,
    RunConfig,
    TokenizerTrainConfig,
    TrainConfig,
    content_hash,
    from_dict,
    to_dict,
)
from scaling.lines import evaluation_record
from scaling.pretrained import filled_tokenizer
from scaling.records import IMPORTED, RunFolder, read_json
from scaling.requests import EvaluateRequest
from scaling.schema import ConfigError, require
from scaling.tokenizer.vqvae import Tokenizer
from scaling.validation import Validation
from scaling.weight_files import is_hub_name

IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True)
class Training:
    """How long a checkpoint was trained, and who says so."""

    epochs: float
    images: int
    batch: int
    told: str


KNOWN = {
    "var_d16": (200, 768),
    "var_d20": (250, 768),
    "var_d24": (350, 768),
    "var_d30": (350, 1024),
    "var_d36": (350, 768),
}
"""Epochs of ImageNet and batch of the published VAR, from its README."""


def training_of(where: str, request: EvaluateRequest) -> Training:
    """How long the checkpoint at ``where`` was trained: as given, else as its name says.

    Raises:
        ConfigError: neither given nor known; a run of this project; the sweep's folder is a file.
    """
    require(
        not (Path(where) / "config.json").exists(),
        f"--into is for published checkpoints; {where} is a run, a point of its own sweep's laws already",
    )
    require(
        not Path(request.into or "").is_file(), f"--into {request.into}: a file; expected a sweep's folder"
    )
    name = Path(re.split("[:/]", where)[-1]).stem
    epochs, images, batch = request.epochs, request.train_images, request.train_batch
    if name in KNOWN and epochs is None and images is None:
        epochs, known_batch = KNOWN[name]
        said = f"{name} is published with {epochs} epochs of ImageNet's {IMAGENET_IMAGES} images"
        return Training(epochs, IMAGENET_IMAGES, batch or known_batch, said)
    if epochs is None or images is None:
        raise ConfigError(f"nothing says how long {name} was trained: give --epochs and --train-images")
    return Training(epochs, images, batch or TrainConfig.batch, "as given to --epochs and --train-images")


def import_into(sweep: str | Path, validation: Validation, training: Training) -> RunFolder:
    """Write the run's folder; the same weights on the same images have the same folder, others another.

    Raises:
        ConfigError: the sweep's losses are of other tokens, or of other images.
    """
    root, opened = Path(sweep), validation.opened
    config = _config(validation, training)
    _check_alike(root, config, opened.tokenizer, validation.fingerprint)
    name = re.sub(r"[^\w.-]+", "-", opened.name)
    weights = _digest(cast(nn.Module, opened.model))
    told = content_hash([config, weights, validation.fingerprint])
    run = RunFolder(root / f"{IMPORTED}{name}-{told[:10]}")
    run.create(to_dict(config))
    run.write_costs(flops.costs(config))
    total = config.total_steps
    record = evaluation_record(config, total, flops.spent(config, total), training.images)
    run.append(record | {"unique_tokens": record["tokens"]} | validation.record)
    run.close()
    origin = {
        "weights": _absolute(validation.where),
        "weights_sha256": weights,
        "tokenizer": None if validation.tokenizer is None else _absolute(validation.tokenizer),
        "scales": None if Path(validation.where).is_dir() else list(opened.model.config.scales),
        "tokenizer_hash": opened.tokenizer.content_hash,
        "images": validation.fingerprint,
        "training": training.told,
    }
    run.set_status("done", step=total, total_steps=total, imported=origin)
    return run


def _config(validation: Validation, training: Training) -> RunConfig:
    """A config that gives the model's costs; nothing says how the tokenizer was trained."""
    data = replace(validation.data, train_images=training.images)
    return RunConfig(
        model=validation.opened.model.config,
        data=data,
        tokenizer=validation.opened.tokenizer.config,
        tokenizer_train=TokenizerTrainConfig(),
        train=TrainConfig(epochs=training.epochs, batch=training.batch, precision=validation.precision),
        evaluation=EvaluationConfig(points=1, images=validation.record["eval_images"]),
    )


def _check_alike(sweep: Path, config: RunConfig, tokenizer: Tokenizer, images: str) -> None:
    """Refuse a sweep whose runs of this family have other tokens, or whose imported points other images."""
    for file in sorted(sweep.glob("*/config.json")):
        run = RunFolder(file.parent)
        other = from_dict(RunConfig, run.config())
        imported = run.status().get("imported")
        require(
            not imported or imported["images"] == images,
            f"--into {sweep}: {run.name} was evaluated on other images; give a sweep of its own",
        )
        if other.model.family != config.model.family:
            continue
        require(
            other.model.scales == config.model.scales,
            f"--into {sweep}: {run.name} has steps {list(other.model.scales)}, this checkpoint "
            f"{list(config.model.scales)}; losses of other steps say nothing of each other: give --scales, "
            "or a sweep of its own",
        )
        theirs, content = other.tokenizer, _tokenizer_hash(run, other)
        # A scalable tokenizer gives each size by itself: which sizes are cached changes no token.
        scales = theirs.scales if theirs.quantizer == "scalable" else tokenizer.config.scales
        alike = replace(tokenizer.config, scales=scales) == theirs
        if not alike or filled_tokenizer(theirs, tokenizer.state_dict()).content_hash != content:
            raise ConfigError(
                f"--into {sweep}: {run.name} has tokens of "
                + ("a tokenizer that is not there to compare" if content is None else "another tokenizer")
                + "; losses of other tokens say nothing of each other: give a sweep of its own"
            )


def _tokenizer_hash(run: RunFolder, config: RunConfig) -> str | None:
    """Content hash of a run's tokenizer, None where that is not there."""
    imported = run.status().get("imported")
    if imported:
        return str(imported["tokenizer_hash"])
    folder = run.path.parent.parent / "tokenizers" / config.tokenizer_run.run_id / "tokenizer"
    description = folder / "tokenizer.json"
    return str(read_json(description)["content_hash"]) if description.exists() else None


def _digest(model: nn.Module) -> str:
    """SHA-256 (hex) of the weights by this project's names, wherever they were read from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _absolute(where: str) -> str:
    return where if is_hub_name(where) else str(Path(where).expanduser().absolute())
