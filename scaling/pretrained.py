"""Trained models from wherever they lie, under one roof: runs of this project and published checkpoints.

- ``open_model`` gives model and tokenizer of a run's folder, of a model that ``convert`` wrote, or of a
  published file (VAR, FlexVAR), which says itself what it is: its config is told from keys and shapes.
- A mismatch names the keys, and says so where the file is of another kind than was asked for.
- A model is built without weights and takes over those of the file, which is mapped: d36-s, 2.35 billion
  parameters, needs its 9.4 GB once, in pages of the file; a GPU gets them tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from scaling.checkpoint import sync_file
from scaling.config import (
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    check_tokens,
    from_dict,
    require,
    to_dict,
)
from scaling.families.interface import FamilyModel
from scaling.families.published import (
    check_names,
    check_published,
    listed,
    skeleton,
    told_config,
    transformer_from_published,
)
from scaling.families.registry import family_model
from scaling.records import RecordsError, RunFolder, read_json, write_json
from scaling.schema import ConfigError
from scaling.tokenizer.published import from_published, told_tokenizer
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer
from scaling.weight_files import WeightFile, read_weights

FORMAT = "varscale-model-1"
DESCRIPTION = "model.json"
Kind = Literal["VAR", "FlexVAR", "VAR tokenizer", "FlexVAR tokenizer", "varscale"]
TRANSFORMERS: tuple[Kind, ...] = ("VAR", "FlexVAR")
TOKENIZERS: tuple[Kind, ...] = ("VAR tokenizer", "FlexVAR tokenizer")


@dataclass(frozen=True)
class Opened:
    """A model to evaluate, to sample or to edit with, and what it speaks: both in evaluation mode."""

    model: FamilyModel
    tokenizer: Tokenizer
    name: str
    """The run's id, or the name of the folder or file without suffix."""
    run: RunConfig | None
    """Of a run of this project."""
    notes: tuple[str, ...] = ()
    """What was done to read the files, for people."""


def open_model(
    where: str | Path,
    tokenizer: str | Path | None = None,
    device: str | torch.device = "cpu",
    scales: Sequence[int] | None = None,
) -> Opened:
    """A model and its tokenizer.

    Args:
        where: a run's folder (its final weights), a folder that ``convert`` wrote, or a published file by
            path or hub name (``owner/repo:file``).
        tokenizer: a tokenizer run's folder, a tokenizer's folder, or a published file; a run finds its own,
            and a published training checkpoint may hold it.
        scales: side lengths of a published model's steps, where the file does not tell them.

    Raises:
        ConfigError: nothing of that kind there, files that cannot be read or do not fit, no tokenizer.
        RecordsError: a run without final weights; damaged records.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        require(scales is None, f"{where}: its scales are those of its config; give no others")
        return _open_folder(path, tokenizer, device)
    file = read_weights(where)
    config, weights, notes = read_transformer(file, scales)
    if tokenizer is None:
        held = [name for name, state in file.states.items() if kind_of(state) in TOKENIZERS]
        require(
            bool(held),
            f"{where}: give its tokenizer with --tokenizer (VAR: vae_ch160v4096z32.pth; FlexVAR: FlexVAE)",
        )
        found, notes = _published_tokenizer(file, config), (*notes, f"tokenizer read from '{held[0]}'")
    else:
        found = open_tokenizer(tokenizer, config)
    return Opened(filled(config, weights, device), found.to(device), file.name, None, notes)


def _open_folder(path: Path, tokenizer: str | Path | None, device: str | torch.device) -> Opened:
    """A run, an imported checkpoint, or a model that ``convert`` wrote."""
    name, run = path.absolute().name, None
    if (path / "config.json").exists():
        if origin := RunFolder(path).status().get("imported"):
            opened = open_model(origin["weights"], tokenizer or origin["tokenizer"], device, origin["scales"])
            return replace(opened, name=name)
        model, run = load_model(RunFolder(path), device)
        own = path.absolute().parent.parent / "tokenizers" / run.tokenizer_run.run_id
        if tokenizer is None and not (own / "tokenizer").is_dir():
            raise ConfigError(f"{path}: its tokenizer is not at {own}; give it with --tokenizer")
        tokenizer = own if tokenizer is None else tokenizer
    else:
        model = filled(*open_weights(path), device)
        require(tokenizer is not None, f"{path}: give its tokenizer with --tokenizer")
        assert tokenizer is not None
    return Opened(model, open_tokenizer(tokenizer, model.config).to(device), name, run)


def load_model(run: RunFolder, device: str | torch.device = "cpu") -> tuple[FamilyModel, RunConfig]:
    """The trained model of a finished run, in evaluation mode; no tokenizer is needed.

    Raises:
        RecordsError: the run has no final weights yet, or they are not of its config.
    """
    config = from_dict(RunConfig, run.config())
    try:
        return filled(*open_weights(run.path), device), config
    except ConfigError as error:
        raise RecordsError(f"{run.path / 'final'}: {error}") from None


def open_weights(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of a finished run, or of a folder that ``save_model`` wrote.

    Raises:
        ConfigError: neither of them.
        RecordsError: the run has no final weights yet; damaged records.
    """
    if (folder / "config.json").exists():
        run = RunFolder(folder)
        weights = run.weights
        if not weights.exists():
            raise RecordsError(f"{folder} has no final weights yet (state: {run.status()['state']})")
        return from_dict(RunConfig, run.config()).model, read_weights(weights).states[""]
    file = folder / DESCRIPTION
    if not file.exists():
        raise ConfigError(
            f"{folder}: neither a run's folder (config.json) nor a converted model ({DESCRIPTION})"
        )
    value = read_json(file)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise RecordsError(f"{file}: expected a model of format {FORMAT!r}")
    return from_dict(ModelConfig, value.get("config")), read_weights(folder / "weights.safetensors").states[
        ""
    ]


