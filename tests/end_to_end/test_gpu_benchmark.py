"""The benchmark for a GPU runs on a CPU in its smallest form, and one part that fails leaves the others."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import gpu
from benchmarks.gpu_parts import PARTS, Setting

SETTING = Setting(torch.device("cpu"), tiny=True, published=None)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """As a process of its own would leave it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "train16", "loader", "sampling", "encoding"])
def test_every_part_gives_figures(part: str) -> None:
    rows = PARTS[part](SETTING)
    assert rows
    for row in rows:
        assert math.isfinite(row.value)
    assert any("TFLOP" in row.bound or "kB" in row.bound for row in rows)


def test_a_part_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys, time\n"
        "given = sys.argv[1:]\n"
        "name, target = given[given.index('--only') + 1], given[given.index('--json') + 1]\n"
        "if name == 'sampling':\n"
        "    raise MemoryError('no room for pictures')\n"
        "if name == 'encoding':\n"
        "    time.sleep(60)\n"
        "row = {'what': name, 'value': 2.0, 'unit': 's', 'target': '', 'bound': ''}\n"
        "pathlib.Path(target).write_text(json.dumps([row]))\n"
    )
    stand_in.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1.0)
    parts = ["sampling", "loader", "encoding", "startup"]
    code = gpu.main(
        [
            "--tiny",
            "--device",
            "cpu",
            "--parts",
            *parts,
            "--seconds",
            "4",
            "--json",
            str(tmp_path / "all.json"),
        ]
    )
    assert code == 1
    found = json.loads((tmp_path / "all.json").read_text())["parts"]
    assert list(found) == parts
    assert found["sampling"]["failed"] == "MemoryError: no room for pictures"
    assert found["loader"]["rows"][0]["value"] == 2.0
    assert found["encoding"]["failed"].startswith("not done in")
    assert found["startup"]["failed"] == "no time left"
    printed = capsys.readouterr().out
    assert "no room for pictures" in printed
    assert "2 s" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "torch sees no GPU here"), (["--device", "cpu"], "only --tiny ends in time")],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert said in capsys.readouterr().err
