"""``fidelity`` and ``classifier`` of the command line, on a sweep of two families with two tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import run_sweep
from scaling.records import RunFolder, read_json
from tests.scaling.fidelity import study

RECIPE = """
name: study
depths: [1]
data:
  source: folder
  path: IMAGES
  resolution: 8
  views: 2
  train_images: 30
  val_images: 10
  num_classes: 3
tokenizer:
  {vocab: 16, latent_channels: 4, channels: 32, multipliers: [1, 1, 1], res_blocks: 1, scales: [1, 2]}
train: {steps: 20, batch: 8}
launch: {device: cpu, threads: 1}
"""
OPTIONS = ("--extractor", study.EXTRACTOR, "--images", "20", "--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a recipe of them, and a finished sweep."""
    root = tmp_path_factory.mktemp("study")
    images = study.make_images(root / "images")
    study.make_study(root, images)
    (root / "study.yaml").write_text(RECIPE.replace("IMAGES", str(images)))
    return root


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> list[RunFolder]:
    """A copy of the sweep's runs; their images stay where they are."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    sweep = tmp_path / "runs" / "study"
    return [RunFolder(sweep / listed["run"]) for listed in read_json(sweep / "sweep.json")["runs"]]


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert run_sweep.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    return error.removeprefix("error: ").strip()


def lines(runs: list[RunFolder]) -> list[list[dict[str, Any]]]:
    return [run.metrics("fidelity") for run in runs]


def test_a_sweep_is_measured_once_and_its_report_written_again(
    runs: list[RunFolder], made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = runs[0].path.parent
    reported: list[Path] = []
    monkeypatch.setattr(run_sweep, "_report", lambda where, show: reported.append(where))
    assert run_sweep.main(["fidelity", str(sweep), "--family", "flexvar", *OPTIONS]) == 0
    assert [len(found) for found in lines(runs)] == [0, 1]
    assert not reported, "there was no report"
    (sweep / "report").mkdir()
    (sweep / "report" / "report.html").touch()
    capsys.readouterr()
    recipe, root = str(made / "study.yaml"), str(sweep.parent)
    assert run_sweep.main(["fidelity", recipe, "--root", root, *OPTIONS]) == 0
    told = capsys.readouterr().out
    assert [len(found) for found in lines(runs)] == [1, 1]
    assert reported == [sweep]
    rows = {row.split()[0]: row for row in told.splitlines() if row.split()[:1]}
    for run, state in zip(runs, ("measured", "there already"), strict=True):
        (line,) = run.metrics("fidelity")
        assert f"{line['fid']:.2f}" in rows[run.name]
        assert rows[run.name].strip().endswith(state)
    assert "1 of 2 had a line of this setting already and were not measured again" in told
    told_apart = [RunFolder(f).status() for f in jobs(sweep)]
    assert [status["state"] for status in told_apart] == ["done", "done"]
    assert {(status["step"], status["total_steps"]) for status in told_apart} == {(20, 20), (50, 50)}


def jobs(sweep: Path) -> list[Path]:
    """Folders of the requests that were made."""
    return [file.parent for file in sweep.glob("fidelity/*/launch.json")]


def test_a_failure_is_of_its_own_call(runs: list[RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    """A second request finds neither the state nor the words of the first."""
    sweep = runs[0].path.parent
    assert "no such reference" in refused(capsys, "fidelity", sweep, *OPTIONS, "--reference", "nowhere.npz")
    (failed,) = jobs(sweep)
    assert run_sweep.main(["fidelity", str(sweep), *OPTIONS]) == 0
    states = {folder: RunFolder(folder).status()["state"] for folder in jobs(sweep)}
    assert states.pop(failed) == "failed"
    assert list(states.values()) == ["done"]


def test_a_run_is_measured_by_its_folder(runs: list[RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep.main(["fidelity", str(runs[0].path), *OPTIONS]) == 0
    assert [len(found) for found in lines(runs)] == [1, 0]
    assert runs[0].name in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(runs: list[RunFolder]) -> None:
    sweep = str(runs[0].path.parent)
    assert run_sweep.main(["fidelity", sweep, *OPTIONS, "--batch", "4"]) == 0
    alone = lines(runs)
    for run in runs:
        run.truncate(-1)
        for record in alone[runs.index(run)]:
            run.append(record | {"kind": "eval"})
        run.close()
    shutil.rmtree(runs[0].path.parent / "fidelity")
    code = run_sweep.main(["fidelity", sweep, *OPTIONS, "--batch", "4", "--processes", "2"])
    assert code == 0, [(folder / "log.txt").read_text() for folder in jobs(runs[0].path.parent)]
    for one, two in zip(alone, lines(runs), strict=True):
        for key, value in one[0].items():
            same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert two[0][key] == same, key


def test_the_studys_own_classifier_is_trained_and_found(
    runs: list[RunFolder], made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = runs[0].path.parents[1]
    words = ["classifier", str(made / "study.yaml"), "--root", str(root), "--steps", "4", "--width", "8"]
    assert run_sweep.main([*words, "--batch", "8"]) == 0
    told = capsys.readouterr().out
    (folder,) = (root / "classifiers").iterdir()
    facts = read_json(folder / "classifier.json")["facts"]
    assert f"{folder}: {facts['val_accuracy']:.1%} of 10 validation images right" in told
    before = (folder / "weights.safetensors").stat().st_mtime_ns
    assert run_sweep.main([*words, "--batch", "8"]) == 0
    assert (folder / "weights.safetensors").stat().st_mtime_ns == before
    own = ("--extractor", "classifier", *OPTIONS[2:])
    assert run_sweep.main(["fidelity", str(runs[0].path), *own]) == 0
    (line,) = runs[0].metrics("fidelity")
    assert line["extractor"].startswith("classifier:")
    assert run_sweep.main(["fidelity", str(runs[0].path), *own, "--weights", str(folder)]) == 0
    assert runs[0].metrics("fidelity") == [line]
    assert run_sweep.main([*words, "--batch", "9"]) == 0
    message = refused(capsys, "fidelity", runs[0].path, *own)
    assert "has several of these images" in message
    assert "--weights FOLDER says which" in message
    (folder / "data.json").write_text('{"fingerprint": "of others"}')
    assert "made from other images" in refused(capsys, *words, "--batch", "8")


def test_what_cannot_be_measured_is_told_in_one_line(
    runs: list[RunFolder], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, run = runs[0].path.parent, runs[0].path
    for words, message in (
        ((sweep,), "fidelity needs --extractor: inception, inception-adm, classifier or MODULE:FUNCTION"),
        ((tmp_path / "nowhere", *OPTIONS), "a sweep's name or folder, nor a run's folder"),
        (("quickstart", "--root", tmp_path, *OPTIONS), "no such sweep yet"),
        ((sweep, *OPTIONS, "--family", "raster"), "has no raster; it has var, flexvar"),
        ((sweep, *OPTIONS, "--depth", "7"), "no run of depth 7 is finished yet"),
        ((sweep, *OPTIONS, "--tokenizer", "x"), "--tokenizer is for a single run"),
        ((run, *OPTIONS, "--depth", "1"), "is a single run; --depth and --family choose among the runs"),
        ((sweep, *OPTIONS, "--batch", "0"), "--batch must be at least 1, got 0"),
        (
            (sweep, *OPTIONS, "--processes", "21"),
            "--images must be at least one for each of the 21 processes",
        ),
        ((sweep, *OPTIONS, "--cfg=-1"), "--cfg must not be negative, got -1"),
        (
            (sweep, *OPTIONS, "--reference", "x.npz", "--reference-images", "5"),
            "--reference-images is for --reference train or val, not for a file (x.npz)",
        ),
    ):
        assert message in refused(capsys, "fidelity", *words)
    assert not (sweep / "fidelity").exists(), "nothing was started"
    missing = ("--extractor", "inception", *OPTIONS[2:])
    assert "extractor inception needs weights" in refused(capsys, "fidelity", sweep, *missing)
    runs[1].set_status("running")
    assert "is not finished (state: running)" in refused(capsys, "fidelity", runs[1].path, *OPTIONS)
    assert lines(runs) == [[], []]
    recipe = ("classifier", made / "study.yaml", "--root", tmp_path)
    assert "--steps must be positive, got 0" in refused(capsys, *recipe, "--steps", "0")
    assert "gone" in refused(capsys, *recipe, "--data.path", tmp_path / "gone")
    assert not (tmp_path / "classifiers").exists()
    assert "--images asks for 31, the data has 30" in refused(capsys, *recipe, "--images", "31")
