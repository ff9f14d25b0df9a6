"""The tokenizer as a whole, and its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scaling.config import ConfigError
from scaling.records import RecordsError
from scaling.tokenizer.vqvae import Tokenizer, facts_of, load_tokenizer, save_tokenizer
from tests.scaling.tokenizer import tiny


def tokenizer(seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(tiny.TOKENIZER)


@pytest.mark.parametrize(("multipliers", "side"), [((1,), 4), ((1, 2), 8), ((1, 1, 1, 1), 32)])
def test_any_power_of_two_downsampling(multipliers: tuple[int, ...], side: int) -> None:
    model = Tokenizer(dataclasses.replace(tiny.TOKENIZER, multipliers=multipliers))
    tokens = model.encode(torch.rand(2, 3, side, side))
    assert tokens.shape == (2, 21)
    assert tokens.dtype == torch.int64
    images = model.decode(tokens)
    assert images.shape == (2, 3, side, side)
    assert images.abs().max() <= 1


def test_encoding_in_bf16_is_a_tokenizer_of_its_own_with_few_other_tokens() -> None:
    exact = tokenizer()
    half = Tokenizer(dataclasses.replace(tiny.TOKENIZER, encode_precision="bf16"))
    half.load_state_dict(exact.state_dict())
    assert half.content_hash != exact.content_hash
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    features = exact.encode_features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = half.encode_features(images).float()
    assert 0 < (low - features).norm() < 0.02 * features.norm()
    assert torch.equal(half.encode(images), half.quantize.encode(low))
    assert (half.encode(images) == exact.encode(images)).float().mean() > 0.8
    assert torch.equal(half.decode(exact.encode(images)), exact.decode(exact.encode(images)))


def test_fewer_norm_groups_admit_narrower_networks() -> None:
    model = Tokenizer(dataclasses.replace(tiny.TOKENIZER, channels=16, norm_groups=4))
    groups = {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {4}
    assert model.decode(model.encode(torch.rand(1, 3, 16, 16))).shape == (1, 3, 16, 16)
    with pytest.raises(ConfigError, match="multiple of norm_groups 32, got 16"):
        dataclasses.replace(tiny.TOKENIZER, channels=16)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes images of shape \(3, 16, 16\), got \(3, 32, 32\)"):
        tokenizer().encode(torch.zeros(1, 3, 32, 32))


def test_other_steps_fit_images_of_their_last_size() -> None:
    model, sizes = tokenizer(), ((1, 1), (2, 3), (4, 6))
    tokens = model.encode(torch.rand(2, 3, 16, 24), sizes)
    assert tokens.shape == (2, 31)
    assert model.decode(tokens, sizes).shape == (2, 3, 16, 24)
    with pytest.raises(
        ConfigError, match=r"shape \(3, 16, 24\) for steps that end at \(4, 6\), got \(3, 16, 16"
    ):
        model.encode(torch.zeros(1, 3, 16, 16), sizes)


def test_encode_and_forward_choose_the_same_tokens() -> None:
    model, images = tokenizer(), torch.rand(3, 3, 16, 16) * 2 - 1
    (reconstruction,), quantized = model(images)
    assert torch.equal(quantized.tokens, model.encode(images))
    torch.testing.assert_close(
        reconstruction.clamp(-1, 1), model.decode(quantized.tokens), rtol=1e-4, atol=1e-5
    )


def test_saved_is_loaded(tmp_path: Path) -> None:
    model = tokenizer()
    content_hash = save_tokenizer(model, tmp_path, {"psnr": 1.5})
    loaded = load_tokenizer(tmp_path)
    assert loaded.content_hash == model.content_hash == content_hash
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert facts_of(tmp_path) == {"psnr": 1.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "weights.safetensors"]


def test_the_hash_is_of_config_and_every_weight() -> None:
    model = tokenizer()
    before = model.content_hash
    assert Tokenizer(dataclasses.replace(tiny.TOKENIZER, beta=0.5)).content_hash != before
    with torch.no_grad():
        model.quantize.embedding.weight[0, 0] += 1e-6
    assert model.content_hash != before


def test_weights_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tokenizer(), tmp_path, {})
    weights = load_file(tmp_path / "weights.safetensors")
    weights["quant_conv.bias"] = weights["quant_conv.bias"] + 1
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(RecordsError, match="do not belong together"):
        load_tokenizer(tmp_path)
    del weights["quant_conv.bias"]
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(RecordsError, match="not the weights of this tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "weights.safetensors"])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, file: str) -> None:
    save_tokenizer(tokenizer(), tmp_path, {})
    (tmp_path / file).write_bytes(b"{")
    with pytest.raises(RecordsError, match=file):
        load_tokenizer(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(RecordsError, match=f"{file}: no such file"):
        load_tokenizer(tmp_path)


def test_a_config_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    save_tokenizer(tokenizer(), tmp_path, {})
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["config"]["scales"] = [4, 2]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(RecordsError, match=r"tokenizer\.json: .*scales must grow"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RecordsError, match="expected a tokenizer of format"):
        load_tokenizer(tmp_path)
