"""Published checkpoints there and back, runs and converted folders opened, wrong files told by their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from scaling.config import FLEXIBLE, ConfigError, ModelConfig, TokenizerConfig, to_dict
from scaling.convert import convert
from scaling.families.published import told_config, transformer_from_published, transformer_to_published
from scaling.families.registry import FAMILIES, build
from scaling.pretrained import load_model, open_model
from scaling.records import RecordsError, RunFolder
from scaling.requests import ConvertRequest
from scaling.tokenizer.published import to_published
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer, save_tokenizer
from tests.scaling import tiny

SIDES = (1, 2)
SCALABLE = TokenizerConfig(
    vocab=16, latent_channels=4, z_channels=8, channels=32, multipliers=(1, 2), res_blocks=1,
    scales=SIDES, quantizer="scalable",
)  # fmt: skip


def model_config(family: Any = "var", depth: int = 1, **options: Any) -> ModelConfig:
    own: dict[str, Any] = {"vocab": 16, "latent_channels": 4, "scales": SIDES, "num_classes": 3}
    return ModelConfig.from_depth(depth, family=family, **(own | options))


def weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """A state dict in which every value is its own."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in build(config).state_dict().items()}


def tokenizer(config: TokenizerConfig = tiny.TOKENIZER, seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(config).eval()


def published(path: Path, config: ModelConfig, **options: Any) -> Path:
    torch.save(transformer_to_published(config, weights(config)), path, **options)
    return path


def published_tokenizer(path: Path, config: TokenizerConfig = tiny.TOKENIZER) -> Path:
    torch.save(to_published(config, tokenizer(config).state_dict()), path)
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def refused(*where: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        open_model(*where, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(["var", "flexvar"]),
    depth=st.integers(1, 3),
    adaln=st.sampled_from(["own", "shared"]),
    qk_norm=st.booleans(),
    scales=st.sets(st.integers(2, 6), min_size=1).map(lambda s: (1, *sorted(s))),
    mlp_ratio=st.integers(1, 4),
)
def test_ours_to_published_to_ours(
    family: Any, depth: int, adaln: Any, qk_norm: bool, scales: tuple[int, ...], mlp_ratio: int
) -> None:
    config = model_config(
        family, depth, adaln=adaln, qk_norm=qk_norm, scales=scales, mlp_ratio=mlp_ratio, width=64 * depth
    )
    ours = weights(config)
    theirs = transformer_to_published(config, ours)
    same(transformer_from_published(theirs), ours)
    assert told_config(theirs, None if family == "var" else scales) == config
    same(transformer_to_published(config, transformer_from_published(theirs)), theirs)


def test_published_buffers() -> None:
    config = model_config()
    state = transformer_to_published(config, weights(config))
    assert state["lvl_1L"].tolist() == [[0, 1, 1, 1, 1]]
    allowed = state["attn_bias_for_masking"][0, 0] == 0
    assert allowed.tolist() == [[True] + 4 * [False]] + 4 * [5 * [True]]
    assert state["attn_bias_for_masking"][~allowed[None, None]].eq(-torch.inf).all()
    assert state["blocks.0.attn.zero_k_bias"].eq(0).all()


@pytest.mark.parametrize("family", ["var", "flexvar"])
def test_an_opened_file_is_the_model_that_was_written(family: str, tmp_path: Path) -> None:
    """Logits bit for bit: also what is no weight (level ids, positions' sizes) is right."""
    config, tokens = model_config(family), tiny.TOKENIZER if family == "var" else SCALABLE
    file = published(tmp_path / "net.pth", config)
    found = open_model(file, published_tokenizer(tmp_path / "vae.pth", tokens), scales=SIDES)
    assert (found.name, found.run, found.model.config) == ("net", None, config)
    original = build(config).eval()
    original.load_state_dict(weights(config))
    tokens_BL, labels_B = torch.randint(0, 16, (2, 5)), torch.tensor([0, 2])
    inputs = FAMILIES[family].inputs(found.tokenizer.quantize, tokens_BL, config.sizes)
    with torch.no_grad():
        assert torch.equal(found.model(labels_B, inputs), original(labels_B, inputs))
    images = torch.rand(2, 3, found.tokenizer.resolution, found.tokenizer.resolution)
    assert torch.equal(found.tokenizer.encode(images), tokenizer(tokens).encode(images))


def test_the_file_is_mapped_and_never_written_to(tmp_path: Path) -> None:
    file = published(tmp_path / "net.pth", model_config())
    before = file.read_bytes()
    for parameter in open_model(file, published_tokenizer(tmp_path / "vae.pth")).model.parameters():  # type: ignore[attr-defined]
        assert not parameter.requires_grad
        parameter.zero_()
    assert file.read_bytes() == before


class TestScales:
    def test_a_var_tells_its_own(self, tmp_path: Path) -> None:
        config = model_config(scales=(1, 3, 4))
        assert told_config(transformer_to_published(config, weights(config))).scales == (1, 3, 4)

    def test_without_levels_by_their_number_or_given(self) -> None:
        config = model_config(scales=(1, 2, 4))
        state = transformer_to_published(config, weights(config))
        del state["lvl_1L"]
        with pytest.raises(ConfigError, match=r"21 positions in 3 scales .* --scales"):
            told_config(state)
        assert told_config(state, (1, 2, 4)) == config

    @pytest.mark.parametrize("wrong", [(1, 2), (1, 2, 3), (1, 3, 4)])
    def test_scales_that_do_not_fit(self, wrong: tuple[int, ...]) -> None:
        config = model_config(scales=(1, 2, 4))
        with pytest.raises(ConfigError, match="do not fit"):
            told_config(transformer_to_published(config, weights(config)), wrong)

    def test_flexvar(self) -> None:
        config = model_config("flexvar", scales=(1, 2, 4))
        state = transformer_to_published(config, weights(config))
        assert told_config(state).scales == (1, 2, 3, 4)
        assert told_config(state, (1, 2, 4)).scales == (1, 2, 4)
        with pytest.raises(ConfigError, match=r"must end with .* 4, got \[1, 3\]"):
            told_config(state, (1, 3))

    @pytest.mark.parametrize(
        ("side", "scales"),
        [
            (8, (1, 2, 3, 4, 5, 6, 8)),
            (16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
            (20, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 18, 20)),
            (24, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 24)),
        ],
    )
    def test_a_flexvar_of_any_side_has_steps(self, side: int, scales: tuple[int, ...]) -> None:
        """So that it can be sampled and edited, where --scales are the steps of the picture."""
        config = model_config("flexvar", scales=(1, side))
        state = transformer_to_published(config, weights(config))
        told = told_config(state)
        assert told.scales == scales
        assert told.step_schedule == ("published" if side == 16 else "paper")


class TestWrongFiles:
    """The message names the keys, or says what the file is instead."""

    @pytest.fixture
    def state(self) -> dict[str, Tensor]:
        return transformer_to_published(model_config(depth=2), weights(model_config(depth=2)))

    def message(self, tmp_path: Path, state: dict[str, Tensor]) -> str:
        torch.save(state, tmp_path / "net.pth")
        text = refused(tmp_path / "net.pth", published_tokenizer(tmp_path / "vae.pth"))
        assert "net.pth" in text
        return text

    @pytest.mark.parametrize("key", ["head.weight", "blocks.1.ffn.fc1.bias", "pos_start", "lvl_embed.weight"])
    def test_missing(self, tmp_path: Path, state: dict[str, Tensor], key: str) -> None:
        del state[key]
        assert f"missing {key}" in self.message(tmp_path, state)

    def test_unexpected(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        state |= {f"blocks.0.norm{i}.weight": torch.ones(64) for i in range(7)}
        assert "unexpected keys blocks.0.norm0.weight, " in self.message(tmp_path, state)
        assert "and 2 more" in self.message(tmp_path, state)

    @pytest.mark.parametrize("key", ["blocks.1.attn.proj.weight", "word_embed.bias", "pos_start"])
    def test_shapes(self, tmp_path: Path, state: dict[str, Tensor], key: str) -> None:
        state[key] = torch.zeros(3, 5)
        text = self.message(tmp_path, state)
        assert f"{key} (3, 5)" in text or f"{key} has shape (3, 5)" in text

    def test_a_tokenizer_is_no_transformer(self, tmp_path: Path) -> None:
        vae = published_tokenizer(tmp_path / "vae.pth")
        assert "a VAR tokenizer, expected a VAR or FlexVAR" in refused(vae, vae)

    def test_a_transformer_is_no_tokenizer(self, tmp_path: Path) -> None:
        net = published(tmp_path / "net.pth", model_config())
        assert "a VAR transformer, expected a VAR tokenizer" in refused(net, net)

    def test_another_models_tokenizer(self, tmp_path: Path) -> None:
        net = published(tmp_path / "net.pth", model_config())
        other = published_tokenizer(tmp_path / "vq.pth", SCALABLE)
        assert "vq.pth is not this model's tokenizer: tokenizer.quantizer must be 'residual'" in refused(
            net, other
        )
        net = published(tmp_path / "net.pth", model_config(vocab=32))
        assert "model.vocab 32 differs" in refused(net, published_tokenizer(tmp_path / "vae.pth"))

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        assert "--tokenizer" in refused(published(tmp_path / "net.pth", model_config()))

    def test_strangers(self, tmp_path: Path) -> None:
        torch.save({"layer1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
        assert "found keys such as layer1.weight" in refused(tmp_path / "resnet.pth")
        assert "neither a run's folder" in refused(tmp_path)

    def test_our_weights_without_their_config(self, tmp_path: Path) -> None:
        torch.save(weights(model_config()), tmp_path / "x.pth")
        assert "give the folder" in refused(tmp_path / "x.pth")


def test_a_published_training_checkpoint_holds_both(tmp_path: Path) -> None:
    config = model_config()
    state = {f"module.{k}": v for k, v in transformer_to_published(config, weights(config)).items()}
    vae = to_published(tiny.TOKENIZER, tokenizer().state_dict())
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": state, "vae_local": vae}}, tmp_path / "ar-ckpt.pth")
    found = open_model(tmp_path / "ar-ckpt.pth")
    same(dict(found.model.state_dict()), weights(config))  # type: ignore[attr-defined]
    assert found.tokenizer.config == tiny.TOKENIZER
    told = " ".join(found.notes)
    assert all(word in told for word in ("trainer.var_wo_ddp", "trainer.vae_local", "'module.'"))


class TestConvert:
    def request(self, out: Path, to: Any = "varscale", **more: Any) -> ConvertRequest:
        return ConvertRequest(to=to, out=str(out), **more)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("family", ["var", "flexvar"])
    def test_a_transformer_there_and_back(self, tmp_path: Path, family: str, suffix: str) -> None:
        config = model_config(family)
        net = published(tmp_path / "net.pth", config)
        convert(str(net), self.request(tmp_path / "ours", scales=SIDES))
        convert(str(tmp_path / "ours"), self.request(tmp_path / f"back{suffix}", "published"))
        tokens = tiny.TOKENIZER if family == "var" else SCALABLE
        vae = published_tokenizer(tmp_path / "vae.pth", tokens)
        for where, scales in (("ours", None), (f"back{suffix}", SIDES)):
            found = open_model(tmp_path / where, vae, scales=scales)
            assert found.model.config == config
            same(dict(found.model.state_dict()), weights(config))  # type: ignore[attr-defined]
        if suffix == ".pth":
            same(torch.load(tmp_path / "back.pth"), torch.load(net))

    @pytest.mark.parametrize("config", [tiny.TOKENIZER, SCALABLE])
    def test_a_tokenizer_there_and_back(self, tmp_path: Path, config: TokenizerConfig) -> None:
        vae = published_tokenizer(tmp_path / "vae.pth", config)
        convert(str(vae), self.request(tmp_path / "ours", scales=SIDES))
        found = load_tokenizer(tmp_path / "ours")
        assert found.config == config
        same(dict(found.state_dict()), dict(tokenizer(config).state_dict()))
        convert(str(tmp_path / "ours"), self.request(tmp_path / "back.pth", "published"))
        same(torch.load(tmp_path / "back.pth"), torch.load(vae))

    def test_either_part_of_a_training_checkpoint(self, tmp_path: Path) -> None:
        config = model_config()
        both = {
            "var_wo_ddp": transformer_to_published(config, weights(config)),
            "vae_local": to_published(tiny.TOKENIZER, tokenizer().state_dict()),
        }
        torch.save({"trainer": both}, tmp_path / "x.pth")
        convert(str(tmp_path / "x.pth"), self.request(tmp_path / "net"))
        convert(str(tmp_path / "x.pth"), self.request(tmp_path / "vae", part="tokenizer", scales=SIDES))
        assert open_model(tmp_path / "net", tmp_path / "vae").model.config == config

    @pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"flexvar"}))
    def test_what_the_published_code_lacks(self, family: str) -> None:
        config = model_config(family, **({} if family in FLEXIBLE else {"adaln": "none"}))
        with pytest.raises(ConfigError, match=f"the published code has no {family}"):
            transformer_to_published(config, weights(config))

    def test_names_that_no_one_could_read_back(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"ends in \.pth or \.safetensors"):
            convert(str(tmp_path), self.request(tmp_path / "x.bin", "published"))


class TestRuns:
    """A run's folder beside its tokenizer's, as a sweep lays them."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> RunFolder:
        config = tiny.run_config()
        run = tiny.make_run(tmp_path / "sweep" / config.run_id, config)
        (run.path / "final").mkdir()
        save_file(weights(config.model), run.path / "final" / "weights.safetensors")
        run.set_status("done")
        folder = tmp_path / "tokenizers" / config.tokenizer_run.run_id / "tokenizer"
        save_tokenizer(tokenizer(), folder, {})
        return run

    def test_a_run_finds_its_tokenizer(self, run: RunFolder) -> None:
        found = open_model(run.path)
        assert (found.name, found.run) == (run.name, tiny.run_config())
        same(dict(found.model.state_dict()), weights(tiny.run_config().model))  # type: ignore[attr-defined]
        same(dict(found.tokenizer.state_dict()), dict(tokenizer().state_dict()))

    def test_or_is_given_one(self, run: RunFolder, tmp_path: Path) -> None:
        other = tokenizer(seed=7)
        save_tokenizer(other, tmp_path / "other", {})
        found = open_model(run.path, tmp_path / "other")
        assert found.tokenizer.content_hash == other.content_hash

    def test_without_a_tokenizer_the_model_alone(self, run: RunFolder, tmp_path: Path) -> None:
        (tmp_path / "tokenizers").rename(tmp_path / "moved")
        assert "give it with --tokenizer" in refused(run.path)
        model, config = load_model(run)
        assert to_dict(config) == run.config()
        same(dict(model.state_dict()), weights(config.model))  # type: ignore[attr-defined]

    def test_an_unfinished_run(self, run: RunFolder) -> None:
        (run.path / "final" / "weights.safetensors").unlink()
        run.set_status("running")
        with pytest.raises(RecordsError, match=r"no final weights yet \(state: running\)"):
            open_model(run.path)

    def test_weights_of_another_config(self, run: RunFolder) -> None:
        save_file(weights(model_config(depth=2)), run.path / "final" / "weights.safetensors")
        with pytest.raises(RecordsError, match=r"not this var model: it has unexpected keys blocks\.1\."):
            open_model(run.path)

    def test_a_run_to_the_published_layout_and_opened_there(self, run: RunFolder, tmp_path: Path) -> None:
        convert(str(run.path), ConvertRequest(to="published", out=str(tmp_path / "net.pth")))
        tokenizer_run = tmp_path / "tokenizers" / tiny.run_config().tokenizer_run.run_id
        convert(str(tokenizer_run), ConvertRequest(to="published", out=str(tmp_path / "vae.pth")))
        found = open_model(tmp_path / "net.pth", tmp_path / "vae.pth")
        same(dict(found.model.state_dict()), weights(tiny.run_config().model))  # type: ignore[attr-defined]
        assert found.tokenizer.content_hash == tokenizer().content_hash
