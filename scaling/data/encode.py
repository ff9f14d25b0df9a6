"""The job that encodes a data set into a token cache.

    python -m scaling.data.encode runs/tokens/<id> --tokenizer runs/tokenizers/<id>

- Several processes (``accelerate launch``) share the shards and, once begun, never talk: one that fails
  or is late holds up no collective, and the first one writes the manifest when all shards are there.
- Images are read in threads while the tokenizer encodes; the batch is small enough that the published
  tokenizer's widest layer fits into a gigabyte on the CPU.
- Started again, it checks every shard and encodes what is missing or damaged. Of a whole cache the images may
  be gone: they are asked for only when something is to be encoded.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.config import ConfigError, LaunchConfig, TokenizerRunConfig, from_dict
from scaling.data.cache import Encode, Progress, build_cache, open_cache
from scaling.data.sources import open_source
from scaling.process import JobProcess, recorded_failure, run_job
from scaling.records import RecordsError, RunFolder, read_json

if TYPE_CHECKING:
    import torch

    from scaling.data.shards import UInt16
    from scaling.data.transforms import UInt8
    from scaling.tokenizer.quantizer import Size
    from scaling.tokenizer.vqvae import Tokenizer

PIXELS_PER_BATCH = {"cpu": 2**19, "cuda": 2**22}
"""Pixels encoded at once: 8 images of 256 px on a CPU, 64 on a GPU."""
MAX_BATCH = 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the folder's config and launch files and encode; raises what ``run_job`` turns into exit codes."""
    parser = argparse.ArgumentParser(
        prog="python -m scaling.data.encode", description="Encode images into tokens."
    )
    parser.add_argument("folder", type=Path, help="the token cache's folder, with config.json")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer run's folder")
    given = parser.parse_args(arguments)
    folder = RunFolder(given.folder)
    encode_folder(folder, given.tokenizer)


def encode_folder(folder: RunFolder, tokenizer_run: Path) -> None:
    """Encode the images of ``folder``'s config with the tokenizer of ``tokenizer_run``."""
    import torch
    from accelerate import PartialState

    from scaling.clock import host_memory
    from scaling.tokenizer.vqvae import load_tokenizer

    with recorded_failure(folder):
        config = from_dict(TokenizerRunConfig, folder.config())
        launch_file = folder.path / "launch.json"
        launch = from_dict(LaunchConfig, read_json(launch_file)) if launch_file.exists() else LaunchConfig()
        if launch.device == "cuda" and not torch.cuda.is_available():
            raise RecordsError(f"{launch_file}: device is cuda, and torch finds no GPU here")
        if launch.threads is not None:
            torch.set_num_threads(launch.threads)
        torch.backends.cudnn.allow_tf32 = False  # a token is an argmin: the same on every device
        state = PartialState(cpu=launch.device == "cpu" or not torch.cuda.is_available())
    with JobProcess(folder, state.is_main_process, state.wait_for_everyone) as job:
        tokenizer = load_tokenizer(tokenizer_run / "tokenizer")
        if tokenizer.config != config.tokenizer:
            raise RecordsError(
                f"{tokenizer_run} holds another tokenizer than {folder.path / 'config.json'} says"
            )
        try:
            source = open_source(config.data)
        except ConfigError as error:
            try:
                open_cache(folder.path, tokenizer.content_hash, config.tokenizer.scales, verify=True)
            except RecordsError:
                raise error from None
            return
        if state.is_main_process:
            folder.claim_data(source.fingerprint())
        started = time.monotonic()

        def report(progress: Progress) -> None:
            job.beat(step=progress.images, total_steps=progress.total)
            if progress.encoded:
                speed = progress.encoded * state.num_processes / (time.monotonic() - started)
                job.beat(images_per_second=round(speed, 2))

        build_cache(
            folder.path,
            config.data,
            config.tokenizer.scales,
            config.tokenizer.vocab,
            source,
            encoder(tokenizer, state.device),
            tokenizer.content_hash,
            batch=batch_size(config.data.resolution, state.device.type),
            threads=launch.threads or max(1, (os.cpu_count() or 1) // state.num_processes),
            rank=state.process_index,
            world=state.num_processes,
            progress=report,
            should_stop=job.should_stop,
        )
        job.beat(host_memory=host_memory())


def batch_size(resolution: int, device: str) -> int:
    """Images encoded at once on a kind of device."""
    return max(1, min(MAX_BATCH, PIXELS_PER_BATCH.get(device, PIXELS_PER_BATCH["cuda"]) // resolution**2))


def encoder(tokenizer: Tokenizer, device: torch.device, sizes: Sequence[Size] | None = None) -> Encode:
    """The tokenizer as a function from uint8 images (B, res, res, 3) to uint16 token ids (B, L).

    Args:
        sizes: the steps (h, w) that the tokens are of; None for all of the tokenizer's.
    """
    import numpy as np
    import torch

    tokenizer = tokenizer.to(device).eval()
    if device.type == "cuda":  # as cuDNN's fast kernels want it; a CPU gains nothing from it
        tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    @torch.inference_mode()
    def encode(images: UInt8) -> UInt16:
        images_BHW3 = torch.from_numpy(images).to(device)
        images_B3HW = images_BHW3.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
        return tokenizer.encode(images_B3HW, sizes).cpu().numpy().astype(np.uint16)

    return encode


if __name__ == "__main__":
    sys.exit(run_job(main))
