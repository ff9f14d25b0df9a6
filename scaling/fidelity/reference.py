"""What generated images are compared with: statistics of real ones, made here or read from a file.

A file is an .npz, read without pickle. It has some of
    mu (D,), sigma (D, D)       the Gaussian, as pytorch-fid and the ADM toolkit write it
    arr_0 (N, H, W, 3) uint8    images, as in the ADM toolkit's reference batches
    features (N, D) float32     of images, for precision and recall
    extractor, reference, images    what made it, of what, of how many: only in files from here
Features or images without a Gaussian have one made of them; a Gaussian alone gives FID and nothing else.
"""

from __future__ import annotations

import hashlib
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scaling.config import ConfigError
from scaling.fidelity.collect import ALONE, BATCH, KEPT, Images, Share, chosen, collect
from scaling.fidelity.features import NamedExtractor
from scaling.fidelity.statistics import Gaussian, Moments


@dataclass(frozen=True)
class Reference:
    """Real images as an extractor sees them."""

    identity: str
    gaussian: Gaussian
    features_ND: Tensor | None
    """For precision and recall; None when only the Gaussian is known."""
    images: int | None
    """How many made the Gaussian, if known."""


def make_reference(
    images: Images,
    count: int,
    extractor: NamedExtractor,
    identity: str,
    *,
    batch: int = BATCH,
    keep: int = KEPT,
    share: Share = ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> Reference:
    """Statistics of the real images 0 to ``count`` − 1, by all processes; arguments as of ``collect``."""
    found = collect(images, count, extractor, batch=batch, keep=keep, share=share, progress=progress)
    return Reference(identity, found.moments.gaussian(), found.features_ND, count)


def save_reference(file: Path, reference: Reference, extractor: NamedExtractor) -> None:
    """Write ``reference`` to an .npz, whole or not at all."""
    content: dict[str, np.ndarray] = {
        "mu": reference.gaussian.mean_D,
        "sigma": reference.gaussian.covariance_DD,
        "extractor": np.array(extractor.identity),
        "reference": np.array(reference.identity),
    }
    if reference.features_ND is not None:
        content["features"] = reference.features_ND.numpy()
    if reference.images is not None:
        content["images"] = np.array(reference.images)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.npz")
    try:
        np.savez(aside, allow_pickle=False, **content)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def load_reference(
    file: Path,
    extractor: NamedExtractor,
    *,
    batch: int = BATCH,
    keep: int = KEPT,
    share: Share = ALONE,
) -> Reference:
    """The reference in ``file``; every process reads it, and images in it are looked at by all together.

    Raises:
        ConfigError: no such file, not an .npz of this kind, or made with another extractor.
    """
    content = _read(file)
    made = content.get("extractor")
    if made is not None and str(made) != extractor.identity:
        raise ConfigError(
            f"{file} was made with extractor {made}, not {extractor.identity}; "
            "use that one, or make the reference again"
        )
    features_ND = None
    if "features" in content:
        features_ND = torch.from_numpy(content["features"])[chosen(len(content["features"]), keep)]
    gaussian = None
    if "mu" in content:
        gaussian = Gaussian(content["mu"].astype(np.float64), content["sigma"].astype(np.float64))
    images = int(content["images"]) if "images" in content else None
    if "arr_0" in content and features_ND is None:
        pixels = content["arr_0"]
        if gaussian is not None:  # then only what precision and recall need is looked at
            pixels = pixels[chosen(len(pixels), keep)]

        def batch_of(indices: Sequence[int]) -> Tensor:
            return torch.from_numpy(pixels[list(indices)]).permute(0, 3, 1, 2)

        count = len(pixels)
        found = collect(batch_of, count, extractor, batch=batch, keep=keep, share=share)
        features_ND = found.features_ND
        if gaussian is None:
            gaussian, images = found.moments.gaussian(), count
    if gaussian is None:
        moments = Moments(content["features"].shape[1])
        moments.add(content["features"])
        gaussian, images = moments.gaussian(), moments.count
    identity = str(content["reference"]) if "reference" in content else f"{file.stem}:{_digest(gaussian)}"
    return Reference(identity, gaussian, features_ND, images)


def _read(file: Path) -> dict[str, np.ndarray]:
    """The file's arrays, checked for their shapes and for numbers that are none."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            content = {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such reference file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file}: not an .npz file of plain arrays ({error})") from None
    if not ({"mu", "sigma"} <= content.keys() or content.keys() & {"arr_0", "features"}):
        raise ConfigError(
            f"{file}: expected mu and sigma, or images as arr_0, or features; "
            f"it has {', '.join(content) or 'nothing'}"
        )
    if len({"mu", "sigma"} & content.keys()) == 1:
        raise ConfigError(f"{file}: mu and sigma are one Gaussian, it has only one of them")
    wanted = {"mu": 1, "sigma": 2, "features": 2, "arr_0": 4}
    for key, dimensions in wanted.items():
        if key in content and content[key].ndim != dimensions:
            raise ConfigError(
                f"{file}: {key} has shape {content[key].shape}, expected {dimensions} dimensions"
            )
        if key in content and not np.isfinite(content[key]).all():
            raise ConfigError(f"{file}: {key} has numbers that are not finite")
    if "mu" in content and content["sigma"].shape != 2 * content["mu"].shape:
        raise ConfigError(
            f"{file}: sigma has shape {content['sigma'].shape}, mu {content['mu'].shape}: not one Gaussian"
        )
    if "arr_0" in content and (content["arr_0"].dtype != np.uint8 or content["arr_0"].shape[-1] != 3):
        raise ConfigError(f"{file}: arr_0 must be images (N, H, W, 3) of uint8")
    return content


def _digest(gaussian: Gaussian) -> str:
    return hashlib.sha256(gaussian.mean_D.tobytes() + gaussian.covariance_DD.tobytes()).hexdigest()[:12]
