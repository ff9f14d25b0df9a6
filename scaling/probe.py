"""A few seconds of real work, timed: what a plan's hours are told from.

    python -m scaling.probe run FOLDER --seconds 5         training, evaluation, saving, pictures of a depth
    python -m scaling.probe tokenizer FOLDER --seconds 5   a tokenizer's training
    python -m scaling.probe tokens FOLDER --seconds 2.5    token encoding

FOLDER holds ``config.json`` and ``launch.json`` as the job's own folder would; what was measured is left in
``speed.json``.

- Everything that takes time is the jobs' own code: model, optimiser, micro-batches, evaluation, checkpoint,
  pictures. Only the loop is another, since it goes by the clock.
- The start of a job is told by that of its probe, so each imports what its job does and no more: what is not
  needed by all three is imported when it is known which it is.
- Several processes follow the first one's clock.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scaling.config import LaunchConfig, RunConfig, TokenizerRunConfig, from_dict
from scaling.process import recorded_failure, run_job
from scaling.records import RunFolder, read_json


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="scaling.probe", description="Time a few seconds of real work.")
    parser.add_argument("what", choices=("run", "tokenizer", "tokens"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    folder = RunFolder(args.folder)
    with recorded_failure(folder):
        import torch

        launch = from_dict(LaunchConfig, read_json(folder.path / "launch.json"))
        if launch.threads is not None:
            torch.set_num_threads(launch.threads)
        torch.backends.cudnn.allow_tf32 = False  # as the jobs
        if args.what == "run":
            from scaling.probes.run import probe_run

            probe_run(folder, from_dict(RunConfig, folder.config()), launch, args.seconds)
            return
        stage = from_dict(TokenizerRunConfig, folder.config())
        if args.what == "tokenizer":
            from scaling.probes.tokenizer import probe_tokenizer

            probe_tokenizer(folder, stage, launch, args.seconds)
        else:
            from scaling.probes.tokens import probe_tokens

            probe_tokens(folder, stage, launch, args.seconds)


if __name__ == "__main__":
    sys.exit(run_job(main))
