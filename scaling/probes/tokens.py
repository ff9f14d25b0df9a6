"""The encoding of tokens, timed, with an untrained tokenizer: what it has learnt changes no speed."""

from __future__ import annotations

import contextlib
import time

import torch
from accelerate import PartialState

from scaling.clock import host_memory
from scaling.config import LaunchConfig, TokenizerRunConfig
from scaling.data.cache import Progress, build_cache
from scaling.data.encode import batch_size, encoder
from scaling.probes.noise import images_or_noise
from scaling.probes.stopwatch import Stopwatch
from scaling.process import Interrupted, JobProcess
from scaling.records import RunFolder, write_json
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer, save_tokenizer

LEAST_BATCHES = 2


def probe_tokens(folder: RunFolder, config: TokenizerRunConfig, launch: LaunchConfig, seconds: float) -> None:
    """Begin the recipe's own cache and leave it after so many seconds; the speed goes to ``speed.json``.

    The speed is that of the batches after the first, which reads and allocates what the others find there:
    what it takes longer is a job's time beside, as is its start. No batch is encoded to warm up: after one
    that is larger than the job's own, memory comes cheaper than in the job.
    """
    state = PartialState(cpu=launch.device == "cpu" or not torch.cuda.is_available())
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
        marks: list[tuple[float, int]] = []

        def mark(progress: Progress) -> None:
            marks.append((time.monotonic(), progress.encoded))

        def enough() -> bool:
            return len(marks) > LEAST_BATCHES and marks[-1][0] - marks[0][0] >= seconds

        with contextlib.suppress(Interrupted):  # by ``enough``, or by who asks the next question
            build_cache(
                folder.path / "tokens", config.data, config.tokenizer.scales, config.tokenizer.vocab,
                source, encoder(tokenizer, state.device), tokenizer.content_hash,
                batch=batch_size(config.data.resolution, state.device.type), threads=launch.threads or 1,
                rank=state.process_index, world=state.num_processes,
                progress=mark, should_stop=lambda: enough() or job.should_stop(),
            )  # fmt: skip
        if watch.agreed(float(job.should_stop())):
            raise Interrupted
        if state.is_main_process:
            train = source.count("train") / state.num_processes

            def sequences(images: int) -> float:
                return min(images, train) * config.data.views + max(0.0, images - train)

            (start, first), (end, last) = marks[min(1, len(marks) - 2)], marks[-1]
            per_second = (sequences(last) - sequences(first)) / (end - start)
            found = {
                "sequences_per_second": per_second * state.num_processes,
                "inside_seconds": watch.seconds["making a tokenizer"] + sequences(last) / per_second,
                "host_memory": host_memory(),
            }
            write_json(folder.path / "speed.json", found)
        state.wait_for_everyone()
