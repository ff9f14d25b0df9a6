"""The encoding of tokens, timed, with an untrained tokenizer: what it has learnt changes no speed."""

from __future__ import annotations

import time

import numpy as np
import torch
from accelerate import PartialState

from scaling.clock import host_memory
from scaling.config import LaunchConfig, TokenizerRunConfig
from scaling.data.cache import Progress, build_cache
from scaling.data.encode import batch_size, encoder
from scaling.data.images import ImageSource, SourceView, Split
from scaling.probes.noise import images_or_noise
from scaling.probes.stopwatch import Stopwatch
from scaling.process import JobProcess
from scaling.records import RunFolder, write_json
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer, save_tokenizer


def probe_tokens(folder: RunFolder, config: TokenizerRunConfig, launch: LaunchConfig, seconds: float) -> None:
    """Encode some images into a cache of their own, about so many seconds' worth; the speed goes to
    ``speed.json``.

    The speed is that between the first image and the last, as a finished job tells it; what comes before and
    after (opening images and tokenizer, the manifest) is a job's time beside.
    """
    state = PartialState(cpu=launch.device == "cpu")
    rank, world = state.process_index, state.num_processes
    with JobProcess(folder, state.is_main_process, state.wait_for_everyone) as job:
        watch = Stopwatch(state, job)
        with watch.timed("making a tokenizer"):
            if state.is_main_process:
                torch.manual_seed(0)
                save_tokenizer(Tokenizer(config.tokenizer), folder.path / "tokenizer", {})
            state.wait_for_everyone()
        tokenizer = load_tokenizer(folder.path / "tokenizer")
        source = images_or_noise(config.data)
        if state.is_main_process:
            folder.claim_data(source.fingerprint())
        encode = encoder(tokenizer, state.device)
        batch = batch_size(config.data.resolution, state.device.type)
        one = np.zeros((batch, config.data.resolution, config.data.resolution, 3), np.uint8)
        for part in ("first batch", "batch"):
            with watch.timed(part):
                encode(one)
        wanted = batch * world * max(1, int(seconds / watch["batch"]))
        some = _First(source, min(wanted, source.count("train")))
        marks: list[tuple[float, int]] = []

        def mark(progress: Progress) -> None:
            marks.append((time.monotonic(), progress.encoded))

        build_cache(
            folder.path / "tokens", config.data, config.tokenizer.scales, config.tokenizer.vocab, some,
            encode, tokenizer.content_hash, batch=batch, threads=launch.threads or 1, rank=rank,
            world=world, progress=mark, should_stop=job.should_stop,
        )  # fmt: skip
        if state.is_main_process:
            encoding = marks[-1][0] - marks[0][0]
            sequences = (some.count("train") * config.data.views + 1) / (some.count("train") + 1)
            found = {
                "sequences_per_second": marks[-1][1] * world * sequences / encoding,
                # The first batch takes longer than others, in a real job too.
                "inside_seconds": encoding + watch.seconds["making a tokenizer"] + 2 * watch.seconds["batch"],
                "host_memory": host_memory(),
            }
            write_json(folder.path / "speed.json", found)
        state.wait_for_everyone()


class _First(SourceView):
    """The first images of a source, and one for validation."""

    def __init__(self, source: ImageSource, images: int) -> None:
        super().__init__(source)
        self._images = images

    def count(self, split: Split) -> int:
        """Few."""
        return self._images if split == "train" else 1
