"""A sweep folder with known exponents, as a finished (or interrupted) sweep leaves it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scaling.records import RunFolder, write_json

SCALES = [1, 2, 3, 4]
SEQ = sum(s * s for s in SCALES)
ALPHA = {"loss_last": -0.020, "loss_avg": -0.025, "error_last": -0.008, "error_avg": -0.010}
AT_MILLION = {"loss_last": 4.45, "loss_avg": 4.60, "error_last": 0.93, "error_avg": 0.94}
BATCH, STEPS, IMAGES = 64, 300, 4000
STEEPER = {"var": 1.0, "flexvar": 1.0, "flexvar-mamba": 1.5, "raster": 0.5}
"""A family's exponents in units of ``ALPHA``."""
HIGHER = {"var": 1.0, "flexvar": 0.98, "flexvar-mamba": 0.97, "raster": 0.95}
"""A family's values at a million parameters in units of ``AT_MILLION``."""
TOKENIZERS = {"residual": "tok-32px-v256-0123456789", "scalable": "tok-32px-v256-abcdefabcd"}


def law(quantity: str, params: float, offset: float = 0.0, family: str = "var") -> float:
    """The ground truth of the last evaluation."""
    at_million = AT_MILLION[quantity] * HIGHER[family] - offset
    return float(offset + at_million * (params / 1e6) ** (ALPHA[quantity] * STEEPER[family]))


def scales_of(family: str) -> list[int]:
    """Side lengths of a family's token maps."""
    return SCALES[-1:] if family == "raster" else SCALES


def quantizer_of(family: str) -> str:
    """The kind of tokenizer that a family is trained on."""
    return "residual" if family == "var" else "scalable"


def run_config(depth: int, seed: int = 0, family: str = "var") -> dict[str, Any]:
    """Shaped like ``to_dict(RunConfig)``."""
    return {
        "model": {
            "family": family, "depth": depth, "width": 64 * depth, "heads": depth,
            "scales": scales_of(family),
        },
        "data": {"source": "photos", "resolution": 32, "train_images": IMAGES, "val_images": 500},
        "tokenizer": {"quantizer": quantizer_of(family), "scales": SCALES},
        "tokenizer_train": {"steps": 100, "lpips_weights": None},
        "train": {"steps": STEPS, "batch": BATCH},
        "seed": seed,
    }  # fmt: skip


def sweep(
    root: Path,
    depths: Sequence[int] = (1, 2, 3, 4, 5),
    seeds: Sequence[int] = (0,),
    evaluations: int = 12,
    noise: float = 0.0,
    unfinished: Sequence[int] = (),
    pictures: bool = False,
    tokenizer: bool = False,
    name: str = "study",
    rng_seed: int = 0,
    families: Sequence[str] = ("var",),
    fidelity: bool = False,
) -> Path:
    """Write a sweep; final losses lie on ``law`` (times exp(noise·z))."""
    rng = np.random.default_rng(rng_seed)
    folder = root / name
    listed = []
    for family in families:
        place = TOKENIZERS[quantizer_of(family)]
        for seed in seeds:
            for depth in depths:
                run = RunFolder(folder / f"{family}-d{depth}-s{seed}-0123456789")
                listed.append(
                    {
                        "run": run.name, "family": family,
                        "tokenizer": f"../tokenizers/{place}", "tokens": f"../tokens/{place}",
                    }
                )  # fmt: skip
                run.create(run_config(depth, seed, family))
                _write_run(run, depth, evaluations, noise, rng, depth in unfinished, family)
                if fidelity and depth not in unfinished:
                    measure(run, family, rng)
                if pictures and depth not in unfinished:
                    _picture(run.path / "samples.png", (4 * 32, 4 * 32), rng)
    facts: dict[str, Any] = {
        "name": name, "runs": listed, "recipe": {"families": list(families), "depths": list(depths)},
        "command": f"python run_sweep.py run {name}", "commit": "0123456789abcdef",
    }  # fmt: skip
    for kind in dict.fromkeys(map(quantizer_of, families)) if tokenizer else ():
        tok = root / "tokenizers" / TOKENIZERS[kind]
        write_json(
            tok / "tokenizer" / "tokenizer.json",
            {
                "content_hash": "ab" * 32, "config": {},
                "facts": {
                    "psnr": 21.5, "ssim": 0.71,
                    "usage": [1.0, 0.9, 0.8, 0.7], "perplexity": [9.0, 40.0, 80.0, 99.0],
                },
            },
        )  # fmt: skip
        RunFolder(tok).append({"kind": "eval", "step": 1, "psnr": 20.0})
        _picture(tok / "reconstructions.png", (8 * 32, 2 * 32), rng)
    write_json(folder / "sweep.json", facts)
    return folder


