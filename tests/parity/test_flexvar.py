"""FlexVAR's transformer against numbers from its published code: trained and untrained steps, gradients."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from scaling import flops
from scaling.config import PAPER_SCALES, ModelConfig, TokenizerConfig
from scaling.families.flexvar import FlexVAR, sin_cos_map
from scaling.families.published import published_name, transformer_from_published
from scaling.generation import sample_tokens
from scaling.steps import published_scales, step_scales
from scaling.tokenizer.published import from_published
from scaling.tokenizer.vqvae import Tokenizer

from . import reference

pytestmark = [pytest.mark.reference, reference.needs_reference]
PYRAMIDS = {"1234": (1, 2, 3, 4), "134": (1, 3, 4), "12": (1, 2)}
IO = "flexvar_io.safetensors"


def squares(*sides: int) -> tuple[tuple[int, int], ...]:
    return tuple((side, side) for side in sides)


@pytest.fixture(scope="module")
def model() -> FlexVAR:
    # The published positions are 32 x 32 whatever the steps: twice the 16 of the paper's.
    config = ModelConfig.from_depth(
        2, family="flexvar", vocab=64, latent_channels=32, scales=PAPER_SCALES, num_classes=10
    )
    built = FlexVAR(config).eval()
    built.load_state_dict(transformer_from_published(reference.weights("flexvar_weights.safetensors")))
    return built


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizerConfig(
        quantizer="scalable", vocab=64, latent_channels=32, z_channels=64, channels=32, scales=(1, 2, 3, 4)
    )
    built = Tokenizer(config)
    built.load_state_dict(from_published(config, reference.weights("flexvar_vq_weights.safetensors")))
    return built.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vq() -> dict[str, torch.Tensor]:
    return reference.tensors("flexvar_vq_io.safetensors")


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return reference.tensors(IO)


@pytest.mark.parametrize("backend", ["masked", "blockwise"])
@pytest.mark.parametrize("tag", PYRAMIDS)
def test_logits(
    tag: str, backend: str, model: FlexVAR, vq: dict[str, torch.Tensor], io: dict[str, torch.Tensor]
) -> None:
    model.attention_backend = backend  # type: ignore[assignment]
    with torch.no_grad():
        logits = model(vq["labels"].long(), vq[f"quant_z_{tag}"], sizes=squares(*PYRAMIDS[tag]))
    torch.testing.assert_close(logits, io[f"logits_{tag}"], atol=1e-4, rtol=0)


def test_loss_and_gradient_norms(model: FlexVAR, vq: dict[str, torch.Tensor]) -> None:
    facts = reference.metadata(IO)
    for tag, scales in PYRAMIDS.items():
        logits = model(vq["labels"].long(), vq[f"quant_z_{tag}"], sizes=squares(*scales))
        loss = F.cross_entropy(logits.flatten(0, 1), vq[f"idx_{tag}"].long().flatten())
        assert loss.item() == pytest.approx(facts[f"loss_{tag}"]["train_loss"], abs=1e-5)
        if tag == "1234":
            model.zero_grad()
            loss.backward()
    parameters = dict(model.named_parameters())
    assert len(facts["grad_norms_1234"]) == len(parameters)
    for key, norm in facts["grad_norms_1234"].items():
        gradient = parameters[published_name(key) or ""].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), key


@pytest.mark.parametrize(
    ("tag", "scales", "options"),
    [
        ("1234", (1, 2, 3, 4), {"guidance": 1.5}),
        ("12357", (1, 2, 3, 5, 7), {"guidance": 1.5}),
        # LlamaGen's cfg 2.5 is a weight of 1.5 on the difference.
        ("134_llamagencfg", (1, 3, 4), {"guidance": 1.5, "guidance_form": "constant"}),
        ("1_2_3_4_5_maxpn3", (1, 2, 3, 4, 5), {"guidance": 2.0, "largest": 3}),
    ],
)
def test_greedy_samples(
    tag: str,
    scales: tuple[int, ...],
    options: dict[str, object],
    model: FlexVAR,
    tokenizer: Tokenizer,
    vq: dict[str, torch.Tensor],
    io: dict[str, torch.Tensor],
) -> None:
    labels = vq["labels"][: len(io[f"greedy_{tag}_idx_0"])].long()
    tokens, latent = sample_tokens(
        model,
        tokenizer.quantize,
        labels,
        range(len(labels)),
        top_k=1,
        sizes=squares(*scales),
        **options,  # type: ignore[arg-type]
    )
    wanted = torch.cat([io[f"greedy_{tag}_idx_{k}"].flatten(1) for k in range(len(scales))], dim=1)
    assert torch.equal(tokens, wanted.long())
    with torch.no_grad():
        images = tokenizer.decode_features(latent)
    torch.testing.assert_close(images[:2], io[f"greedy_{tag}_image"], atol=1e-3, rtol=0)


def test_positions(model: FlexVAR, io: dict[str, torch.Tensor]) -> None:
    for side in (1, 2, 3, 4, 5, 7):
        ours = model.positions_of(squares(side))
        torch.testing.assert_close(ours[None], io[f"pos_area_{side}"], atol=1e-5, rtol=0)
    corner = sin_cos_map(128, 32, 32)[:, :6, :6]
    torch.testing.assert_close(corner[None], io["pos_1LC_init_sincos_corner"], atol=1e-5, rtol=0)


def test_published_random_steps() -> None:
    stored = json.loads((reference.FOLDER / "flexvar_random_pyramids.json").read_text())
    for seed, rows in stored["python_random_seed_draws"].items():
        draws = random.Random(int(seed))
        assert [list(published_scales(draws)) for _ in rows] == rows
    # The steps of a run are drawn in another order, from the same distribution.
    config = ModelConfig.from_depth(1, family="flexvar", step_schedule="published")
    seen = [step_scales(config, 0, step) for step in range(20_000)]
    shares, stats = Counter(scales[-1] for scales in seen), stored["stats"]
    assert shares[16] / len(seen) == pytest.approx(stats["last_scale_hist"]["16"], abs=0.015)
    lengths = [sum(side * side for side in scales) for scales in seen]
    assert sum(lengths) / len(seen) == pytest.approx(stats["seq_len_mean"], rel=0.005)


def test_published_parameter_counts() -> None:
    lines = (reference.FOLDER / "keys" / "flexvar_param_counts.tsv").read_text().splitlines()[1:]
    assert lines
    for line in lines:
        depth, _, total, *_ = line.split("\t")
        model = ModelConfig.from_depth(int(depth), family="flexvar", vocab=8912)
        assert flops.params_total(model) == int(total)


@pytest.mark.parametrize("depth", [16, 20, 24])
def test_published_keys_and_shapes(depth: int) -> None:
    state = reference.published_shapes(f"flexvar_d{depth}.txt")
    with torch.device("meta"):
        model = FlexVAR(ModelConfig.from_depth(depth, family="flexvar", vocab=8912))
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in transformer_from_published(state).items()} == wanted
