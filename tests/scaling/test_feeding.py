"""What feeds a step: the same batches bit for bit, drawn ahead or not, from files or from the device."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from scaling import feeding, trainer, training_step
from scaling.config import Family, RunConfig
from scaling.data.cache import CachedSplit, open_cache
from scaling.data.sampler import batch_indices, batch_views
from scaling.draws import step_draws
from scaling.feeding import Feed, worth_keeping
from scaling.process import Interrupted, JobProcess
from scaling.records import RunFolder
from scaling.steps import step_scales, token_columns
from scaling.training_step import Batches
from tests.scaling import tiny
from tests.scaling.test_memory import too_large, training
from tests.scaling.test_trainer import numbers, run, weights

CPU = torch.device("cpu")
TOKENIZER = dataclasses.replace(tiny.SCALABLE, multipliers=(1, 1), scales=(1, 2, 3, 4))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not feeds(), "no thread stays behind"


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.make_tokens(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def unbroken(chain: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("unbroken") / "run", chain, tiny.run_config())


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a thread draws, and all tokens are kept on the device."""
    monkeypatch.setattr(feeding, "draws_ahead", lambda device: True)
    monkeypatch.setattr(trainer, "kept_on_device", lambda *given: True)


def expected(
    config: RunConfig, split: CachedSplit, step: int, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels and drop path of a step, looked up image by image."""
    images, seed = batch_indices(config.seed, step, config.train.batch, split.images), config.seed
    views = batch_views(step, config.train.batch, split.images, config.data.views)
    draws = step_draws(config.model, seed, step, config.train.batch)
    columns = token_columns(config.tokenizer.scales, step_scales(config.model, seed, step))
    tokens = [split.tokens(images[[i]], views[[i]])[0, columns] for i in share]
    labels = [3 if draws.drop_label[i] else split.labels[images[i]] for i in share]
    assert draws.path_scale is not None
    return np.stack(tokens), np.array(labels), draws.path_scale[:, :, share]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("family", ["var", "flexvar"])
def test_every_way_gives_the_same_batches(
    family: Family, thread: bool, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over epochs of two views and, for FlexVAR, steps of random token maps; of the second of two processes;
    asked for out of order too."""
    monkeypatch.setattr(feeding, "draws_ahead", lambda device: thread)
    tokenizer = tiny.TOKENIZER if family == "var" else TOKENIZER
    config = tiny.run_config(family, tokenizer, steps=40)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=2, drop_path=0.4))
    split = open_cache(tiny.make_tokens(tmp_path, config=tokenizer)[0]).split("train")
    share = np.arange(5, 8)
    feed = Feed(config, split, slice(5, 8), CPU, split if kept else None)
    used = set()
    for step in [*range(30), 7, 3, 39, 0]:
        scales = step_scales(config.model, config.seed, step)
        used.add(scales)
        tokens, labels, path_scale = expected(config, split, step, share)
        found = feed.share(step, scales)
        assert found.tokens.dtype == found.labels_b.dtype == torch.int64
        assert np.array_equal(found.tokens.numpy(), tokens)
        assert np.array_equal(found.labels_b.numpy(), labels)
        assert found.path_scale is not None
        assert np.array_equal(found.path_scale.numpy(), path_scale)
    assert len(used) > (family == "flexvar")
    assert bool(feeds()) == thread
    feed.close()


def test_large_ids_and_skipped_images_keep_their_places(tmp_path: Path) -> None:
    """16 bits without a sign travel as 16 bits with one; a skipped image has a row but no number."""
    rows = np.array([[0, 32767], [7, 7], [32768, 65535], [1, 40000]], dtype="<u2")
    (tmp_path / "train-00000.bin").write_bytes(rows[:2].tobytes())
    (tmp_path / "train-00001.bin").write_bytes(rows[2:].tobytes())
    np.save(tmp_path / "train-labels.npy", np.array([0, 1, 2]))
    facts = {
        "images": 3, "planned": 4, "shard_images": 2, "skipped": [{"index": 1}],
        "shards": [{"name": "train-00000"}, {"name": "train-00001"}],
    }  # fmt: skip
    split = CachedSplit(tmp_path, "train", facts, views=1, seq_len=2)
    assert split.nbytes == rows.nbytes
    whole = np.concatenate(split.everything())
    for images in ([2, 0, 1], [1], [0, 0, 2]):
        chosen = np.array(images)
        assert np.array_equal(whole[split.rows(chosen)], split.tokens(chosen))
        assert np.array_equal(split.tokens(chosen), rows[[0, 2, 3]][chosen])
    on_device = feeding._all_tokens(split, CPU)
    assert np.array_equal(on_device.long() & 0xFFFF, rows.astype(np.int64))


