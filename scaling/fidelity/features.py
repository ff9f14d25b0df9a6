"""Feature extractors: what the metrics see of an image, and how a command line names one.

    inception         Inception-v3 with pytorch-fid's preprocessing   --weights FILE or hf://OWNER/NAME/FILE
    inception-adm     the same network with the ADM toolkit's          "
    MODULE:FUNCTION   the user's own: FUNCTION() returns an extractor

- An extractor is any object with ``features(images)``; with ``probabilities(images)`` there is an inception
  score too. One that can give both in one pass says so with ``features_and_probabilities``.
- Weights are the user's to bring: a .pth is read with ``weights_only`` and cannot run code.
- Numbers of two extractors must never meet, so each has an identity: for weights a digest of the tensors,
  whatever file they came from; for the user's own its name, whose meaning is the user's to keep.
"""

from __future__ import annotations

import hashlib
import importlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scaling.config import ConfigError
from scaling.fidelity.inception import Inception, Resize

HUB = "hf://"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
WHERE = (
    f"give --weights FILE with the FID Inception of pytorch-fid ({INCEPTION_FILE}, in release 'fid_weights' "
    "of github.com/mseitzer/pytorch-fid), or --weights hf://OWNER/NAME/FILE for a copy on the hub"
)
PREPROCESSING: dict[str, Resize] = {"inception": "half-pixel", "inception-adm": "tf1"}


class Extractor(Protocol):
    """Features of images. It may also have ``probabilities(images_B3HW) -> (B, V)``, over classes."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        """(B, D) of float images in [−1, 1]."""
        ...


@dataclass(frozen=True)
class NamedExtractor:
    """An extractor, on a device, and what tells it from others."""

    extractor: Extractor
    identity: str
    device: torch.device

    @torch.no_grad()
    def describe(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, D) and probabilities (B, V), None where the extractor has none.

        Args:
            images_B3HW: uint8, on any device.

        Raises:
            ConfigError: not one row of finite numbers per image.
        """
        images_B3HW = images_B3HW.to(self.device).float() / 127.5 - 1
        extractor = self.extractor
        if hasattr(extractor, "features_and_probabilities"):
            features_BD, probabilities_BV = extractor.features_and_probabilities(images_B3HW)
        else:
            features_BD = extractor.features(images_B3HW)
            probabilities = getattr(extractor, "probabilities", None)
            probabilities_BV = None if probabilities is None else probabilities(images_B3HW)
        for name, values in (("features", features_BD), ("probabilities", probabilities_BV)):
            if values is not None and (values.ndim != 2 or len(values) != len(images_B3HW)):
                raise ConfigError(
                    f"{self.identity}: {name} of {len(images_B3HW)} images have shape "
                    f"{tuple(values.shape)}, expected ({len(images_B3HW)}, n)"
                )
            if values is not None and not values.isfinite().all():
                raise ConfigError(f"{self.identity}: some {name} are not finite numbers")
        return features_BD, probabilities_BV


def load_extractor(name: str, weights: str | None, device: torch.device) -> NamedExtractor:
    """The extractor that a command line names.

    Args:
        name: as in the module's docstring.
        weights: a file, or ``hf://OWNER/NAME/FILE``; None for the user's own.
        device: where it works; the user's own is moved there if it is a module.

    Raises:
        ConfigError: an unknown name, weights that are not there or are other ones, a function that fails.
    """
    if name in PREPROCESSING:
        model = Inception(PREPROCESSING[name])
        state = read_weights(name, weights)
        load_weights(model, state, f"{name}: {weights}")
        return NamedExtractor(model.to(device), f"{name}:{digest(state)[:12]}", device)
    if ":" in name:
        if weights is not None:
            raise ConfigError(f"--weights is for {', '.join(PREPROCESSING)}; {name} brings its own")
        own = _call(name)
        if isinstance(own, nn.Module):
            own = own.to(device).eval()
        return NamedExtractor(own, name, device)
    raise ConfigError(f"unknown extractor '{name}'; known: {', '.join(PREPROCESSING)}, MODULE:FUNCTION")


def read_weights(name: str, weights: str | None) -> dict[str, Tensor]:
    """The tensors of a file, or of one on the hub, without the batch norms' counters.

    Raises:
        ConfigError: none given, not there, or not a file of tensors.
    """
    if weights is None:
        raise ConfigError(f"extractor {name} needs weights: {WHERE}")
    file = _download(weights) if weights.startswith(HUB) else Path(weights).expanduser()
    if not file.is_file():
        raise ConfigError(f"extractor {name}: {file}: no such file; {WHERE}")
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"extractor {name}: {file}: not a readable file of weights ({reason})") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"extractor {name}: {file}: expected a state dict of tensors")
    return {key: value for key, value in found.items() if not key.endswith("num_batches_tracked")}


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Put ``state`` into ``model``, whole.

    Raises:
        ConfigError: keys that are missing or unknown, or another shape; it names the first.
    """
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    for what, keys in (
        ("lacks", wanted.keys() - state.keys()),
        ("has unknown", state.keys() - wanted.keys()),
    ):
        if keys:
            raise ConfigError(f"{where} {what} {len(keys)} of {len(wanted)} weights, such as '{min(keys)}'")
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            raise ConfigError(
                f"{where}: '{key}' has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
            )
    model.load_state_dict(state, strict=False)


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of names, shapes and values."""
    found = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        found.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _download(address: str) -> Path:
    owner, _, rest = address.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise ConfigError(f"--weights {address}: expected {HUB}OWNER/NAME/FILE")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigError(
            f"--weights {address} needs huggingface_hub: pip install 'varscale[metrics]', or give a file"
        ) from None
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--weights {address}: not to be had from the hub ({reason})") from None


def _call(name: str) -> Extractor:
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"extractor {name}: {error}; expected MODULE:FUNCTION that can be imported"
        ) from None
    made = factory()
    if not hasattr(made, "features"):
        raise ConfigError(f"extractor {name}: it returned a {type(made).__name__} without features(images)")
    own: Extractor = made
    return own
