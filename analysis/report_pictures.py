"""What a report shows that lies beside the records: tokenizers, samples and sheets of stages."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from analysis.study import Study
from scaling.records import RunFolder, read_json

PICTURE_BYTES = 400_000
"""A picture above this is embedded as a smaller JPEG; the file itself stays where it is."""


def tokenizers(studies: Iterable[Study], notes: list[str]) -> list[dict[str, Any]]:
    """Facts and pictures of every tokenizer that the sweep names, and the families that were trained on it;
    ``missing`` says what is not there."""
    by_link: dict[str, list[Study]] = {}
    for study in studies:
        for link in dict.fromkeys(run.tokenizer for run in study.listed):
            by_link.setdefault(link, []).append(study)
    if not by_link:
        nothing = {"missing": "without a sweep.json no tokenizer is known", "name": "", "families": []}
        return [nothing | {"facts": [], "columns": [], "scales": [], "picture": None, "path": ""}]
    return [_tokenizer(link, users, notes) for link, users in by_link.items()]


def _tokenizer(link: str, users: list[Study], notes: list[str]) -> dict[str, Any]:
    folder = users[0].folder / link
    known: dict[str, Any] = {}
    for record in RunFolder(folder).metrics():
        known |= {k: v for k, v in record.items() if k not in ("kind", "step")}
    description = folder / "tokenizer" / "tokenizer.json"
    missing = "" if description.exists() else f"the tokenizer {folder.name} is not finished or not kept here"
    facts = read_json(description) if description.exists() else {}
    known |= facts.get("facts", {})
    wanted = ("psnr", "ssim", "usage", "perplexity", "steps")
    scalars = [
        (key, f"{value:.4g}")
        for key, value in sorted(known.items())
        if isinstance(value, int | float) and not isinstance(value, bool) and any(w in key for w in wanted)
    ]
    lists = {
        key: value for key, value in sorted(known.items())
        if isinstance(value, list) and ("usage" in key or "perplexity" in key)
        and all(isinstance(v, int | float) for v in value)
    }  # fmt: skip
    sides = users[0].runs[0]["config"].get("tokenizer", {}).get("scales", [])
    table = [
        {"scale": f"{side}×{side}", "values": [f"{column[i]:.3g}" for column in lists.values()]}
        for i, side in enumerate(sides)
        if all(len(column) == len(sides) for column in lists.values())
    ]
    return {
        "missing": missing, "name": folder.name, "families": [study.family for study in users],
        "facts": scalars, "columns": list(lists), "scales": table,
        "picture": _picture(folder / "reconstructions.png", notes),
        "path": f"../{link}/reconstructions.png",
    }  # fmt: skip


def samples(study: Study, notes: list[str]) -> list[dict[str, Any]]:
    """The pictures that a family's runs have left, by depth and seed."""
    found = []
    for run in sorted(study.runs, key=lambda r: (r["depth"], r["seed"])):
        file = study.folder / run["run"] / "samples.png"
        found.append(
            {
                "depth": run["depth"],
                "seed": run["seed"],
                "picture": _picture(file, notes),
                "path": f"../{run['run']}/samples.png",
            }
        )
    return found


def stages(study: Study, notes: list[str]) -> dict[str, Any]:
    """The sheet that the command ``stages`` drew of the family, where it did."""
    name = f"stages-{study.family}.png"
    return {"picture": _picture(study.folder / name, notes), "path": f"../{name}"}


def _picture(file: Path, notes: list[str]) -> str | None:
    """A data URI, or None when there is no such file, or a damaged one, which is noted."""
    if not file.exists():
        return None
    data, kind = file.read_bytes(), "png"
    if len(data) > PICTURE_BYTES:
        from PIL import Image

        try:
            with Image.open(file) as picture:
                small = picture.convert("RGB")
        # Pillow's words for a torn file, a torn compressed part, and a size that only an attack has.
        except (OSError, ValueError, Image.DecompressionBombError):
            notes.append(f"{file.parent.name}/{file.name} is damaged or too large; left out")
            return None
        small.thumbnail((1600, 1600))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
