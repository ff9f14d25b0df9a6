"""The study's own classifier: it learns what can be learnt, says how well, and is the same made twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scaling.config import DataConfig, LaunchConfig
from scaling.data.sources import open_source
from scaling.data.transforms import view_array
from scaling.fidelity import train_classifier
from scaling.fidelity.classifier import Classifier, ClassifierConfig, find_classifier, load_classifier
from scaling.fidelity.features import load_extractor
from scaling.fidelity.weights import digest
from scaling.records import RecordsError, RunFolder, read_json, write_json
from scaling.requests import ClassifierRun, ClassifierTraining, same_images
from scaling.schema import ConfigError, to_dict

CPU = torch.device("cpu")
TRAINING = ClassifierTraining(width=8, steps=20, batch=12, lr=1e-2)


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


def trained(data: DataConfig, **options: Any) -> tuple[Classifier, dict[str, Any]]:
    training = replace(TRAINING, **options)
    return train_classifier.train_classifier(open_source(data), data, training, CPU)


def test_it_learns_and_says_how_well(data: DataConfig) -> None:
    model, facts = trained(data)
    assert facts["val_accuracy"] == 1
    assert facts["chance"] == 0.5
    assert (facts["val_images"], facts["train_images"]) == (16, 36)
    again, _ = trained(data)
    assert digest(model.state_dict()) == digest(again.state_dict())
    part, facts = trained(data, images=9)
    assert facts["train_images"] == 9
    assert digest(part.state_dict()) != digest(model.state_dict())


def test_accuracy_is_counted_on_centre_crops_of_all_validation_images(data: DataConfig) -> None:
    """A model that is told nothing names one class for ever."""
    source = open_source(data)
    model, facts = trained(data, steps=1, batch=5, lr=1e-12)
    crops = torch.from_numpy(np.stack([view_array(source.image("val", i), data, None) for i in range(16)]))
    labels = torch.tensor([source.label("val", i) for i in range(16)])
    guesses = model(crops.permute(0, 3, 1, 2).float() / 127.5 - 1).argmax(dim=1)
    assert facts["val_accuracy"] == (guesses == labels).float().mean().item()


def test_batches_are_cut_at_any_place_and_mirrored_half_of_the_time() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8))
    indices = np.arange(400) % 4
    found = train_classifier.cuts(pixels, indices, 4, True, (0, 3))
    expected = {}
    for i in range(4):
        for top in range(3):
            for left in range(3):
                cut = pixels[i, top : top + 4, left : left + 4]
                expected[i, cut.numpy().tobytes()] = False
                expected[i, cut.flip(1).numpy().tobytes()] = True
    flips = [expected[int(i), cut.numpy().tobytes()] for i, cut in zip(indices, found, strict=True)]
    assert 140 < sum(flips) < 260  # half of 400, six standard deviations
    assert len({cut.numpy().tobytes() for cut in found}) == len(expected), "every place occurs"
    plain = train_classifier.cuts(pixels, indices, 4, False, (0, 3))
    assert not any(expected[int(i), cut.numpy().tobytes()] for i, cut in zip(indices, plain, strict=True))
    assert torch.equal(found, train_classifier.cuts(pixels, indices, 4, True, (0, 3)))
    assert not torch.equal(found, train_classifier.cuts(pixels, indices, 4, True, (0, 4)))


def test_the_job_leaves_an_extractor_that_is_found_by_its_images(data: DataConfig, tmp_path: Path) -> None:
    out = make(tmp_path, data)
    train_classifier.main([str(out)])
    assert RunFolder(out).status()["state"] == "done"
    model, identity = load_classifier(out)
    expected, facts = trained(data)
    assert read_json(out / "classifier.json")["facts"] == json.loads(json.dumps(facts))
    assert identity == f"classifier:{digest(expected.state_dict())[:12]}@1.000"
    assert find_classifier(tmp_path, replace(data, views=3, flip=True, path="elsewhere")) == out
    with pytest.raises(ConfigError, match="has none of these images"):
        find_classifier(tmp_path, replace(data, train_images=10))
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


def make(root: Path, data: DataConfig, **options: Any) -> Path:
    """The folder of a classifier to train."""
    run = ClassifierRun(same_images(data), replace(TRAINING, **options))
    folder = RunFolder(root / run.run_id)
    folder.create(to_dict(run))
    write_json(folder.path / "launch.json", to_dict(LaunchConfig(device="cpu", threads=1)))
    return folder.path


def test_an_image_is_judged_alone() -> None:
    model = Classifier(ClassifierConfig(12, 4, width=8, blocks=2)).eval()
    images = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


def test_folders_that_hold_none_are_told(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs --weights FOLDER; 'run_sweep\.py classifier RECIPE'"):
        load_extractor("classifier", None, CPU)
    with pytest.raises(RecordsError, match="no such file"):
        load_extractor("classifier", str(tmp_path), CPU)
    one, other = (make(tmp_path, data, steps=1, batch=2, seed=seed) for seed in (0, 1))
    for folder in (one, other):
        train_classifier.main([str(folder)])
    (other / "weights.safetensors").replace(one / "weights.safetensors")
    with pytest.raises(RecordsError, match="do not belong together"):
        load_classifier(one)


def test_images_that_do_not_fit_into_memory_are_refused(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_classifier, "MEMORY_SHARE", 1e-12)
    with pytest.raises(ConfigError, match=r"36 training images of 18 px are .* GiB; --images 0 would fit"):
        trained(data)


def test_channels_double_until_eight_pixels_are_left() -> None:
    assert ClassifierConfig(32, 10, 32).channels == (32, 64, 128)
    assert ClassifierConfig(8, 10, 32).channels == (32,)
    assert ClassifierConfig(256, 10, 32).channels == (32, 64, 128, 256, 256, 256)
    with pytest.raises(ConfigError, match="width must be a multiple of 8, got 12"):
        ClassifierConfig(32, 10, 12)
