"""``sample`` of the command line: any model and a request to PNGs, a grid and their settings.

    <out>/settings.json                    what decides the pictures
    <out>/00000-class3-seed7.png           picture 0, of class 3, drawn with seed 7
    <out>/grid.png                         the first of them
    <out>/acceptance.json                  by class, where a classifier has chosen

A folder whose settings are the same is gone on with: pictures that are there are not drawn again, so a
larger ``--count`` adds to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scaling.config import Device, content_hash, require
from scaling.editing import check_sizes
from scaling.generation import draw_images
from scaling.noise import NOISE
from scaling.pictures import pixel_grid, save_png, uint8
from scaling.pretrained import Opened, open_model, weights_hash
from scaling.records import read_json, write_json
from scaling.rejection import Acceptance, candidates_for, load_classifier, reject
from scaling.requests import SampleRequest

Progress = Callable[[int, int], None]
"""Called with pictures drawn and their number."""
GRID_MOST = 100
"""Pictures of the grid at most; all of many thousands would be a picture that nothing opens."""

NAMED = 6
"""Classes in the name of a folder."""


@dataclass(frozen=True)
class Sampled:
    """What the command wrote, and what it says."""

    grid: Path
    words: tuple[str, ...]


def sample(where: str, request: SampleRequest, progress: Progress = lambda done, total: None) -> Sampled:
    """Draw ``request.count`` pictures from a model.

    Args:
        where: as ``open_model``.

    Raises:
        ConfigError: a class, steps or a smoothing that the model does not have; no GPU; a classifier that is
            none; pictures with other settings in the folder.
        RecordsError: as ``open_model``.
    """
    device = chosen_device(request.device)
    opened = open_model(where, request.tokenizer, device)
    config = opened.model.config
    classes = request.known_classes(config.num_classes)
    if request.sizes is not None:
        check_sizes(config, request.sizes)
    settings = settings_of(opened, request)
    out = out_folder(opened, where, request, settings)
    claim(out, settings)
    labels = [classes[i % len(classes)] for i in range(request.count)]
    if request.classifier is None:
        words = _draw_all(opened, request, labels, out, progress)
    else:
        words = _draw_best(opened, request, labels, out, device, progress)
    grid = out / "grid.png"
    files = [_there(out, i) for i in range(min(len(labels), GRID_MOST))]
    pictures = np.stack([np.asarray(Image.open(file)) for file in files if file is not None])
    save_png(pixel_grid(pictures), grid)
    return Sampled(grid, (*opened.notes, *words))


def _draw_all(
    opened: Opened, request: SampleRequest, labels: Sequence[int], out: Path, progress: Progress
) -> tuple[str, ...]:
    """Every picture that is not there yet; picture i has seed + i."""
    missing = [i for i in range(len(labels)) if _there(out, i) is None]
    done = len(labels) - len(missing)
    for start in range(0, len(missing), request.batch):
        some = missing[start : start + request.batch]
        seeds = [request.seed + i for i in some]
        images_B3HW = _images(opened, request, [labels[i] for i in some], seeds)
        for i, seed, pixels in zip(some, seeds, uint8(images_B3HW), strict=True):
            save_png(Image.fromarray(pixels), out / f"{i:05d}-class{labels[i]}-seed{seed}.png")
        progress(done + start + len(some), len(labels))
    return (f"{done} of {len(labels)} pictures were there already",) if done else ()


def _draw_best(
    opened: Opened,
    request: SampleRequest,
    labels: Sequence[int],
    out: Path,
    device: str,
    progress: Progress,
) -> tuple[str, ...]:
    """Class by class, the pictures that the classifier is surest of."""
    assert request.classifier is not None
    assert request.keep is not None
    classifier, share = load_classifier(request.classifier, device), request.keep
    wanted = Counter(labels)
    candidates = {label: candidates_for(count, share) for label, count in wanted.items()}
    total, before, words = sum(candidates.values()), 0, []
    file = out / "acceptance.json"
    found: dict[str, Any] = read_json(file) if file.exists() else {}
    for label, count in candidates.items():
        places = [i for i, other in enumerate(labels) if other == label]
        if any(_there(out, i) is None for i in places):
            for i in places:  # of a class that was cut short: which seeds are kept is known at its end only
                there = _there(out, i)
                if there is not None:
                    there.unlink()
            result = reject(
                lambda some, seeds: _images(opened, request, some, seeds), classifier, [label] * count,
                keep=wanted[label], seed=request.seed + before, batch=request.batch,
                progress=lambda done: progress(before + done, total),  # noqa: B023
            )  # fmt: skip
            found[str(label)] = asdict(result.acceptance[label])
            write_json(file, found)
            for i, kept in zip(places, result.kept, strict=True):
                target = out / f"{i:05d}-class{label}-seed{kept.seed}.png"
                save_png(Image.fromarray(uint8(kept.image_3HW[None])[0]), target)
        words.append(_told(label, Acceptance(**found[str(label)])))
        before += count
        progress(before, total)
    return tuple(words)


def _told(label: int, found: Acceptance) -> str:
    return (
        f"class {label}: {found.kept} of {found.candidates} kept, of at least {found.threshold:.4f}; mean "
        f" {found.mean:.4f} of all, {found.mean_kept:.4f} of the kept"
    )


def _images(opened: Opened, request: SampleRequest, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
    return draw_images(
        opened.model, opened.tokenizer, labels, seeds, request.sampling(len(labels)),
        smooth=request.smooth, sizes=request.sizes,
    )  # fmt: skip


def _there(out: Path, index: int) -> Path | None:
    """The file of a picture that was drawn."""
    return next(iter(sorted(out.glob(f"{index:05d}-class*.png"))), None)


# -- of every command that draws -----------------------------------------------------------------------


def chosen_device(device: Device) -> str:
    """The device by torch's name.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    there = torch.cuda.is_available()
    require(device != "cuda" or there, "--device cuda: torch sees no GPU here")
    return "cuda" if there and device != "cpu" else "cpu"


