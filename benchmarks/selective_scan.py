"""The selective scan: what ``selective_scan`` gains over its definition, token by token under autograd.

    OMP_NUM_THREADS=1 python -m benchmarks.selective_scan

For shapes of one layer, prints the processor time of forward and of forward with backward, the bytes that
the backward pass keeps beside the arguments, and for comparison the time of attention in a layer of the same
width, which is half as many channels (all pairs, fp32). The scan in chunks, as it runs on a GPU, is timed on
the CPU too: there it only shows that the form costs little more, not what it gains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from scaling.layers import selective_scan as scans

STATE, REPEATS = 16, 5
SHAPES = ((8, 680, 768), (8, 680, 256), (64, 30, 512))
"""Images, tokens, channels: depth 6 and 2 at the paper's ten steps, depth 4 at 1 + 4 + 9 + 16 tokens."""
Scan = Callable[..., tuple[Tensor, Tensor]]


def arguments(images: int, length: int, channels: int) -> list[Tensor]:
    """u, Δ, A, B, C, D as at the start of training."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    decay = -torch.arange(1.0, STATE + 1).repeat(channels, 1)
    delta = 10 ** (-1 - 2 * torch.rand(images, length, channels, generator=generator))
    tensors = [
        normal(images, length, channels), delta, decay,
        normal(images, length, STATE), normal(images, length, STATE), torch.ones(channels),
    ]  # fmt: skip
    return [x.requires_grad_() for x in tensors]


def milliseconds(action: Callable[[], object]) -> float:
    """Of the processor, so that other work on the machine matters less: the fastest of some repeats."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        action()
        times.append(1e3 * (time.process_time() - start))
    return min(times[1:])


def forward(scan: Scan, given: list[Tensor]) -> None:
    """Without autograd."""
    with torch.no_grad():
        scan(*given)


def both(scan: Scan, given: list[Tensor]) -> None:
    """Forward and backward."""
    for x in given:
        x.grad = None
    scan(*given)[0].sum().backward()


def kept_bytes(scan: Scan, given: list[Tensor]) -> int:
    """What autograd keeps that is not an argument."""
    own = {x.untyped_storage().data_ptr() for x in given}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        scan(*given)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@contextmanager
def chunked() -> Iterator[None]:
    """Segments as on the CPU, in chunks as on a GPU."""
    plan, numbers = scans._plan, scans.SEGMENT_NUMBERS

    def as_elsewhere(images: int, length: int, per_token: int, device: torch.device) -> tuple[int, int, int]:
        return plan(images, length, per_token, torch.device("meta"))

    scans._plan, scans.SEGMENT_NUMBERS = as_elsewhere, {"other": numbers["cpu"]}
    yield
    scans._plan, scans.SEGMENT_NUMBERS = plan, numbers


def attention(images: int, length: int, channels: int) -> Callable[[], None]:
    """Forward and backward of attention at half as many channels."""
    q, k, v = (torch.randn(images, max(1, channels // 128), length, 64, requires_grad=True) for _ in range(3))

    def action() -> None:
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    return action


def main() -> None:
    """Measure and print."""
    table = Table("images", "tokens", "channels", "form", "forward ms", "with backward ms", "kept MB")
    for shape in SHAPES:
        given = arguments(*shape)
        columns = [str(n) for n in shape]

        def row(name: str, scan: Scan) -> None:
            times = [milliseconds(lambda: run(scan, given)) for run in (forward, both)]  # noqa: B023
            table.add_row(
                *columns, name, *(f"{t:.1f}" for t in times), f"{kept_bytes(scan, given) / 1e6:.1f}"  # noqa: B023
            )  # fmt: skip

        row("token by token", scans.sequential_scan)
        row("segments", scans.selective_scan)
        with chunked():
            row("segments of chunks", scans.selective_scan)
        table.add_row(*columns, "attention", "", f"{milliseconds(attention(*shape)):.1f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