def test_a_run_fed_ahead_is_the_run_that_draws_for_itself(
    ahead: None, unbroken: RunFolder, chain: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = run(tmp_path / "run", chain, tiny.run_config())
    assert numbers(folder) == numbers(unbroken)
    assert all(torch.equal(weights(folder)[name], value) for name, value in weights(unbroken).items())
    assert [f.status()["tokens_on_device"] for f in (unbroken, folder)] == [False, True]


def test_a_stopped_run_goes_on_with_the_same_batches(
    ahead: None,
    unbroken: RunFolder,
    chain: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(JobProcess, "should_stop", lambda job: True)
            with pytest.raises(Interrupted):
                run(tmp_path / "run", chain, tiny.run_config())
        assert not feeds()
    assert numbers(run(tmp_path / "run", chain, tiny.run_config())) == numbers(unbroken)


def test_halved_micro_batches_are_of_the_same_draw(
    ahead: None, chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = run(tmp_path / "two", chain, tiny.run_config(), dataclasses.replace(tiny.LAUNCH, micro_batch=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(training_step, "_loss", too_large(3, training_step._loss))
    drawn, real = list[int](), Feed._drawn

    def counted(self: Feed, step: int, scales: tuple[int, ...]) -> Any:
        drawn.append(step)
        return real(self, step, scales)

    monkeypatch.setattr(Feed, "_drawn", counted)
    folder = run(tmp_path / "run", chain, tiny.run_config())
    assert training(folder) == training(two)
    assert drawn == list(range(20)), "each step once, the one that was taken three times too"


def test_what_goes_wrong_in_the_thread_is_told_in_the_loop(
    ahead: None, chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batch_indices

    def broken(seed: int, step: int, batch: int, n: int) -> np.ndarray:
        if step == 6:
            assert threading.current_thread() is not threading.main_thread()
            raise OSError(5, "the disk of the tokens is gone")
        return real(seed, step, batch, n)

    monkeypatch.setattr(feeding, "batch_indices", broken)
    with pytest.raises(OSError, match="the disk of the tokens is gone"):
        run(tmp_path / "run", chain, tiny.run_config())
    status = RunFolder(tmp_path / "run").status()
    assert status["state"] == "failed"
    assert "the disk of the tokens is gone" in status["error"]


def test_nothing_is_drawn_beyond_the_last_step(ahead: None, chain: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny.run_config(steps=3)
    accelerator: Any = SimpleNamespace(num_processes=1, process_index=0, device=CPU)
    split = open_cache(chain[0]).split("train")
    with Batches(config, tiny.LAUNCH, accelerator, split, RunFolder(tmp_path)) as batches:
        for step in range(3):
            batches.micro_batches(step, config.model.scales)
            assert (batches._feed._next is None) == (step == 2)


@pytest.mark.parametrize(
    ("steps", "room", "keep"),
    [(20, 10**6, True), (20, 600, True), (20, 599, False), (4, 600, True), (3, 600, False)],
)
def test_tokens_are_kept_that_fit_and_are_read_at_least_once(
    steps: int, room: int, keep: bool, chain: tuple[Path, Path]
) -> None:
    """30 images of two views and 5 tokens of 2 bytes; 8 images a step."""
    split = open_cache(chain[0]).split("train")
    assert worth_keeping(tiny.run_config(steps=steps), split, room) == keep
    assert not feeding.kept_on_device(tiny.run_config(steps=steps), tiny.LAUNCH, split, CPU)