def settings_of(opened: Opened, request: SampleRequest) -> dict[str, Any]:
    """What decides the pictures, as plain values; the number of pictures does not, without a classifier."""
    sizes = request.sizes or opened.model.config.sizes
    settings = {
        "model": opened.name,
        "weights": weights_hash(opened.model),
        "tokenizer": opened.tokenizer.content_hash,
        "classes": list(request.known_classes(opened.model.config.num_classes)),
        "sizes": [list(size) for size in sizes],
        **{
            name: getattr(request, name)
            for name in ("seed", "cfg", "guidance_form", "top_k", "top_p", "smooth", "precision")
        },
        "noise": NOISE,
    }
    if request.classifier is not None:
        settings |= {"classifier": request.classifier, "keep": request.keep, "count": request.count}
    return settings


def out_folder(opened: Opened, where: str, request: SampleRequest, settings: dict[str, Any]) -> Path:
    """Where pictures go: as asked for, or a name with the settings in the run's folder, or here."""
    if request.out is not None:
        return Path(request.out)
    name = f"samples-cfg{request.cfg:g}-k{request.top_k}-p{request.top_p:g}-seed{request.seed}"
    name += "-smooth" if request.smooth else ""
    name += f"-{request.precision}" if request.precision != "fp32" else ""
    if request.classes is not None:
        name += "-class" + "-".join(map(str, request.classes[:NAMED]))
    if request.sizes is not None:
        name += f"-to{request.sizes[-1][0]}x{request.sizes[-1][1]}"
    if request.classifier is not None:
        name += f"-keep{request.keep:g}"
    name += f"-{content_hash(settings)[:8]}"  # of all settings, those that the name has no place for too
    return Path(where) / name if opened.run is not None else Path(f"{opened.name}-{name}")


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder with its ``settings.json``, or check that it has the same.

    Raises:
        ConfigError: pictures with other settings are there.
    """
    file = out / "settings.json"
    if file.exists():
        there = read_json(file)
        for key in sorted({*settings, *there}):
            require(
                there.get(key) == settings.get(key),
                f"{out} holds pictures with {key} {_short(there.get(key))}, not {_short(settings.get(key))}; "
                "give another --out, or remove the folder",
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
