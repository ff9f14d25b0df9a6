"""The job on a finished run: its line in the records, its reference, several processes, and its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from scaling.config import DataConfig, SamplingConfig
from scaling.data.transforms import view_array
from scaling.fidelity import job
from scaling.fidelity.collect import chosen
from scaling.generation import sample_images
from scaling.pretrained import load_model
from scaling.records import FolderBusyError, RecordsError, RunFolder
from scaling.schema import ConfigError
from scaling.tokenizer.vqvae import load_tokenizer
from tests.scaling import tiny
from tests.scaling.data_fixtures import image_folder
from tests.scaling.test_trainer import run

NAME = f"{__name__}:extractor"
REPOSITORY = Path(__file__).resolve().parents[3]


class Pooled:
    """Mean colours of the quarters of an image."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images_B3HW, 2).flatten(1)

    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        return (10 * images_B3HW.mean(dim=(2, 3))).softmax(dim=1)


def extractor() -> Pooled:
    return Pooled()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


Made = tuple[RunFolder, Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A finished run, its tokenizer's folder, and images for its data."""
    root = tmp_path_factory.mktemp("fidelity")
    chain = tiny.make_tokens(root)
    AcceleratorState._reset_state(reset_partial_state=True)
    finished = run(root / "run", chain, tiny.run_config(steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    images = image_folder(root / "images", {"a": 10, "b": 10, "c": 10}, {"a": 4, "b": 3, "c": 3})
    return finished, chain[1], images


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> RunFolder:
    """A copy of the run whose data is a folder of images."""
    finished = made[0]
    copy = RunFolder(tmp_path / "run")
    config = finished.config()
    config["data"] |= {"source": "folder", "path": str(made[2])}
    copy.create(config)
    (copy.path / "final").mkdir()
    for name in ("metrics.jsonl", "final/weights.safetensors"):
        (copy.path / name).write_bytes((finished.path / name).read_bytes())
    return copy


def arguments(folder: RunFolder, made: Made, *more: str) -> list[str]:
    return [
        str(folder.path), "--tokenizer", str(made[1]), "--images", "20", "--extractor", NAME,
        "--device", "cpu", *more,
    ]  # fmt: skip


def measured(folder: RunFolder, made: Made, *more: str) -> dict[str, Any]:
    job.main(arguments(folder, made, *more))
    return folder.metrics("fidelity")[-1]


def test_a_line_with_costs_and_settings_is_added(folder: RunFolder, made: Made) -> None:
    before = folder.metrics()
    line = measured(folder, made, "--guidance", "2", "--top-p", "0.9", "--seed", "5")
    last = folder.metrics("eval")[-1]
    assert {key: line[key] for key in job.FROM_EVALUATION} == {key: last[key] for key in job.FROM_EVALUATION}
    assert line["fid"] > 0
    assert 1 <= line["is"] <= 3
    assert 0 <= line["precision"] <= 1
    assert 0 <= line["recall"] <= 1
    assert (line["images"], line["reference_images"], line["manifold_images"]) == (20, 30, 20)
    assert (line["guidance"], line["top_k"], line["top_p"], line["seed"]) == (2, 0, 0.9, 5)
    assert line["extractor"] == NAME
    assert line["reference"].startswith("train-")
    assert folder.metrics()[:-1] == before


def test_settings_of_one_step_live_side_by_side_and_a_repeat_counts_once(
    folder: RunFolder, made: Made
) -> None:
    first = measured(folder, made, "--guidance", "0")
    other = measured(folder, made, "--guidance", "3")
    assert measured(folder, made, "--guidance", "0") == first
    assert folder.metrics("fidelity") == [other, first]


def test_pictures_are_those_of_sampling_one_by_one(folder: RunFolder, made: Made) -> None:
    sampling = SamplingConfig(guidance=1.5, seed=7)
    sample, config = job.sampler(folder, made[1], sampling, torch.device("cpu"))
    model, tokenizer = load_model(folder)[0], load_tokenizer(made[1] / "tokenizer")
    expected = sample_images(model, tokenizer, [i % 3 for i in range(6)], sampling)
    torch.testing.assert_close(sample(range(1, 6, 2)), expected[1::2])
    assert config.model.num_classes == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_images_are_centre_crops(made: Made, split: str) -> None:
    data = DataConfig(source="folder", path=str(made[2]), resolution=8)
    images, count, name = job.real_images(data, split, None, threads=2)  # type: ignore[arg-type]
    assert count == {"train": 30, "val": 10}[split]
    assert name.startswith(f"{split}-")
    source = job.open_source(data)
    expected = np.stack([view_array(source.image(split, i), data, None) for i in (7, 2)])  # type: ignore[arg-type]
    assert np.array_equal(images([7, 2]).permute(0, 2, 3, 1).numpy(), expected)
    some, part, other = job.real_images(data, split, 6, threads=2)  # type: ignore[arg-type]
    assert part == 6
    assert other == name.rpartition("-")[0] + "-6"
    assert torch.equal(some(range(6)), images(chosen(count, 6).tolist()))


def test_a_saved_reference_gives_the_same_line(folder: RunFolder, made: Made, tmp_path: Path) -> None:
    file = tmp_path / "reference.npz"
    first = measured(folder, made, "--reference-data", "val", "--save-reference", str(file))
    assert first["reference_images"] == 10
    assert measured(folder, made, "--reference-data", str(file)) == first
    assert len(folder.metrics("fidelity")) == 1
    with pytest.raises(ConfigError, match="are for --reference-data train or val"):
        job.main(arguments(folder, made, "--reference-data", str(file), "--reference-images", "5"))


def test_images_may_have_moved(folder: RunFolder, made: Made, tmp_path: Path) -> None:
    first = measured(folder, made)
    made[2].rename(tmp_path / "moved")
    try:
        with pytest.raises(ConfigError, match="images"):
            measured(folder, made)
        assert measured(folder, made, "--data-path", str(tmp_path / "moved")) == first
    finally:
        (tmp_path / "moved").rename(made[2])


def test_two_processes_give_the_numbers_of_one(folder: RunFolder, made: Made) -> None:
    alone = measured(folder, made, "--batch", "4")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "scaling.fidelity.job", *arguments(folder, made, "--batch", "4")],
        check=False, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (together,) = folder.metrics("fidelity")
    for key, value in alone.items():
        assert together[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


def test_what_is_missing_is_told_before_anything_is_sampled(folder: RunFolder, made: Made) -> None:
    with pytest.raises(ConfigError, match="extractor inception needs weights"):
        job.main([*arguments(folder, made), "--extractor", "inception"])
    with pytest.raises(ConfigError, match="--reference-images asks for 31, the train split has 30"):
        job.main(arguments(folder, made, "--reference-images", "31"))
    with pytest.raises(ConfigError, match="--batch must be at least 1, got 0"):
        job.main(arguments(folder, made, "--batch", "0"))
    with folder.lock(), pytest.raises(FolderBusyError):
        measured(folder, made)
    (folder.path / "metrics.jsonl").write_text("")
    with pytest.raises(RecordsError, match="no evaluation in it"):
        job.main(arguments(folder, made))
    (folder.path / "final" / "weights.safetensors").unlink()
    with pytest.raises(RecordsError, match="has no final weights yet"):
        job.main(arguments(folder, made))
