"""GPUs that a plan can be made for without having one: peak rates, memory and power, from their makers.

Rates are dense (no structured sparsity), with fp32 accumulation, in FLOP/s; fp32 is without TF32, which the
trainers leave off. A figure of a data sheet that counts sparsity is halved. Power is the board's limit, so
energy from it is a bound.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from scaling.config import ConfigError

TERA, GB = 10**12, 10**9


@dataclass(frozen=True)
class Device:
    """One GPU model."""

    name: str
    bf16: float | None
    """FLOP/s; None where the device has no such units."""
    fp16: float
    fp32: float
    memory: int
    """Bytes."""
    watts: float

    def peak(self, precision: str) -> float:
        """FLOP/s in a precision of the recipe.

        Raises:
            ConfigError: the device does not compute in it.
        """
        rate: float | None = {"bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}[precision]
        if rate is None:
            raise ConfigError(
                f"--device {self.name} does not compute in {precision}; plan with --train.precision fp16 "
                "or fp32"
            )
        return rate


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA Tesla V100 data sheet (SXM2, 32 GB).
        Device("v100", None, 125 * TERA, 15.7 * TERA, 32 * GB, 300),
        # NVIDIA T4 data sheet.
        Device("t4", None, 65 * TERA, 8.1 * TERA, 16 * GB, 70),
        # NVIDIA A100 data sheet (SXM, 80 GB).
        Device("a100", 312 * TERA, 312 * TERA, 19.5 * TERA, 80 * GB, 400),
        # NVIDIA A10 data sheet: 125 dense (250 with sparsity).
        Device("a10", 125 * TERA, 125 * TERA, 31.2 * TERA, 24 * GB, 150),
        # NVIDIA H100 data sheet (SXM): 1979 with sparsity.
        Device("h100", 989.5 * TERA, 989.5 * TERA, 67 * TERA, 80 * GB, 700),
        # NVIDIA H200 data sheet (SXM): 1979 with sparsity.
        Device("h200", 989.5 * TERA, 989.5 * TERA, 67 * TERA, 141 * GB, 700),
        # NVIDIA HGX B200 data sheet, an eighth of it: 36 PFLOP/s with sparsity, 600 TFLOP/s, 1.44 TB.
        Device("b200", 2250 * TERA, 2250 * TERA, 75 * TERA, 180 * GB, 1000),
        # NVIDIA L4 data sheet: 242 with sparsity.
        Device("l4", 121 * TERA, 121 * TERA, 30.3 * TERA, 24 * GB, 72),
        # NVIDIA L40S data sheet: 362 dense.
        Device("l40s", 362 * TERA, 362 * TERA, 91.6 * TERA, 48 * GB, 350),
        # NVIDIA Ada GPU architecture white paper, GeForce RTX 4090: with fp32 accumulation (330 with fp16's).
        Device("4090", 165.2 * TERA, 165.2 * TERA, 82.6 * TERA, 24 * GB, 450),
        # NVIDIA Ampere GA102 white paper, GeForce RTX 3090: with fp32 accumulation (142 with fp16's).
        Device("3090", 71 * TERA, 71 * TERA, 35.6 * TERA, 24 * GB, 350),
    )
}


def find_device(name: str) -> Device:
    """The device of that name, however it is written: ``h100``, ``H100-SXM``, ``RTX 4090``.

    Raises:
        ConfigError: not in the table; the nearest names are told.
    """
    words = name.lower().replace("-", " ").replace("_", " ").split()
    found = [DEVICES[word] for word in words if word in DEVICES]
    if len(found) == 1:
        return found[0]
    near = difflib.get_close_matches(name.lower(), DEVICES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(DEVICES))}"
    raise ConfigError(f"--device {name}: unknown; {hint}")


def known_device(name: str) -> Device | None:
    """The device that a driver's name (``NVIDIA H100 80GB HBM3``) is of, if it is in the table. A slice of
    one is another device."""
    words = name.lower().replace("-", " ").split()
    found = [DEVICES[word] for word in words if word in DEVICES]
    return found[0] if len(found) == 1 and "mig" not in words else None
