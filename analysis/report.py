"""One report per sweep: ``report.html`` (self-contained), ``report.md``, ``fits.json``, ``figures/``.

- The HTML opens from disk, fetches nothing and runs no script: figures are inline SVG, pictures
  data URIs, every text escaped by jinja2. SVG colours become CSS variables, so one figure serves
  a light page, a dark one and paper.
- Equal records give equal bytes: no dates, no machine's paths.
- A partial sweep gets a report too; what is missing is said where it would stand.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from analysis import findings, plots
from analysis.files import write_bytes
from analysis.outlook import Outlook
from analysis.study import Law, Study, make_study, usable
from scaling.records import RecordsError, RunFolder, read_json, write_atomic, write_json

ROUNDING = 1e-9
"""An exponent that moves by less has not moved."""
OUTLOOK = ("loss_last_plain", "loss_last_offset", "loss_avg_plain", "loss_avg_offset")
PICTURE_BYTES = 400_000
"""A picture above this is embedded as a smaller JPEG; the file itself stays where it is."""


def make_report(sweep_folder: str | Path, flops: Literal["flops", "flops_6nd"] = "flops") -> Path:
    """Write ``<sweep_folder>/report/`` and return the path of its ``report.html``.

    Args:
        sweep_folder: runs/<sweep>.
        flops: which compute the axes and laws over C use, exact or 6·N·D.

    Raises:
        RecordsError: as ``analysis.study.make_study``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    study = make_study(sweep_folder, flops)
    notes = list(study.notes)
    tokenizer, samples = _tokenizer(study, notes), _samples(study, notes)
    target = study.folder / "report"
    figures = target / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, dict[str, Any]] = {}
    with plots.styled():
        for name, caption, make in _figures(study):
            fig = make()
            svg = plots.to_svg(fig)
            write_atomic(figures / f"{name}.svg", svg)
            write_bytes(figures / f"{name}.png", plots.to_png(fig))
            drawn[name] = {"caption": caption, "svg": Markup(_inline(svg, name, study))}
    for stale in figures.iterdir():
        if stale.stem not in drawn and stale.suffix in (".svg", ".png"):
            stale.unlink()
    write_json(target / "fits.json", study.to_json())
    laws = [_law_row(row) for row in study.laws]
    methods = list(dict.fromkeys(row["method"] for row in laws if row["method"]))
    for row in laws:
        row["mark"] = "abcdefghijklmnopqrstuvwxyz"[methods.index(row["method"])] if row["method"] else ""
    context = {
        "study": study,
        "notes": notes,
        "figures": drawn,
        "groups": _groups(drawn),
        "headline": findings.headline(study),
        "sentences": findings.sentences(study),
        "runs": _run_rows(study),
        "laws": laws,
        "methods": list(zip("abcdefghijklmnopqrstuvwxyz", methods, strict=False)),
        "forecasts": _forecast_rows(study),
        "outlook": _outlook_rows(study.outlook),
        "conventions": _convention_rows(study),
        "tokenizer": tokenizer,
        "samples": samples,
        "recipe": json.dumps(study.sweep.get("recipe", _config(study)), indent=2, ensure_ascii=False),
        "command": study.sweep.get("command") or "not recorded",
        "commit": study.sweep.get("commit") or "not recorded",
        "colours": _css_colours(study),
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


# -- figures ---------------------------------------------------------------------------------


def _figures(study: Study) -> Iterator[tuple[str, str, Callable[[], Any]]]:
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


def _groups(drawn: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    return {
        part: [name for name in drawn if name.endswith(ending)]
        for part, ending in (
            ("size", "_vs_params"), ("compute", "_vs_compute"), ("forecast", "_forecast"),
            ("curves", "_curves"), ("scale", "_by_scale"),
        )
    }  # fmt: skip


def _palette(study: Study) -> dict[str, tuple[str, str, str]]:
    """Light hex -> (CSS name, light, dark)."""
    depths = study.frame["depth"].nunique()
    found = {
        plots.INK: ("ink", plots.INK, "#e8eaed"), plots.MUTED: ("muted", plots.MUTED, "#9aa3ad"),
        plots.GRID: ("grid", plots.GRID, "#31363d"), plots.PAPER: ("paper", plots.PAPER, "#16191d"),
        plots.PLAIN: ("plain", plots.PLAIN, "#5db5ef"), plots.OFFSET: ("offset", plots.OFFSET, "#f29157"),
    }  # fmt: skip
    pairs = zip(plots.depth_colours(depths), plots.depth_colours(depths, dark=True), strict=True)
    for i, (light, dark) in enumerate(pairs):
        found.setdefault(light, (f"d{i}", light, dark))
    return found


def _css_colours(study: Study) -> list[tuple[str, str, str]]:
    return sorted(_palette(study).values())


def _inline(svg: str, name: str, study: Study) -> str:
    """The SVG element alone, ids made unique on the page, colours as CSS variables."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    for light, (variable, _, _) in _palette(study).items():
        body = body.replace(light, f"var(--{variable})")
    # Presentation attributes do not read CSS variables; matplotlib writes styles except for a few fills.
    body = re.sub(r'\b(fill|stroke)="(var\([^"]*\))"', r'style="\1: \2"', body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" ', body, count=1)


# -- tables ----------------------------------------------------------------------------------


def _run_rows(study: Study) -> list[dict[str, Any]]:
    rows = []
    for run in sorted(study.runs, key=lambda r: (r["depth"], r["seed"])):
        part = study.frame[study.frame["run"] == run["run"]]
        row: dict[str, Any] = {
            "run": run["run"],
            "depth": run["depth"],
            "seed": run["seed"],
            "state": run["state"],
        }
        last = part.iloc[-1] if len(part) else None
        for key in ("params", "tokens", "flops", "flops_6nd"):
            row[key] = "–" if last is None else plots.number(float(f"{last[key]:.4g}"))
        row["epochs"] = "–" if last is None else f"{last['epochs']:.3g}"
        for key in plots.QUANTITIES:
            row[key] = "–" if last is None else _with_error(last[key], last[key + "_se"])
        rows.append(row)
    return rows


def _with_error(value: float, error: float) -> str:
    """A single validation image has no standard error."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _law_row(row: Law) -> dict[str, Any]:
    over = {"params": "N", "flops": "C", "flops_6nd": "C (6ND)"}[row.x]
    points = {"final": "final", "pareto": "Pareto set", "hull": "log-log hull"}[row.points]
    cells = {
        "quantity": plots.QUANTITIES[row.quantity][0], "x": over, "points": points, "drawable": row.drawable,
        "form": f"L∞ + (β{over[0]})^α" if row.offset else f"(β{over[0]})^α",
        "status": "converged" if row.drawable else row.status,
        "alpha": "–", "beta": "–", "offset": "–", "pearson": "–", "n": "–", "method": "",
    }  # fmt: skip
    law = row.law
    if law is None:
        return cells
    cells["pearson"], cells["n"] = f"{law.pearson:.4f}", f"{len(law.x)} ({law.groups})"
    if not law.converged:
        return cells
    why = law.no_interval()
    bounds = {} if why else law.interval()
    cells["method"] = f"no interval: {why}" if why else law.interval_method
    cells["alpha"] = _with_interval(law.alpha, bounds.get("alpha"))
    cells["beta"] = _big(law.log_beta)
    if row.offset:
        cells["offset"] = _with_interval(law.offset, bounds.get("offset"))
    return cells


def _outlook_rows(outlook: tuple[Outlook, ...]) -> list[dict[str, str]]:
    """A row per depth, a cell per loss and form."""
    rows: dict[int, dict[str, str]] = {}
    for o in outlook:
        start = {"depth": f"d{o.depth}", "params": plots.number(float(f"{o.params:.4g}"))}
        start["flops"] = plots.number(float(f"{o.flops:.3g}"))
        cells = rows.setdefault(o.depth, start | dict.fromkeys(OUTLOOK, "–"))
        cells[f"{o.quantity}_{'offset' if o.offset else 'plain'}"] = (
            f"{o.value:.4f} [{o.low:.5g}, {o.high:.5g}]"
        )
    return list(rows.values())


def _convention_rows(study: Study) -> list[dict[str, str]]:
    rows = []
    for row in study.conventions:
        fitted = math.isfinite(row["exponent"])
        rows.append(
            {
                "axis": row["N"] if row["x"] == "params" else row["C"],
                "points": "final losses" if row["x"] == "params" else "Pareto set",
                "alpha": _with_interval(row["exponent"], (row["low"], row["high"])) if fitted else "–",
                "moved": f"{row['moved']:+.2g}" if fitted and abs(row["moved"]) > ROUNDING else "–",
                "status": row["status"],
            }
        )
    return rows


def _with_interval(value: float, bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return f"{value:.4g}"
    return f"{value:.4g} [{bounds[0]:.4g}, {bounds[1]:.4g}]"


def _big(log_value: float) -> str:
    """exp(log_value) as m×10ⁿ, also beyond the range of floats."""
    exponent = math.floor(log_value / math.log(10))
    mantissa = math.exp(log_value - exponent * math.log(10))
    return f"{mantissa:.2f}×{plots.number(10.0**4)[:2]}{str(exponent).translate(plots._SUPER)}"


def _forecast_rows(study: Study) -> list[dict[str, Any]]:
    rows = []
    for quantity, found in study.forecasts.items():
        for offset, f in found:
            row: dict[str, Any] = {
                "quantity": plots.QUANTITIES[quantity][0], "form": "with offset" if offset else "power law",
                "fitted": f.trained, "actual": f"{f.actual:.4f}", "status": f.law.status,
                "predicted": "–", "error": "–", "covered": "–",
            }  # fmt: skip
            if f.law.converged:
                row |= {
                    "predicted": f"{f.predicted:.4f} [{f.low:.5g}, {f.high:.5g}]",
                    "error": f"{f.error:+.2%}", "covered": f.verdict, "status": "converged",
                }  # fmt: skip
            rows.append(row)
    return rows


# -- what lies beside the records --------------------------------------------------------------


def _config(study: Study) -> dict[str, Any]:
    config: dict[str, Any] = study.runs[0]["config"]
    return config


def _scales(study: Study) -> list[int]:
    scales = _config(study)["model"].get("scales", [])
    counts = {len(v) for v in study.frame["loss_scales"]}
    return list(scales) if counts == {len(scales)} else []


def _tokenizer(study: Study, notes: list[str]) -> dict[str, Any]:
    """Facts and pictures of the tokenizer that the sweep names; ``missing`` says what is not there."""
    link = study.sweep.get("tokenizer")
    if link is None:
        return {"missing": "sweep.json names no tokenizer", "picture": None, "facts": [], "scales": []}
    root = study.folder.resolve().parent
    folder = (study.folder / str(link)).resolve()
    if not folder.is_relative_to(root):
        raise RecordsError(f"{study.folder / 'sweep.json'}: tokenizer {link!r} lies outside {root.name}/")
    known: dict[str, Any] = {}
    for record in RunFolder(folder).metrics():
        known |= {k: v for k, v in record.items() if k not in ("kind", "step")}
    description = folder / "tokenizer" / "tokenizer.json"
    missing = "" if description.exists() else f"the tokenizer {folder.name} is not finished or not kept here"
    facts = read_json(description) if description.exists() else {}
    known |= facts.get("facts", {})
    wanted = ("psnr", "ssim", "usage", "perplexity", "steps")
    scalars = [
        (key, f"{value:.4g}")
        for key, value in sorted(known.items())
        if isinstance(value, int | float) and not isinstance(value, bool) and any(w in key for w in wanted)
    ]
    lists = {
        key: value for key, value in sorted(known.items())
        if isinstance(value, list) and ("usage" in key or "perplexity" in key)
        and all(isinstance(v, int | float) for v in value)
    }  # fmt: skip
    sides = _config(study)["model"].get("scales", [])
    table = [
        {"scale": f"{side}×{side}", "values": [f"{column[i]:.3g}" for column in lists.values()]}
        for i, side in enumerate(sides)
        if all(len(column) == len(sides) for column in lists.values())
    ]
    return {
        "missing": missing, "name": folder.name, "facts": scalars, "columns": list(lists), "scales": table,
        "hash": facts.get("content_hash", ""),
        "picture": _picture(folder / "reconstructions.png", notes),
        "path": f"../{link}/reconstructions.png",
    }  # fmt: skip


def _samples(study: Study, notes: list[str]) -> list[dict[str, Any]]:
    found = []
    for run in sorted(study.runs, key=lambda r: (r["depth"], r["seed"])):
        file = study.folder / run["run"] / "samples.png"
        found.append(
            {
                "depth": run["depth"],
                "seed": run["seed"],
                "picture": _picture(file, notes),
                "path": f"../{run['run']}/samples.png",
            }
        )
    return found


def _picture(file: Path, notes: list[str]) -> str | None:
    """A data URI, or None when there is no such file, or a damaged one, which is noted."""
    if not file.exists():
        return None
    data, kind = file.read_bytes(), "png"
    if len(data) > PICTURE_BYTES:
        from PIL import Image

        try:
            with Image.open(file) as picture:
                small = picture.convert("RGB")
        # Pillow's words for a torn file, a torn compressed part, and a size that only an attack has.
        except (OSError, ValueError, Image.DecompressionBombError):
            notes.append(f"{file.parent.name}/{file.name} is damaged or too large; left out")
            return None
        small.thumbnail((1600, 1600))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


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
