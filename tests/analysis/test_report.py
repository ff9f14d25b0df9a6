"""A report recovers what the records were made from, whole or partial, and is safe to open."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import make_report
from analysis.files import plain, write_bytes
from analysis.findings import headline
from analysis.report import _inline
from analysis.report_pictures import PICTURE_BYTES
from analysis.report_tables import forecast_rows
from analysis.study import make_study
from scaling.records import RecordsError, write_json
from tests.analysis import fabricate


class Page(HTMLParser):
    """Collects tags, links and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        self.ids += [v or "" for k, v in attrs if k == "id"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report(fabricate.sweep(tmp_path_factory.mktemp("runs"), pictures=True, tokenizer=True))


def test_known_exponents_are_recovered(report: Path) -> None:
    found = {
        (r["quantity"], r["x"], r["offset"]): r
        for r in fabricate.fits(report)["laws"]
        if r["points"] == "final"
    }
    for quantity, alpha in fabricate.ALPHA.items():
        row = found[quantity, "params", False]
        assert row["params"]["alpha"] == pytest.approx(alpha, rel=1e-9)
        assert row["pearson"] == pytest.approx(-1, abs=1e-9)
        at_million = (row["params"]["beta"] * 1e6) ** row["params"]["alpha"]
        assert at_million == pytest.approx(fabricate.AT_MILLION[quantity], rel=1e-6)


def test_the_largest_depth_is_forecast_from_the_others(report: Path) -> None:
    rows = [f for f in fabricate.fits(report)["forecasts"] if not f["offset"]]
    assert len(rows) == 4
    for row in rows:
        assert row["hidden_params"] == 73728 * 125
        assert row["fitted_on"] == 4
        assert row["reached"] == pytest.approx(fabricate.law(row["quantity"], 73728 * 125))
        assert row["predicted"] == pytest.approx(row["reached"], rel=1e-9)


def test_intervals_hold_the_truth_under_noise(tmp_path: Path) -> None:
    study = make_study(fabricate.sweep(tmp_path, depths=range(1, 9), seeds=(0, 1), noise=0.001))
    law = study.law("loss_last").law
    assert law is not None
    assert len(law.x) == 16
    low, high = law.interval()["alpha"]
    assert low < -0.020 < high
    assert high - low < 0.004
    assert "falls as a power law" in headline(study)


def test_the_page_is_self_contained(report: Path) -> None:
    page = Page(report.read_text())
    assert "script" not in page.tags
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 14
    assert page.tags.count("img") == 6
    assert not re.search(r"url\((?!#)", report.read_text())


def test_files_beside_it(report: Path) -> None:
    names = sorted(p.name for p in (report.parent / "figures").iterdir())
    assert len(names) == 28
    markdown = (report.parent / "report.md").read_text()
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown):
        assert (report.parent / picture).resolve().is_file(), picture
    assert "0123456789abcdef" in markdown
    assert "psnr: 21.5" in markdown


def test_equal_records_give_equal_bytes(report: Path, tmp_path: Path) -> None:
    again = make_report(fabricate.sweep(tmp_path, pictures=True, tokenizer=True))
    for file in sorted(p for p in again.parent.rglob("*") if p.is_file()):
        assert file.read_bytes() == (report.parent / file.relative_to(again.parent)).read_bytes(), file.name


def test_partial_sweep_says_what_is_missing_and_escapes_it(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2, 3), unfinished=(2, 3))
    facts = json.loads((folder / "sweep.json").read_text())
    hostile = {"name": "<script>alert(1)</script>", "commit": "</code><img src=x>"}
    write_json(folder / "sweep.json", facts | hostile)
    report = make_report(folder)
    text = report.read_text()
    assert "One depth (d1) has finished" in text
    assert "var-d2-s0-0123456789 is failed at step" in text
    assert "loss &lt;is&gt; not finite" in text
    assert "the tokenizer tok-32px-v256-0123456789 is not finished or not kept here" in text
    assert "No run has left samples yet" in text
    laws = fabricate.fits(report)["laws"]
    assert "at least 3 points, got 1" in next(r["status"] for r in laws if r["x"] == "params")
    assert not {"script", "img", "is"} & set(Page(text).tags)


@pytest.mark.parametrize("name", ['"><script>alert(1)</script>', "../../up", "", "a\n"])
def test_a_family_that_is_no_plain_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,))
    file = folder / "var-d1-s0-0123456789" / "config.json"
    config = json.loads(file.read_text())
    config["model"]["family"] = name
    write_json(file, config)
    with pytest.raises(RecordsError, match=r"config\.json: model\.family = .*; expected lower-case letters,"):
        make_report(folder)
    assert not (folder / "report").exists()


