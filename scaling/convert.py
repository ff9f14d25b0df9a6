"""Published files to this project's folders and back, by ``run_sweep.py convert``.

- To varscale: ``weights.safetensors`` and a description in JSON, of a transformer (``model.json``) or of a
  tokenizer (``tokenizer.json``); what reads them opens no pickle and needs no options.
- To published: a state dict with the published keys, shapes and buffers, ``.pth`` or ``.safetensors``.
- Files are mapped, names changed and written again: the memory of one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scaling.checkpoint import sync_file
from scaling.config import PAPER_SCALES
from scaling.families.published import transformer_to_published
from scaling.pretrained import (
    DESCRIPTION,
    TOKENIZERS,
    TRANSFORMERS,
    chosen,
    filled_tokenizer,
    open_weights,
    read_transformer,
    save_model,
)
from scaling.requests import ConvertRequest
from scaling.schema import ConfigError
from scaling.tokenizer.published import from_published, to_published, told_tokenizer
from scaling.tokenizer.vqvae import load_tokenizer, save_tokenizer
from scaling.weight_files import WeightFile, read_weights

FLEXVAR_SIDES = tuple(range(1, 17))


def convert(where: str, request: ConvertRequest) -> list[str]:
    """Convert as asked; lines that say what was written.

    Raises:
        ConfigError: files that cannot be read or are of another kind, a model that the published code lacks.
        RecordsError: a run without final weights; damaged records.
    """
    assert request.out is not None
    if request.to == "varscale":
        file = read_weights(where)
        tokenizer = request.part == "tokenizer" or (
            request.part is None and chosen(file, (*TRANSFORMERS, *TOKENIZERS))[0] in TOKENIZERS
        )
        write = _tokenizer_to_ours if tokenizer else _transformer_to_ours
        return write(file, Path(request.out), request.scales)
    return _to_published(Path(where), Path(request.out))


def _transformer_to_ours(file: WeightFile, out: Path, scales: Sequence[int] | None) -> list[str]:
    config, weights, notes = read_transformer(file, scales)
    save_model(config, weights, out, file.path.name)
    kind = f"{config.family} of depth {config.depth}, width {config.width}, scales {list(config.scales)}"
    return [*notes, f"{out}: {kind}, vocabulary {config.vocab}, adaLN {config.adaln}"]


def _tokenizer_to_ours(file: WeightFile, out: Path, scales: Sequence[int] | None) -> list[str]:
    kind, state, notes = chosen(file, TOKENIZERS)
    usual = PAPER_SCALES if kind == "VAR tokenizer" else FLEXVAR_SIDES
    config = told_tokenizer(state, usual if scales is None else scales)
    tokenizer = filled_tokenizer(config, from_published(config, state))
    content = save_tokenizer(tokenizer, out, {"origin": file.path.name})
    said = f"{config.quantizer}, vocabulary {config.vocab}, scales {list(config.scales)}"
    return [*notes, f"{out}: tokenizer, {said}, content hash {content[:12]}"]


def _to_published(where: Path, out: Path) -> list[str]:
    if out.suffix not in (".pth", ".safetensors"):
        raise ConfigError(f"--out {out}: a published file ends in .pth or .safetensors")
    folder = where / "tokenizer" if (where / "tokenizer").is_dir() else where
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder)
        state, what = to_published(tokenizer.config, tokenizer.state_dict()), "tokenizer"
    elif (where / "config.json").exists() or (where / DESCRIPTION).exists():
        config, weights = open_weights(where)
        state, what = transformer_to_published(config, weights), f"{config.family} transformer"
    else:
        raise ConfigError(
            f"{where}: expected a folder of this project: a run, a tokenizer, or what 'convert' wrote"
        )
    _write(state, out)
    return [f"{out}: {what} in the published layout, {len(state)} tensors"]


def _write(state: Mapping[str, Tensor], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.partial")
    plain = {name: value.detach().contiguous() for name, value in state.items()}
    if out.suffix == ".pth":
        torch.save(plain, aside)
    else:
        save_file(plain, aside)
    sync_file(aside)
    aside.replace(out)
