"""``edit`` of the command line: a request to edited pictures, a sheet of them and a few words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from scaling.config import FLEXIBLE, content_hash, require
from scaling.edit_inputs import Inputs, enlarged, prepare
from scaling.editing import Edited, extended, reconstructed, redraw, refine
from scaling.masks import known_psnr, pasted
from scaling.pictures import labelled_rows, uint8
from scaling.pretrained import Opened, open_model
from scaling.requests import EditRequest
from scaling.sample_command import chosen_device
from scaling.tokenizer.metrics import at_size

PER_ROW = 8
"""Candidates in a row of the sheet."""
GREY = 0.0
"""What is shown for pixels that are not known."""


@dataclass(frozen=True)
class EditReport:
    """What the command wrote, and what it says."""

    sheet: Path
    words: tuple[str, ...]


def edit(where: str, image: str, request: EditRequest) -> EditReport:
    """Edit one image: ``count`` PNGs and ``sheet.png``.

    Args:
        where: as ``open_model``.
        image: as ``read_image``.

    Raises:
        ConfigError: a task, size or class that the model cannot have, a box or a mask that does not fit; no
            GPU.
        RecordsError: a model or an image that cannot be read.
    """
    device = chosen_device(request.device)
    opened = open_model(where, request.tokenizer, device)
    _check(opened, request)
    inputs = prepare(opened, image, request, device)
    sampling = request.sampling(request.count)
    labels_1 = None if request.class_ is None else torch.tensor([request.class_], device=device)
    model, tokenizer = opened.model, opened.tokenizer
    if request.task == "refine":
        edited = refine(
            model, tokenizer, inputs.image_13hw, labels_1, sampling, sizes=inputs.sizes, batch=request.batch
        )
    else:
        edited = redraw(
            model, tokenizer, inputs.canvas_13HW, inputs.masks_1HW, labels_1, sampling,
            sizes=inputs.sizes, peek=request.peek, batch=request.batch,
        )  # fmt: skip
    settings = "" if request.class_ is None else f"-class{request.class_}-cfg{request.cfg:g}"
    settings += f"-k{request.top_k}-p{request.top_p:g}-seed{request.seed}"
    # All options that decide the pictures, so that another edit does not write over this one.
    settings += f"-{content_hash(replace(request, out=None, batch=EditRequest.batch, device='auto'))[:8]}"
    base = Path(f"edit-{opened.name}") if opened.run is None else Path(where)
    folder = base / f"edit-{Path(image).stem.replace(':', '-')}-{request.task}{settings}"
    return _write(opened, inputs, edited, request, folder if request.out is None else Path(request.out))


def _check(opened: Opened, request: EditRequest) -> None:
    config = opened.model.config
    options = [f"--{name}" for name in ("size", "scales") if getattr(request, name) is not None]
    wanted = [f"--task {request.task}"] if request.task in ("refine", "expand") else options
    require(
        config.family in FLEXIBLE or not wanted,
        f"{opened.name} is a {config.family}, whose tokens are of one size; {' and '.join(wanted)} needs "
        f"{' or '.join(FLEXIBLE)}",
    )
    known = config.num_classes
    require(
        request.class_ is None or 0 <= request.class_ < known,
        f"--class {request.class_} is not one of the model's {known} classes (0 to {known - 1})",
    )


def _write(opened: Opened, inputs: Inputs, edited: Edited, request: EditRequest, out: Path) -> EditReport:
    """The pictures, the sheet, and what is said of the known pixels."""
    drawn_N3HW, canvas_13HW, masks_1HW = edited.candidates[0], inputs.canvas_13HW, inputs.masks_1HW
    f, (height, width) = opened.tokenizer.config.downsampling, canvas_13HW.shape[2:]
    words = [*opened.notes, *inputs.words]
    if request.class_ is None and request.cfg != EditRequest.cfg:
        words.append(f"--cfg {request.cfg:g} is without effect: there is no --class to guide towards")
    plain_13hw = reconstructed(opened.tokenizer, inputs.image_13hw)
    if request.task == "refine":
        nowhere_1hw = torch.zeros_like(plain_13hw[:, 0], dtype=torch.bool)
        fidelity = _fidelity(at_size(drawn_N3HW, plain_13hw), inputs.image_13hw, plain_13hw, nowhere_1hw)
        words.append(f"averaged down to the image's size: {fidelity}")
        plain_13HW = enlarged(plain_13hw, (height, width))
        first = {"original (enlarged)": canvas_13HW, "reconstruction": plain_13HW}
    else:
        plain_13HW = extended(plain_13hw, height, width, f)[0]  # of every other task the canvas is the image
        share = 100 * (~masks_1HW).double().mean().item()
        fidelity = _fidelity(drawn_N3HW, canvas_13HW, plain_13HW, masks_1HW)
        words.append(f"known pixels ({share:.0f} % of the picture), as drawn: {fidelity}")
        if request.paste:
            feather = max(1, f // 4) if request.feather is None else request.feather
            drawn_N3HW = pasted(drawn_N3HW, canvas_13HW, masks_1HW, feather)
            words.append(f"pasted: known pixels more than {feather} from painted ones are the image's own")
        first = {"original": canvas_13HW, "reconstruction": plain_13HW}
        if request.task != "expand":  # there the canvas is what is known
            first["masked"] = torch.where(masks_1HW[:, None], GREY, canvas_13HW)
    out.mkdir(parents=True, exist_ok=True)
    pictures = list(uint8(drawn_N3HW))
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(out / f"{i:05d}-seed{request.seed + i}.png")
    rows = [(", ".join(first), [uint8(picture)[0] for picture in first.values()])]
    for start in range(0, len(pictures), PER_ROW):
        part = pictures[start : start + PER_ROW]
        seeds = [str(request.seed + start), str(request.seed + start + len(part) - 1)]
        rows.append((f"candidates, seeds {' to '.join(dict.fromkeys(seeds))}", part))
    told = "no class" if request.class_ is None else f"class {request.class_}, guidance {request.cfg:g}"
    sheet = out / "sheet.png"
    labelled_rows(rows, f"{opened.name}: {request.task}, {told}").save(sheet)
    return EditReport(sheet, tuple(words))


def _fidelity(x_N3HW: Tensor, original_13HW: Tensor, plain_13HW: Tensor, masks_1HW: Tensor) -> str:
    """How near the known pixels are to the original and to the tokenizer's picture of it."""
    if masks_1HW.all():
        return "there are none"

    def to(other_13HW: Tensor) -> str:
        noise = (10 ** (-known_psnr(x_N3HW, other_13HW, masks_1HW) / 10)).mean()  # over all candidates
        return "equal" if noise == 0 else f"{-10 * noise.log10().item():.2f} dB"

    own = known_psnr(plain_13HW, original_13HW, masks_1HW).item()
    return (
        f"to the original {to(original_13HW)}, to the tokenizer's reconstruction {to(plain_13HW)} "
        f"(the reconstruction itself to the original {own:.2f} dB)"
    )
