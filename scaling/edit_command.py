"""``edit`` of the command line: an image file and a request to edited pictures, a sheet and a few words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from scaling.config import FLEXIBLE, SamplingConfig, require
from scaling.data.images import decode
from scaling.editing import Edited, check_sizes, extended, reconstructed, redraw, refine, refining_sizes
from scaling.masks import known_psnr, pasted
from scaling.pretrained import Opened, open_model
from scaling.requests import EditRequest, Task
from scaling.steps import proportional_sizes
from scaling.tokenizer.metrics import at_size
from scaling.tokenizer.pictures import grid
from scaling.tokenizer.quantizer import Size

Bool = NDArray[np.bool_]
PER_ROW = 8
"""Candidates in a row of the sheet."""
GREY = 0.0
"""What is shown for pixels that are not known."""


@dataclass(frozen=True)
class EditReport:
    """What the command wrote, and what it says."""

    sheet: Path
    words: tuple[str, ...]


@dataclass(frozen=True)
class _Work:
    """An image made ready for a task."""

    image_13hw: Tensor
    """The given image at the size it is encoded at."""
    canvas_13HW: Tensor
    """What is known, at the size of the result."""
    masks_1HW: Tensor
    """True where painted."""
    sizes: tuple[Size, ...]
    fitted: str | None
    """What was done to the image, for the user."""


def edit(where: str, image: Path, request: EditRequest, device: str | torch.device) -> EditReport:
    """Edit one image: ``count`` PNGs and ``sheet.png``.

    Raises:
        ConfigError: a task, size or class that the model cannot have, a box or a mask that does not fit.
        RecordsError: a model or an image that cannot be read.
    """
    task, opened = request.chosen, open_model(where, request.tokenizer, device)
    _check(opened, request, task)
    work = _prepare(opened, image, request, task, device)
    tokenizer = opened.tokenizer
    sampling = SamplingConfig(
        images=request.count, guidance=request.cfg, guidance_form=request.cfg_form,
        top_k=request.top_k, top_p=request.top_p, seed=request.seed,
    )  # fmt: skip
    labels_1 = None if request.class_ is None else torch.tensor([request.class_], device=device)
    if task == "refine":
        edited = refine(
            opened.model, tokenizer, work.image_13hw, labels_1, sampling,
            sizes=work.sizes, batch=request.batch,
        )  # fmt: skip
    else:
        edited = redraw(
            opened.model, tokenizer, work.canvas_13HW, work.masks_1HW, labels_1, sampling,
            sizes=work.sizes, peek=request.peek, batch=request.batch,
        )  # fmt: skip
    settings = "" if request.class_ is None else f"-class{request.class_}-cfg{request.cfg:g}"
    settings += f"-k{request.top_k}-p{request.top_p:g}-seed{request.seed}"
    base = Path() if opened.run is None else Path(where)
    out = base / f"edit-{image.stem}-{task}{settings}" if request.out is None else Path(request.out)
    return _write(opened, work, edited, request, task, out)


def _check(opened: Opened, request: EditRequest, task: Task) -> None:
    config = opened.model.config
    flexible = config.family in FLEXIBLE
    options = [f"--{name}" for name in ("size", "scales") if getattr(request, name) is not None]
    wanted = f"--task {task}" if task in ("refine", "expand") else (options or [""])[0]
    require(
        flexible or not wanted,
        f"{opened.name} is a {config.family}, whose tokens are of one size; {wanted} needs "
        f"{' or '.join(FLEXIBLE)}",
    )
    known = config.num_classes
    require(
        request.class_ is None or 0 <= request.class_ < known,
        f"--class {request.class_} is not one of the model's {known} classes (0 to {known - 1})",
    )
    scales = request.scales
    require(
        scales is None or (len(scales) > 0 and all(a < b for a, b in pairwise(scales))),
        f"--scales must grow, got {' '.join(map(str, scales or ()))}",
    )


def _prepare(
    opened: Opened, path: Path, request: EditRequest, task: Task, device: str | torch.device
) -> _Work:
    """Read, check and fit the image and its mask; choose the steps."""
    picture = decode(path, str(path))
    f, side = opened.tokenizer.config.downsampling, opened.tokenizer.resolution
    height, width = request.pixels or (side, side)
    unit = 2 * f if task == "refine" else f
    require(
        height % unit == width % unit == 0,
        f"--size {request.size}: sides must be multiples of {unit} pixels for this model and task",
    )
    if task == "refine":
        if request.pixels is None:
            own = [edge // f * f for edge in (picture.height, picture.width)]
            require(
                f <= min(own) and max(own) <= side,
                f"{path} has {picture.height} x {picture.width} pixels; without --size refining "
                f"is for sides of {f} to {side} pixels",
            )
            height, width = 2 * own[0], 2 * own[1]
        target = (height // 2, width // 2)
    elif task == "expand":
        short = min(picture.size)
        target = (side * picture.height // short // f * f, side * picture.width // short // f * f)
    else:
        target = (height, width)
    fitted, note = fit(picture, target)
    image_13hw = _tensor(fitted).to(device)
    sizes = _steps(opened, request, task, (height // f, width // f))
    if task == "refine":
        canvas_13HW = F.interpolate(image_13hw, (height, width), mode="nearest")
        masks_1HW = torch.zeros(1, height, width, dtype=torch.bool, device=device)
    elif task == "expand":
        canvas_13HW, masks_1HW = extended(image_13hw, height, width, f)
    else:
        canvas_13HW, given = image_13hw, _mask(request, task, picture, path)
        shown, _ = fit(Image.fromarray(given.astype(np.uint8) * 255), target, Image.Resampling.BOX)
        painted = np.asarray(shown) > 0
        require(
            bool(painted.any()) or not given.any(),
            f"{path}: the mask lies wholly in what is cropped away to fit {height} x {width} pixels",
        )
        masks_1HW = torch.from_numpy(painted)[None].to(device)
    return _Work(image_13hw, canvas_13HW, masks_1HW, sizes, None if note is None else f"{path}: {note}")


def _steps(opened: Opened, request: EditRequest, task: Task, target: Size) -> tuple[Size, ...]:
    """The steps that end at ``target`` tokens (h, w)."""
    config = opened.model.config
    scales = request.scales
    if scales is None:
        if task == "refine":
            return refining_sizes((target[0] // 2, target[1] // 2), config.scales)
        return proportional_sizes(target, config.scales)
    require(
        scales[-1] == min(target),
        f"--scales must end at {min(target)}, the result's shorter side in tokens, got {scales[-1]}",
    )
    return check_sizes(config, proportional_sizes(target, scales))


def _mask(request: EditRequest, task: Task, picture: Image.Image, path: Path) -> Bool:
    """What is painted, (height, width) of the given image."""
    if request.mask is not None:
        return read_mask(Path(request.mask), picture, path)
    assert request.box is not None
    inside = box_mask(request.box, picture.height, picture.width)
    return ~inside if task == "outpaint" else inside


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


def read_mask(path: Path, picture: Image.Image, of: Path) -> Bool:
    """A mask file of an image's size, True where white.

    Raises:
        ConfigError: of another size, or neither black nor white somewhere.
        RecordsError: not readable.
    """
    mask = decode(path, str(path))
    require(
        mask.size == picture.size,
        f"{path} has {mask.width} x {mask.height} pixels but {of} {picture.width} x {picture.height}",
    )
    pixels = np.asarray(mask)
    white, black = (pixels == 255).all(-1), (pixels == 0).all(-1)
    other = int((~white & ~black).sum())
    require(not other, f"{path}: {other} pixels are neither black nor white; save it as PNG without greys")
    return white


def fit(
    picture: Image.Image, target: Size, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> tuple[Image.Image, str | None]:
    """A picture of ``target`` (height, width) pixels: the middle of the right shape, resized.

    Returns:
        the picture, and what was done, if anything.
    """
    height, width = target
    scale = min(picture.height / height, picture.width / width)
    part = (min(picture.height, round(height * scale)), min(picture.width, round(width * scale)))
    words = []
    if part != (picture.height, picture.width):
        top, left = (picture.height - part[0]) // 2, (picture.width - part[1]) // 2
        words.append(f"cropped to its middle {part[0]} x {part[1]}")
        picture = picture.crop((left, top, left + part[1], top + part[0]))
    if part != target:
        words.append(f"resized to {height} x {width} pixels")
        picture = picture.resize((width, height), resampling)
    return picture, " and ".join(words) or None


def _write(
    opened: Opened, work: _Work, edited: Edited, request: EditRequest, task: Task, out: Path
) -> EditReport:
    """The pictures, the sheet, and what is said of the known pixels."""
    drawn_N3HW, canvas_13HW, masks_1HW = edited.candidates[0], work.canvas_13HW, work.masks_1HW
    f = opened.tokenizer.config.downsampling
    words = [*opened.notes, *([work.fitted] if work.fitted else [])]
    plain_13hw = reconstructed(opened.tokenizer, work.image_13hw)
    if task == "refine":
        nowhere_1hw = torch.zeros_like(plain_13hw[:, 0], dtype=torch.bool)
        fidelity = _fidelity(at_size(drawn_N3HW, plain_13hw), work.image_13hw, plain_13hw, nowhere_1hw)
        words.append(f"averaged down to the image's size: {fidelity}")
        plain_13HW = _enlarged(plain_13hw, canvas_13HW)
        first = {"original (enlarged)": canvas_13HW, "reconstruction": plain_13HW}
    else:
        height, width = canvas_13HW.shape[2:]
        plain_13HW = extended(plain_13hw, height, width, f)[0]  # of every other task the canvas is the image
        share = 100 * (~masks_1HW).double().mean().item()
        fidelity = _fidelity(drawn_N3HW, canvas_13HW, plain_13HW, masks_1HW)
        words.append(f"known pixels ({share:.0f} % of the picture), as drawn: {fidelity}")
        if request.paste:
            feather = max(1, f // 4) if request.feather is None else request.feather
            drawn_N3HW = pasted(drawn_N3HW, canvas_13HW, masks_1HW, feather)
            words.append(f"pasted: known pixels more than {feather} from painted ones are the image's own")
        masked_13HW = torch.where(masks_1HW[:, None], GREY, canvas_13HW)
        first = {"original": canvas_13HW, "masked": masked_13HW, "reconstruction": plain_13HW}
    out.mkdir(parents=True, exist_ok=True)
    pictures = list(_uint8(drawn_N3HW))
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(out / f"{i:05d}-seed{request.seed + i}.png")
    rows = [(", ".join(first), [_uint8(picture)[0] for picture in first.values()])]
    for start in range(0, len(pictures), PER_ROW):
        part = pictures[start : start + PER_ROW]
        seeds = [str(request.seed + start), str(request.seed + start + len(part) - 1)]
        rows.append((f"candidates, seeds {' to '.join(dict.fromkeys(seeds))}", part))
    told = "no class" if request.class_ is None else f"class {request.class_}, guidance {request.cfg:g}"
    sheet = out / "sheet.png"
    grid(rows, f"{opened.name}: {task}, {told}").save(sheet)
    return EditReport(sheet, tuple(words))


def _enlarged(small_13hw: Tensor, like_13HW: Tensor) -> Tensor:
    """An image at another's size, without smoothing."""
    return F.interpolate(small_13hw, like_13HW.shape[2:], mode="nearest")


def _fidelity(x_N3HW: Tensor, original_13HW: Tensor, plain_13HW: Tensor, masks_1HW: Tensor) -> str:
    """How near the known pixels are to the original and to the tokenizer's picture of it."""
    if masks_1HW.all():
        return "there are none"

    def to(other_13HW: Tensor) -> str:
        value = known_psnr(x_N3HW, other_13HW, masks_1HW).mean().item()
        return "equal" if value == float("inf") else f"{value:.2f} dB"

    own = known_psnr(plain_13HW, original_13HW, masks_1HW).item()
    return (
        f"to the original {to(original_13HW)}, to the tokenizer's reconstruction {to(plain_13HW)} "
        f"(the reconstruction itself to the original {own:.2f} dB)"
    )


def _tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (1, 3, H, W) in [−1, 1]."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def _uint8(images_B3HW: Tensor) -> NDArray[np.uint8]:
    """Images in [−1, 1] as uint8 (B, H, W, 3)."""
    pixels = ((images_B3HW.clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
