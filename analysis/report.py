"""One report per sweep: ``report.html`` (self-contained), ``report.md``, ``fits.json``, ``figures/``.

- A sweep of several families begins with their comparison; below it stands what a sweep of one family has,
  once for each.
- The HTML opens from disk, fetches nothing and runs no script: figures are inline SVG, pictures
  data URIs, every text escaped by jinja2. SVG colours become CSS variables, so one figure serves
  a light page, a dark one and paper.
- Equal records give equal bytes: no dates, no machine's paths.
- A partial sweep gets a report too; what is missing is said where it would stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal

from analysis import (
    families,
    family_plots,
    fidelity,
    findings,
    grid_plots,
    plots,
    report_pictures,
    report_tables,
)
from analysis.families import Families
from analysis.family_pairs import QUANTITY
from analysis.fidelity import Protocol
from analysis.files import plain, write_bytes
from analysis.records import read_records
from analysis.study import LEVEL, Law, Study, left_out, studies_of, usable
from scaling.records import write_atomic, write_json

Figures = Iterator[tuple[str, str, Callable[[], Any]]]
"""Name, caption and maker of figures."""


def make_report(sweep_folder: str | Path, flops: Literal["flops", "flops_6nd"] = "flops") -> Path:
    """Write ``<sweep_folder>/report/`` and return the path of its ``report.html``.

    Args:
        sweep_folder: runs/<sweep>.
        flops: which compute the axes and laws over C use, exact or 6·N·D.

    Raises:
        RecordsError: as ``analysis.records.read_records``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    records = read_records(sweep_folder)
    studies = studies_of(records, flops)
    several = len(records.families) > 1
    first = next(iter(studies.values()))
    compared = families.compare_families(studies) if len(studies) > 1 else None
    measured = fidelity.read_fidelity(first.folder, [run for study in studies.values() for run in study.runs])
    pictures_notes: list[str] = []
    tokenizers = report_pictures.tokenizers(studies.values(), pictures_notes)
    parts = [_part(study, several, pictures_notes) for study in studies.values()]
    notes = [note for note in first.notes if all(note in study.notes for study in studies.values())]
    for part, study in zip(parts, studies.values(), strict=True):
        part["notes"] = [note for note in study.notes if note not in notes]
    target = first.folder / "report"
    figures = target / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    palette = _palette(list(studies.values()))
    drawn: dict[str, dict[str, Any]] = {}
    with plots.styled():
        for name, caption, make in _all_figures(studies, compared, measured, several):
            fig = make()
            svg = plots.to_svg(fig)
            write_atomic(figures / f"{name}.svg", svg)
            write_bytes(figures / f"{name}.png", plots.to_png(fig))
            drawn[name] = {"caption": caption, "svg": Markup(_inline(svg, name, palette))}
    for stale in figures.iterdir():
        if stale.stem not in drawn and stale.suffix in (".svg", ".png"):
            stale.unlink()
    for part in parts:
        part["groups"] = _groups(drawn, part["prefix"])
    value = {
        "sweep": first.name,
        "commit": first.sweep.get("commit"),
        "flops_convention": flops,
        "level": LEVEL,
        "families": {family: study.to_json() for family, study in studies.items()},
        "comparison": compared.to_json() if compared else None,
        "fidelity": fidelity.to_json(measured),
    }
    write_json(target / "fits.json", plain(value))
    context = {
        "name": first.name,
        "several": several,
        "headline": families.headline(compared) if compared else findings.headline(first),
        "notes": [*left_out(records), *notes, *pictures_notes],
        "comparison": _comparison(compared, drawn),
        "fidelity": _fidelity(measured, list(studies), drawn),
        "parts": parts,
        "figures": drawn,
        "tokenizers": tokenizers,
        "recipe": json.dumps(
            first.sweep.get("recipe", first.runs[0]["config"]), indent=2, ensure_ascii=False
        ),
        "command": first.sweep.get("command") or "not recorded",
        "commit": first.sweep.get("commit") or "not recorded",
        "colours": sorted(palette.values()),
        "compute": plots.X_LABELS[flops],
    }
    environment = Environment(
        loader=PackageLoader("analysis", "templates"), undefined=StrictUndefined,
        autoescape=lambda name: name is not None and ".html" in name, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["md"] = _markdown
    environment.filters["code"] = _code
    environment.filters["block"] = _block
    for name in ("report.html", "report.md"):
        write_atomic(target / name, environment.get_template(f"{name}.jinja").render(context))
    return target / "report.html"


def _part(study: Study, several: bool, notes: list[str]) -> dict[str, Any]:
    """One family's share of the page, but for its figures and notes."""
    laws, methods = report_tables.law_rows(study)
    return {
        "study": study,
        "prefix": f"{study.family}-" if several else "",
        "headline": findings.headline(study),
        "sentences": findings.sentences(study),
        "runs": report_tables.run_rows(study),
        "laws": laws,
        "methods": methods,
        "forecasts": report_tables.forecast_rows(study),
        "outlook": report_tables.outlook_rows(study.outlook),
        "conventions": report_tables.convention_rows(study),
        "grids": report_tables.grid_rows(study),
        "budgets": any(grid.isoflop or grid.isoflop_problem for grid in study.grids),
        "settings": report_tables.setting_rows(study),
        "rates": report_tables.rate_sentences(study),
        "samples": report_pictures.samples(study, notes),
        "stages": report_pictures.stages(study, notes),
    }


def _comparison(found: Families | None, drawn: dict[str, Any]) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "notes": found.notes,
        "figures": [name for name in drawn if name.startswith(COMPARED)],
        "exponents": report_tables.exponent_rows(found),
        "pairs": report_tables.pair_rows(found),
        "standings": [standing.sentence for standing in found.standings],
    }


