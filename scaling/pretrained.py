"""Trained models from wherever they lie, under one roof: runs of this project and published checkpoints.

- ``open_model`` gives model and tokenizer of a run's folder, of a model that ``convert`` wrote, or of a
  published file (VAR, FlexVAR), which says itself what it is: its config is told from keys and shapes.
- A mismatch names the keys, and says so where the file is of another kind than was asked for.
- Names and shapes go both ways, so that models trained here load in the published code. Buffers that it
  stores (masks, level ids, a zero bias for k) follow from the config: left out here, made on the way out.
- A model is built without weights and takes those of the file, which is mapped: 2.3 billion parameters need
  9.4 GB once (docs/LOG.md has the figures), and on a GPU the file is copied tensor by tensor.

Shapes: L tokens, K scales, W width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from scaling.checkpoint import sync_file
from scaling.config import (
    PAPER_SCALES,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    check_tokens,
    from_dict,
    require,
    to_dict,
)
from scaling.families.interface import FamilyModel
from scaling.families.registry import build, family_model
from scaling.records import RecordsError, RunFolder, read_json, write_json
from scaling.schema import ConfigError
from scaling.tokenizer.published import from_published, told_tokenizer
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer
from scaling.weight_files import WeightFile, read_weights

FORMAT = "varscale-model-1"
DESCRIPTION = "model.json"
PUBLISHED_SCALES = (PAPER_SCALES, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
"""Of the published models for 256 and 512 px."""
HEAD_WIDTH = 64
Index = tuple[int | slice | None, ...]
Kind = Literal["VAR", "FlexVAR", "VAR tokenizer", "FlexVAR tokenizer", "varscale"]
TRANSFORMERS: tuple[Kind, ...] = ("VAR", "FlexVAR")
TOKENIZERS: tuple[Kind, ...] = ("VAR tokenizer", "FlexVAR tokenizer")
_NAMED = 5
_BUFFERS = re.compile(r"(^lvl_1L$|attn_bias_for_masking$|zero_k_bias$)")
_TOP = {
    "class_emb.weight": "class_embedding.weight",
    "pos_start": "start_position",
    "pos_1LC": "positions",
    "lvl_embed.weight": "scale_embedding.weight",
    "word_embed.weight": "token_embedding.weight",
    "word_embed.bias": "token_embedding.bias",
    "shared_ada_lin.1.weight": "shared_adaln.weight",
    "shared_ada_lin.1.bias": "shared_adaln.bias",
    "head_nm.ada_lin.1.weight": "head.adaln.weight",
    "head_nm.ada_lin.1.bias": "head.adaln.bias",
    "head.weight": "head.to_vocab.weight",
    "head.bias": "head.to_vocab.bias",
}
_BLOCK = {
    "attn.scale_mul_1H11": "mixer.log_scale",
    "attn.q_bias": "mixer.q_bias",
    "attn.v_bias": "mixer.v_bias",
    "attn.mat_qkv.weight": "mixer.qkv.weight",
    "attn.proj.weight": "mixer.out.weight",
    "attn.proj.bias": "mixer.out.bias",
    "ffn.fc1.weight": "mlp_in.weight",
    "ffn.fc1.bias": "mlp_in.bias",
    "ffn.fc2.weight": "mlp_out.weight",
    "ffn.fc2.bias": "mlp_out.bias",
    "ada_lin.1.weight": "adaln.weight",
    "ada_lin.1.bias": "adaln.bias",
    "ada_gss": "adaln_offset",
}
_PUBLISHED = {ours: theirs for table in (_TOP, _BLOCK) for theirs, ours in table.items()}


# -- opening -----------------------------------------------------------------------------------------


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
    if path.is_dir() and (path / "config.json").exists():
        require(scales is None, f"{where}: a run's scales are those of its config; give no others")
        model, run = load_model(RunFolder(path), device)
        own = path.absolute().parent.parent / "tokenizers" / run.tokenizer_run.run_id
        if tokenizer is None and not (own / "tokenizer").is_dir():
            raise ConfigError(f"{where}: its tokenizer is not at {own}; give it with --tokenizer")
        found = open_tokenizer(own if tokenizer is None else tokenizer, run.model)
        return Opened(model, found.to(device), path.absolute().name, run)
    if path.is_dir():
        require(scales is None, f"{where}: a converted model's scales are in its {DESCRIPTION}")
        config, weights = _converted(path)
        model = filled(config, weights, device)
        require(tokenizer is not None, f"{where}: give its tokenizer with --tokenizer")
        assert tokenizer is not None
        return Opened(model, open_tokenizer(tokenizer, config).to(device), path.absolute().name, None)
    file = read_weights(where)
    config, weights, notes = read_transformer(file, scales)
    if tokenizer is None:
        held = [name for name, state in file.states.items() if kind_of(state) in TOKENIZERS]
        require(
            bool(held),
            f"{where}: give its tokenizer with --tokenizer (VAR: vae_ch160v4096z32.pth; FlexVAR: FlexVAE.pth)",
        )
        found, notes = _published_tokenizer(file, config), (*notes, f"tokenizer read from '{held[0]}'")
    else:
        found = open_tokenizer(tokenizer, config)
    return Opened(filled(config, weights, device), found.to(device), file.name, None, notes)


def load_model(run: RunFolder, device: str | torch.device = "cpu") -> tuple[FamilyModel, RunConfig]:
    """The trained model of a finished run, in evaluation mode.

    Raises:
        RecordsError: the run has no final weights yet, or they are not of its config.
    """
    config = from_dict(RunConfig, run.config())
    weights = run.path / "final" / "weights.safetensors"
    if not weights.exists():
        raise RecordsError(f"{run.path} has no final weights yet (state: {run.status()['state']})")
    try:
        return filled(config.model, read_weights(weights).states[""], device), config
    except ConfigError as error:
        raise RecordsError(str(error)) from None


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
    model = skeleton(config)
    _check(f"{config.family} model", model.state_dict(), weights)
    model.load_state_dict(dict(weights), assign=True)
    return family_model(model.eval().requires_grad_(False).to(device))


def skeleton(config: ModelConfig) -> nn.Module:
    """The model without memory for its parameters."""
    with init_empty_weights(include_buffers=False):
        return build(config)


def _converted(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of a folder that ``save_model`` wrote."""
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
    raise ConfigError(f"{file.path}: {expected}, found keys such as {_listed(list(file.states[first]))}")


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


