"""Timing a machine: the trainers' own steps, whatever the settings, and a result that a plan can use."""

import dataclasses
from pathlib import Path

import pytest

from scaling import probe
from scaling.config import DataConfig, TokenizerRunConfig, TokenizerTrainConfig, to_dict
from scaling.records import RunFolder, read_json, write_json
from tests.scaling.tiny import DATA, LAUNCH, TOKENIZER, make_run, run_config

PARTS = ("flops_per_second", "evaluation_flops_per_second", "checkpoint_seconds", "inside_seconds")


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_run_is_timed_in_all_its_parts(tmp_path: Path, micro_batch: int | None) -> None:
    launch = dataclasses.replace(LAUNCH, micro_batch=micro_batch)
    folder, config = make_run(tmp_path / "run", run_config(), launch), run_config()
    probe.probe_run(folder, config, launch, seconds=0.05)
    found = read_json(folder.path / "speed.json")
    assert all(found[part] > 0 for part in PARTS)
    assert found["steps"] >= probe.LEAST_STEPS
    assert found["peak_memory"] == found["host_memory"] > 100 * 2**20, "on a CPU they are the same"
    assert folder.status()["state"] == "done"
    assert folder.metrics() == [], "it is no run: nothing that a fit could take for one"


def test_a_tokenizer_and_its_tokens_are_timed_without_images_at_hand(tmp_path: Path) -> None:
    train = TokenizerTrainConfig(steps=20, batch=4, autoencode_steps=5, eval_images=4)
    tokenizer = dataclasses.replace(TOKENIZER, scales=(1, 4))
    data = dataclasses.replace(DATA, source="folder", path=str(tmp_path / "nowhere"), resolution=16)
    config = TokenizerRunConfig(data, tokenizer, train)
    folder = RunFolder(tmp_path / "stage")
    folder.create(to_dict(config))
    write_json(folder.path / "launch.json", to_dict(LAUNCH))
    probe.probe_stage(folder, config, LAUNCH, seconds=0.05)
    found = read_json(folder.path / "speed.json")
    for part in ("images_per_second", "encoded_per_second", "evaluation_seconds", "checkpoint_seconds"):
        assert found[part] > 0, part
    assert found["steps"] >= 2 * probe.LEAST_STEPS, "with and without the codebook"


def test_noise_stands_in_for_images_of_any_size() -> None:
    noise = probe.NoiseImages(DataConfig(resolution=32, train_images=5, val_images=2, num_classes=3))
    assert (noise.count("train"), noise.count("val"), noise.num_classes) == (5, 2, 3)
    assert noise.image("train", 4).size == (36, 36)
    assert {noise.label("train", i) for i in range(5)} == {0, 1, 2}
