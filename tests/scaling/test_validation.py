"""``evaluate``: a run's own last numbers again; published checkpoints as points of a sweep."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from analysis.records import load_runs
from scaling import flops
from scaling.config import ConfigError, DataConfig, EvaluationConfig, RunConfig
from scaling.convert import convert
from scaling.data.cache import build_cache, open_cache
from scaling.data.encode import batch_size, encoder
from scaling.data.live import Encoded, encode_validation
from scaling.data.sources import open_source
from scaling.families.registry import build, family_model
from scaling.imported import IMAGENET_IMAGES, KNOWN, Training, import_into, training_of
from scaling.pretrained import Opened, open_model
from scaling.records import RunFolder, list_runs, write_json
from scaling.requests import ConvertRequest, DataChoice, EvaluateRequest
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer, save_tokenizer
from scaling.trainer import train
from scaling.validation import Validation, _launch, validate
from tests.scaling import tiny
from tests.scaling.data_fixtures import NoiseSource, image_folder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision per process; the product's commands have a process of their own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A trained run beside its tokenizer and its images, as a sweep leaves it."""
    root = tmp_path_factory.mktemp("runs")
    images = image_folder(root / "images", {"a": 10, "b": 10, "c": 10}, {"a": 31, "b": 30, "c": 29})
    data = DataConfig(
        source="folder", path=str(images), resolution=8, train_images=30, val_images=90, num_classes=3
    )
    config = dataclasses.replace(tiny.run_config(), data=data)
    torch.manual_seed(0)
    save_tokenizer(
        Tokenizer(tiny.TOKENIZER), root / "tokenizers" / config.tokenizer_run.run_id / "tokenizer", {}
    )
    return trained(root / "sweep", config)


def trained(sweep: Path, config: RunConfig) -> RunFolder:
    tokenizer = load_tokenizer(sweep.parent / "tokenizers" / config.tokenizer_run.run_id / "tokenizer")
    tokens = sweep.parent / "tokens"
    build_cache(
        tokens, config.data, config.tokenizer.scales, config.tokenizer.vocab, open_source(config.data),
        encoder(tokenizer, CPU), tokenizer.content_hash, batch=batch_size(8, "cpu"),
    )  # fmt: skip
    folder = tiny.make_run(sweep / config.run_id, config)
    train(folder, config, tiny.LAUNCH, open_cache(tokens), tokenizer)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def published(run: RunFolder, target: Path) -> tuple[str, str]:
    """The run and its tokenizer as published files."""
    tokenizer = run.path.parent.parent / "tokenizers"
    files = str(target / "net.pth"), str(target / "vae.pth")
    for where, file in zip((run.path, next(tokenizer.iterdir())), files, strict=True):
        convert(str(where), ConvertRequest(to="published", out=file))
    return files


def evaluated(run: RunFolder, target: Path) -> Validation:
    """The published files on the run's images."""
    net, vae = published(run, target)
    data = DataChoice(source="folder", path=run.config()["data"]["path"])
    return validate(net, EvaluateRequest(tokenizer=vae, data=data, device="cpu", threads=1))


NUMBERS = [f"{q}_{part}{se}" for q in ("loss", "error") for part in ("avg", "last") for se in ("", "_se")]
NUMBERS += ["loss_scales", "error_scales", "eval_images"]


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in NUMBERS}


def test_a_run_gives_its_own_last_evaluation_exactly(run: RunFolder) -> None:
    found = validate(str(run.path), EvaluateRequest(device="cpu"))
    assert found.record == numbers(run.metrics("eval")[-1])
    assert found.record["eval_images"] == 90


def test_so_does_a_run_that_used_a_part_of_the_images(run: RunFolder) -> None:
    config = tiny.run_config()
    data = DataConfig(**run.config()["data"])
    part = dataclasses.replace(config, data=data, evaluation=EvaluationConfig(points=1, images=37))
    other = trained(run.path.parent.parent / "other", part)
    found = validate(str(other.path), EvaluateRequest(device="cpu"))
    assert found.record == numbers(other.metrics("eval")[-1])
    assert found.record["eval_images"] == 37


