"""What the image metrics cost once features are there, and what Inception costs per image.

    python -m benchmarks.fidelity [--images 10000] [--device cuda]

Features are random, ``--images`` × 2048 of each set, correlated as a layer's outputs are. Each step runs
once, in a process of its own: moments streamed as the metrics stream them, FID, the usual formula for it with
SciPy's matrix root of the product, precision and recall, the inception score of 1008 classes, Inception on
8 images of 256 px. Peak memory is the process's, beside its peak before the step, the features included.
On a machine that others use, CPU seconds of one thread (OMP_NUM_THREADS=1) say more than the clock.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.linalg import sqrtm

from scaling.fidelity.collect import BATCH, FOLDED
from scaling.fidelity.inception import CLASSES, DIM, Inception
from scaling.fidelity.manifold import precision_recall
from scaling.fidelity.statistics import Gaussian, InceptionScore, Moments, frechet_distance

STEPS = ("moments", "fid", "sqrtm", "precision-recall", "inception-score", "inception")


def features(seed: int, images: int) -> np.ndarray:
    """float32 (images, 2048), rectified mixtures whose spectrum falls as 1/i."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(DIM, DIM)) / np.arange(1, DIM + 1)[:, None] ** 0.5
    return np.maximum(rng.normal(size=(images, DIM)) @ mixing + seed, 0).astype(np.float32)


def gaussian_of(values: np.ndarray) -> Gaussian:
    """Streamed as the metrics do."""
    moments = Moments(DIM)
    for begin in range(0, len(values), FOLDED):
        moments.add(values[begin : begin + FOLDED])
    return moments.gaussian()


def usual_fid(one: Gaussian, other: Gaussian) -> float:
    """With the root of the product of the covariances."""
    shift = one.mean_D - other.mean_D
    root = np.asarray(sqrtm(one.covariance_DD @ other.covariance_DD))
    both = np.trace(one.covariance_DD + other.covariance_DD)
    return float(shift @ shift + both - 2 * np.trace(root).real)


def inception_score(images: int) -> tuple[float, float]:
    """Of random probabilities."""
    rng = np.random.default_rng(0)
    score = InceptionScore(images, CLASSES)
    for begin in range(0, images, BATCH):
        indices = np.arange(begin, min(begin + BATCH, images))
        score.add(indices, rng.dirichlet(np.ones(CLASSES), size=len(indices)))
    return score.result()


def prepare(step: str, images: int, device: str) -> Callable[[], Any]:
    """The step as a call, with what it needs at hand."""
    if step == "inception-score":
        return lambda: inception_score(images)
    if step == "inception":
        network, batch = Inception().to(device), torch.rand(8, 3, 256, 256, device=device) * 2 - 1
        with torch.no_grad():
            network(batch)
        return lambda: network.features_and_probabilities(batch)[1].sum().item()
    one, other = features(0, images), features(1, images)
    if step == "moments":
        return lambda: gaussian_of(one).mean_D.sum()
    if step == "precision-recall":
        first, second = (torch.from_numpy(values).to(device) for values in (one, other))
        return lambda: precision_recall(first, second)
    # Made as NumPy does, which is quicker; the features themselves are no longer needed.
    fitted = [Gaussian(v.mean(axis=0, dtype=float), np.cov(v, rowvar=False)) for v in (one, other)]
    function = frechet_distance if step == "fid" else usual_fid
    return lambda: function(*fitted)


def peak_mebibytes() -> float:
    """The most this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(step: str, images: int, device: str) -> None:
    """Run one step in this process, whose peak is then the step's own; print times, MiB and the result."""
    call = prepare(step, images, device)
    before, start, cpu_start = peak_mebibytes(), time.perf_counter(), time.process_time()
    result = call()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    print(f"{seconds:.2f}\t{cpu:.2f}\t{peak_mebibytes():.0f}\t{before:.0f}\t{result}")


def main() -> None:
    """Each step in a process of its own, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step is not None:
        measure(given.step, given.images, given.device)
        return
    table = Table("step", "seconds", "CPU seconds", "peak MiB", "peak MiB before", "result")
    for step in STEPS:
        command = [sys.executable, "-m", "benchmarks.fidelity", "--step", step]
        command += ["--images", str(given.images), "--device", given.device]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        name = "inception, 8 images" if step == "inception" else step
        table.add_row(name, *printed.strip().split("\t"))
    print(f"{given.images} images × {DIM} features, {torch.get_num_threads()} threads, {given.device}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
