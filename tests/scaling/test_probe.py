"""Probes: real work of a few hundredths of a second, timed; and how long a clock's owner had no core."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling.config import DataConfig, TokenizerRunConfig, TokenizerTrainConfig, to_dict
from scaling.probes import noise, run, stopwatch, tokenizer, tokens
from scaling.process import JobProcess
from scaling.records import RunFolder, read_json, write_json
from tests.scaling.tiny import DATA, LAUNCH, TOKENIZER, make_run, run_config

PARTS = ("flops_per_second", "evaluation_flops_per_second", "checkpoint_seconds", "inside_seconds")


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_run_is_timed_in_all_its_parts(tmp_path: Path, micro_batch: int | None) -> None:
    launch = dataclasses.replace(LAUNCH, micro_batch=micro_batch)
    folder, config = make_run(tmp_path / "run", run_config(), launch), run_config()
    run.probe_run(folder, config, launch, seconds=0.05)
    found = read_json(folder.path / "speed.json")
    assert all(found[part] > 0 for part in PARTS)
    assert found["steps"] >= run.LEAST_STEPS
    assert found["peak_memory"] == found["host_memory"] > 100 * 2**20, "on a CPU they are the same"
    assert folder.status()["state"] == "done"
    assert folder.metrics() == [], "it is no run: nothing that a fit could take for one"


def stage(root: Path) -> tuple[RunFolder, TokenizerRunConfig]:
    """A tokenizer of images that are not at hand."""
    train = TokenizerTrainConfig(steps=20, batch=4, autoencode_steps=5, eval_images=4)
    data = dataclasses.replace(DATA, source="folder", path=str(root / "nowhere"), resolution=16)
    config = TokenizerRunConfig(data, dataclasses.replace(TOKENIZER, scales=(1, 4)), train)
    folder = RunFolder(root / "stage")
    folder.create(to_dict(config))
    write_json(folder.path / "launch.json", to_dict(LAUNCH))
    return folder, config


def test_a_tokenizer_is_timed_without_images_at_hand(tmp_path: Path) -> None:
    folder, config = stage(tmp_path)
    tokenizer.probe_tokenizer(folder, config, LAUNCH, seconds=0.05)
    found = read_json(folder.path / "speed.json")
    for part in ("images_per_second", "evaluation_seconds", "checkpoint_seconds", "inside_seconds"):
        assert found[part] > 0, part
    assert found["steps"] >= 2 * tokenizer.LEAST_STEPS, "with and without the codebook"


@pytest.mark.parametrize("seconds", [0.0, 1e6])
@pytest.mark.parametrize("views", [1, 3])
def test_tokens_are_timed_by_sequences_and_their_start_is_told_apart(
    tmp_path: Path, views: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = stage(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, views=views))
    clock, sizes = [0.0], list[int]()
    # A batch takes as many seconds as it has crops, the first 50 more, whatever this machine does.
    monkeypatch.setattr(tokens, "time", Clock(clock))
    monkeypatch.setattr(stopwatch, "time", Clock(clock))
    monkeypatch.setattr(tokens, "batch_size", lambda resolution, device: 4 * views)
    real = tokens.encoder

    def slow(*arguments: Any) -> Callable[[Any], Any]:
        encode = real(*arguments)

        def encoded(images: Any) -> Any:
            clock[0] += len(images) + (0 if sizes else 50)
            sizes.append(len(images))
            return encode(images)

        return encoded

    monkeypatch.setattr(tokens, "encoder", slow)
    tokens.probe_tokens(folder, config, LAUNCH, seconds=seconds)
    found = read_json(folder.path / "speed.json")
    assert found["sequences_per_second"] == pytest.approx(1)
    assert found["inside_seconds"] == pytest.approx(sum(sizes)), "the 50 seconds are beside"
    everything = (config.data.train_images or 0) * views + (config.data.val_images or 0)
    assert sum(sizes) == (everything if seconds else tokens.LEAST_BATCHES * 4 * views)


class Clock:
    """A stand-in for the module ``time``."""

    def __init__(self, now: list[float]) -> None:
        self._now = now

    def monotonic(self) -> float:
        """Seconds."""
        return self._now[0]


def test_the_time_without_a_core_is_told_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stat = [0.0], tmp_path / "schedstat"
    monkeypatch.setattr(stopwatch, "time", Clock(clock))
    monkeypatch.setattr(stopwatch, "SCHEDSTAT", stat)

    def pass_by(seconds: float, waited: float) -> None:
        clock[0] += seconds
        before = int(stat.read_text().split()[1]) if stat.exists() else 0
        stat.write_text(f"{int(clock[0] * 1e9)} {before + int(waited * 1e9)} 7\n")

    pass_by(100.0, 50.0)
    accelerator = run.make_accelerator(run_config(), LAUNCH)
    with JobProcess(RunFolder(tmp_path / "job")) as job:
        watch = stopwatch.Stopwatch(accelerator, job)
        for _ in range(2):
            with watch.timed("train"):
                pass_by(10.0, 3.0)
        with watch.timed("reading a disk"):
            pass_by(30.0, 0.0)
        assert watch["train"] == 20
        assert watch.waited(["train"]) == pytest.approx(0.3)
        assert watch.waited(["train", "reading a disk"]) == pytest.approx(6 / 50), "no disturbance by itself"
        stat.unlink()
        with watch.timed("elsewhere"):
            clock[0] += 1.0
        assert watch.waited(["elsewhere"]) is None, "a system that does not tell"


def test_noise_stands_in_for_images_of_any_size() -> None:
    images = noise.NoiseImages(DataConfig(resolution=32, train_images=5, val_images=2, num_classes=3))
    assert (images.count("train"), images.count("val"), images.num_classes) == (5, 2, 3)
    assert images.image("train", 4).size == (36, 36)
    assert {images.label("train", i) for i in range(5)} == {0, 1, 2}