def test_a_published_file_gives_what_the_run_gives(run: RunFolder, tmp_path: Path) -> None:
    found = evaluated(run, tmp_path)
    assert found.record == validate(str(run.path), EvaluateRequest(device="cpu")).record
    shown = found.to_json()
    json.dumps(shown, allow_nan=False)
    assert shown["accuracy_last"] == pytest.approx(100 * (1 - found.record["error_last"]))
    table = found.table()
    assert all(text in table for text in ("1 x 1", "2 x 2", f"{found.record['loss_avg']:.4f} ± ", "10 %"))


def test_own_images_that_were_moved_and_other_images(run: RunFolder, tmp_path: Path) -> None:
    moved = image_folder(tmp_path / "moved", {"a": 10, "b": 10, "c": 10}, {"a": 31, "b": 30, "c": 29})
    request = EvaluateRequest(device="cpu", data=DataChoice(path=str(moved)))
    assert validate(str(run.path), request).record == numbers(run.metrics("eval")[-1])
    other = image_folder(tmp_path / "other", {"a": 1, "b": 1}, {"a": 2, "b": 2, "c": 3})
    request = EvaluateRequest(device="cpu", data=DataChoice(source="folder", path=str(other)))
    assert validate(str(run.path), request).record["eval_images"] == 7