def _write_run(
    run: RunFolder, depth: int, evaluations: int, noise: float, rng: np.random.Generator, unfinished: bool,
    family: str,
) -> None:  # fmt: skip
    params = 73728 * depth**3
    scatter = {q: float(np.exp(noise * rng.normal())) for q in ALPHA}
    steps = np.unique(np.round(np.geomspace(6, STEPS, evaluations)).astype(int))
    if unfinished:
        steps = steps[: len(steps) // 2]
    parts = (0.6, 0.85, 0.98, 1.03)[-len(scales_of(family)) :]
    length = sum(s * s for s in scales_of(family))
    for step in steps.tolist():
        tokens = step * BATCH * length
        # Slower for larger models, so that the curves cross; gone at the last step.
        lag = 1 + 0.22 * (np.sqrt(300 / step) - 1) * (0.5 + 0.1 * depth) / np.sqrt(300 / 6)
        share = {"loss": 1.0, "erro": 0.1}
        values = {q: law(q, params, family=family) * scatter[q] * float(lag) ** share[q[:4]] for q in ALPHA}
        record: dict[str, Any] = {
            "kind": "eval", "step": step, "params": params, "params_total": params + 200_000,
            "tokens": tokens, "unique_tokens": min(tokens, IMAGES * length), "epochs": step * BATCH / IMAGES,
            "flops": int(4.1 * params * tokens), "flops_6nd": int(6 * params * tokens),
            "eval_images": 500, "seconds": 1.0,
            "loss_scales": [values["loss_avg"] * f for f in parts],
            "error_scales": [min(1.0, values["error_avg"] * f) for f in parts],
        }  # fmt: skip
        record |= values | {f"{q}_se": v * 0.0015 for q, v in values.items()}
        run.append(record)
    run.close()
    if unfinished:
        run.set_status("failed", step=int(steps[-1]), total_steps=STEPS, error="loss <is> not finite")
    else:
        run.set_status("done", step=STEPS, total_steps=STEPS)


def measure(run: RunFolder, family: str, rng: np.random.Generator, **values: Any) -> None:
    """Append a line of generation metrics at the run's last evaluation."""
    last = run.metrics("eval")[-1]
    fid = 40 * HIGHER[family] ** 5 * (last["params"] / 1e6) ** -0.2
    record = {
        "kind": "fidelity", "step": last["step"], "tokens": last["tokens"], "flops": last["flops"],
        "params": last["params"], "fid": float(fid), "is": 3 + 60 / fid, "is_std": 0.1,
        "precision": float(0.5 + 0.1 * rng.random()), "recall": 0.4, "images": 5000,
        "extractor": "inception", "reference": "validation", "guidance": 1.5, "guidance_form": "ramp",
        "top_k": 0, "top_p": 0.0, "seed": 0,
    } | values  # fmt: skip
    told_apart_by = (
        "extractor",
        "reference",
        "images",
        "guidance",
        "guidance_form",
        "top_k",
        "top_p",
        "seed",
    )
    run.append(record | {"setting": " ".join(f"{key}={record[key]}" for key in told_apart_by)})
    run.close()


def change(folder: Path, depth: int, seed: int = 0, line: int = -1, **values: Any) -> None:
    """Overwrite values of one recorded evaluation, the last if not said otherwise."""
    file = folder / f"var-d{depth}-s{seed}-0123456789" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[line] = json.dumps(json.loads(lines[line]) | values)
    file.write_text("\n".join(lines) + "\n")


def _picture(file: Path, size: tuple[int, int], rng: np.random.Generator) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file)


def fits(report: Path, family: str = "var") -> dict[str, Any]:
    """A family's numbers beside a report."""
    value: dict[str, Any] = json.loads((report.parent / "fits.json").read_text())
    found: dict[str, Any] = value["families"][family]
    return found
