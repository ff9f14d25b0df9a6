"""Rejection sampling keeps, per class, the images that the classifier is surest of; seeds draw them again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scaling.config import ConfigError
from scaling.rejection import candidates_for, load_classifier, reject

LABELS = [2, 0, 2, 2, 0, 2, 0, 0, 2, 2, 1]


def sample(labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """An image is its seed's noise, and its class in a corner."""
    images = [torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    for image, label in zip(images, labels, strict=True):
        image[0, 0, 0] = label
    return torch.stack(images)


class Brightness:
    """Probability of the class that an image says it is of: its mean."""

    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        result = torch.zeros(len(images_B3HW), 4)
        for row, image in enumerate(images_B3HW):
            result[row, int(image[0, 0, 0])] = image[1:].mean()
        return result


def module_classifier() -> torch.nn.Module:
    """What ``MODULE:FUNCTION`` names."""
    classifier = torch.nn.Flatten()
    classifier.probabilities = lambda images: images.flatten(1).softmax(-1)  # type: ignore[assignment]
    return classifier


def nothing() -> object:
    """No classifier."""
    return object()


def test_the_best_of_each_class_are_kept_by_count_and_by_share() -> None:
    everything = sample(LABELS, range(10, 10 + len(LABELS)))
    means = everything[:, 1:].mean((1, 2, 3)).tolist()
    for keep, wanted in ((2, {2: 2, 0: 2}), (0.5, {2: 3, 0: 2, 1: 1})):
        labels = LABELS if keep == 0.5 else LABELS[:-1]
        result = reject(sample, Brightness(), labels, keep=keep, seed=10, batch=4)
        for label, count in wanted.items():
            mine = sorted((i for i in range(len(labels)) if labels[i] == label), key=lambda i: -means[i])
            kept = [entry for entry in result.kept if entry.label == label]
            assert [entry.seed - 10 for entry in kept] == mine[:count]
            assert [entry.probability for entry in kept] == pytest.approx([means[i] for i in mine[:count]])
            facts = result.acceptance[label]
            assert (facts.candidates, facts.kept) == (len(mine), count)
            assert facts.threshold == pytest.approx(means[mine[count - 1]])
            assert facts.mean == pytest.approx(sum(means[i] for i in mine) / len(mine))
            assert facts.mean_kept == pytest.approx(sum(means[i] for i in mine[:count]) / count)


def test_a_kept_image_can_be_drawn_again_and_batches_change_nothing() -> None:
    results = [reject(sample, Brightness(), LABELS, keep=0.4, seed=3, batch=batch) for batch in (1, 3, 100)]
    for entry in results[0].kept:
        assert torch.equal(sample([entry.label], [entry.seed])[0], entry.image_3HW)
    for other in results[1:]:
        assert [(e.label, e.seed) for e in other.kept] == [(e.label, e.seed) for e in results[0].kept]


def test_kept_images_do_not_keep_their_batches() -> None:
    result = reject(sample, Brightness(), LABELS, keep=0.4, batch=100)
    assert all(entry.image_3HW.untyped_storage().nbytes() == 3 * 4 * 4 * 4 for entry in result.kept)


@given(st.integers(1, 500), st.floats(0.001, 1))
def test_as_few_candidates_as_keep_what_is_wanted(wanted: int, share: float) -> None:
    count = candidates_for(wanted, share)
    assert count >= wanted
    labels = [0] * count
    kept = reject(lambda some, _: torch.zeros(len(some), 1), _One(), labels, keep=share, batch=10**6).kept
    assert len(kept) == wanted
    if count > wanted:
        assert int(share * (count - 1) + 1e-9) < wanted


def test_one_picture_too_is_the_best_of_many() -> None:
    assert candidates_for(1, 0.05) == 20


class _One:
    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        return torch.ones(len(images_B3HW), 1)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="keep 3 of class 1, of which 1 are drawn"):
        reject(sample, Brightness(), LABELS, keep=3)
    with pytest.raises(ConfigError, match="keep is a share of the candidates"):
        reject(sample, Brightness(), LABELS, keep=1.5)
    with pytest.raises(ConfigError, match=r"probabilities of 11 images have shape \(11, 1\)"):
        reject(sample, _One(), LABELS, keep=1.0)
    assert hasattr(load_classifier("tests.scaling.test_rejection:module_classifier", "cpu"), "probabilities")
    for name in ("tests.scaling.test_rejection:absent", "no.such.module:f"):
        with pytest.raises(ConfigError, match="must be importable as MODULE:FUNCTION"):
            load_classifier(name, "cpu")
    with pytest.raises(ConfigError, match=r"without probabilities\(images\)"):
        load_classifier("tests.scaling.test_rejection:nothing", "cpu")