def told_config(state: Mapping[str, Tensor], scales: Sequence[int] | None = None) -> ModelConfig:
    """The config of a published VAR or FlexVAR, from its keys and shapes.

    Scales: of a VAR from the level of every position, which is stored, else by the number of positions if it
    is a published model's; of a FlexVAR, which has no scales of its own, the ten of the paper if its largest
    map is 16 × 16.

    Raises:
        ConfigError: keys are missing; scales that do not fit, or that nothing tells.
    """
    kind = "FlexVAR" if kind_of(state) == "FlexVAR" else "VAR"

    def shape(key: str, ndim: int) -> torch.Size:
        require(key in state, f"not this {kind}: it is missing {key}")
        found = state[key].shape
        require(len(found) == ndim, f"not this {kind}: {key} has shape {tuple(found)}, not {ndim} dimensions")
        return found

    width, qk_norm = shape("word_embed.weight", 2)[0], "blocks.0.attn.scale_mul_1H11" in state
    heads = shape("blocks.0.attn.scale_mul_1H11", 4)[1] if qk_norm else width // HEAD_WIDTH
    depth = len({match[0] for key in state if (match := re.match(r"blocks\.\d+\.", key))})
    return ModelConfig.from_depth(
        depth,
        width=width,
        heads=max(1, heads),
        vocab=shape("head.weight", 2)[0],
        latent_channels=shape("word_embed.weight", 2)[1],
        num_classes=shape("class_emb.weight", 2)[0] - 1,
        scales=(_flexvar_scales if kind == "FlexVAR" else _var_scales)(state, scales),
        family="flexvar" if kind == "FlexVAR" else "var",
        mlp_ratio=shape("blocks.0.ffn.fc1.weight", 2)[0] // width,
        adaln="shared" if "shared_ada_lin.1.weight" in state else "own",
        qk_norm=qk_norm,
    )


def _var_scales(state: Mapping[str, Tensor], given: Sequence[int] | None) -> tuple[int, ...]:
    length, count = (
        state["pos_1LC"].shape[1],
        state["lvl_embed.weight"].shape[0] if "lvl_embed.weight" in state else 0,
    )
    levels = state.get("lvl_1L")
    told = _sides(levels) if levels is not None and not levels.is_meta else None
    if told is None:
        known = [s for s in PUBLISHED_SCALES if (sum(side * side for side in s), len(s)) == (length, count)]
        told = known[0] if known else None
    found = told if given is None else tuple(given)
    require(
        found is not None, f"{length} positions in {count} scales are no published model's: give --scales"
    )
    assert found is not None
    fits = (sum(side * side for side in found), len(found)) == (length, count) and told in (None, found)
    require(
        fits,
        f"scales {list(found)} do not fit: the file has {length} positions in {count} scales"
        + (f", {list(told)}" if told else ""),
    )
    return found


