"""From images to numbers: batches and processes change nothing, references survive their files."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scaling.fidelity import collect as collecting
from scaling.fidelity.collect import Images, Share, as_uint8, chosen, collect
from scaling.fidelity.features import NamedExtractor
from scaling.fidelity.manifold import precision_recall
from scaling.fidelity.measure import FidelityResult, measure
from scaling.fidelity.reference import Reference, load_reference, make_reference, save_reference
from scaling.fidelity.statistics import Gaussian, frechet_distance
from scaling.schema import ConfigError

CPU = torch.device("cpu")


class Corners:
    """The pixels of the top left corner as features, and a softmax over its colours."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW[:, :, :2, :2].flatten(1)

    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW[:, :, 0, 0].softmax(dim=1)


class FeaturesOnly:
    """As ``Corners`` without classes."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        return Corners().features(images_B3HW)


CORNERS = NamedExtractor(Corners(), "corners", CPU)


def pictures(seed: int, top: int = 256) -> Images:
    """Noise that depends on the index alone, below ``top``."""

    def by_index(indices: Sequence[int]) -> Tensor:
        made = [np.random.default_rng((seed, i)).integers(0, top, (3, 4, 4), dtype=np.uint8) for i in indices]
        return torch.from_numpy(np.stack(made))

    return by_index


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference(pictures(0), 80, CORNERS, "noise")


def together(world: int, work: Callable[[Share], Any]) -> list[Any]:
    """``work`` in ``world`` threads that wait for each other as processes do."""
    barrier = threading.Barrier(world, timeout=30)
    board: list[Any] = [None] * world
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            board[rank] = value
            barrier.wait()
            found = list(board)
            barrier.wait()
            return found

        results[rank] = work(Share(rank, world, gather))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_close(one: FidelityResult, other: FidelityResult) -> None:
    for field in dataclasses.fields(FidelityResult):
        value, expected = getattr(one, field.name), getattr(other, field.name)
        assert value == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected)


def test_the_numbers_are_those_of_all_features_at_once(reference: Reference) -> None:
    result = measure(pictures(1, 200), 60, reference, CORNERS, batch=7, keep=40)
    features, probabilities = CORNERS.describe(pictures(1, 200)(range(60)))
    assert probabilities is not None
    real = CORNERS.describe(pictures(0)(range(80)))[0]
    values = features.double().numpy()
    generated = Gaussian(values.mean(axis=0), np.cov(values, rowvar=False))
    assert result.fid == pytest.approx(frechet_distance(generated, reference.gaussian), rel=1e-9)
    assert (result.precision, result.recall) == precision_recall(real, features[chosen(60, 40)])
    scores = []
    for part in probabilities.double().split(6):
        scores.append((part * (part / part.mean(dim=0)).log()).sum(dim=1).mean().exp().item())
    assert (result.is_mean, result.is_std) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert (result.images, result.manifold_images, result.reference_images) == (60, 40, 80)
    assert (result.extractor, result.reference) == ("corners", "noise")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_images_and_get_one_result(reference: Reference, world: int) -> None:
    alone = measure(pictures(1), 50, reference, CORNERS, keep=33)
    found = together(
        world, lambda share: measure(pictures(1), 50, reference, CORNERS, batch=5, keep=33, share=share)
    )
    for result in found:
        assert_close(result, alone)


def test_moments_do_not_depend_on_how_many_rows_they_take_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(pictures(2), 50, CORNERS, batch=7).moments
    monkeypatch.setattr(collecting, "FOLDED", 16)
    parts = collect(pictures(2), 50, CORNERS, batch=7).moments
    assert (parts.count, whole.count) == (50, 50)
    np.testing.assert_allclose(parts.scatter_DD, whole.scatter_DD, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 300), st.integers(1, 300))
def test_some_images_are_a_fixed_choice_spread_over_all(count: int, keep: int) -> None:
    found = chosen(count, keep)
    assert np.array_equal(found, np.unique(found))
    assert len(found) == min(count, keep)
    assert set(found) <= set(range(count))
    assert set(chosen(count, max(1, keep // 2))) <= set(found)
    if keep >= 50:  # a folder sorted by class has its last classes in it
        assert found.min() < count / 4
        assert found.max() >= 3 * count / 4 - 1


def test_features_come_back_in_the_order_of_the_images() -> None:
    every = CORNERS.describe(pictures(2)(range(23)))[0]
    alone = collect(pictures(2), 23, CORNERS, keep=17).features_ND
    assert torch.equal(alone, every[chosen(23, 17)])
    for world in (2, 4):
        for part in together(
            world, lambda share: collect(pictures(2), 23, CORNERS, batch=3, keep=17, share=share)
        ):
            assert torch.equal(part.features_ND, alone)


def test_equal_images_have_no_distance(reference: Reference) -> None:
    result = measure(pictures(0), 80, reference, CORNERS)
    assert result.fid == pytest.approx(0, abs=1e-9)
    assert (result.precision, result.recall) == (1, 1)


def test_without_probabilities_there_is_no_inception_score(reference: Reference) -> None:
    found = measure(pictures(0), 20, reference, NamedExtractor(FeaturesOnly(), "corners", CPU))
    assert (found.is_mean, found.is_std) == (None, None)
    assert set(found.record()) == {
        "fid", "is", "is_std", "precision", "recall", "images", "manifold_images",
        "extractor", "reference", "reference_images",
    }  # fmt: skip


def test_floats_are_rounded_to_the_pixels_of_a_file() -> None:
    images = torch.tensor([-2, -1, -0.999, 0.001, 0.5, 1, 7]).expand(1, 3, 1, 7)
    assert as_uint8(images)[0, 0, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(as_uint8(pixels.float() / 127.5 - 1), pixels)
    with pytest.raises(ConfigError, match="some pixels of the images are not finite numbers"):
        as_uint8(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(ConfigError, match=r"of shape \(B, 3, H, W\), got \(1, 2, 2\)"):
        as_uint8(torch.zeros(1, 2, 2))


# -- references in files ---------------------------------------------------------------------------


def test_a_saved_reference_gives_the_same_numbers(reference: Reference, tmp_path: Path) -> None:
    file = tmp_path / "made" / "reference.npz"
    save_reference(file, reference, CORNERS)
    again = load_reference(file, CORNERS)
    assert [p.name for p in file.parent.iterdir()] == ["reference.npz"]
    assert measure(pictures(1), 30, again, CORNERS) == measure(pictures(1), 30, reference, CORNERS)
    with pytest.raises(ConfigError, match="was made with extractor corners, not others"):
        load_reference(file, NamedExtractor(Corners(), "others", CPU))


def test_files_of_other_toolkits_are_read(reference: Reference, tmp_path: Path) -> None:
    mu, sigma = reference.gaussian.mean_D, reference.gaussian.covariance_DD
    images = pictures(0)(range(80)).permute(0, 2, 3, 1).numpy()
    expected = measure(pictures(1), 30, reference, CORNERS)
    known = {"fid": expected.fid, "precision": expected.precision, "recall": expected.recall}

    def numbers(**content: np.ndarray) -> dict[str, Any]:
        np.savez(tmp_path / "other.npz", allow_pickle=False, **content)
        found = load_reference(tmp_path / "other.npz", CORNERS)
        assert found.identity.startswith("other:")
        record = measure(pictures(1), 30, found, CORNERS).record()
        return {name: record[name] for name in known}

    gaussian_alone = numbers(mu=mu, sigma=sigma)
    assert gaussian_alone == {"fid": expected.fid, "precision": None, "recall": None}
    assert numbers(mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=images) == known
    assert numbers(arr_0=images) == pytest.approx(known, rel=1e-9)
    assert reference.features_ND is not None
    assert numbers(features=reference.features_ND.numpy()) == pytest.approx(known, rel=1e-9)


def test_files_that_are_no_reference_are_told(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message) as told:
            load_reference(file, CORNERS)
        assert "\n" not in str(told.value)

    refused("no such reference file")
    file.write_bytes(b"text")
    refused("not an .npz file of plain arrays")
    np.savez(file, mu=np.array([{}], dtype=object), sigma=np.eye(1))
    refused("not an .npz file of plain arrays")
    np.savez(file, mean=np.zeros(3))
    refused("expected mu and sigma, or images as arr_0, or features; it has mean")
    np.savez(file, mu=np.zeros((3, 1)), sigma=np.eye(3))
    refused(r"mu has shape \(3, 1\), expected 1 dimensions")
    np.savez(file, mu=np.full(3, np.nan), sigma=np.eye(3))
    refused("mu has numbers that are not finite")
    np.savez(file, mu=np.zeros(3), features=np.zeros((5, 3)))
    refused("mu and sigma are one Gaussian, it has only one of them")
    np.savez(file, mu=np.zeros(3), sigma=np.eye(4))
    refused(r"sigma has shape \(4, 4\), mu \(3,\): not one Gaussian")
    np.savez(file, arr_0=np.zeros((5, 4, 4, 1), dtype=np.uint8))
    refused(r"arr_0 must be images \(N, H, W, 3\) of uint8")
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ConfigError, match="features of one kind, got 12 and 3"):
        measure(pictures(0), 20, load_reference(file, CORNERS), CORNERS)
