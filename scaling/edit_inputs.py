"""What ``edit`` starts from: an image and a mask from files or numbers, made to fit the model; and the steps.

- The image is a file, or ``val:N``, the N-th validation image of the run's own data.
- What has another size is cropped to the middle of the right shape and resized, the mask with it.

Shapes: 1 image, 3 colours, h w the given image's pixels as it is encoded, H W the result's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from scaling.config import ConfigError, RunConfig, require
from scaling.data.images import decode
from scaling.data.sources import open_source
from scaling.data.transforms import view_array
from scaling.editing import check_sizes, extended, refining_sizes
from scaling.pretrained import Opened
from scaling.requests import EditRequest
from scaling.steps import proportional_sizes
from scaling.tokenizer.quantizer import Size

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Inputs:
    """An image made ready for a task."""

    image_13hw: Tensor
    """The given image at the size it is encoded at, in [−1, 1]."""
    canvas_13HW: Tensor
    """What is known, at the size of the result."""
    masks_1HW: Tensor
    """True where painted."""
    sizes: tuple[Size, ...]
    """The steps."""
    words: tuple[str, ...]
    """What the image is and what was done to it, for the user."""


def prepare(opened: Opened, name: str, request: EditRequest, device: str | torch.device) -> Inputs:
    """Read, check and fit the image and its mask; choose the steps.

    Args:
        name: of the image; see ``read_image``.

    Raises:
        ConfigError: sizes, a mask or a box that do not fit the image or the model.
        RecordsError: a file that cannot be read.
    """
    picture, words = read_image(name, opened.run)
    f, side = opened.tokenizer.config.downsampling, opened.tokenizer.resolution
    encoded, (height, width) = _fitting(picture, name, request, f, side)
    fitted, note = fit(picture, encoded)
    words += [] if note is None else [f"{name}: {note}"]
    image_13hw = _tensor(fitted).to(device)
    sizes = _steps(opened, request, (height // f, width // f))
    if request.task == "expand":
        canvas_13HW, masks_1HW = extended(image_13hw, height, width, f)
    elif request.task == "refine":
        canvas_13HW = enlarged(image_13hw, (height, width))
        masks_1HW = torch.zeros(1, height, width, dtype=torch.bool, device=device)
    else:
        canvas_13HW, given = image_13hw, _mask(request, picture, name)
        painted = fit_mask(given, encoded)
        require(
            bool(painted.any()) or not given.any(),
            f"{name}: the mask lies wholly in what is cropped away to fit {height} x {width} pixels",
        )
        masks_1HW = torch.from_numpy(painted)[None].to(device)
    return Inputs(image_13hw, canvas_13HW, masks_1HW, sizes, tuple(words))


def _fitting(picture: Image.Image, name: str, request: EditRequest, f: int, side: int) -> tuple[Size, Size]:
    """Height and width in pixels that the image is encoded at, and those of the result.

    Args:
        f: the tokenizer's downsampling.
        side: the model's resolution.
    """
    height, width = result = request.pixels or (side, side)
    unit = 2 * f if request.task == "refine" else f
    require(
        height % unit == width % unit == 0,
        f"--size {request.size}: sides must be multiples of {unit} pixels for this model and task",
    )
    if request.task == "expand":
        short = min(picture.size)
        return (side * picture.height // short // f * f, side * picture.width // short // f * f), result
    if request.task != "refine":
        return result, result
    if request.pixels is not None:
        return (height // 2, width // 2), result
    h, w = (edge // f * f for edge in (picture.height, picture.width))
    require(
        f <= min(h, w) and max(h, w) <= side,
        f"{name} has {picture.height} x {picture.width} pixels; refining without --size is for sides of "
        f"{f} to {side}",
    )
    return (h, w), (2 * h, 2 * w)


def _steps(opened: Opened, request: EditRequest, target: Size) -> tuple[Size, ...]:
    """The steps that end at ``target`` tokens (h, w)."""
    config, scales = opened.model.config, request.scales
    if scales is None:
        if request.task == "refine":
            return refining_sizes((target[0] // 2, target[1] // 2), config.scales)
        return proportional_sizes(target, config.scales)
    require(all(a < b for a, b in pairwise(scales)), f"--scales must grow, got {' '.join(map(str, scales))}")
    require(
        scales[-1:] == (min(target),),
        f"--scales must end at {min(target)}, the result's shorter side in tokens, got "
        f"{' '.join(map(str, scales)) or 'none'}",
    )
    return check_sizes(config, proportional_sizes(target, scales))


def read_image(name: str, run: RunConfig | None) -> tuple[Image.Image, list[str]]:
    """An RGB image, and what is to be said of it.

    Args:
        name: a file, or ``val:N`` for a validation image, cropped as for validation.
        run: whose data that is.

    Raises:
        ConfigError: no such validation image, or the model is no run.
        RecordsError: not readable.
    """
    match = re.fullmatch(r"val:(\d+)", name)
    if match is None:
        return decode(Path(name), name), []
    if run is None:
        raise ConfigError(f"{name} is a validation image of a run; a checkpoint has none, give a file")
    source, index = open_source(run.data), int(match[1])
    count = source.count("val")
    require(index < count, f"{name}: the run has validation images 0 to {count - 1}")
    label = source.label("val", index)
    picture = Image.fromarray(view_array(source.image("val", index), run.data, None))
    return picture, [f"{name} is of class {label}, {source.class_names[label]}"]


def _mask(request: EditRequest, picture: Image.Image, name: str) -> Bool:
    """What is painted, (height, width) of the given image."""
    if request.mask is not None:
        return read_mask(request.mask, picture, name)
    assert request.box is not None
    inside = box_mask(request.box, picture.height, picture.width)
    return ~inside if request.task == "outpaint" else inside


def box_mask(box: tuple[float, ...], height: int, width: int) -> Bool:
    """True inside a box (left, upper, right, lower), in pixels or, none being above 1, as fractions.

    Raises:
        ConfigError: a box outside the image, or with nothing in it.
    """
    fractions = max(box) <= 1
    x0, y0, x1, y1 = (
        round(edge * side) if fractions else edge for edge, side in zip(box, 2 * (width, height), strict=True)
    )
    shown = " ".join(f"{edge:g}" for edge in box)
    require(
        all(float(edge).is_integer() for edge in (x0, y0, x1, y1)),
        f"--box {shown}: give whole pixels, or fractions from 0 to 1 only",
    )
    require(
        min(x0, y0) >= 0 and x1 <= width and y1 <= height,
        f"--box {shown} reaches outside the image, {width} pixels wide and {height} high",
    )
    require(x0 < x1 and y0 < y1, f"--box {shown} is empty; it is left upper right lower")
    mask = np.zeros((height, width), dtype=bool)
    mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    return mask


def read_mask(file: str, picture: Image.Image, of: str) -> Bool:
    """A mask file of an image's size, True where white.

    Raises:
        ConfigError: of another size, or neither black nor white somewhere.
        RecordsError: not readable.
    """
    mask = decode(Path(file), file)
    require(
        mask.size == picture.size,
        f"{file} has {mask.width} x {mask.height} pixels but {of} {picture.width} x {picture.height}",
    )
    pixels = np.asarray(mask)
    white, black = (pixels == 255).all(-1), (pixels == 0).all(-1)
    other = int((~white & ~black).sum())
    require(not other, f"{file}: {other} pixels are neither black nor white; save it as PNG without greys")
    return white


def fit_mask(mask: Bool, target: Size) -> Bool:
    """A mask cropped and resized as ``fit`` does the picture; where any pixel was masked, so is the result.

    Averages in 8 bits would lose small spots, and what they hide would stay.
    """
    top, left, rows, columns = _middle(mask.shape[0], mask.shape[1], target)
    part_11hw = torch.from_numpy(mask[top : top + rows, left : left + columns])[None, None].float()
    return F.adaptive_max_pool2d(part_11hw, target)[0, 0].numpy() > 0


def fit(picture: Image.Image, target: Size) -> tuple[Image.Image, str | None]:
    """A picture of ``target`` (height, width) pixels: the middle of the right shape, resized.

    Returns:
        the picture, and what was done, if anything.
    """
    height, width = target
    top, left, *part = _middle(picture.height, picture.width, target)
    words = []
    if part != [picture.height, picture.width]:
        words.append(f"cropped to its middle {part[0]} x {part[1]}")
        picture = picture.crop((left, top, left + part[1], top + part[0]))
    if part != [height, width]:
        words.append(f"resized to {height} x {width} pixels")
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture, " and ".join(words) or None


def _middle(height: int, width: int, target: Size) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest part of the target's shape, in the middle."""
    scale = min(height / target[0], width / target[1])
    rows, columns = min(height, round(target[0] * scale)), min(width, round(target[1] * scale))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def enlarged(small_13hw: Tensor, size: Size) -> Tensor:
    """An image at a larger size, without smoothing."""
    return F.interpolate(small_13hw, size, mode="nearest")


def _tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (1, 3, H, W) in [−1, 1]."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
