"""Published files read as a user does, by path, held to the numbers of the published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import run_sweep
from scaling.families.published import (
    check_published,
    told_config,
    transformer_from_published,
    transformer_to_published,
)
from scaling.families.registry import build
from scaling.generation import sample_tokens
from scaling.pretrained import Opened, open_model
from scaling.tokenizer.published import from_published, to_published, told_tokenizer
from scaling.tokenizer.vqvae import Tokenizer

from . import reference

pytestmark = [pytest.mark.reference, reference.needs_reference]
VARIANTS = ["var_default", "var_saln", "var_nol2"]
TRANSFORMERS = {
    "var_d16_256.txt": (16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "var_d16_256_nol2.txt": (16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "var_d36s_512.txt": (36, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    "flexvar_d16.txt": (16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "flexvar_d20.txt": (20, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "flexvar_d24.txt": (24, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference weights as the published code saves them."""
    folder = tmp_path_factory.mktemp("published")
    for name in (*VARIANTS, "var_vae", "flexvar", "flexvar_vq"):
        torch.save(reference.weights(f"{name}_weights.safetensors"), folder / f"{name}.pth")
    return folder


def opened(files: Path, name: str) -> Opened:
    return open_model(
        files / f"{name}.pth", files / ("flexvar_vq.pth" if name == "flexvar" else "var_vae.pth")
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_var_logits_and_greedy_samples(files: Path, name: str) -> None:
    io, vae = reference.tensors(f"{name}_io.safetensors"), reference.tensors("var_vae_io.safetensors")
    found = opened(files, name)
    tokens = found.tokenizer.encode(vae["images"])
    with torch.no_grad():
        logits = found.model(vae["labels"].long(), found.tokenizer.quantize.teacher_inputs(tokens))
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)
    drawn, latent = sample_tokens(
        found.model, found.tokenizer.quantize, vae["labels"][:4].long(), range(4), guidance=1.5, top_k=1
    )
    assert torch.equal(drawn, torch.cat([io[f"greedy_idx_{k}"].flatten(1) for k in range(4)], dim=1).long())
    images = (found.tokenizer.decode_features(latent).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(images, io["greedy_image"], atol=1e-3, rtol=0)


def test_flexvar_logits_and_greedy_samples(files: Path) -> None:
    io, vq = reference.tensors("flexvar_io.safetensors"), reference.tensors("flexvar_vq_io.safetensors")
    found, sizes = opened(files, "flexvar"), tuple((side, side) for side in (1, 2, 3, 4))
    with torch.no_grad():
        tokens = found.tokenizer.quantize.encode(vq["encode_conti"], sizes)
        inputs = found.tokenizer.quantize.teacher_inputs(tokens, sizes)
        logits = found.model(vq["labels"].long(), inputs, sizes=sizes)
    torch.testing.assert_close(logits, io["logits_1234"], atol=1e-4, rtol=0)
    wanted = torch.cat([io[f"greedy_1234_idx_{k}"].flatten(1) for k in range(4)], dim=1).long()
    drawn, latent = sample_tokens(
        found.model, found.tokenizer.quantize, vq["labels"][: len(wanted)].long(), range(len(wanted)),
        guidance=1.5, top_k=1, sizes=sizes,
    )  # fmt: skip
    assert torch.equal(drawn, wanted)
    images = found.tokenizer.decode_features(latent)[:2]
    torch.testing.assert_close(images, io["greedy_1234_image"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", [*VARIANTS, "flexvar"])
def test_converted_by_command_and_back_is_the_published_file(
    files: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back.pth")
    assert run_sweep.main(["convert", str(files / f"{name}.pth"), "--to", "varscale", "--out", ours]) == 0
    assert run_sweep.main(["convert", ours, "--to", "published", "--out", back]) == 0
    assert "depth 2, width 128" in capsys.readouterr().out
    original, found = torch.load(files / f"{name}.pth"), torch.load(back)
    # FlexVAR's mask follows the steps last used, and is not among the reference weights.
    assert found.keys() - original.keys() == ({"attn_bias_for_masking"} if name == "flexvar" else set())
    for key, value in original.items():
        assert torch.equal(found[key], value), key
        assert found[key].dtype == value.dtype


@pytest.mark.parametrize("name", ["var_vae", "flexvar_vq"])
def test_a_tokenizer_converted_by_command_and_back(files: Path, tmp_path: Path, name: str) -> None:
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back.pth")
    words = ["convert", str(files / f"{name}.pth"), "--to", "varscale", "--out", ours]
    assert run_sweep.main([*words, "--scales", "1", "2", "3", "4"]) == 0
    assert run_sweep.main(["convert", ours, "--to", "published", "--out", back]) == 0
    original, found = torch.load(files / f"{name}.pth"), torch.load(back)
    statistics = {"quantize.ema_vocab_hit_SV", "quantize.codebook_used"}
    assert found.keys() - statistics == original.keys() - statistics
    assert all(torch.equal(found[key], original[key]) for key in original.keys() - statistics)


def test_evaluate_by_command_gives_the_published_codes_loss(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of 8 bits near the reference's: the published model's own tokens and loss of them."""
    vae = reference.tensors("var_vae_io.safetensors")
    pixels = ((vae["images"] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    for split in ("train", "val"):
        for i, (picture, label) in enumerate(zip(pixels, vae["labels"].tolist(), strict=True)):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    for label in range(10):  # classes without a picture have a folder, so that labels keep their numbers
        folder = tmp_path / "train" / f"class{label}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(folder / "any.png")
    words = ["evaluate", str(files / "var_default.pth"), "--tokenizer", str(files / "var_vae.pth"), "--json"]
    data = ["--data.source", "folder", "--data.path", str(tmp_path), "--data.crop-margin", "1"]
    assert run_sweep.main([*words, *data, "--device", "cpu", "--threads", "1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = opened(files, "var_default")
    tokens = found.tokenizer.encode(pixels.float() / 127.5 - 1)
    with torch.no_grad():
        logits = found.model(vae["labels"].long(), found.tokenizer.quantize.teacher_inputs(tokens))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert shown["loss_avg"] == pytest.approx(loss.item(), abs=1e-5)
    assert shown["eval_images"] == len(pixels)
    # Rounding to 8 bits moves some tokens, and the mean loss of an untrained model hardly.
    published = reference.metadata("var_default_io.safetensors")["eval_ep_no_cond_drop"]
    assert shown["loss_avg"] == pytest.approx(published["L_mean"], rel=0.05)


@pytest.mark.parametrize("file", TRANSFORMERS)
def test_published_transformers_keys_there_and_back(file: str) -> None:
    state = reference.published_shapes(file)
    config = told_config(state)
    assert (config.depth, config.scales) == TRANSFORMERS[file]
    assert (config.width, config.heads, config.num_classes) == (64 * config.depth, config.depth, 1000)
    assert (config.adaln == "shared", config.qk_norm) == ("36s" in file, "nol2" not in file)
    check_published(config, state)
    ours = transformer_from_published(state)
    with torch.device("meta"):
        model = build(config)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    back = transformer_to_published(config, ours)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("file", ["var_vqvae_ch160v4096z32.txt", "flexvar_vq16_v8912z32.txt"])
def test_published_tokenizers_keys_there_and_back(file: str) -> None:
    state = reference.published_shapes(file)
    config = told_tokenizer(
        state, tuple(range(1, 17)) if "flexvar" in file else (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    )
    ours = from_published(config, state)
    with torch.device("meta"):
        model = Tokenizer(config)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    back = to_published(config, ours)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
