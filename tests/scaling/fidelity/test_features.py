"""Extractors are named on a command line; what is missing or wrong is told in one line."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scaling.fidelity.features import NamedExtractor, load_extractor
from scaling.fidelity.weights import INCEPTION_FILE
from scaling.schema import ConfigError
from tests.scaling.fidelity.weights import random_images, random_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in both kinds of file; the .pth has the batch norms' counters, as some do."""
    root, state = tmp_path_factory.mktemp("weights"), random_weights()
    save_file(state, root / "inception.safetensors")
    torch.save(state | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}, root / "inception.pth")
    return {"pth": root / "inception.pth", "safetensors": root / "inception.safetensors"}


def test_both_kinds_of_file_are_one_extractor(files: dict[str, Path]) -> None:
    images = random_images(2, 32)
    found = [load_extractor("inception", str(file), CPU) for file in files.values()]
    adm = load_extractor("inception-adm", str(files["pth"]), CPU)
    assert found[0].identity == found[1].identity
    assert adm.identity.partition(":")[2] == found[0].identity.partition(":")[2]
    assert adm.identity != found[0].identity
    features, probabilities = found[0].describe(images)
    assert probabilities is not None
    assert (features.shape, probabilities.shape) == ((2, 2048), (2, 1008))
    assert torch.equal(features, found[1].describe(images)[0])
    assert not torch.equal(features, adm.describe(images)[0])


def test_weights_come_from_the_hub_by_name(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository != "someone/inception":
            raise OSError("no such repository\nmore lines")
        return str(files["pth"])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = load_extractor("inception", "hf://someone/inception/folder/file.pth", CPU)
    assert asked == [("someone/inception", "folder/file.pth")]
    assert found.identity == load_extractor("inception", str(files["pth"]), CPU).identity
    with pytest.raises(ConfigError, match=r"not to be had from the hub \(no such repository\)$"):
        load_extractor("inception", "hf://nobody/inception/file.pth", CPU)
    with pytest.raises(ConfigError, match="expected hf://OWNER/NAME/FILE"):
        load_extractor("inception", "hf://someone/inception", CPU)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"needs huggingface_hub: pip install 'varscale\[metrics\]'"):
        load_extractor("inception", "hf://someone/inception/file.pth", CPU)


def test_missing_weights_say_where_the_usual_file_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"needs weights: give --weights FILE .*{INCEPTION_FILE}"):
        load_extractor("inception", None, CPU)
    with pytest.raises(ConfigError, match=f"there.pth: no such file; .*{INCEPTION_FILE}"):
        load_extractor("inception-adm", str(tmp_path / "there.pth"), CPU)


class Trap:
    """What a pickled file could do."""

    def __reduce__(self) -> Any:
        return (Path("/").joinpath, ("x",))


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message) as told:
            load_extractor("inception", str(file), CPU)
        assert "\n" not in str(told.value)

    file.write_bytes(b"not weights")
    refused("not a readable file of weights")
    file.write_bytes(pickle.dumps(Trap(), protocol=2))
    refused("not a readable file of weights")
    torch.save([torch.zeros(1)], file)
    refused("expected a state dict of tensors")
    state = random_weights()
    torch.save({k: v for k, v in state.items() if k != "fc.bias"}, file)
    refused("lacks 1 of 472 weights, such as 'fc.bias'")
    torch.save(state | {"AuxLogits.fc.bias": torch.zeros(1)}, file)
    refused("has unknown 1 of 472 weights, such as 'AuxLogits.fc.bias'")
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, file)
    refused(r"'fc.weight' has shape \(1000, 2048\), expected \(1008, 2048\)")


class Means(nn.Module):
    """Mean colour of an image."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        assert not self.training
        return images_B3HW.mean(dim=(2, 3))


def test_a_user_brings_an_extractor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = ModuleType("own_extractor")
    own.means, own.nothing = Means, lambda: "text"  # type: ignore[attr-defined]
    own.__file__ = str(tmp_path / "own_extractor.py")
    Path(own.__file__).write_text("VERSION = 1")
    monkeypatch.setitem(sys.modules, "own_extractor", own)
    found = load_extractor("own_extractor:means", None, CPU)
    features, probabilities = found.describe(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    assert probabilities is None
    assert re.fullmatch("own_extractor:means@[0-9a-f]{12}", found.identity)
    assert load_extractor("own_extractor:means", None, CPU).identity == found.identity
    Path(own.__file__).write_text("VERSION = 2")
    assert load_extractor("own_extractor:means", None, CPU).identity != found.identity, "it is another one"
    assert features.tolist() == [[-1], [1]]
    for name, message in (
        ("own_extractor:missing", "has no attribute 'missing'; expected MODULE:FUNCTION"),
        ("no_such_module_here:f", "No module named 'no_such_module_here'; expected MODULE:FUNCTION"),
        ("own_extractor:nothing", r"returned a str without features\(images\)"),
        (
            "incepton",
            "unknown extractor 'incepton'; known: inception, inception-adm, classifier, MODULE:FUNCTION",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_extractor(name, None, CPU)
    with pytest.raises(ConfigError, match="--weights is for inception, inception-adm, classifier; "):
        load_extractor("own_extractor:means", "file.pth", CPU)


class Broken:
    """Rows that are too few, or no numbers."""

    def __init__(self, features: Tensor) -> None:
        self.values = features

    def features(self, images_B3HW: Tensor) -> Tensor:
        return self.values


def test_features_are_one_row_of_numbers_per_image() -> None:
    for values, message in (
        (torch.zeros(3, 4), r"features of 2 images have shape \(3, 4\), expected \(2, n\)"),
        (torch.zeros(2, 4, 1), r"shape \(2, 4, 1\)"),
        (torch.full((2, 4), torch.nan), "some features are not finite numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            NamedExtractor(Broken(values), "broken", CPU).describe(random_images(2, 4))