def _fidelity(
    measured: Sequence[Protocol], names: Sequence[str], drawn: dict[str, Any]
) -> list[dict[str, Any]]:
    return [
        {
            "label": protocol.label,
            "figures": [name for name in drawn if name.startswith(f"{MEASURED}{number}_")],
            "rows": report_tables.fidelity_rows(protocol, names),
        }
        for number, protocol in enumerate(measured, 1)
    ]


# -- figures ---------------------------------------------------------------------------------


COMPARED, MEASURED = "families", "fid"
"""What the names of figures of several families, and of generation metrics, begin with."""


def _all_figures(
    studies: dict[str, Study], compared: Families | None, measured: Sequence[Protocol], several: bool
) -> Figures:
    names, flops = list(studies), next(iter(studies.values())).flops
    for number, group in enumerate(compared.shared if compared else (), 1):
        caption = (
            f"Loss of the last map, {group.side}×{group.side} tokens that are the same for "
            f"{families.listed(group.families)}: final value of every finished run against N, and every run "
            "against compute with each family's Pareto frontier; each family's own law, without offset."
        )
        if any(len(study.final(QUANTITY)) for study in group.studies):
            make: Callable[[], Any] = partial(family_plots.params_figure, group, names)
            yield f"{COMPARED}{number}_{QUANTITY}_vs_params", caption, make
        if any(len(study.frontiers[QUANTITY, "pareto"].x) for study in group.studies):
            make = partial(family_plots.compute_figure, group, names)
            yield f"{COMPARED}{number}_{QUANTITY}_vs_compute", caption, make
    for number, protocol in enumerate(measured, 1):
        if len(fidelity.drawn(protocol.last)):
            yield (
                f"{MEASURED}{number}_vs_params",
                f"Fréchet distance, {protocol.label}: the latest measurement of every run against N, every "
                "measurement against compute.",
                partial(family_plots.fid_figure, protocol, "params", names),
            )
        if len(fidelity.drawn(protocol.frame)):
            yield (
                f"{MEASURED}{number}_vs_compute",
                f"Fréchet distance, {protocol.label}: every measurement against compute.",
                partial(family_plots.fid_figure, protocol, flops, names),
            )
    for study in studies.values():
        prefix = f"{study.family}-" if several else ""
        for name, caption, make in _figures(study):
            yield prefix + name, caption, make


def _figures(study: Study) -> Figures:
    """Name, caption and maker of every figure that the records can fill."""
    frame, flops = study.frame, study.flops
    for quantity in plots.QUANTITIES:
        final = study.final(quantity)
        if len(final):
            laws = [_named(r) for r in study.laws if r.quantity == quantity and r.x == "params" and r.law]
            yield (
                f"{quantity}_vs_params",
                "Final validation value of every finished run against N = the parameters of the blocks' "
                "matrices, with the laws fitted to all of them, without and with offset (VAR fig. 5).",
                partial(plots.params_figure, final, quantity, laws),
            )
    for quantity in plots.QUANTITIES:
        good = frame[usable(frame, quantity)]
        if len(good):
            laws = [
                _named(r) for r in study.laws if r.quantity == quantity and r.points == "pareto" and r.law
            ]
            yield (
                f"{quantity}_vs_compute",
                "Every evaluation of every run, coloured by depth, and the Pareto frontier of the runs that "
                f"did not fail, with its laws (VAR fig. 6). Compute is {_convention(study)}.",
                partial(
                    plots.compute_figure,
                    good,
                    quantity,
                    study.frontiers[quantity, "pareto"],
                    laws,
                    flops,
                ),
            )
    for quantity in ("loss_last", "loss_avg"):
        if quantity in study.forecasts:
            named = [("with offset: " if o else "power law: ", f) for o, f in study.forecasts[quantity]]
            yield (
                f"{quantity}_forecast",
                "The largest depth was hidden, the laws fitted to the others, and the forecast set beside "
                "what the run reached.",
                partial(plots.forecast_figure, study.final(quantity), quantity, named),
            )
    for grid in study.grids:
        if grid.surface is not None:
            yield (
                f"{grid.quantity}_vs_tokens",
                "Final validation value of every finished run against the tokens it saw, and the surface "
                "over N and D at each size.",
                partial(grid_plots.surface_figure, study.gridded(grid.quantity), grid),
            )
    for quantity in ("loss_avg", "loss_last"):
        good = frame[usable(frame, quantity)]
        if len(good):
            yield (
                f"{quantity}_curves",
                "Validation loss of every run while it trained; dotted runs did not finish.",
                partial(plots.curves_figure, good, quantity),
            )
    scales = _scales(study)
    for quantity in ("loss", "error"):
        if len(study.finished) and scales:
            yield (
                f"{quantity}_by_scale",
                "Final validation value at each scale of the token pyramid, one line per depth.",
                partial(plots.scales_figure, study.finished, quantity, scales),
            )


