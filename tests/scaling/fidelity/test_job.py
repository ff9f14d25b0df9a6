"""The job on the runs of a sweep: their lines, the one reference, going on where it was stopped, refusals."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from scaling.config import DataConfig, SamplingConfig, to_dict
from scaling.data.sources import open_source
from scaling.data.transforms import view_array
from scaling.fidelity import job, pictures
from scaling.fidelity.collect import chosen
from scaling.fidelity.reference import load_reference
from scaling.generation import sample_images
from scaling.pretrained import open_model
from scaling.records import FolderBusyError, RecordsError, RunFolder, read_json, write_json
from scaling.requests import FidelityJob, FidelityRequest
from scaling.schema import ConfigError
from tests.scaling.fidelity import study

REQUEST = FidelityRequest(extractor=study.EXTRACTOR, images=20, device="cpu")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study.make_images(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    study.make_study(root, images)
    return root / "runs"


@pytest.fixture
def runs(made: Path, images: Path, tmp_path: Path) -> list[RunFolder]:
    """A copy of the sweep's two runs."""
    shutil.copytree(made, tmp_path / "runs")
    return [RunFolder(tmp_path / "runs/study" / study.config_of(f, images).run_id) for f in study.FAMILIES]


def measured(runs: list[RunFolder], **options: Any) -> list[dict[str, Any]]:
    """Rows of ``measured.json``."""
    place = runs[0].path.parent / "fidelity" / "job"
    request = dataclasses.replace(REQUEST, **options)
    write_json(place / "launch.json", to_dict(FidelityJob(request, tuple(str(run.path) for run in runs))))
    job.main([str(place / "launch.json")])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert RunFolder(place).status()["state"] == "done"
    rows: list[dict[str, Any]] = read_json(place / "measured.json")["runs"]
    return rows


def references(runs: list[RunFolder]) -> list[Path]:
    return sorted((runs[0].path.parent / "fidelity").glob("reference-*.npz"))


def test_every_run_gets_a_line_with_its_costs_and_the_settings(runs: list[RunFolder]) -> None:
    before = [run.metrics() for run in runs]
    rows = measured(runs, cfg=2.0, top_p=0.9, seed=5)
    assert [(row["run"], row["family"], row["there"]) for row in rows] == [
        (runs[0].name, "var", False),
        (runs[1].name, "flexvar", False),
    ]
    for run, row, old in zip(runs, rows, before, strict=True):
        (line,) = run.metrics("fidelity")
        assert run.metrics()[:-1] == old
        assert row.items() >= line.items()
        last = run.metrics("eval")[-1]
        assert {k: line[k] for k in job.FROM_EVALUATION} == {k: last[k] for k in job.FROM_EVALUATION}
        assert line["fid"] > 0
        assert 1 <= line["is"] <= 3
        assert 0 <= line["precision"] <= 1
        assert 0 <= line["recall"] <= 1
        assert (line["images"], line["reference_images"], line["manifold_images"]) == (20, 30, 20)
        assert (line["guidance"], line["top_k"], line["top_p"], line["seed"]) == (2, 0, 0.9, 5)
        assert re.fullmatch(re.escape(study.EXTRACTOR) + "@[0-9a-f]{12}", line["extractor"])
        assert line["reference"].startswith("train-")
    assert rows[0]["fid"] != rows[1]["fid"]


def test_a_family_with_one_form_of_guidance_is_recorded_with_it() -> None:
    def recorded(family: str) -> str:
        model = SimpleNamespace(model=SimpleNamespace(family=family))
        form: str = job.drawn_how(SimpleNamespace(config=model), REQUEST)["guidance_form"]  # type: ignore[arg-type]
        return form

    assert REQUEST.guidance_form == "ramp"
    assert [recorded(family) for family in ("var", "flexvar", "raster")] == ["ramp", "ramp", "constant"]


