"""Feature extractors: what the metrics see of an image, and how a command line names one.

    inception         Inception-v3 with pytorch-fid's preprocessing   --weights FILE or hf://OWNER/NAME/FILE
    inception-adm     the same network with the ADM toolkit's          "
    classifier        trained on the study's own images                --weights FOLDER
    MODULE:FUNCTION   the user's own: FUNCTION() returns an extractor

- An extractor is any object with ``features(images)``; with ``probabilities(images)`` there is an inception
  score too. One that can give both in one pass says so with ``features_and_probabilities``.
- Weights are the user's to bring: a .pth is read with ``weights_only`` and cannot run code.
- Numbers of two extractors must never meet, so each has an identity: for weights a digest of the tensors,
  whatever file they came from; for the user's own its name and a digest of MODULE's file. Weights that it
  reads from elsewhere are not looked at: name their version in that file.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from scaling.config import ConfigError
from scaling.fidelity.classifier import load_classifier
from scaling.fidelity.inception import Inception, Resize
from scaling.fidelity.weights import digest, load_weights, read_weights

PREPROCESSING: dict[str, Resize] = {"inception": "half-pixel", "inception-adm": "tf1"}
NEED_WEIGHTS = (*PREPROCESSING, "classifier")


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
        weights: a file, ``hf://OWNER/NAME/FILE``, or the classifier's folder; None for the user's own.
        device: where it works; the user's own is moved there if it is a module.

    Raises:
        ConfigError: an unknown name, weights that are not there or are other ones, a function that is not
            there or makes no extractor.
        RecordsError: a classifier's folder that is none.
    """
    if name in PREPROCESSING:
        model = Inception(PREPROCESSING[name])
        state = read_weights(name, weights)
        load_weights(model, state, f"{name}: {weights}")
        return NamedExtractor(model.to(device), f"{name}:{digest(state)[:12]}", device)
    if name == "classifier":
        if weights is None:
            raise ConfigError(
                "extractor classifier needs --weights FOLDER; 'run_sweep.py classifier RECIPE' makes one"
            )
        classifier, identity = load_classifier(Path(weights))
        return NamedExtractor(classifier.to(device), identity, device)
    if ":" in name:
        if weights is not None:
            raise ConfigError(f"--weights is for {', '.join(NEED_WEIGHTS)}; {name} brings its own")
        own = _call(name)
        if isinstance(own, nn.Module):
            own = own.to(device).eval()
        return NamedExtractor(own, f"{name}@{_source_digest(name)}", device)
    raise ConfigError(f"unknown extractor '{name}'; known: {', '.join(NEED_WEIGHTS)}, MODULE:FUNCTION")


def _source_digest(name: str) -> str:
    """Of the file of MODULE in MODULE:FUNCTION, which has been imported."""
    module = sys.modules[name.partition(":")[0]]
    file = getattr(module, "__file__", None)
    if file is None:
        raise ConfigError(f"extractor {name}: {module.__name__} has no file to tell its versions apart by")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


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
