"""The scalable tokenizer against the published FlexVAR code: its numbers, and the keys of its checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from scaling.config import ConfigError, TokenizerConfig
from scaling.tokenizer.published import FLEXVAR_TOKENIZER, from_published, to_published
from scaling.tokenizer.scalable import ScalableQuantizer
from scaling.tokenizer.vqvae import Tokenizer
from tests.parity import reference

pytestmark = [pytest.mark.reference, reference.needs_reference]

SMALL = TokenizerConfig(vocab=64, channels=32, scales=(1, 2, 3, 4), quantizer="scalable", z_channels=64)
USED = "quantize.codebook_used"
PYRAMIDS = ("1234", "134", "12")


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return reference.tensors("flexvar_vq_io.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return reference.weights("flexvar_vq_weights.safetensors")


@pytest.fixture(scope="module")
def tokenizer(weights: dict[str, torch.Tensor]) -> Tokenizer:
    model = Tokenizer(SMALL)
    model.load_state_dict(from_published(SMALL, weights))
    return model.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def steps(pyramid: str) -> list[tuple[int, int]]:
    return [(int(side), int(side)) for side in pyramid]


@torch.no_grad()
def test_features_before_quantisation(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    close(tokenizer.encode_features(io["images"]), io["encode_conti"], 1e-4)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_tokens_of_every_pyramid_are_equal(
    tokenizer: Tokenizer, io: dict[str, torch.Tensor], pyramid: str
) -> None:
    assert torch.equal(tokenizer.encode(io["images"], steps(pyramid)), io[f"idx_{pyramid}"])


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@torch.no_grad()
def test_transformer_inputs(tokenizer: Tokenizer, io: dict[str, torch.Tensor], pyramid: str) -> None:
    ours = tokenizer.quantize.teacher_inputs(io[f"idx_{pyramid}"], steps(pyramid))
    close(ours, io[f"quant_z_{pyramid}"], 1e-4)


@torch.no_grad()
def test_codes_of_every_size(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    tokens = tokenizer.encode(io["images"])
    for k, codes in enumerate(tokenizer.quantize.cumulative_features(tokens)):
        close(codes, io[f"multi_scale_encode_quant_{k}"], 1e-4)


def test_one_size_alone_is_a_plain_quantiser(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    tokens = tokenizer.encode(io["images"], [(4, 4)])
    assert torch.equal(tokens, io["encode_idx_full"])
    with torch.no_grad():
        close(tokenizer.quantize.features(tokens, [(4, 4)]), io["encode_quant_full"], 1e-4)


@torch.no_grad()
def test_reconstructions(tokenizer: Tokenizer, io: dict[str, torch.Tensor]) -> None:
    tokens = tokenizer.encode(io["images"][:2])
    close(tokenizer.decode_features(tokenizer.quantize.features(tokens)), io["recon_full"], 1e-3)
    close(tokenizer.decode(io["encode_idx_full"][:2], [(4, 4)]), io["decode_code"].clamp(-1, 1), 1e-3)
    second = tokenizer.quantize.cumulative_features(tokens[:1])[1]
    enlarged = F.interpolate(tokenizer.decode_features(second), (64, 64), mode="bicubic")
    close(enlarged, io["recon_ms_scale1_resized"], 1e-3)


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_training_losses(tokenizer: Tokenizer, io: dict[str, torch.Tensor], ratio: float) -> None:
    expected = reference.metadata("flexvar_vq_io.safetensors")[f"vq_losses_entropy_ratio_{ratio}"]
    f = tokenizer.encode_features(io["images"]).detach()
    quantizer = tokenizer.quantize
    assert isinstance(quantizer, ScalableQuantizer)
    quantized = quantizer(f, [(4, 4)])
    assert float(quantized.loss.detach()) == pytest.approx(expected["vq"] + expected["commit"], rel=1e-4)
    assert torch.equal(quantized.tokens, io["encode_idx_full"])
    assert len(quantized.tokens.unique()) / SMALL.vocab == pytest.approx(expected["usage"])
    entropy = quantizer.entropy(quantized.vectors, quantizer.mean_probabilities(f, [(4, 4)]))
    assert ratio * float(entropy.detach()) == pytest.approx(expected["entropy"], rel=1e-4)


def test_keys_and_shapes_of_the_published_checkpoint() -> None:
    lines = (reference.FOLDER / "keys" / "flexvar_vq16_v8912z32.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    with torch.device("meta"):
        model = Tokenizer(FLEXVAR_TOKENIZER)
        published = to_published(FLEXVAR_TOKENIZER, model.state_dict())
    assert {name: str(tuple(v.shape)) for name, v in published.items()} == {row[0]: row[1] for row in rows}
    assert sum(p.numel() for p in model.parameters()) == 72_049_827


def test_there_and_back(weights: dict[str, torch.Tensor]) -> None:
    back = to_published(SMALL, from_published(SMALL, weights))
    assert back.pop(USED).shape == (65536,)
    assert back.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in back.items())


def test_mismatches_name_the_keys(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"FlexVAR tokenizer: it is missing decoder\.mid\.1\.k\.bias$"):
        from_published(SMALL, {k: v for k, v in weights.items() if k != "decoder.mid.1.k.bias"})
    with pytest.raises(ConfigError, match=r"it has unexpected keys head$"):
        from_published(SMALL, weights | {"head": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"other shapes: quant_conv.bias \(3,\) instead of \(32,\)$"):
        from_published(SMALL, weights | {"quant_conv.bias": torch.zeros(3)})
    other = Tokenizer(TokenizerConfig(vocab=8, channels=32, scales=(1, 2))).state_dict()
    with pytest.raises(ConfigError, match=r"it is missing decoder\.conv_blocks\.0.* and 321 more"):
        from_published(SMALL, other)
    with pytest.raises(ConfigError, match=r"it has unexpected keys quantize\.quant_resi"):
        to_published(SMALL, other)
