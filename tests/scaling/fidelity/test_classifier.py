"""The study's own classifier: it learns what can be learnt, says how well, and is the same made twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scaling.config import DataConfig
from scaling.data.sources import open_source
from scaling.fidelity import train_classifier
from scaling.fidelity.classifier import Classifier, ClassifierConfig, load_classifier
from scaling.fidelity.features import load_extractor
from scaling.fidelity.weights import digest
from scaling.records import RecordsError, RunFolder, read_json
from scaling.schema import ConfigError, to_dict

CPU = torch.device("cpu")
TRAINING = train_classifier.ClassifierTraining(steps=20, batch=12, lr=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Noise of three colours; in validation every class is there, the first twice as often."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (12, 12, 12)), ("val", (8, 4, 4))):
        for colour, count in enumerate(counts):
            folder = root / split / "rgb"[colour]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                pixels[..., colour] += 127
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return DataConfig(source="folder", path=str(root), resolution=16)


def trained(data: DataConfig, width: int = 8) -> tuple[Classifier, dict[str, object]]:
    config = ClassifierConfig(data.resolution, 3, width)
    return train_classifier.train_classifier(open_source(data), data, config, TRAINING, CPU)


def test_it_learns_and_says_how_well(data: DataConfig) -> None:
    model, facts = trained(data)
    assert facts["val_accuracy"] == 1
    assert facts["chance"] == 0.5
    assert (facts["val_images"], facts["train_images"]) == (16, 36)
    again, _ = trained(data)
    assert digest(model.state_dict()) == digest(again.state_dict())


def test_accuracy_is_counted_on_all_validation_images(data: DataConfig) -> None:
    """A model that is told nothing names one class for ever."""
    source = open_source(data)
    nothing = train_classifier.ClassifierTraining(steps=1, batch=5, lr=1e-12)
    model, facts = train_classifier.train_classifier(source, data, ClassifierConfig(16, 3, 8), nothing, CPU)
    images = torch.from_numpy(
        np.stack([np.asarray(source.image("val", i).resize((18, 18), 1)) for i in range(16)])
    )
    crops = images[:, 1:17, 1:17].permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.tensor([source.label("val", i) for i in range(16)])
    assert facts["val_accuracy"] == (model(crops).argmax(dim=1) == labels).float().mean().item()


def test_the_job_leaves_an_extractor(data: DataConfig, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create({"data": to_dict(data)})
    out = tmp_path / "classifier"
    options = ["--steps", "20", "--batch", "12", "--lr", "1e-2", "--width", "8"]
    train_classifier.main([str(run.path), "--out", str(out), *options])
    model, identity = load_classifier(out)
    expected, facts = trained(data)
    assert read_json(out / "classifier.json")["facts"] == json.loads(json.dumps(facts))
    assert identity == f"classifier:{digest(expected.state_dict())[:12]}@1.000"
    extractor = load_extractor("classifier", str(out), CPU)
    images = torch.randint(
        0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    features, probabilities = extractor.describe(images)
    assert probabilities is not None
    assert features.shape == (4, 16)
    assert torch.equal(probabilities, expected.probabilities(images.float() / 127.5 - 1))
    torch.testing.assert_close(probabilities, model.head(features).softmax(dim=1))
    with pytest.raises(ConfigError, match=r"takes images of shape \(3, 16, 16\), got \(3, 32, 32\)"):
        extractor.describe(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_an_image_is_judged_alone() -> None:
    model = Classifier(ClassifierConfig(12, 4, width=8, blocks=2)).eval()
    images = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


def test_folders_that_hold_none_are_told(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"needs --weights FOLDER; python -m scaling\.fidelity\.train_class"
    ):
        load_extractor("classifier", None, CPU)
    with pytest.raises(RecordsError, match="no such file"):
        load_extractor("classifier", str(tmp_path), CPU)
    run = RunFolder(tmp_path / "run")
    run.create({"data": to_dict(data)})
    for name in ("one", "other"):
        options = ["--steps", "1", "--batch", "2", "--width", "8", "--seed", str(len(name))]
        train_classifier.main([str(run.path), "--out", str(tmp_path / name), *options])
    (tmp_path / "other" / "weights.safetensors").replace(tmp_path / "one" / "weights.safetensors")
    with pytest.raises(RecordsError, match="do not belong together"):
        load_classifier(tmp_path / "one")
    with pytest.raises(ConfigError, match="--steps must be positive, got 0"):
        train_classifier.main([str(run.path), "--out", str(tmp_path / "x"), "--steps", "0"])


def test_channels_double_until_eight_pixels_are_left() -> None:
    assert ClassifierConfig(32, 10, 32).channels == (32, 64, 128)
    assert ClassifierConfig(8, 10, 32).channels == (32,)
    assert ClassifierConfig(256, 10, 32).channels == (32, 64, 128, 256, 256, 256)
    with pytest.raises(ConfigError, match="width must be a multiple of 8, got 12"):
        ClassifierConfig(32, 10, 12)
