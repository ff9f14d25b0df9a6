"""The job that measures the pictures of a finished run and adds the numbers to its records.

    python -m scaling.fidelity.job runs/<sweep>/<run> --tokenizer runs/tokenizers/<id> \\
        --extractor inception --weights pt_inception-2015-12-05-6726825d.pth

- One line ``{"kind": "fidelity", ...}`` is appended to ``metrics.jsonl``, with N, D and C of the last
  evaluation beside it, so that FID is plotted against them as loss is. Another setting (guidance,
  extractor, number of images) is another line; the same one again replaces the first for readers.
- Image i has class i mod V and seed ``--seed`` + i: classes are balanced and mixed, as inception scores need,
  and the pictures are the same however many processes (``accelerate launch``) share them.
- The reference is real images of the run's data, all of a split, centre crops at the run's resolution as the
  run itself is validated on; or a file. With ``--save-reference`` a sweep looks at them once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from scaling.config import ConfigError, DataConfig, RunConfig, SamplingConfig, require
from scaling.data.images import ImageSource, SourceView, Split
from scaling.data.sources import Chosen, open_source
from scaling.data.transforms import image_batch
from scaling.fidelity.collect import BATCH, KEPT, Images, Share, chosen
from scaling.fidelity.features import NamedExtractor, load_extractor
from scaling.fidelity.measure import measure
from scaling.fidelity.reference import Reference, load_reference, make_reference, save_reference
from scaling.generation import sample_tokens
from scaling.pretrained import load_model
from scaling.process import run_job
from scaling.records import RecordsError, RunFolder
from scaling.tokenizer.vqvae import load_tokenizer

FROM_EVALUATION = (
    "step", "params", "params_total", "tokens", "unique_tokens", "epochs", "flops", "flops_6nd",
)  # fmt: skip
SAMPLING = ("guidance", "guidance_form", "top_k", "top_p", "seed")
"""How pictures are drawn: options of the command line, fields of ``SamplingConfig`` and of the record."""


def sampler(
    folder: RunFolder, tokenizer_run: Path, sampling: SamplingConfig, device: torch.device
) -> tuple[Images, RunConfig]:
    """The run's pictures by index, and its config.

    Raises:
        RecordsError: the run is not finished, or there is no tokenizer.
    """
    model, config = load_model(folder, device)
    tokenizer = load_tokenizer(tokenizer_run / "tokenizer").to(device)

    @torch.no_grad()
    def sample(indices: Sequence[int]) -> Tensor:
        labels_B = torch.tensor([i % config.model.num_classes for i in indices], device=device)
        _, latent_BCHW = sample_tokens(
            model, tokenizer.quantize, labels_B, [sampling.seed + i for i in indices],
            guidance=sampling.guidance, guidance_form=sampling.guidance_form,
            top_k=sampling.top_k, top_p=sampling.top_p,
        )  # fmt: skip
        return tokenizer.decode_features(latent_BCHW).clamp(-1, 1)

    return sample, config


class _AsValidation(SourceView):
    """The training images as validation images, of which ``image_batch`` cuts the centre."""

    def count(self, split: Split) -> int:
        """Training images."""
        return self.source.count("train")

    def image(self, split: Split, i: int) -> Image.Image:
        """A training image."""
        return self.source.image("train", i)


def real_images(data: DataConfig, split: Split, wanted: int | None, threads: int) -> tuple[Images, int, str]:
    """Centre crops of a split by index, how many there are, and what tells them from others.

    Args:
        wanted: so many of the split, as ``chosen``; all when None.

    Raises:
        ConfigError: the data is not there, or has fewer images.
    """
    opened = open_source(data)
    source: ImageSource = _AsValidation(opened) if split == "train" else opened
    pool, there = ThreadPoolExecutor(threads), source.count("val")
    count = there if wanted is None else wanted
    require(count <= there, f"--reference-images asks for {count}, the {split} split has {there}")
    order = chosen(there, count)

    def batch(indices: Sequence[int]) -> Tensor:
        crops_BHW3 = image_batch(source, data, "val", order[list(indices)], pool=pool)
        return torch.from_numpy(crops_BHW3).permute(0, 3, 1, 2)

    # A study's own choice of images follows from the data's seed; how they are cut, from the rest.
    seed = f"-seed{data.seed}" if isinstance(opened, Chosen) else ""
    name = f"{split}-{opened.fingerprint()[:12]}-{data.resolution}px-margin{data.crop_margin:g}{seed}-{count}"
    return batch, count, name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scaling.fidelity.job",
        description="Measure a finished run's pictures: FID, inception score, precision and recall.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer run's folder")
    parser.add_argument("--images", type=int, default=50_000, help="pictures to draw (default 50000)")
    parser.add_argument(
        "--extractor", required=True, help="inception, inception-adm, classifier or MODULE:FUNCTION"
    )
    parser.add_argument("--weights", help="a file or hf://OWNER/NAME/FILE; of a classifier, its folder")
    parser.add_argument(
        "--reference-data", default="train", help="train, val, or an .npz file (default train)"
    )
    parser.add_argument("--reference-images", type=int, help="so many of the split; default all")
    parser.add_argument("--save-reference", type=Path, help="write the reference to this .npz file")
    parser.add_argument("--data-path", help="where the run's images lie now, if elsewhere")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--guidance-form", choices=("ramp", "constant"), default="ramp")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures at once")
    parser.add_argument(
        "--manifold", type=int, default=KEPT, help=f"images for precision and recall (default {KEPT})"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args(arguments)
    for name in ("images", "batch", "manifold", "reference_images"):
        value, option = getattr(given, name), name.replace("_", "-")
        require(value is None or value >= 1, f"--{option} must be at least 1, got {value}")
    return given


def reference_of(
    given: argparse.Namespace, data: DataConfig, extractor: NamedExtractor, share: Share
) -> Reference:
    """What ``--reference-data`` names."""
    options: dict[str, Any] = {"batch": given.batch, "keep": given.manifold, "share": share}
    if given.reference_data not in ("train", "val"):
        require(
            given.reference_images is None and given.save_reference is None,
            "--reference-images and --save-reference are for --reference-data train or val, not for a file",
        )
        return load_reference(Path(given.reference_data), extractor, **options)
    if given.data_path is not None:
        data = dataclasses.replace(data, path=given.data_path)
    threads = max(1, (os.cpu_count() or 1) // share.world)
    images, count, name = real_images(data, given.reference_data, given.reference_images, threads)
    return make_reference(images, count, extractor, name, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, append, print; raises what ``run_job`` turns into exit codes."""
    given = parse(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch sees no GPU here")
    torch.backends.cudnn.allow_tf32 = False
    state = PartialState(cpu=given.device == "cpu")
    share = Share(state.process_index, state.num_processes, lambda value: list(gather_object([value])))
    folder = RunFolder(given.folder)
    how = {key: getattr(given, key) for key in SAMPLING}
    sampling = SamplingConfig(images=given.images, **how)
    extractor = load_extractor(given.extractor, given.weights, state.device)
    sample, config = sampler(folder, given.tokenizer, sampling, state.device)
    evaluations = folder.metrics("eval")
    if not evaluations:
        raise RecordsError(f"{folder.path / 'metrics.jsonl'}: no evaluation in it to take N, D and C from")
    reference = reference_of(given, config.data, extractor, share)
    if given.save_reference is not None and state.is_main_process:
        save_reference(given.save_reference, reference, extractor)

    def progress(done: int) -> None:
        if state.is_main_process:
            end = "\n" if done * share.world >= given.images else "\r"
            print(
                f"{min(given.images, done * share.world)} of {given.images} images", end=end, file=sys.stderr
            )

    result = measure(
        sample, given.images, reference, extractor,
        batch=given.batch, keep=given.manifold, share=share, progress=progress,
    )  # fmt: skip
    if state.is_main_process:
        line = fidelity_line(evaluations[-1], result.record() | how)
        with folder.lock():
            folder.append(line)
            folder.sync()
        folder.close()
        print({key: line[key] for key in ("fid", "is", "is_std", "precision", "recall", "images")})
    state.wait_for_everyone()
    state.destroy_process_group()


def fidelity_line(evaluation: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The line for ``metrics.jsonl``; its ``setting`` tells lines of one step apart."""
    setting = " ".join(f"{key}={measured[key]}" for key in ("extractor", "reference", "images", *SAMPLING))
    cost = {key: evaluation[key] for key in FROM_EVALUATION}
    return {"kind": "fidelity", "setting": setting} | cost | measured


if __name__ == "__main__":
    sys.exit(run_job(main))
