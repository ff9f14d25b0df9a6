"""The tokenizer against the published code: numbers it gave, and the keys of its checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from scaling.config import TokenizerConfig
from scaling.tokenizer.published import from_published, to_published
from scaling.tokenizer.vqvae import Tokenizer
from tests.parity import reference

pytestmark = [pytest.mark.reference, reference.needs_reference]

SMALL = TokenizerConfig(vocab=64, latent_channels=8, channels=32, scales=(1, 2, 3, 4))
HITS = "quantize.ema_vocab_hit_SV"


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return reference.tensors("var_vae_io.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    model = Tokenizer(SMALL)
    model.load_state_dict(from_published(SMALL, reference.weights("var_vae_weights.safetensors")))
    return model.eval()


def tokens(io: dict[str, torch.Tensor], name: str = "idx", count: int = 4) -> torch.Tensor:
    return torch.cat([io[f"{name}_{k}"] for k in range(count)], dim=1)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@torch.no_grad()
def test_features_before_quantisation(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    close(tokenizer.encoder(io["images"]), io["encoder_out"], 1e-4)
    close(tokenizer.encode_features(io["images"]), io["f"], 1e-4)


def test_tokens_are_equal(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    assert torch.equal(tokenizer.encode(io["images"]), tokens(io))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("idx_alt12234", ((1, 1), (2, 2), (2, 2), (3, 3), (4, 4))),
        ("idx_rect", ((1, 1), (1, 2), (3, 2), (4, 4))),
    ],
)
def test_tokens_of_other_schedules(
    tokenizer: Tokenizer, io: dict[str, torch.Tensor], name: str, sizes: tuple[tuple[int, int], ...]
) -> None:
    assert torch.equal(tokenizer.quantize.encode(io["f"], sizes), tokens(io, name, len(sizes)))


@torch.no_grad()
def test_cumulative_features(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    for k, ours in enumerate(tokenizer.quantize.cumulative_features(tokens(io))):
        close(ours, io[f"f_hat_{k}"], 1e-4)
    close(tokenizer.quantize.features(tokens(io)), io["f_hat_3"], 1e-4)


@torch.no_grad()
def test_transformer_inputs(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    close(tokenizer.quantize.teacher_inputs(tokens(io)), io["var_input"], 1e-4)
    f_hat, nexts = torch.zeros_like(io["f"]), []
    for k, side in enumerate(SMALL.scales):
        codes = tokenizer.quantize.codes(io[f"idx_{k}"]).mT.unflatten(2, (side, side))
        f_hat, following = tokenizer.quantize.advance(k, f_hat, codes)
        nexts.append(following)
    for k in range(3):
        close(nexts[k], io[f"next_ar_input_{k}"], 1e-4)
    assert nexts[3] is None
    close(f_hat, io["next_ar_input_3"], 1e-4)


@torch.no_grad()
def test_reconstructions(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    close(tokenizer.decode(tokens(io)[:4]), io["rec_last_scale"], 1e-3)
    coarse = tokenizer.quantize.cumulative_features(tokens(io)[:2])[0]
    close(tokenizer.decode_features(coarse).clamp(-1, 1), io["rec_scale0"], 1e-3)


def test_training_forward_and_gradients(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    tokenizer.zero_grad()
    (reconstruction,), quantized = tokenizer(io["images"])
    loss = quantized.loss + F.mse_loss(reconstruction, io["images"])
    loss.backward()
    close(reconstruction[:2], io["train_forward_rec"], 1e-3)
    close(quantized.loss.reshape(1), io["train_forward_vq_loss"], 1e-4)
    close(loss.reshape(1), io["train_forward_vq_loss_plus_mse"], 1e-4)
    expected = reference.metadata("var_vae_io.safetensors")["grad_norms"]
    ours = {name: float(p.grad.norm()) for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    scale = max(expected.values())
    for name, norm in expected.items():
        # Biases before a group norm have no gradient but rounding noise: hence the absolute part.
        assert ours[name] == pytest.approx(norm, rel=1e-3, abs=1e-6 * scale), name


def test_keys_and_shapes_of_the_published_checkpoint() -> None:
    lines = (reference.FOLDER / "keys" / "var_vqvae_ch160v4096z32.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    published = {row[0]: row[1] for row in rows}
    with torch.device("meta"):
        model = Tokenizer(TokenizerConfig())
        ours = to_published(TokenizerConfig(), model.state_dict())
    assert {name: str(tuple(value.shape)) for name, value in ours.items()} == published
    assert ours.keys() - model.state_dict().keys() == {HITS}
    assert sum(p.numel() for p in model.parameters()) == 108948355