def _named(row: Law) -> tuple[str, Any]:
    return ("with offset: " if row.offset else "power law: "), row.law


def _convention(study: Study) -> str:
    exact = "the exact count (3 × forward, allowed attention pairs only)"
    return exact if study.flops == "flops" else "the approximation 6·N·D"


def _scales(study: Study) -> list[int]:
    """Sides of the token maps that every run has; empty where there is one, or runs differ."""
    found = {tuple(run["config"]["model"].get("scales", [])) for run in study.runs}
    lengths = {len(v) for v in study.frame["loss_scales"]}
    scales = found.pop()
    return list(scales) if not found and lengths == {len(scales)} and len(scales) > 1 else []


def _groups(drawn: dict[str, dict[str, Any]], prefix: str) -> dict[str, list[str]]:
    """A family's figures by section."""
    known = {f"{prefix}{quantity}" for quantity in (*plots.QUANTITIES, "loss", "error")}
    return {
        part: [n for n in drawn if n.endswith(ending) and n.removesuffix(ending) in known]
        for part, ending in (
            ("size", "_vs_params"), ("compute", "_vs_compute"), ("forecast", "_forecast"),
            ("grid", "_vs_tokens"),
            ("curves", "_curves"), ("scale", "_by_scale"),
        )
    }  # fmt: skip


def _palette(studies: Sequence[Study]) -> dict[str, tuple[str, str, str]]:
    """Light hex -> (CSS name, light, dark)."""
    found = {
        plots.INK: ("ink", plots.INK, "#e8eaed"), plots.MUTED: ("muted", plots.MUTED, "#9aa3ad"),
        plots.GRID: ("grid", plots.GRID, "#31363d"), plots.PAPER: ("paper", plots.PAPER, "#16191d"),
        plots.PLAIN: ("plain", plots.PLAIN, "#5db5ef"), plots.OFFSET: ("offset", plots.OFFSET, "#f29157"),
    }  # fmt: skip
    for i, (light, dark, _) in enumerate(family_plots.LOOKS):
        found[light] = (f"f{i}", light, dark)
    for depths in sorted({study.frame["depth"].nunique() for study in studies}):
        pairs = zip(plots.depth_colours(depths), plots.depth_colours(depths, dark=True), strict=True)
        for i, (light, dark) in enumerate(pairs):
            found.setdefault(light, (f"d{i}of{depths}", light, dark))
    return found


def _inline(svg: str, name: str, palette: dict[str, tuple[str, str, str]]) -> str:
    """The SVG element alone, ids made unique on the page, colours as CSS variables."""
    name = escape(name)
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    for light, (variable, _, _) in palette.items():
        body = body.replace(light, f"var(--{variable})")
    # Presentation attributes do not read CSS variables; matplotlib writes styles except for a few fills.
    body = re.sub(r'\b(fill|stroke)="(var\([^"]*\))"', r'style="\1: \2"', body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" ', body, count=1)


# -- text -------------------------------------------------------------------------------------


def _markdown(text: Any) -> str:
    """Text for a Markdown table cell or paragraph: nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", str(text)).replace("\n", " ")


def _fence(text: str, least: int) -> str:
    """Backticks, more than ``text`` has in a row anywhere."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def _code(text: Any) -> str:
    """Text as Markdown code within a line."""
    line = " ".join(str(text).split("\n"))
    fence = _fence(line, 1)
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _block(text: str, language: str) -> str:
    """Text as a Markdown code block."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"
