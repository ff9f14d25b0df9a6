"""Train a tokenizer (stage 1): ``python -m scaling.tokenizer.training runs/tokenizers/<id>``.

The folder holds ``config.json`` (TokenizerRunConfig) and ``launch.json`` (LaunchConfig); training
leaves ``metrics.jsonl``, ``checkpoints/``, and at the end ``tokenizer/`` and ``reconstructions.png``.

Design choices
- Under Accelerate: started plainly for one process, by ``accelerate launch`` for several.
- A checkpoint is written at every ``checkpoint_every`` steps, after its evaluation, and whenever
  ``launch.checkpoint_seconds`` have gone by; it changes nothing in what follows. A run that was killed
  and started again ends with the same weights, bit for bit on the CPU.
- Evaluation is of whole validation images by the tokenizer as it would be saved, in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from scaling.agreement import Agreement, same_start
from scaling.checkpoint import NotFiniteError, load_checkpoint, save_checkpoint
from scaling.clock import host_memory
from scaling.config import ConfigError, LaunchConfig, TokenizerRunConfig, from_dict, identity, require
from scaling.data.images import ImageSource
from scaling.data.sources import open_source
from scaling.process import Interrupted, JobProcess, recorded_failure, run_job
from scaling.records import RunFolder, read_json
from scaling.tokenizer import metrics
from scaling.tokenizer.codebook import hits, perplexity, usage
from scaling.tokenizer.feed import KeptOriginals, prefetched, train_images, validation_images
from scaling.tokenizer.pictures import reconstruction_sheet
from scaling.tokenizer.stage1 import Stage1, not_finite
from scaling.tokenizer.vqvae import Tokenizer, save_tokenizer

log = logging.getLogger("scaling.tokenizer")

SEED_IMAGES = 512
"""Images whose features seed the codebook, and no fewer than codes in it."""
SHOWN, STAGED = 12, 4
"""Validation images in the picture, and of them those shown scale by scale."""
UInt8 = NDArray[np.uint8]


def main(arguments: list[str] | None = None) -> None:
    """Train the tokenizer of the folder named on the command line, or go on training it."""
    parser = argparse.ArgumentParser(prog="python -m scaling.tokenizer.training", description=__doc__)
    parser.add_argument("folder", type=Path, help="runs/tokenizers/<id>, with config.json and launch.json")
    folder = RunFolder(parser.parse_args(arguments).folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with recorded_failure(folder):
        config = from_dict(TokenizerRunConfig, folder.config())
        launch = from_dict(LaunchConfig, read_json(folder.path / "launch.json"))
        accelerator = make_accelerator(launch)
        check(config, accelerator.num_processes)
        if launch.threads is not None:
            torch.set_num_threads(launch.threads)
        torch.backends.cudnn.allow_tf32 = False  # a token is an argmin: the same on every device
    try:
        with JobProcess(folder, accelerator.is_main_process, accelerator.wait_for_everyone) as job:
            source = open_source(config.data)
            if accelerator.is_main_process:
                folder.claim_data(source.fingerprint())
            train_tokenizer(config, launch, folder, accelerator, job, source)
    finally:
        accelerator.end_training()


def make_accelerator(launch: LaunchConfig) -> Accelerator:
    """The processes and the device of this job.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if launch.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launch.device is 'cuda', but torch sees no GPU here; use 'auto' or 'cpu'")
    return Accelerator(cpu=launch.device == "cpu", mixed_precision="no")


def check(config: TokenizerRunConfig, processes: int) -> None:
    """``ConfigError`` for what cannot be trained."""
    tokenizer, resolution = config.tokenizer, config.data.resolution
    side = resolution // tokenizer.downsampling
    require(
        resolution % tokenizer.downsampling == 0 and tokenizer.scales[-1] == side,
        f"tokenizer.scales must end at the latent size {resolution / tokenizer.downsampling:g} "
        f"(= {resolution} px / {tokenizer.downsampling}), got {list(tokenizer.scales)}",
    )
    require(
        resolution >= metrics.WINDOW,
        f"data.resolution must be at least {metrics.WINDOW} (the window of SSIM), got {resolution}",
    )
    require(
        config.train.entropy == 0 or tokenizer.quantizer == "scalable",
        "tokenizer_train.entropy is a term of the scalable tokenizer: set it to 0 or tokenizer.quantizer to "
        "'scalable'",
    )
    require(
        config.train.batch % processes == 0,
        f"tokenizer_train.batch {config.train.batch} cannot be shared evenly by {processes} processes",
    )


