"""The FID Inception: keys and shapes of the published file, borders and resizing by hand, and the numbers of
another implementation for weights that can be made again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaling.fidelity.inception import Inception, Resize, corner_weights, network_input
from tests.scaling.fidelity.weights import random_images, random_weights

SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_4a_3x3.bn.running_var": (192,),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
    "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch3x3_2a.conv.weight": (384, 384, 1, 3),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}
OTHERS: dict[Resize, dict[str, list[float]]] = {
    "tf1": {
        "mean": [3.7045316219594895, 3.7184268380726877],
        "norm": [300.58276115092576, 301.82317630464496],
        "centre": [1067.5488489375873, 1067.6621888131026],
        "entropy": [0.8101885880482781, 0.8864972711087244],
    },
    "half-pixel": {
        "mean": [3.708974846983388, 3.728683395960047],
        "norm": [301.01193100470834, 302.71713168387674],
        "centre": [1067.8243474104559, 1067.7891296209618],
    },
}
"""From torch-fidelity 0.4.0's Inception in float64, with ``random_weights`` and ``random_images(2, 64)``; for
half-pixel its input was what pytorch-fid makes of the same images."""


@pytest.fixture(scope="module")
def model() -> Inception:
    found = Inception()
    found.load_state_dict(random_weights(), strict=False)
    return found


def test_keys_and_shapes_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        network = Inception()
    state = {k: tuple(v.shape) for k, v in network.state_dict().items() if "num_batches" not in k}
    assert {key: state[key] for key in SHAPES} == SHAPES
    assert len(state) == 94 * 5 + 2
    # Inception-v3 without its auxiliary head has 21 785 568 parameters before the last layer.
    assert sum(p.numel() for p in network.parameters()) == 21_785_568 + 2049 * 1008


def test_sides_and_channels_of_every_block(model: Inception) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
        for name, module in model.named_children()
        if name != "fc"
    ]
    assert model.features(torch.zeros(1, 3, 40, 30)).shape == (1, 2048)
    for handle in handles:
        handle.remove()
    assert seen["Conv2d_2b_3x3"] == (64, 147, 147)
    assert seen["Conv2d_4a_3x3"] == (192, 71, 71)
    assert seen["Mixed_5b"] == (256, 35, 35)
    assert seen["Mixed_6a"] == seen["Mixed_6e"] == (768, 17, 17)
    assert seen["Mixed_7a"] == (1280, 8, 8)
    assert seen["Mixed_7b"] == seen["Mixed_7c"] == (2048, 8, 8)


@pytest.mark.parametrize("resize", ["tf1", "half-pixel"])
def test_numbers_are_those_of_another_implementation(model: Inception, resize: Resize) -> None:
    images = random_images(2, 64).float() / 127.5 - 1
    model.resize = resize
    features, probabilities = model.features_and_probabilities(images)
    features, probabilities = features.double(), probabilities.double()
    found = {
        "mean": features.mean(dim=1),
        "norm": features.norm(dim=1),
        "centre": (features * torch.arange(2048)).sum(dim=1) / features.sum(dim=1),
        "entropy": -(probabilities * probabilities.log()).sum(dim=1),
    }
    for name, expected in OTHERS[resize].items():
        assert found[name].tolist() == pytest.approx(expected, rel=1e-5), name


def test_average_pools_do_not_count_the_padding_and_the_last_one_takes_the_largest(model: Inception) -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3)
    average = model.get_submodule("Mixed_5b").pooled(x)  # type: ignore[operator]
    assert average[0, 0].tolist() == [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]
    largest = model.get_submodule("Mixed_7c").pooled(-x)  # type: ignore[operator]
    assert largest[0, 0].tolist() == [[0, 0, -1], [0, 0, -1], [-3, -3, -4]]


def test_probabilities_leave_out_the_bias_of_the_last_layer(model: Inception) -> None:
    images = random_images(1, 32).float() / 127.5 - 1
    features, probabilities = model.features_and_probabilities(images)
    assert torch.equal(model.features(images), features)
    assert torch.equal(model.probabilities(images), probabilities)
    torch.testing.assert_close(probabilities, torch.softmax(features @ model.fc.weight.T, dim=1))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(1))


def test_resizing_from_the_corner_by_hand() -> None:
    assert corner_weights(2, 4).tolist() == [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    assert corner_weights(4, 2).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def plane(pixels: Tensor) -> Tensor:
    """uint8 rows as three equal channels of one image in [−1, 1]."""
    return (pixels.float() / 127.5 - 1).expand(1, 3, -1, -1)


def test_inputs_of_the_network_by_hand() -> None:
    """Two pixels, 0 and 255, side by side."""
    image = plane(torch.tensor([[0, 255]], dtype=torch.uint8))
    half = network_input(image, "half-pixel")
    assert half.shape == (1, 3, 299, 299)
    # Output i reads position (i + ½)·2/299 − ½, held within the image; 149 is the middle of 299.
    expected = [-1, -1, 2 * (100.5 * 2 / 299 - 0.5) - 1, 0, 1, 1]
    assert half[0, 0, 7, [0, 74, 100, 149, 224, 298]].tolist() == pytest.approx(expected, abs=1e-6)
    corner = network_input(image, "tf1")
    expected = [(255 * min(1, i * 2 / 299) - 128) / 128 for i in (0, 50, 149, 150, 298)]
    assert corner[0, 2, 298, [0, 50, 149, 150, 298]].tolist() == pytest.approx(expected, abs=1e-6)


def test_shrinking_does_not_smooth() -> None:
    """Every other pixel of a picture twice the size from the corner; stripes stay stripes."""
    stripes = plane(torch.tensor([[0, 255] * 299], dtype=torch.uint8).expand(598, -1))
    assert torch.equal(network_input(stripes, "tf1").unique(), torch.tensor([-1.0]))
