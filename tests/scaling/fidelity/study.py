"""A finished sweep of two families that was never trained: random weights, one evaluation, images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scaling import flops
from scaling.config import Family, RunConfig, to_dict
from scaling.families.registry import build
from scaling.records import RunFolder, write_json
from scaling.tokenizer.vqvae import Tokenizer, save_tokenizer
from tests.scaling import tiny
from tests.scaling.data_fixtures import image_folder

EXTRACTOR = f"{__name__}:extractor"
FAMILIES: tuple[Family, ...] = ("var", "flexvar")


class Pooled:
    """Mean colours of the quarters of an image."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images_B3HW, 2).flatten(1)

    def probabilities(self, images_B3HW: Tensor) -> Tensor:
        return (10 * images_B3HW.mean(dim=(2, 3))).softmax(dim=1)


def extractor() -> Pooled:
    return Pooled()


def make_images(root: Path) -> Path:
    """30 training and 10 validation images of three classes."""
    return image_folder(root, {"a": 10, "b": 10, "c": 10}, {"a": 4, "b": 3, "c": 3})


def config_of(family: Family, images: Path) -> RunConfig:
    """A depth-1 run on these images."""
    data = dataclasses.replace(tiny.DATA, source="folder", path=str(images))
    return dataclasses.replace(tiny.run_config(family), data=data)


def make_study(root: Path, images: Path) -> list[RunFolder]:
    """``root/runs/study`` and its two tokenizers; the runs, as the sweep lists them."""
    sweep, listed = root / "runs" / "study", []
    for seed, family in enumerate(FAMILIES):
        config, run = config_of(family, images), None
        torch.manual_seed(seed)
        stage = f"../tokenizers/{config.tokenizer_run.run_id}"
        save_tokenizer(Tokenizer(config.tokenizer).eval(), sweep / stage / "tokenizer", {})
        run = RunFolder(sweep / config.run_id)
        run.create(to_dict(config))
        (run.path / "final").mkdir()
        save_file(build(config.model).state_dict(), run.path / "final" / "weights.safetensors")
        step = config.total_steps
        spent = flops.spent(config, step)
        run.append(
            {"kind": "eval", "step": step, "params": flops.params(config.model), "params_total": 1}
            | {
                "tokens": spent.tokens,
                "unique_tokens": 1,
                "epochs": 1.0,
                "flops": spent.flops,
                "flops_6nd": 1,
            }
        )
        run.close()
        run.set_status("done")
        listed.append({"run": run.name, "family": family, "tokenizer": stage, "tokens": "../tokens/none"})
    write_json(sweep / "sweep.json", {"name": "study", "runs": listed})
    return [RunFolder(sweep / entry["run"]) for entry in listed]