def _sides(level_1L: Tensor) -> tuple[int, ...]:
    """Side lengths from the level of every position."""
    return tuple(math.isqrt(int(n)) for n in level_1L.flatten().bincount())


def _flexvar_scales(state: Mapping[str, Tensor], given: Sequence[int] | None) -> tuple[int, ...]:
    side = state["pos_1LC"].shape[-1] // 2
    if given is None:
        require(side == PAPER_SCALES[-1], f"trained for maps up to {side} x {side}: give --scales")
        return PAPER_SCALES
    require(
        given[-1] == side, f"scales must end with the largest trained map's side {side}, got {list(given)}"
    )
    return tuple(given)


def published_name(key: str) -> str | None:
    """This project's name of a published VAR or FlexVAR key; None for a buffer that is not kept.

    Raises:
        ConfigError: a key that such a checkpoint does not have.
    """
    if _BUFFERS.search(key):
        return None
    if key in _TOP:
        return _TOP[key]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if match and match[2] in _BLOCK:
        return f"blocks.{match[1]}.{_BLOCK[match[2]]}"
    raise ConfigError(f"not a VAR checkpoint: unexpected key '{key}'")


def transformer_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published VAR or FlexVAR state dict under this project's names and shapes; nothing is copied.

    Raises:
        ConfigError: a key that such a checkpoint does not have.
    """
    converted = {}
    for key, value in state.items():
        name = published_name(key)
        if name is not None:
            converted[name] = value[_axes(name)[1]] if value.ndim else value
    return converted


def transformer_to_published(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model of this project as the published code loads it, its buffers included.

    FlexVAR's stored mask is, as published, of the steps last used; here of ``config.scales``.

    Raises:
        ConfigError: a model that the published code does not have; not the state of a model of this config.
    """
    require(
        config.family in ("var", "flexvar") and config.adaln != "none",
        f"the published code has no {config.family} with adaln '{config.adaln}': only var and flexvar, with "
        "adaLN own or shared",
    )
    _check(f"{config.family} model", skeleton(config).state_dict(), state)
    published_state = {_published_key(name): value[_axes(name)[0]] for name, value in state.items()}
    device = state["positions"].device
    side_K = torch.tensor(config.scales, device=device)
    level_L = torch.arange(len(side_K), device=device).repeat_interleave(
        side_K**2, output_size=config.seq_len
    )
    allowed_LL = level_L[:, None] >= level_L
    mask_LL = torch.zeros(allowed_LL.shape, device=device).masked_fill_(~allowed_LL, -math.inf)
    published_state["attn_bias_for_masking"] = mask_LL[None, None]
    if config.family == "var":
        published_state["lvl_1L"] = level_L[None]
    for layer in range(config.depth):
        published_state[f"blocks.{layer}.attn.zero_k_bias"] = torch.zeros(config.width, device=device)
    return published_state


def _axes(name: str) -> tuple[Index, Index]:
    """Indices that give a tensor of ours its published shape, and back."""
    leaf = name.rsplit(".", 1)[-1]
    every = slice(None)
    if leaf in ("start_position", "positions"):
        return (None,), (0,)
    if leaf == "adaln_offset":
        return (None, None), (0, 0)
    if leaf == "log_scale":
        return (None, every, None, None), (0, every, 0, 0)
    return (every,), (every,)


def _published_key(name: str) -> str:
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    return match[1] + _PUBLISHED[match[2]] if match else _PUBLISHED[name]


def check_published(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """``ConfigError``, with the published keys, unless a published state dict is of this config."""
    expected = transformer_to_published(config, skeleton(config).state_dict())
    _check(
        "FlexVAR" if config.family == "flexvar" else "VAR",
        {key: value for key, value in expected.items() if not _BUFFERS.search(key)},
        {key: value for key, value in state.items() if not _BUFFERS.search(key)},
    )


def _check(what: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    for problem, keys in (
        ("it is missing", [key for key in expected if key not in given]),
        ("it has unexpected keys", [key for key in given if key not in expected]),
        ("it has other shapes:", wrong),
    ):
        require(not keys, f"not this {what}: {problem} {_listed(keys)}")


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


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
