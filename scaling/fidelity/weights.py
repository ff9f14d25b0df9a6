"""Weights that the user brings, from a file or the hub, read without running code and checked by name."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scaling.config import ConfigError

HUB = "hf://"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
WHERE = (
    f"give --weights FILE with the FID Inception of pytorch-fid ({INCEPTION_FILE}, in release 'fid_weights' "
    "of github.com/mseitzer/pytorch-fid), or --weights hf://OWNER/NAME/FILE for a copy on the hub"
)


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
