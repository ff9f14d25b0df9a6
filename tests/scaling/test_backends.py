"""All back ends of attention compute the same; a run chooses one by its timings and keeps it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scaling import backends, trainer
from scaling.backends import CANDIDATES, FILE, Shape, calibrate, check, choose_attention, fastest
from scaling.config import ConfigError, Family, LaunchConfig, ModelConfig
from scaling.data.cache import open_cache
from scaling.families.registry import build
from scaling.layers.attention import FUSED_ALONE, Backend, block_causal, fused_by_steps
from scaling.layers.block import Attend
from scaling.layers.flex import BLOCK, block_mask
from scaling.records import RecordsError, RunFolder, read_json, write_json
from scaling.tokenizer.vqvae import load_tokenizer
from tests.scaling import tiny

CPU = torch.device("cpu")
AUTO = dataclasses.replace(tiny.LAUNCH, attention="auto")


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")  # here that is meant


@pytest.fixture
def gradients_of_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses gradients of FlexAttention on a CPU, where its compiler has none; uncompiled it has."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def results(
    attend: Attend, sizes: tuple[tuple[int, int], ...], scale: float, kind: torch.dtype
) -> list[Tensor]:
    """Output and gradients in fp64, of vectors that the sizes decide."""
    length = sum(h * w for h, w in sizes)
    generator = torch.Generator().manual_seed(length)
    x_3BHLE = torch.randn(3, 2, 3, length, 16, generator=generator, dtype=torch.float64)
    x_3BHLE[:2] = F.normalize(x_3BHLE[:2], dim=-1)
    weights = torch.randn(2, 3, length, 16, generator=generator)
    given_3 = [x.to(kind).requires_grad_() for x in x_3BHLE]
    out = attend(given_3[0], given_3[1], given_3[2], scale)
    assert out.dtype == kind
    gradients = torch.autograd.grad(out, given_3, weights.to(kind))
    return [x.detach().double() for x in (out, *gradients)]


@pytest.mark.usefixtures("gradients_of_flex")
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=4),
    scale=st.floats(0.01, 60.0),
)
def test_the_forms_for_a_gpu_equal_the_masked_one(sizes: list[tuple[int, int]], scale: float) -> None:
    steps = tuple(sizes)
    exact = results(block_causal(steps, "masked", CPU), steps, scale, torch.float64)
    for attend in (fused_by_steps(steps, CPU), block_causal(steps, "flex", CPU)):
        for one, true in zip(results(attend, steps, scale, torch.float32), exact, strict=True):
            # Scores of up to ``scale`` are rounded by as much; that goes into everything.
            assert (one - true).abs().max() <= 5e-6 * (1 + scale) * (1 + true.abs().max())


@pytest.mark.usefixtures("gradients_of_flex")
def test_in_bf16_they_are_as_near_to_the_exact_one_as_the_masked_one() -> None:
    steps = ((1, 1), (2, 2), (6, 6), (11, 12), (3, 3), (12, 12))
    exact = results(block_causal(steps, "masked", CPU), steps, 40.0, torch.float64)
    reference = results(block_causal(steps, "masked", CPU), steps, 40.0, torch.bfloat16)
    for attend in (fused_by_steps(steps, CPU), block_causal(steps, "flex", CPU)):
        for one, other, true in zip(
            results(attend, steps, 40.0, torch.bfloat16), reference, exact, strict=True
        ):
            assert (one - true).norm() < 2.5 * (other - true).norm()


def test_the_papers_steps_take_three_fused_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, calls = ModelConfig.from_depth(1).sizes, list[tuple[int, int, bool]]()
    plain = F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, scale: float) -> Tensor:
        calls.append((q.shape[2], k.shape[2], attn_mask is None))
        return plain(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    x = torch.randn(1, 1, 680, 4)
    fused_by_steps(sizes, CPU)(x, x, x, 1.0)
    assert calls == [(255, 255, False), (169, 424, True), (256, 680, True)]
    assert FUSED_ALONE <= 169


def test_the_block_mask_is_of_whole_blocks_and_made_once() -> None:
    sizes = ModelConfig.from_depth(1).sizes
    mask = block_mask(sizes, CPU)
    assert mask is block_mask(sizes, CPU)
    assert mask.shape[-2:] == (6 * BLOCK, 6 * BLOCK)
    assert mask.full_kv_num_blocks is not None
    worked_on = int((mask.kv_num_blocks + mask.full_kv_num_blocks).sum())
    assert worked_on == 28  # of 36, as scaling.layers.flex says


def moved(model: ModelConfig, attention: Backend = "masked") -> nn.Module:
    """A model away from its start, whose gates near 0 would hide mistakes."""
    torch.manual_seed(0)
    network = build(model, attention)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def model_config(family: Family, **options: Any) -> ModelConfig:
    scales = (4,) if family == "raster" else (1, 2, 3, 4)
    return ModelConfig.from_depth(
        2, vocab=32, latent_channels=8, num_classes=5, scales=scales, family=family, **options
    )


def given_to(config: ModelConfig, scales: tuple[int, ...], images: int) -> tuple[Tensor, Tensor]:
    """Labels and inputs."""
    generator = torch.Generator().manual_seed(sum(scales))
    tokens = sum(side * side for side in scales)
    labels = torch.randint(5, (images,), generator=generator)
    if config.family == "raster":
        return labels, torch.randint(32, (images, tokens), generator=generator)
    return labels, torch.randn(images, tokens - scales[0] ** 2, 8, generator=generator)


def outputs(network: nn.Module, scales: tuple[int, ...], images: int = 3) -> list[Tensor]:
    """Logits, and the gradient of every parameter."""
    network.zero_grad()
    labels, inputs = given_to(network.config, scales, images)  # type: ignore[arg-type]
    logits = network(labels, inputs, sizes=tuple((side, side) for side in scales))
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("gradients_of_flex")
@pytest.mark.parametrize("family", ["var", "flexvar"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": False}])
def test_families_with_steps_compute_the_same_with_flex(family: Family, options: dict[str, Any]) -> None:
    config = model_config(family, **options)
    for scales in [(1, 2, 3, 4), *([(1, 3, 4), (1, 4)] if family == "flexvar" else [])]:
        plain, other = outputs(moved(config), scales), outputs(moved(config, "flex"), scales)
        for one, true in zip(other, plain, strict=True):
            torch.testing.assert_close(one, true, atol=1e-5 * float(true.abs().max()) + 1e-6, rtol=1e-4)


# -- the choice ------------------------------------------------------------------------------------


def stand_in(seconds: dict[str, float]) -> tuple[backends.Timer, list[str]]:
    """A timer that tells these seconds, and the list of what it was asked; a missing one fails."""
    asked = list[str]()

    def timer(shape: Shape, name: Backend) -> float:
        asked.append(name)
        if name not in seconds:
            raise RuntimeError(f"no compiler for {name}\nand more")
        return seconds[name]

    return timer, asked


def processes(index: int = 0, count: int = 1, told: int = 0) -> Accelerator:
    """One of several processes on one device; the sum over all of them is what the first one said."""
    return cast(
        Accelerator,
        SimpleNamespace(
            device=CPU, num_processes=count, process_index=index, is_main_process=index == 0,
            reduce=lambda mine, reduction: mine + told,
        ),
    )  # fmt: skip


def choose(folder: RunFolder, seconds: dict[str, float], **options: Any) -> str:
    timer, _ = stand_in(seconds)
    return choose_attention(folder, tiny.run_config(), AUTO, processes(), timer=timer, **options)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"masked": 3.0, "blockwise": 2.0, "flex": 1.0}, "flex"),
        ({"masked": 3.0, "blockwise": 2.0, "flex": 2.5}, "blockwise"),
        ({"masked": 1.0, "blockwise": 2.0, "flex": 2.5}, "masked"),
        ({"masked": 1.0, "blockwise": 0.99, "flex": 0.98}, "masked"),  # within noise
        ({"masked": 1.0}, "masked"),
        ({"blockwise": 2.0, "flex": 1.0}, "flex"),  # no memory for the reference
        ({}, "masked"),
    ],
)
def test_the_clearly_fastest_is_taken(seconds: dict[str, float], chosen: str) -> None:
    assert fastest(seconds) == chosen


@pytest.mark.usefixtures("gradients_of_flex")
def test_the_choice_is_kept_when_a_run_goes_on(tmp_path: Path) -> None:
    folder = tiny.make_run(tmp_path, tiny.run_config())
    assert choose(folder, {"masked": 3.0, "blockwise": 2.0, "flex": 1.0}) == "flex"
    record = read_json(tmp_path / FILE)
    assert record["back_end"] == "flex"
    assert record["seconds"] == {"masked": 3.0, "blockwise": 2.0, "flex": 1.0}
    timer, asked = stand_in({"masked": 1.0, "blockwise": 2.0, "flex": 3.0})
    assert choose_attention(folder, tiny.run_config(), AUTO, processes(), timer=timer) == "flex"
    assert asked == []


def test_what_fails_is_left_out_and_why_is_recorded(tmp_path: Path) -> None:
    folder = tiny.make_run(tmp_path, tiny.run_config())
    assert choose(folder, {"masked": 3.0, "flex": 1.0}) == "masked"
    failed = read_json(tmp_path / FILE)["failed"]
    assert failed["blockwise"] == "RuntimeError: no compiler for blockwise"
    assert "backward on CPU" in failed["flex"]  # torch's own refusal


def test_a_reference_that_fails_is_an_error(tmp_path: Path) -> None:
    folder = tiny.make_run(tmp_path, tiny.run_config())
    with pytest.raises(RuntimeError, match="no compiler for masked"):
        choose(folder, {"blockwise": 1.0})
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("wrong", ["out", "gradient"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_back_end_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, wrong: str, kind: torch.dtype
) -> None:
    shape = Shape(2, 2, 16, ((1, 1), (2, 2), (3, 3)), kind, CPU)
    check(shape, "blockwise")
    true = block_causal

    def off(sizes: Any, name: Backend, device: torch.device) -> Attend:
        attend = true(sizes, name, device)
        if name != "blockwise":
            return attend
        if wrong == "out":
            return lambda q, k, v, scale: attend(q, k, v, 1.2 * scale)
        return lambda q, k, v, scale: attend(q, k.detach() + 0.9 * (k - k.detach()), v, scale)

    monkeypatch.setattr(backends, "block_causal", off)
    timer, _ = stand_in({"masked": 2.0, "blockwise": 1.0})
    seconds, failed = calibrate(shape, timer)
    assert seconds == {"masked": 2.0}
    assert failed["blockwise"].startswith(
        "NotExactError: outputs are off" if wrong == "out" else "NotExactError: gradients of k are off"
    )


def test_a_run_that_began_without_a_choice_and_a_branch_round_as_before(tmp_path: Path) -> None:
    begun = tiny.make_run(tmp_path / "begun", tiny.run_config())
    (begun.checkpoints / "step-000000004").mkdir(parents=True)
    fast = {"masked": 3.0, "blockwise": 1.0}
    assert choose(begun, fast) == "masked"
    trunk = tiny.make_run(tmp_path / "trunk", tiny.run_config())
    write_json(trunk.path / FILE, {"back_end": "flex"})
    assert choose(tiny.make_run(tmp_path / "branch", tiny.run_config()), fast, trunk=trunk) == "flex"
    assert choose(tiny.make_run(tmp_path / "new", tiny.run_config()), fast) == "blockwise"


@pytest.mark.parametrize("text", ["[]", '{"back_end": "auto"}', "{"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    folder = tiny.make_run(tmp_path, tiny.run_config())
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RecordsError, match=r"attention\.json"):
        choose(folder, {"masked": 1.0})


def test_every_process_takes_what_the_first_one_chose(tmp_path: Path) -> None:
    folder = tiny.make_run(tmp_path, tiny.run_config())
    timer, asked = stand_in({"masked": 1.0})
    told = CANDIDATES.index("flex")
    other = processes(index=1, count=2, told=told)
    assert choose_attention(folder, tiny.run_config(), AUTO, other, timer=timer) == "flex"
    assert asked == []
    assert not (tmp_path / FILE).exists()  # only the first writes


def test_without_steps_there_is_nothing_to_choose(tmp_path: Path) -> None:
    folder = tiny.make_run(tmp_path, tiny.run_config())
    timer, asked = stand_in({"masked": 1.0})
    config = tiny.run_config("flexvar-mamba")
    choose_attention(folder, config, AUTO, processes(), timer=timer)
    assert asked == []


def test_flex_on_a_cpu_is_refused_in_one_line(tmp_path: Path) -> None:
    launch = dataclasses.replace(tiny.LAUNCH, attention="flex")
    folder = tiny.make_run(tmp_path, tiny.run_config(), launch)
    with pytest.raises(ConfigError, match=r"launch\.attention flex needs a GPU: .* use auto, masked or"):
        choose_attention(folder, tiny.run_config(), launch, processes())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.make_tokens(tmp_path_factory.mktemp("backends"))


def test_a_run_trains_with_its_choice_and_tells_it(
    tmp_path: Path, tokens: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, tokenizer = open_cache(tokens[0]), load_tokenizer(tokens[1] / "tokenizer")

    def trained(name: str, launch: LaunchConfig) -> RunFolder:
        folder = tiny.make_run(tmp_path / name, tiny.run_config(steps=4), launch)
        trainer.train(folder, tiny.run_config(steps=4), launch, cache, tokenizer)
        return folder

    timer, _ = stand_in({"masked": 1.0, "blockwise": 2.0})
    monkeypatch.setattr(trainer, "choose_attention", functools.partial(choose_attention, timer=timer))
    chosen = trained("chosen", AUTO)
    monkeypatch.undo()
    assert chosen.status()["attention"] == "masked"
    asked_for = trained("asked", dataclasses.replace(AUTO, attention="masked"))
    assert trained("rule", AUTO).status()["attention"] == "blockwise"

    def losses(folder: RunFolder) -> list[float]:
        return [record["loss_avg"] for record in folder.metrics("eval")]

    assert losses(chosen) == losses(asked_for)
