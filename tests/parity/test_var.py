"""The transformer against numbers from the published VAR code (default, shared adaLN, no QK norm)."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from scaling import flops, schedule
from scaling.config import ModelConfig, TokenizerConfig, TrainConfig
from scaling.drawing import keep_top
from scaling.draws import step_draws
from scaling.families.published import published_name, transformer_from_published
from scaling.families.registry import family_model
from scaling.families.var import VAR
from scaling.generation import sample_tokens
from scaling.objective import Objective
from scaling.tokenizer.vqvae import Tokenizer
from scaling.trainer import decay_groups

from . import reference

pytestmark = [pytest.mark.reference, reference.needs_reference]
VARIANTS = ["default", "saln", "nol2"]
SCALES = (1, 2, 3, 4)


def config(variant: str) -> ModelConfig:
    return ModelConfig.from_depth(
        2, vocab=64, latent_channels=8, scales=SCALES, num_classes=10,
        adaln="shared" if variant == "saln" else "own", qk_norm=variant != "nol2",
    )  # fmt: skip


def load(variant: str) -> VAR:
    model = VAR(config(variant)).eval()
    model.load_state_dict(transformer_from_published(reference.weights(f"var_{variant}_weights.safetensors")))
    return model


def tokenizer() -> Tokenizer:
    built = Tokenizer(TokenizerConfig(vocab=64, latent_channels=8, channels=32, scales=SCALES))
    state = reference.weights("var_vae_weights.safetensors")
    built.load_state_dict({k: v for k, v in state.items() if "ema_vocab_hit" not in k})
    return built.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> dict[str, torch.Tensor]:
    return reference.tensors("var_vae_io.safetensors")


def true_tokens(vae: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([vae[f"idx_{k}"].flatten(1) for k in range(len(SCALES))], dim=1).long()


@pytest.mark.parametrize("backend", ["masked", "blockwise"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant: str, backend: str, vae: dict[str, torch.Tensor]) -> None:
    model, expected = load(variant), reference.tensors(f"var_{variant}_io.safetensors")
    model.attention_backend = backend  # type: ignore[assignment]
    inputs = tokenizer().quantize.teacher_inputs(true_tokens(vae))
    labels = vae["labels"].long()
    with torch.no_grad():
        torch.testing.assert_close(model(labels, inputs), expected["logits"], atol=1e-4, rtol=0)
        null = torch.full_like(labels, 10)
        torch.testing.assert_close(model(null, inputs), expected["logits_uncond"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_norms(variant: str, vae: dict[str, torch.Tensor]) -> None:
    model, facts = load(variant), reference.metadata(f"var_{variant}_io.safetensors")
    logits = model(vae["labels"].long(), vae["var_input"])
    loss = F.cross_entropy(logits.flatten(0, 1), true_tokens(vae).flatten())
    loss.backward()
    assert loss.item() == pytest.approx(facts["mean_ce"], abs=1e-5)
    parameters = dict(model.named_parameters())
    assert len(facts["grad_norms_mean_ce"]) == len(parameters)
    for key, norm in facts["grad_norms_mean_ce"].items():
        name = published_name(key)
        assert name is not None
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_samples(variant: str, vae: dict[str, torch.Tensor]) -> None:
    model, expected, vqvae = load(variant), reference.tensors(f"var_{variant}_io.safetensors"), tokenizer()
    labels = vae["labels"][:4].long()
    tokens, f_hat = sample_tokens(model, vqvae.quantize, labels, range(4), guidance=1.5, top_k=1)
    wanted = torch.cat([expected[f"greedy_idx_{k}"].flatten(1) for k in range(len(SCALES))], dim=1)
    assert torch.equal(tokens, wanted.long())
    image = (vqvae.decode_features(f_hat).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(image, expected["greedy_image"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_published_training_steps(variant: str, vae: dict[str, torch.Tensor]) -> None:
    model, facts = load(variant), reference.metadata(f"var_{variant}_io.safetensors")
    train = TrainConfig(steps=20, lr=3e-3, warmup=0.1, lr_start=0.005, lr_end=0.01)
    optimizer = torch.optim.AdamW(decay_groups(model), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    targets, inputs, labels = true_tokens(vae), vae["var_input"], vae["labels"].long()
    assert len(facts["train_steps"]) == 3
    for step, published in enumerate(facts["train_steps"]):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(train, step, 20)
            group["weight_decay"] = schedule.weight_decay(train, step, 20) * group["decay"]
        loss = Objective(family_model(model))(labels, inputs, targets, weight=1 / targets.numel()).total
        assert loss.item() == pytest.approx(published["Lm"], abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
    expected = reference.tensors(f"var_{variant}_io.safetensors")["logits_after_3_steps"]
    with torch.no_grad():
        torch.testing.assert_close(model(labels, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_decay_group_is_the_published_one(variant: str) -> None:
    model, facts = load(variant), reference.metadata(f"var_{variant}_io.safetensors")
    names = {id(p): n for n, p in model.named_parameters()}
    spared = {names[id(p)] for g in decay_groups(model) if g["decay"] == 0.0 for p in g["params"]}
    assert spared == {published_name(key) for key in facts["no_weight_decay_params"]}


def test_top_k_and_top_p() -> None:
    stored = reference.tensors("var_topk_topp.safetensors")
    cases = [name for name in stored if name.startswith("masked_")]
    assert cases
    for name in cases:
        top_k, top_p = name.removeprefix("masked_k").split("_p")
        kept = keep_top(stored["logits"].clone(), int(top_k), float(top_p))
        assert torch.equal(kept, stored[name]), name


def test_schedules() -> None:
    stored = json.loads((reference.FOLDER / "var_lr_schedule.json").read_text())
    args = stored["args"]
    for name, pairs in stored["lr_wd_per_it"].items():
        train = TrainConfig(
            steps=args["max_it"], lr=args["peak_lr"], schedule=name, warmup=args["wp_it"] / args["max_it"],
            lr_start=args["wp0"], lr_end=args["wpe"],
            weight_decay=args["wd"], weight_decay_end=args["wd_end"],
        )  # fmt: skip
        for step, (rate, decay) in enumerate(pairs):
            assert schedule.learning_rate(train, step, len(pairs)) == pytest.approx(rate, rel=1e-12)
            assert schedule.weight_decay(train, step, len(pairs)) == pytest.approx(decay, rel=1e-12)


def test_published_parameter_counts() -> None:
    lines = (reference.FOLDER / "keys" / "var_param_counts.tsv").read_text().splitlines()[1:]
    assert lines
    for line in lines:
        depth, _, total, _, matrices, *_ = line.split("\t")
        model = ModelConfig.from_depth(int(depth))
        assert (flops.params(model), flops.params_total(model)) == (int(matrices), int(total))


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("var_d16_256.txt", {"depth": 16}),
        ("var_d16_256_nol2.txt", {"depth": 16, "qk_norm": False}),
        (
            "var_d36s_512.txt",
            {"depth": 36, "adaln": "shared", "scales": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)},
        ),
    ],
)
def test_published_keys_and_shapes(file: str, options: dict[str, object]) -> None:
    state = reference.published_shapes(file)
    with torch.device("meta"):
        model = VAR(ModelConfig.from_depth(**options))  # type: ignore[arg-type]
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in transformer_from_published(state).items()} == wanted


def test_label_drop_has_the_published_rate() -> None:
    model = config("default")
    dropped = sum(step_draws(model, 0, step, 256).drop_label.sum() for step in range(200))
    assert dropped / (200 * 256) == pytest.approx(0.1, abs=0.005)