def test_the_reference_is_looked_at_once_for_all_runs_and_kept(
    runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, make = [], job.make_reference
    monkeypatch.setattr(
        job, "make_reference", lambda *given, **options: looked.append(given[3]) or make(*given, **options)
    )
    rows = measured(runs)
    measured(runs, cfg=0.0)
    assert looked == [rows[0]["reference"]]
    (file,) = references(runs)
    kept = load_reference(file, job.load_extractor(study.EXTRACTOR, None, torch.device("cpu")))
    assert (kept.identity, kept.images) == (rows[0]["reference"], 30)
    assert all(row["there"] for row in measured(runs, reference=str(file))), "it is the same reference"
    measured(runs, reference="val")
    assert len(references(runs)) == 2


def test_a_setting_is_measured_once_and_other_settings_live_beside_it(runs: list[RunFolder]) -> None:
    first = measured(runs)
    lines = [run.metrics() for run in runs]
    again = measured(runs)
    assert [row["there"] for row in again] == [True, True]
    assert [row | {"there": False} for row in again] == first
    assert [run.metrics() for run in runs] == lines
    assert not any(row["there"] for row in measured(runs[:1], cfg=0.0))
    assert len(runs[0].metrics("fidelity")) == 2
    fewer = measured(runs[:1], manifold=10)
    assert (fewer[0]["there"], fewer[0]["manifold_images"]) == (False, 10)
    assert len(runs[0].metrics("fidelity")) == 2, "only precision and recall are of other images"


def test_a_job_that_was_stopped_goes_on_with_the_next_run(runs: list[RunFolder]) -> None:
    config = runs[1].config()
    tokenizer = runs[1].path.parents[1] / "tokenizers"
    (lost,) = (p for p in tokenizer.iterdir() if "scalable" in (p / "tokenizer/tokenizer.json").read_text())
    lost.rename(tokenizer.parent / "elsewhere")
    with pytest.raises(ConfigError, match=f"{runs[1].name}: its tokenizer is not at"):
        measured(runs)
    status = RunFolder(runs[0].path.parent / "fidelity" / "job").status()
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert [len(run.metrics("fidelity")) for run in runs] == [1, 0]
    AcceleratorState._reset_state(reset_partial_state=True)
    (tokenizer.parent / "elsewhere").rename(lost)
    assert [row["there"] for row in measured(runs)] == [True, False]
    assert runs[1].config() == config


def test_pictures_are_those_of_sampling_one_by_one(runs: list[RunFolder]) -> None:
    sampling = SamplingConfig(guidance=1.5, seed=7)
    for run in runs:
        opened = open_model(run.path)
        expected = sample_images(opened.model, opened.tokenizer, [i % 3 for i in range(6)], sampling)
        torch.testing.assert_close(pictures.sampler(opened, sampling)(range(1, 6, 2)), expected[1::2])


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_images_are_centre_crops(images: Path, split: str) -> None:
    data = DataConfig(source="folder", path=str(images), resolution=8)
    real = pictures.real_images(data, split, None, threads=2)  # type: ignore[arg-type]
    assert real.count == {"train": 30, "val": 10}[split]
    assert real.name.startswith(f"{split}-")
    source = open_source(data)
    expected = np.stack([view_array(source.image(split, i), data, None) for i in (7, 2)])  # type: ignore[arg-type]
    assert np.array_equal(real.images([7, 2]).permute(0, 2, 3, 1).numpy(), expected)
    some = pictures.real_images(data, split, 6, threads=2)  # type: ignore[arg-type]
    assert some.count == 6
    assert some.name == real.name.rpartition("-")[0] + "-6"
    assert torch.equal(some.images(range(6)), real.images(chosen(real.count, 6).tolist()))


def test_images_may_have_moved(runs: list[RunFolder], images: Path, tmp_path: Path) -> None:
    images.rename(tmp_path / "moved")
    try:
        with pytest.raises(ConfigError, match="images"):
            measured(runs[:1])
        AcceleratorState._reset_state(reset_partial_state=True)
        assert not measured(runs[:1], data_path=str(tmp_path / "moved"))[0]["there"]
    finally:
        (tmp_path / "moved").rename(images)
    assert measured(runs[:1])[0]["there"]


def test_what_is_missing_is_told_before_anything_is_sampled(runs: list[RunFolder]) -> None:
    def refused(error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            measured(runs, **options)
        AcceleratorState._reset_state(reset_partial_state=True)

    refused(ConfigError, "extractor inception needs weights", extractor="inception")
    refused(
        ConfigError, "classifiers has none of these images; 'run_sweep.py classifier", extractor="classifier"
    )
    refused(ConfigError, "--reference-images asks for 31, the train split has 30", reference_images=31)
    refused(ConfigError, "no such reference file", reference="nowhere.npz")
    runs[1].set_status("running")
    refused(RecordsError, r"is not finished \(state: running\)")
    runs[1].set_status("done")
    (runs[1].path / "metrics.jsonl").write_text("")
    refused(RecordsError, "no evaluation in it")
    assert [run.metrics("fidelity") for run in runs] == [[], []]
    with runs[0].lock(), pytest.raises(FolderBusyError):
        measured(runs[:1])


def test_a_request_that_is_none_is_told_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "launch.json"
    for value, message in (
        ({"request": {"extractor": "x:y"}}, f"{file}: missing key 'runs'"),
        ({"request": {"extractor": "x:y", "image": 3}, "runs": []}, f"{file}, request.image: unknown key"),
        ({"request": {"extractor": "x:y"}, "runs": []}, f"{file}: no runs in it"),
        ({"request": {}, "runs": ["run"]}, "fidelity needs --extractor"),
    ):
        write_json(file, value)
        with pytest.raises(ConfigError, match=message):
            job.main([str(file)])
        assert RunFolder(tmp_path).status()["state"] == "failed"
    with pytest.raises(RecordsError, match="no such file"):
        job.main([str(tmp_path / "other.json")])
    with pytest.raises(ConfigError, match=r"usage: python -m scaling\.fidelity\.job REQUEST\.json"):
        job.main([])
