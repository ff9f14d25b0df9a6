"""``stages`` of the command line: the same seeds across depths and stages of training (VAR figure 7).

One sheet, a row per depth and a column per stage; a cell has one picture per class. Every cell starts from
the same noise, and with ``--first K`` from the same tokens of the first K steps: those of a validation image
of the class. What then differs between cells is the model alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scaling.config import ConfigError, ModelConfig, RunConfig, from_dict, require
from scaling.data.cache import open_cache
from scaling.generation import Forced, draw_images
from scaling.pictures import pixel_grid, save_png, table, uint8
from scaling.pretrained import filled, open_tokenizer
from scaling.records import RecordsError, RunFolder
from scaling.requests import StagesRequest
from scaling.sample_command import chosen_device
from scaling.steps import token_columns
from scaling.weight_files import read_weights

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StagedRun:
    """A run of the sweep, and the folders of its tokenizer and tokens."""

    run: Path
    tokenizer: Path
    tokens: Path


def draw_stages(
    runs: Sequence[StagedRun],
    request: StagesRequest,
    out: Path,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Draw the sheet of runs of one family with one tokenizer; returns its file.

    Args:
        out: the PNG.
        progress: called with cells drawn and their number.

    Raises:
        ConfigError: classes or a device that are not there, more first steps than there are.
        RecordsError: no weights of any run yet, no validation image of a class, damaged records.
    """
    device = chosen_device(request.device)
    configs, stages = [], []
    for run in runs:
        config = from_dict(RunConfig, RunFolder(run.run).config())
        found = weights_of(RunFolder(run.run), config)
        if found:
            configs.append(config)
            stages.append(found)
    if not configs:
        raise RecordsError(f"{runs[0].run.parent}: no run has weights yet")
    model = configs[0].model
    classes = request.known_classes(model.num_classes)
    tokenizer = open_tokenizer(runs[0].tokenizer, model).to(device)
    forced = None
    if request.first > 0:
        steps = sorted({config.model.scales for config in configs})
        require(
            len(steps) == 1,
            f"--first {request.first} needs runs of the same steps, these have "
            f"{' and '.join(str(list(scales)) for scales in steps)}; choose with --depths",
        )
        forced = first_tokens(runs[0].tokens, configs[0], classes, request.first, device)
    columns = sorted({share for found in stages for share in found})
    total = sum(map(len, stages))
    done = itertools.count(1)
    cells: list[list[Image.Image | None]] = []
    for config, found in zip(configs, stages, strict=True):
        row: list[Image.Image | None] = []
        for share in columns:
            if share not in found:
                row.append(None)
                continue
            try:
                network = filled(config.model, read_weights(found[share]).states[""], device)
            except ConfigError as error:
                raise RecordsError(f"{found[share]}: {error}") from None
            pixels = []
            for start in range(0, len(classes), request.batch):
                part = slice(start, start + request.batch)
                seeds = [request.seed + start + i for i in range(len(classes[part]))]
                known = None if forced is None else Forced(forced.tokens_BL[part], forced.keep_BL[part])
                pixels.append(
                    uint8(
                        draw_images(
                            network,
                            tokenizer,
                            classes[part],
                            seeds,
                            request.sampling(len(seeds)),
                            forced=known,
                        )
                    )
                )
            row.append(pixel_grid(np.concatenate(pixels)))
            progress(next(done), total)
        cells.append(row)
    known_first = f", first {request.first} {_unit(model)} of a validation image" if request.first else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    title = (
        f"{model.family}: classes {' '.join(map(str, classes))}, seed {request.seed}, guidance "
        f"{request.cfg:g}{known_first}"
    )
    names = [f"depth {config.model.depth}" for config in configs]
    save_png(table(cells, names, [f"{100 * share:.3g} % of training" for share in columns], title), out)
    return out


def weights_of(folder: RunFolder, config: RunConfig) -> dict[float, Path]:
    """Files of weights by share of training: the snapshots that the config asks for, and the final ones."""
    files = {share: folder.snapshot(step) for share, step in config.snapshot_steps.items()}
    return {share: file for share, file in (files | {1.0: folder.weights}).items() if file.exists()}


def first_tokens(
    cache: Path, config: RunConfig, classes: Sequence[int], first: int, device: str | torch.device
) -> Forced:
    """The first steps (raster: rows) of the first validation image of each class; the rest is drawn.

    Raises:
        ConfigError: there are not so many steps.
        RecordsError: no validation image of a class.
    """
    split = open_cache(cache).split("val")
    model = config.model
    most = model.scales[-1] if model.family == "raster" else len(model.scales)
    require(
        first <= most,
        f"--first {first}: a {model.family} of scales {list(model.scales)} has {most} {_unit(model)}",
    )
    counts = [side * side for side in model.scales]
    known = first * model.scales[-1] if model.family == "raster" else sum(counts[:first])
    rows = []
    for label in classes:
        of_class = np.flatnonzero(split.labels == label)
        if len(of_class) == 0:
            raise RecordsError(f"{cache}: no validation image of class {label}; take others, or --first 0")
        rows.append(int(of_class[0]))
    tokens = split.tokens(np.array(rows))[:, token_columns(config.tokenizer.scales, model.scales)]
    tokens_BL: Tensor = torch.from_numpy(tokens.astype(np.int64)).to(device)
    keep_BL = (torch.arange(tokens_BL.shape[1], device=device) < known).expand(len(rows), -1)
    return Forced(tokens_BL, keep_BL)


def _unit(model: ModelConfig) -> str:
    return "rows" if model.family == "raster" else "steps"