def test_the_name_of_a_figure_is_no_markup() -> None:
    text = _inline('<svg width="1"><g id="a"/></svg>', '"><script>', {})
    assert Page(text).tags == ["svg", "g"]


def test_nothing_finished_and_figures_of_an_earlier_report_go(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2), unfinished=(1, 2))
    stale = folder / "report" / "figures" / "loss_last_vs_params.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("<svg/>")
    report = make_report(folder)
    assert "No run has finished yet" in report.read_text()
    assert not list((report.parent / "figures").glob("*_vs_params.*"))


def test_a_tokenizer_outside_the_root_is_refused(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,))
    facts = json.loads((folder / "sweep.json").read_text())
    facts["runs"][0]["tokenizer"] = "../../../etc"
    write_json(folder / "sweep.json", facts)
    with pytest.raises(RecordsError, match=r"sweep\.json: tokenizer '\.\./\.\./\.\./etc' of .* lies outside"):
        make_report(folder)


def test_without_a_sweep_json_the_runs_are_reported_all_the_same(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    (folder / "sweep.json").unlink()
    assert "without a sweep.json no tokenizer is known" in make_report(folder).read_text()


@pytest.mark.parametrize("text", ["run `x`", "```", "a``b\n`c", "plain"])
def test_backticks_do_not_leave_their_fence(tmp_path: Path, text: str) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1,))
    facts = json.loads((folder / "sweep.json").read_text())
    write_json(folder / "sweep.json", facts | {"command": text, "recipe": {"note": text}})
    markdown = (make_report(folder).parent / "report.md").read_text()
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    command, recipe = re.search(r"Command: (`+)", markdown), re.search(r"\n(`+)json\n", markdown)
    assert command is not None
    assert recipe is not None
    assert len(command[1]) == longest + 1
    assert len(recipe[1]) == max(3, longest + 1)
    assert markdown.endswith(f"\n{recipe[1]}")


def test_import_is_light() -> None:
    code = (
        "import sys, analysis; assert not {'torch', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules);"
        "analysis.make_report; analysis.load_table; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_torn_picture_costs_itself_only(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2))
    pixels = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    torn, junk = (folder / f"var-d{d}-s0-0123456789" / "samples.png" for d in (1, 2))
    torn.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    junk.write_bytes(b"no picture" * PICTURE_BYTES)
    report = make_report(folder)
    for text in (report.read_text(), (report.parent / "report.md").read_text().replace("\\", "")):
        for run in (1, 2):
            assert f"var-d{run}-s0-0123456789/samples.png is damaged or too large; left out" in text
    assert "img" not in Page(report.read_text()).tags


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    write_bytes(file, b"old")

    def torn(path: Path, data: bytes) -> None:
        path.open("wb").write(data[:1])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="no space"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_values_of_a_report_are_strict_json() -> None:
    value = plain({1: [float("nan"), (1.5, np.float64("inf")), "text", None, True]})
    assert value == {"1": [None, [1.5, None], "text", None, True]}
    assert json.dumps(value, allow_nan=False)


def test_a_forecast_of_a_fit_that_failed_has_no_numbers(tmp_path: Path) -> None:
    study = make_study(fabricate.sweep(tmp_path, noise=2e-3))
    rows = forecast_rows(study)
    laws = [f.law for found in study.forecasts.values() for _, f in found]
    assert {law.converged for law in laws} == {True, False}
    for row, law in zip(rows, laws, strict=True):
        assert (row["predicted"] == row["error"] == row["covered"] == "–") == (not law.converged)


def test_the_sheet_of_stages_is_shown_where_it_was_drawn(tmp_path: Path) -> None:
    folder = fabricate.sweep(tmp_path, depths=(1, 2), families=("var", "raster"), evaluations=2)
    assert "stages of training" not in make_report(folder).read_text()
    fabricate._picture(folder / "stages-raster.png", (64, 64), np.random.default_rng(0))
    report = make_report(folder)
    assert Page(report.read_text()).tags.count("img") == 1
    markdown = (report.parent / "report.md").read_text()
    (shown,) = re.findall(r"!\[stages\]\(([^)]*)\)", markdown)
    assert (report.parent / shown).resolve() == (folder / "stages-raster.png").resolve()