def train_tokenizer(
    config: TokenizerRunConfig,
    launch: LaunchConfig,
    folder: RunFolder,
    accelerator: Accelerator,
    job: JobProcess,
    source: ImageSource,
) -> None:
    """Train from the newest checkpoint, or from the start, to the end, and write the tokenizer.

    Raises:
        Interrupted: the job was asked to leave; a checkpoint was written.
        ConfigError, RecordsError: causes that the user can remove.
    """
    train, main_process = config.train, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    images = KeptOriginals(source)
    threads = max(1, min(8, (os.cpu_count() or 1) // world))
    trained = Stage1(config, accelerator)
    if main_process and trained.perceptual is None and train.perceptual > 0:
        log.warning("the perceptual term is off: tokenizer_train.lpips_weights names no weights")
    validation = validation_images(images, config.data, train.eval_images)

    def load(step: int) -> UInt8:
        return train_images(images, config.data, train.seed, train.batch, step, rank, world)

    def checkpoint(step: int) -> None:
        if main_process:
            folder.sync()
            try:
                save_checkpoint(folder.checkpoints, step, trained.tensors(), trained.state())
            except NotFiniteError as error:
                raise not_finite(f"after step {step} {error}") from None

    saved = load_checkpoint(folder.checkpoints)
    first = saved.step if saved else 0
    same_start(accelerator, folder.checkpoints, first)
    if saved:
        trained.restore(saved)
        log.info("going on from step %d of %d", first, train.steps)
    if main_process:
        folder.truncate(first)

    logged_at, logged_step, saved_at = time.monotonic(), first, time.monotonic()
    agreement = Agreement(accelerator, first)
    with contextlib.closing(prefetched(load, first, train.steps, threads)) as stream:
        for step, batch in enumerate(stream, first):
            if step == train.autoencode_steps:
                count = max(SEED_IMAGES, config.tokenizer.vocab)
                with contextlib.closing(prefetched(load, 0, -(-count // train.batch), threads)) as seeding:
                    device, parts = accelerator.device, launch.micro_batch or train.batch
                    trained.seed_codebook(to_device(i, device).split(parts) for i in seeding)
            trained.step(step, to_device(batch, accelerator.device), launch.micro_batch)
            done = step + 1
            if done % train.log_every == 0 or done == train.steps:
                record = trained.logged(done)
                speed = train.batch * (done - logged_step) / (time.monotonic() - logged_at)
                logged_at, logged_step = time.monotonic(), done
                if main_process:
                    folder.append({"kind": "train", "step": done, **record, "images_per_second": speed})
                job.beat(loss=record["loss"], images_per_second=speed)
            job.beat(step=done, total_steps=train.steps)
            if done % train.checkpoint_every == 0 and train.autoencode_steps < done < train.steps:
                evaluate_and_log(trained, validation, folder, done, launch)
            late = time.monotonic() - saved_at > launch.checkpoint_seconds
            stop, late = agreement.ask(done, job.should_stop(), late)
            if stop or late or done % train.checkpoint_every == 0 or done == train.steps:
                checkpoint(done)
                saved_at = time.monotonic()
            if stop and done < train.steps:
                raise Interrupted
    facts = evaluate_and_log(trained, validation, folder, train.steps, launch)
    if main_process:
        finish(trained, source, validation, facts, folder)
    job.beat(host_memory=host_memory())
    accelerator.wait_for_everyone()


def to_device(images: UInt8, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [−1, 1]."""
    images_BHW3 = torch.from_numpy(images).to(device, non_blocking=True)
    return images_BHW3.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_pixels(images_B3HW: Tensor) -> UInt8:
    """Images in [−1, 1] to uint8 (B, H, W, 3), rounded."""
    pixels = ((images_B3HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    array: UInt8 = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return array


@torch.no_grad()
def evaluate(
    tokenizer: Tokenizer,
    images: UInt8,
    batch: int,
    device: torch.device,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, Any]:
    """Fidelity and codebook use on images.

    Args:
        tokenizer: to evaluate.
        images: this process's share, uint8 (N, H, W, 3).
        batch: images per forward pass.
        device: where the tokenizer is.
        total: adds sums over processes.

    Returns:
        psnr (dB) and ssim, means over images of the reconstructions rounded to 8 bits; for a scalable
        tokenizer both also per size, against the image at that size (ssim None where its window does not
        fit); usage (share of the codebook used) and perplexity per scale, and the usage over all scales;
        eval_images.
    """
    config = tokenizer.config
    hits_KV = torch.zeros(len(config.scales), config.vocab, dtype=torch.int64, device=device)
    scalable = config.quantizer == "scalable"
    sums_K2 = torch.zeros(len(config.scales) if scalable else 1, 2, dtype=torch.float64, device=device)
    for begin in range(0, len(images), batch):
        originals_B3HW = to_device(images[begin : begin + batch], device)
        tokens_BL = tokenizer.encode(originals_B3HW)
        hits_KV += hits(tokens_BL, config.scales, config.vocab)
        for k, features_BChw in enumerate(tokenizer.quantize.cumulative_features(tokens_BL)[-len(sums_K2) :]):
            rebuilt_B3hw = to_device(to_pixels(tokenizer.decode_features(features_BChw)), device)
            x, y = (metrics.at_size(originals_B3HW, rebuilt_B3hw) + 1) / 2, (rebuilt_B3hw + 1) / 2
            # One grey level off everywhere is 48.1 dB: a perfect image counts as 60 dB, not as infinity.
            sums_K2[k, 0] += metrics.psnr(x, y).clamp(max=60).sum()
            if min(y.shape[2:]) >= metrics.WINDOW:
                sums_K2[k, 1] += metrics.ssim(x, y).sum()
    count = float(total(sums_K2.new_tensor(len(images))))
    sums_K2, hits_KV = total(sums_K2), total(hits_KV)
    psnr_K, ssim_K = (sums_K2 / count).T.tolist()
    per_size: dict[str, Any] = {}
    if scalable:
        fits = [side * config.downsampling >= metrics.WINDOW for side in config.scales]
        per_size["psnr_scales"] = psnr_K
        per_size["ssim_scales"] = [s if fit else None for s, fit in zip(ssim_K, fits, strict=True)]
    return {
        "psnr": psnr_K[-1],
        "ssim": ssim_K[-1],
        **per_size,
        "usage_scales": usage(hits_KV),
        "perplexity_scales": perplexity(hits_KV),
        "usage": usage(hits_KV.sum(0, keepdim=True))[0],
        "eval_images": int(count),
    }


def evaluate_and_log(
    trained: Stage1, images: UInt8, folder: RunFolder, step: int, launch: LaunchConfig
) -> dict[str, Any]:
    """``evaluate`` over all processes; the main one appends it to the metrics."""
    accelerator = trained.accelerator
    share = images[accelerator.process_index :: accelerator.num_processes]
    batch = launch.micro_batch or max(1, trained.config.train.batch // accelerator.num_processes)
    facts = evaluate(
        trained.tokenizer, share, batch, trained.device, lambda sums: accelerator.reduce(sums, "sum")
    )
    if accelerator.is_main_process:
        folder.append({"kind": "eval", "step": step, **facts})
        used = " ".join(f"{u:.2f}" for u in facts["usage_scales"])
        log.info("step %d: %.2f dB, SSIM %.3f, usage per scale %s", step, facts["psnr"], facts["ssim"], used)
    return facts


def finish(
    trained: Stage1, source: ImageSource, images: UInt8, facts: dict[str, Any], folder: RunFolder
) -> None:
    """Write ``reconstructions.png`` and then ``tokenizer/``, which says that training is over."""
    config, tokenizer = trained.config, trained.tokenizer
    shown = images[np.arange(min(SHOWN, len(images))) * len(images) // min(SHOWN, len(images))]
    draw_reconstructions(tokenizer, shown, facts, trained.device, folder.path / "reconstructions.png")
    made = {
        "steps": config.train.steps,
        "data": identity(config.data),
        "data_fingerprint": source.fingerprint(),
        "train": identity(config.train),
        "perceptual": "on" if trained.perceptual is not None else "off",
        "adversarial": "on" if trained.discriminator is not None else "off",
    }
    content_hash = save_tokenizer(tokenizer, folder.path / "tokenizer", made | facts)
    log.info("tokenizer %s written to %s", content_hash[:12], folder.path / "tokenizer")


@torch.no_grad()
def draw_reconstructions(
    tokenizer: Tokenizer, images: UInt8, facts: dict[str, Any], device: torch.device, file: Path
) -> None:
    """The picture of some validation images, their reconstructions, and the scales, added up or alone."""
    tokens_BL = tokenizer.encode(to_device(images, device))
    rebuilt = to_pixels(tokenizer.decode(tokens_BL))
    cumulative = tokenizer.quantize.cumulative_features(tokens_BL[:STAGED])
    stages = [to_pixels(tokenizer.decode_features(features_BChw)) for features_BChw in cumulative]
    title = (
        f"{tokenizer.resolution} px, vocabulary {tokenizer.config.vocab}, {tokenizer.config.seq_len} tokens: "
        f"{facts['psnr']:.2f} dB, SSIM {facts['ssim']:.3f} on {facts['eval_images']} validation images"
    )
    alone = tokenizer.config.quantizer == "scalable"
    sheet = reconstruction_sheet(images, rebuilt, stages, tokenizer.config.scales, title, alone)
    partial = file.with_name(f".{file.name}")
    sheet.save(partial, format="PNG")
    partial.replace(file)


if __name__ == "__main__":
    sys.exit(run_job(main))
