"""The terms of the compound loss."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F

from scaling.config import AdversarialConfig, ConfigError, TokenizerTrainConfig, identity
from scaling.tokenizer.discriminator import PatchDiscriminator
from scaling.tokenizer.losses import adaptive_weight, hinge_discriminator, hinge_generator, learning_rate
from scaling.tokenizer.lpips import LPIPS, load_lpips
from tests.scaling.tokenizer import tiny


@given(st.integers(1, 500), st.integers(0, 60))
def test_learning_rate_rises_then_falls_to_its_end(steps: int, warmup: int) -> None:
    train = TokenizerTrainConfig(steps=steps, warmup=warmup, lr=2.0, lr_end=0.1)
    rates = [learning_rate(train, s) for s in range(steps)]
    assert all(0 < rate <= 2 for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps > warmup + 1:
        assert rates[warmup] == 2
        assert rates[-1] == pytest.approx(0.2)


def test_hinge_is_zero_once_everything_is_told_apart() -> None:
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])
    assert hinge_discriminator(real, fake) == 0
    assert hinge_discriminator(fake, real) == pytest.approx(0.5 * (2.5 + 3))
    assert hinge_generator(fake) == 1.5


def test_adaptive_weight_balances_the_gradients() -> None:
    gradient = torch.randn(3, 4)
    assert adaptive_weight(gradient, gradient / 5) == pytest.approx(5, rel=1e-3)
    assert adaptive_weight(gradient, torch.zeros(3, 4)) == 1e4


def test_the_discriminator_judges_each_image_by_itself() -> None:
    torch.manual_seed(0)
    judge, images = PatchDiscriminator(AdversarialConfig(channels=32), 32), torch.randn(4, 3, 32, 32)
    logits = judge(images)
    assert logits.shape == (4, 1, 2, 2)
    torch.testing.assert_close(judge(images[2:3]), logits[2:3])


def test_too_many_halvings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"adversarial\.layers 3 is too many for 16 px images"):
        PatchDiscriminator(AdversarialConfig(layers=3), 16)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(0)
    model = LPIPS()
    for i in range(5):
        model.get_submodule(f"lin{i}.model.1").weight.data.abs_()
    return model


def test_lpips_is_the_published_formula(lpips: LPIPS) -> None:
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    weights = lpips.state_dict()

    def stages(image: torch.Tensor) -> list[torch.Tensor]:
        mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        h = (image - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)
        found, position = [], 0
        for count in (2, 2, 3, 3, 3):
            for _ in range(count):
                h = F.relu(
                    F.conv2d(
                        h,
                        weights[f"features.{position}.weight"],
                        weights[f"features.{position}.bias"],
                        padding=1,
                    )
                )
                position += 2
            found.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
            h, position = F.max_pool2d(h, 2), position + 1
        return found

    expected = sum(
        F.conv2d((a - b).square(), weights[f"lin{i}.model.1.weight"]).mean()
        for i, (a, b) in enumerate(zip(stages(x), stages(y), strict=True))
    )
    torch.testing.assert_close(lpips(x, y), expected)
    assert lpips(x, x) == 0


def test_lpips_gradient_reaches_the_image_only(lpips: LPIPS) -> None:
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    lpips(x, torch.zeros(1, 3, 16, 16)).backward()
    assert x.grad is not None
    assert x.grad.norm() > 0
    assert all(p.grad is None for p in lpips.parameters())


def load(path: str) -> LPIPS:
    """As a tokenizer planned with these weights does."""
    train = TokenizerTrainConfig(lpips_weights=path).resolved()
    assert train.lpips_weights is not None
    return load_lpips(train.lpips_weights, train.lpips_sha256)


def tokenizer_id(path: Path | None, **more: str) -> str:
    weights = None if path is None else str(path)
    train = TokenizerTrainConfig(lpips_weights=weights, **more).resolved()
    return dataclasses.replace(tiny.RUN, train=train).run_id


def test_a_moved_file_is_the_same_tokenizer_and_a_changed_one_another(tmp_path: Path) -> None:
    file, moved, folder = tmp_path / "a.pth", tmp_path / "b.safetensors", tmp_path / "folder"
    file.write_bytes(b"one")
    moved.write_bytes(b"one")
    folder.mkdir()
    (folder / "vgg.pth").write_bytes(b"one")
    before = tokenizer_id(file)
    assert tokenizer_id(moved) == tokenizer_id(folder) == before != tokenizer_id(None)
    (folder / "lin.pth").write_bytes(b"heads")
    (folder / "notes.txt").write_bytes(b"not weights")
    both = tokenizer_id(folder)
    assert both != before
    (folder / "notes.txt").unlink()
    assert tokenizer_id(folder) == both
    file.write_bytes(b"two")
    assert tokenizer_id(file) != before
    # Known weights need not be at hand: where they lie is found out when they are needed.
    known = hashlib.sha256(b"one").hexdigest()
    assert tokenizer_id(tmp_path / "elsewhere.pth", lpips_sha256=known) == before


def test_an_id_from_before_the_content_counted_is_still_the_id() -> None:
    assert identity(TokenizerTrainConfig())["lpips_weights"] is None
    assert "lpips_sha256" not in identity(TokenizerTrainConfig())


def test_weights_are_known_before_a_tokenizer_is_planned_and_the_same_when_it_is_trained(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.pth"
    with pytest.raises(ConfigError, match=r"lpips_weights: .*a\.pth: no such file"):
        TokenizerTrainConfig(lpips_weights=str(file)).resolved()
    with pytest.raises(ConfigError, match=r"lpips_weights: .*no \.safetensors and no \.pth file"):
        TokenizerTrainConfig(lpips_weights=str(tmp_path)).resolved()
    with pytest.raises(ConfigError, match="lpips_sha256 is not known yet"):
        dataclasses.replace(tiny.RUN, train=TokenizerTrainConfig(lpips_weights=str(file)))
    file.write_bytes(b"one")
    train = TokenizerTrainConfig(lpips_weights=str(file)).resolved()
    file.write_bytes(b"two")
    with pytest.raises(ConfigError, match="holds other weights than the tokenizer was planned with"):
        load_lpips(str(file), train.lpips_sha256)


def test_lpips_weights_are_read_from_either_format(lpips: LPIPS, tmp_path: Path) -> None:
    weights = lpips.state_dict()
    assert "features.28.bias" in weights
    assert weights["lin4.model.1.weight"].shape == (1, 512, 1, 1)
    vgg = {k: v for k, v in weights.items() if k.startswith("features")} | {
        "classifier.0.bias": torch.ones(2)
    }
    torch.save(vgg, tmp_path / "vgg16.pth")
    save_file({k: v for k, v in weights.items() if k.startswith("lin")}, tmp_path / "lpips.safetensors")
    loaded = load(str(tmp_path))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in weights.items())
    with pytest.raises(ConfigError, match=r"vgg16\.pth lacks 5 of 31 weights, such as 'lin0"):
        load(str(tmp_path / "vgg16.pth"))


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("attacked"),))


def test_bad_lpips_weights_are_refused(lpips: LPIPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"none\.pth: no such file"):
        load("none.pth")
    Path("noise.pth").write_bytes(b"noise")
    Path("noise.safetensors").write_bytes(b"noise")
    Path("attack.pth").write_bytes(pickle.dumps(Attack(), protocol=2))
    torch.save({"a": Attack()}, "zipped.pth")
    for name in ("noise.pth", "noise.safetensors", "attack.pth", "zipped.pth"):
        with pytest.raises(ConfigError, match="not a readable file of weights"):
            load(name)
    assert not Path("attacked").exists()
    torch.save([1], "list.pth")
    with pytest.raises(ConfigError, match="expected a state dict of tensors, got a list"):
        load("list.pth")
    torch.save(lpips.state_dict() | {"features.0.bias": torch.ones(3)}, "shape.pth")
    with pytest.raises(ConfigError, match=r"'features\.0\.bias' has shape \(3,\), expected \(64,\)"):
        load("shape.pth")


def test_a_checksum_stands_for_weights_that_are_named_and_for_nothing_else(tmp_path: Path) -> None:
    known = hashlib.sha256(b"one").hexdigest()
    with pytest.raises(ConfigError, match=r"lpips_sha256 is given without tokenizer_train\.lpips_weights"):
        tokenizer_id(None, lpips_sha256=known)
    for wrong in ("abc", known + "0", "g" * 64):
        with pytest.raises(ConfigError, match=f"must be 64 hexadecimal digits, got '{wrong}'"):
            tokenizer_id(tmp_path / "a.pth", lpips_sha256=wrong)
    file = tmp_path / "a.pth"
    assert tokenizer_id(file, lpips_sha256=known.upper()) == tokenizer_id(file, lpips_sha256=known)
