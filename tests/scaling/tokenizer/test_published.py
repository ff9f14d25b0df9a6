"""Published layouts of tokenizers: there and back, and refusals that name the keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from scaling.config import ConfigError, TokenizerConfig
from scaling.tokenizer.published import from_published, to_published, told_tokenizer
from scaling.tokenizer.vqvae import Tokenizer
from tests.scaling.tokenizer import tiny

# Of several widths, so that a level in the wrong place has the wrong shape.
RESIDUAL = dataclasses.replace(tiny.TOKENIZER, multipliers=(1, 2, 4))
SCALABLE = dataclasses.replace(tiny.SCALABLE.tokenizer, multipliers=(1, 2, 4), norm_groups=32)


def state(config: TokenizerConfig) -> dict[str, torch.Tensor]:
    model = Tokenizer(config)
    tiny.randomised(model)
    return model.state_dict()


@pytest.mark.parametrize("config", [RESIDUAL, SCALABLE], ids=["var", "flexvar"])
def test_there_and_back(config: TokenizerConfig) -> None:
    ours = state(config)
    back = from_published(config, to_published(config, ours))
    assert list(back) == list(ours)
    assert all(torch.equal(value, ours[name]) for name, value in back.items())


def test_names_of_var_are_ours_but_for_a_statistic() -> None:
    ours = state(RESIDUAL)
    published = to_published(RESIDUAL, ours)
    assert published.pop("quantize.ema_vocab_hit_SV").shape == (3, 32)
    assert published.keys() == ours.keys()


def test_names_of_flexvar_are_those_of_llamagen() -> None:
    ours = state(SCALABLE)
    published = to_published(SCALABLE, ours)
    assert published["quantize.codebook_used"].shape == (65536,)
    # The decoder's levels run coarse to fine there.
    assert torch.equal(
        published["decoder.conv_blocks.0.upsample.conv.weight"], ours["decoder.up.2.upsample.conv.weight"]
    )
    assert torch.equal(
        published["encoder.conv_blocks.0.downsample.conv.bias"], ours["encoder.down.0.downsample.conv.bias"]
    )
    assert torch.equal(published["encoder.mid.2.norm1.weight"], ours["encoder.mid.block_2.norm1.weight"])
    parts = [published[f"decoder.mid.1.{part}.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), ours["decoder.mid.attn_1.qkv.weight"])
    assert all(value.is_contiguous() for value in published.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.mid.1.k.bias": None}, r"FlexVAR tokenizer: it is missing encoder\.mid\.1\.k\.bias$"),
        ({"a": torch.zeros(1)}, r"it has unexpected keys a$"),
        ({"quant_conv.bias": torch.zeros(3)}, r"other shapes: quant_conv\.bias \(3,\) instead of \(8,\)$"),
    ],
)
def test_a_mismatch_names_the_keys(change: dict[str, torch.Tensor | None], message: str) -> None:
    published = to_published(SCALABLE, state(SCALABLE)) | change
    with pytest.raises(ConfigError, match=message):
        from_published(SCALABLE, {k: v for k, v in published.items() if v is not None})


def test_many_keys_are_not_all_named() -> None:
    with pytest.raises(
        ConfigError, match=r"this VAR tokenizer: it is missing .+, .+, .+, .+, .+ and \d+ more$"
    ):
        from_published(RESIDUAL, to_published(SCALABLE, state(SCALABLE)))
    with pytest.raises(ConfigError, match=r"it is missing quant_conv\.bias$"):
        to_published(SCALABLE, {k: v for k, v in state(SCALABLE).items() if k != "quant_conv.bias"})


@pytest.mark.parametrize("config", [RESIDUAL, SCALABLE], ids=["var", "flexvar"])
@pytest.mark.parametrize(("option", "value"), [("norm_groups", 8), ("phi_ratio", 0.25)])
def test_what_the_layout_cannot_tell_is_refused(config: TokenizerConfig, option: str, value: float) -> None:
    other = dataclasses.replace(config, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"{option} {value} cannot be written .* which implies"):
        to_published(other, state(other))


@pytest.mark.parametrize("phis", [0, 1, 2, 4])
def test_the_number_of_phis_is_told(phis: int) -> None:
    config = dataclasses.replace(RESIDUAL, phis=phis)
    assert told_tokenizer(to_published(config, state(config)), config.scales) == config


def test_channels_that_the_groups_do_not_divide_are_named() -> None:
    published = to_published(RESIDUAL, state(RESIDUAL)) | {"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}
    with pytest.raises(ConfigError, match=r"encoder\.conv_in\.weight has 48 channels; .* multiple of 32"):
        told_tokenizer(published, RESIDUAL.scales)
