"""The workspace's panels, and trackio's page in a real browser."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scaling.config import ConfigError
from scaling.records import RecordsError, RunFolder
from scaling.trackers import dashboard
from scaling.trackers.ledger import entries
from tests.scaling.trackers import stores

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[3]


def test_without_package_or_key_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"varscale\[wandb-workspaces\].*--local"):
        dashboard.check_workspace()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY.*--local"):
        dashboard.check_workspace()


def test_the_workspace_draws_loss_error_and_frontier_over_flops_on_log_axes(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    sweep = tmp_path / "sweep"
    stores.make_sweep(sweep)
    stores.make_report(sweep)
    sections = {section.name: section.panels for section in dashboard.sections(sweep, ["loss_avg"])}
    assert list(sections) == ["Loss", "Error", "Frontier", "Throughput", "Figures", "Samples"]
    curves = [*sections["Loss"], *sections["Error"], *sections["Frontier"]]
    assert [panel.y for panel in curves] == [
        ["eval/loss_avg"], ["eval/loss_last"], ["eval/error_avg"], ["eval/error_last"], ["frontier/loss_avg"],
    ]  # fmt: skip
    assert all((panel.x, panel.log_x, panel.log_y) == ("flops", True, True) for panel in curves)
    assert [panel.groupby.name for panel in sections["Loss"]] == ["model.depth"] * 2  # one line per depth
    assert sections["Throughput"][0].y == ["train/images_per_second"]
    assert sections["Figures"][0].media_keys == ["media/loss_avg_vs_compute"]


def test_a_second_time_the_same_workspace_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    ws = pytest.importorskip("wandb_workspaces.workspaces")
    sweep = tmp_path / "sweep"
    stores.make_sweep(sweep)
    asked: list[str] = []

    class View:
        url = "https://example.org/me/varscale?nw=1"

        def __init__(self, **place: str) -> None:
            asked.append(place["project"])

        @classmethod
        def from_url(cls, url: str) -> View:
            return cls(project=url)

        def save(self) -> None:
            if asked[-1] == "broken":
                raise ValueError("refused")

    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="me"))
    monkeypatch.setattr(ws, "Workspace", View)
    with pytest.raises(RecordsError, match="wandb workspace of sweep: ValueError: refused"):
        dashboard.make_workspace(sweep, "broken", [])
    assert dashboard.make_workspace(sweep, "varscale", []) == View.url
    assert dashboard.make_workspace(sweep, "varscale", []) == View.url
    assert asked == ["broken", "varscale", View.url]
    assert entries(sweep / "summary") == {"workspace": {"url": View.url}}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with")
def test_the_local_page_draws_the_sweep_in_a_browser(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    for path in sorted((ROOT / "notebooks" / "records" / "quickstart").glob("var-d[12]-*")):
        shutil.copytree(path, tmp_path / "runs" / "study" / path.name)
    runs = [RunFolder(path).name for path in (tmp_path / "runs" / "study").iterdir()]
    command = [sys.executable, "run_sweep.py", "dashboard", "quickstart", "--name", "study", "--local"]
    command += ["--root", str(tmp_path / "runs")]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "PYTHONUNBUFFERED": "1"}
    environment.pop("DISPLAY", None)
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(line for line in server.stdout if line.startswith("http")).strip()
        assert "write_token" not in address
        browse = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        browse += [
            "--window-size=1400,1200",
            "--virtual-time-budget=20000",
            f"--user-data-dir={tmp_path / 'b'}",
        ]
        page = subprocess.run(
            [*browse, address], capture_output=True, text=True, timeout=120, check=True
        ).stdout
    finally:
        server.kill()
        server.wait()
    for words in (*runs, "summary", "loss_avg", "loss_last", "error_avg", "error_last", "frontier"):
        assert words in page, words
    assert "images_per_second" not in page  # the filter in the address was understood
    assert page.count("<canvas") + page.count('class="marks"') >= 8