def open_tokenizer(where: str | Path, model: ModelConfig) -> Tokenizer:
    """A tokenizer for ``model``, in evaluation mode.

    Args:
        where: a tokenizer run's folder, a tokenizer's folder, or a published file by path or hub name.

    Raises:
        ConfigError: nothing of that kind there, or a tokenizer that gives other tokens than the model's.
        RecordsError: the folder is damaged.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        found = load_tokenizer(path / "tokenizer" if (path / "tokenizer").is_dir() else path)
    else:
        found = _published_tokenizer(read_weights(where), model)
    try:
        check_tokens(model, found.config)
    except ConfigError as error:
        raise ConfigError(f"{where} is not this model's tokenizer: {error}") from None
    return found


def filled(config: ModelConfig, weights: Mapping[str, Tensor], device: str | torch.device) -> FamilyModel:
    """The model with these weights, by this project's names; they are taken over, not copied.

    Raises:
        ConfigError: missing or unexpected names, other shapes.
    """
    torch.backends.cudnn.allow_tf32 = False  # tokens and pictures as in training, the same on every device
    model = skeleton(config)
    check_names(f"{config.family} model", model.state_dict(), weights)
    model.load_state_dict(dict(weights), assign=True)
    return family_model(model.eval().requires_grad_(False).to(device))


def weights_hash(model: FamilyModel) -> str:
    """Tells a model's weights from others: SHA-256 (hex) of names, shapes and sums of each parameter's bits.

    Sums of whole numbers are the same on every device and in any order, and leave the weights where they are.
    """
    assert isinstance(model, nn.Module)
    facts = [
        [name, list(value.shape), int(value.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))]
        for name, value in model.named_parameters()
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def save_model(config: ModelConfig, weights: Mapping[str, Tensor], folder: str | Path, origin: str) -> None:
    """Write ``weights.safetensors`` and ``model.json`` (last), which ``open_model`` reads.

    Args:
        origin: where they come from, for people.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    aside = root / ".weights.partial"
    save_file({name: value.contiguous() for name, value in weights.items()}, aside)
    sync_file(aside)
    aside.replace(root / "weights.safetensors")
    write_json(root / DESCRIPTION, {"format": FORMAT, "config": to_dict(config), "origin": origin})


# -- published files -----------------------------------------------------------------------------------


def kind_of(state: Mapping[str, Tensor]) -> Kind | None:
    """What a state dict is of, told by its keys; None for a stranger."""
    if "pos_1LC" in state:
        return "FlexVAR" if state["pos_1LC"].ndim == 4 else "VAR"
    if "class_embedding.weight" in state:
        return "varscale"
    if "quantize.embedding.weight" in state:
        return f"{'FlexVAR' if any('conv_blocks' in key for key in state) else 'VAR'} tokenizer"  # type: ignore[return-value]
    return None


def chosen(file: WeightFile, wanted: Sequence[Kind]) -> tuple[Kind, dict[str, Tensor], tuple[str, ...]]:
    """The first state dict of a wanted kind, and what was done to get at it.

    Raises:
        ConfigError: none of them is; says what the file is instead.
    """
    kinds = {name: kind_of(state) for name, state in file.states.items()}
    for kind in wanted:
        for name in (name for name, found in kinds.items() if found == kind):
            return kind, file.states[name], file.notes[name]
    expected, first = f"expected a {' or '.join(wanted)}", next(iter(kinds))
    if kinds[first] == "varscale":
        raise ConfigError(
            f"{file.path}: weights in this project's layout, whose config lies beside them: give the folder "
            "(of the run, or that 'convert' wrote)"
        )
    if kinds[first] in TOKENIZERS:
        raise ConfigError(f"{file.path}: a {kinds[first]}, {expected}; a tokenizer goes to --tokenizer")
    if kinds[first] in TRANSFORMERS:
        raise ConfigError(f"{file.path}: a {kinds[first]} transformer, {expected}")
    raise ConfigError(f"{file.path}: {expected}, found keys such as {listed(list(file.states[first]))}")


def read_transformer(
    file: WeightFile, scales: Sequence[int] | None = None
) -> tuple[ModelConfig, dict[str, Tensor], tuple[str, ...]]:
    """Config and weights, by this project's names, of a published transformer, and what was done to read it.

    Raises:
        ConfigError: as ``open_model``.
    """
    _, state, notes = chosen(file, TRANSFORMERS)
    try:
        config = told_config(state, scales)
        check_published(config, state)
        return config, transformer_from_published(state), notes
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None


def _published_tokenizer(file: WeightFile, model: ModelConfig) -> Tokenizer:
    """The published tokenizer of a file, cut to the scales that ``model`` needs."""
    kind, state, _ = chosen(file, TOKENIZERS)
    side = model.scales[-1]
    config = told_tokenizer(state, model.scales if kind == "VAR tokenizer" else range(1, side + 1))
    return filled_tokenizer(config, from_published(config, state))


def filled_tokenizer(config: TokenizerConfig, weights: Mapping[str, Tensor]) -> Tokenizer:
    """The tokenizer with these weights, in evaluation mode."""
    with init_empty_weights(include_buffers=False):
        tokenizer = Tokenizer(config)
    tokenizer.load_state_dict(dict(weights), assign=True)
    return tokenizer.eval().requires_grad_(False)