def test_a_launch_file_of_another_version_is_told_by_name(run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    write_json(copy / "launch.json", {"an_old_key": 1})
    with pytest.raises(ConfigError, match=r"launch\.json: .*an_old_key.*another version has written it"):
        _launch(copy)


def test_images_that_do_not_fit(run: RunFolder, tmp_path: Path) -> None:
    two = image_folder(tmp_path / "two", {"a": 1}, {"a": 2, "b": 2})
    request = EvaluateRequest(device="cpu", data=DataChoice(source="folder", path=str(two)))
    with pytest.raises(ConfigError, match=r"images are of 2 classes, .* knows 3"):
        validate(str(run.path), request)
    net, vae = published(run, tmp_path)
    with pytest.raises(ConfigError, match=r"give --data\.source"):
        validate(net, EvaluateRequest(tokenizer=vae, device="cpu"))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("images", [None, 70, 1])
def test_tokens_are_the_same_however_many_processes_encode_them(
    tmp_path: Path, world: int, images: int | None
) -> None:
    source = NoiseSource(train=1, val=150, broken=frozenset({("val", 70)}))
    data = dataclasses.replace(tiny.DATA, train_images=1, val_images=150)
    torch.manual_seed(0)
    encode = encoder(Tokenizer(tiny.TOKENIZER).eval(), CPU)
    parts: list[list[Encoded]] = []

    def keep(own: list[Encoded]) -> list[list[Encoded]]:
        parts.append(own)
        return parts[:1]  # in place of what the others have

    for rank, of in [(0, 1), *((rank, world) for rank in range(world))]:
        encode_validation(
            source, data, encode, images=images, batch=7, threads=2, rank=rank, world=of, gather=keep
        )
    alone, *shares = parts
    together = sorted((one for part in shares for one in part), key=lambda one: one[0])
    assert [(number, labels) for number, labels, _ in together] == [(n, labels) for n, labels, _ in alone]
    for (_, _, shared), (_, _, whole) in zip(together, alone, strict=True):
        assert np.array_equal(shared, whole)
    assert max(map(len, shares)) == -(-len(alone) // world), "shared evenly"


@pytest.mark.parametrize("images", [None, 70, 1])
@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_tokens_are_those_of_a_cache(tmp_path: Path, images: int | None, batch: int) -> None:
    source = NoiseSource(train=1, val=150, broken=frozenset({("val", 70)}))
    data = dataclasses.replace(tiny.DATA, train_images=1, val_images=150)
    torch.manual_seed(0)
    encode = encoder(Tokenizer(tiny.TOKENIZER).eval(), CPU)
    build_cache(tmp_path, data, tiny.TOKENIZER.scales, 16, source, encode, "hash", batch=batch)
    cached, seen = open_cache(tmp_path).split("val"), list[tuple[int, int]]()
    split = encode_validation(
        source, data, encode, images=images, batch=batch, threads=3, progress=lambda *n: seen.append(n)
    )
    wanted = np.arange(images or 150) * 150 // (images or 150)
    places = np.searchsorted(np.delete(np.arange(150), 70), wanted[wanted != 70])
    assert split.images == len(places)
    assert np.array_equal(split.labels, cached.labels[places])
    assert np.array_equal(split.tokens(np.arange(split.images)), cached.tokens(places))
    assert seen[0] == (0, len(wanted))
    assert seen[-1] == (len(wanted), len(wanted))


def test_too_many_unreadable_images_stop_it() -> None:
    source = NoiseSource(train=1, val=50, broken=frozenset({("val", 7)}))
    with pytest.raises(ConfigError, match="more than 1 % of the 50 val images"):
        encode_validation(
            source,
            tiny.DATA,
            lambda crops: np.zeros((len(crops), 5), np.uint16),
            images=None,
            batch=8,
            threads=2,
        )


class TestImport:
    def imported(self, run: RunFolder, tmp_path: Path, sweep: Path) -> RunFolder:
        request = EvaluateRequest(into=str(sweep), epochs=10, train_images=1000)
        return import_into(sweep, evaluated(run, tmp_path), training_of(str(tmp_path / "net.pth"), request))

    def test_a_finished_run_with_its_costs(self, run: RunFolder, tmp_path: Path) -> None:
        folder = self.imported(run, tmp_path, tmp_path / "new")
        model, config = tiny.run_config().model, folder.config()
        (record,) = folder.metrics("eval")
        assert numbers(record) == numbers(run.metrics("eval")[-1])
        assert record["unique_tokens"] == record["tokens"]
        steps = math.ceil(10 * 1000 / 256)
        assert config["train"]["batch"] == 256
        assert (record["step"], record["tokens"]) == (steps, steps * 256 * 5)
        assert record["flops"] == steps * 256 * flops.train_flops(model)
        assert record["params"] == flops.params(model)
        assert record["epochs"] == pytest.approx(10, rel=0.03)
        assert folder.costs()["tokens_per_image"] == 5
        status = folder.status()
        assert status["state"] == "done"
        assert status["imported"]["weights"] == str(tmp_path / "net.pth")

    def test_twice_is_one_point(self, run: RunFolder, tmp_path: Path) -> None:
        first = self.imported(run, tmp_path, tmp_path / "new")
        assert self.imported(run, tmp_path, tmp_path / "new").path == first.path
        assert len(load_runs(tmp_path / "new")) == 1

    def test_other_weights_and_other_images_are_other_points(self, run: RunFolder, tmp_path: Path) -> None:
        """Of one architecture, under one name."""
        validation = evaluated(run, tmp_path)
        request = EvaluateRequest(into=str(tmp_path), epochs=10, train_images=1000)
        training = training_of(str(tmp_path / "net.pth"), request)
        first = import_into(tmp_path / "one", validation, training)
        images = dataclasses.replace(validation, fingerprint="other")
        assert import_into(tmp_path / "two", images, training).path.name != first.path.name
        with torch.no_grad():
            next(cast(nn.Module, validation.opened.model).parameters()).add_(1)
        second = import_into(tmp_path / "one", validation, training)
        assert len(load_runs(tmp_path / "one")) == 2
        told = [folder.status()["imported"]["weights_sha256"] for folder in (first, second)]
        assert told[0] != told[1]

    def test_a_point_of_the_sweep_that_says_what_it_is(self, run: RunFolder, tmp_path: Path) -> None:
        sweep = run.path.parent
        before = len(load_runs(sweep))
        folder = self.imported(run, tmp_path, sweep)
        try:
            assert [r.name for r in list_runs(sweep)] == [run.name, folder.name]
            frame = load_runs(sweep)
            assert len(frame) == before + 1
            assert frame[frame["run"] == folder.name]["final"].all()
            (note,) = [note for note in frame.attrs["notes"] if folder.name in note]
            assert "not a run of this sweep's recipe" in note
            opened = open_model(folder.path)
            assert opened.name == folder.name
            assert opened.run is None
        finally:
            for file in sorted(folder.path.rglob("*"), reverse=True):
                file.unlink()
            folder.path.rmdir()

    def test_other_tokens_are_refused(self, run: RunFolder, tmp_path: Path) -> None:
        torch.manual_seed(5)
        home = tmp_path / "runs"
        config = dataclasses.replace(tiny.run_config(), data=DataConfig(**run.config()["data"]))
        tiny.make_run(home / "sweep" / config.run_id, config)
        with pytest.raises(ConfigError, match="is not there to compare"):
            self.imported(run, tmp_path, home / "sweep")
        AcceleratorState._reset_state(reset_partial_state=True)
        place = home / "tokenizers" / config.tokenizer_run.run_id / "tokenizer"
        save_tokenizer(Tokenizer(tiny.TOKENIZER), place, {})
        with pytest.raises(ConfigError, match="has tokens of another tokenizer"):
            self.imported(run, tmp_path, home / "sweep")
        assert not list((home / "sweep").glob("imported-*"))

    def test_other_steps_and_other_images_are_refused(self, run: RunFolder, tmp_path: Path) -> None:
        config, training = tiny.run_config("flexvar"), Training(10, 1000, 256, "here")
        tokenizer = Tokenizer(tiny.SCALABLE).eval()
        record = numbers(run.metrics("eval")[-1])

        def add(scales: tuple[int, ...], images: str) -> None:
            model = family_model(build(dataclasses.replace(config.model, scales=scales)))
            opened = Opened(model, tokenizer, "net", None)
            found = Validation("net.pth", None, opened, "fp32", config.data, images, record, 0)
            import_into(tmp_path, found, training)

        add((1, 2), "these")
        with pytest.raises(ConfigError, match=r"has steps \[1, 2\], this checkpoint \[2\]"):
            add((2,), "these")
        with pytest.raises(ConfigError, match="was evaluated on other images"):
            add((1, 2), "those")
        assert len(list(tmp_path.glob("imported-*"))) == 1

    def test_who_says_how_long_it_was_trained(self, tmp_path: Path) -> None:
        into = EvaluateRequest(into=str(tmp_path))
        assert {name: training_of(f"owner/repo:{name}.pth", into).epochs for name in KNOWN} == {
            "var_d16": 200, "var_d20": 250, "var_d24": 350, "var_d30": 350, "var_d36": 350,
        }  # fmt: skip
        known = training_of("x/var_d30.pth", into)
        assert (known.images, known.batch) == (IMAGENET_IMAGES, 1024)
        assert "published with 350 epochs" in known.told
        given = EvaluateRequest(into=str(tmp_path), epochs=3, train_images=7, train_batch=2)
        assert dataclasses.astuple(training_of("var_d30.pth", given))[:3] == (3, 7, 2)
        assert "as given" in training_of("var_d30.pth", given).told
        with pytest.raises(ConfigError, match="nothing says how long FlexVARd16 was trained"):
            training_of("FlexVARd16.pth", into)

    def test_a_run_is_no_import(self, run: RunFolder, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="for published checkpoints"):
            training_of(str(run.path), EvaluateRequest(into=str(tmp_path)))
        with pytest.raises(ConfigError, match="--epochs is for --into"):
            EvaluateRequest(epochs=3)
