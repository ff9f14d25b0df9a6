"""What a plan's time on GPUs comes to: GPU-hours, energy and money."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scaling.config import ConfigError, require
from sweeps.devices import find_device, known_device
from sweeps.plan import Plan, PlannedRun, Stated

PUE = 1.2
"""Energy of a whole data centre over that of its computers, where nothing is stated: between the 1.1 that the
largest operators report of themselves and the 1.5 to 1.6 that Uptime's yearly survey finds on average."""


@dataclass(frozen=True)
class Pricing:
    """How a plan is to be made and what is to be told beside time, as asked for on the command line."""

    device: str | None = None
    """Plan for this GPU instead of the device at hand: h100, a100, l4, 4090, ...; needs mfu."""
    mfu: float | None = None
    """Share of the stated device's peak that training reaches, 0 to 1."""
    price: float | None = None
    """Money per GPU-hour; the plan then has a column of cost."""
    energy: bool = False
    """Energy at the GPUs' power limit."""
    pue: float = PUE
    """Energy of the whole data centre over that of its computers."""

    def stated(self) -> Stated | None:
        """The device to plan for.

        Raises:
            ConfigError: unknown, or without mfu; mfu without a device or not a share.
        """
        if self.device is None:
            require(self.mfu is None, "--mfu is of a stated device; give --device too")
            return None
        device = find_device(self.device)
        if self.mfu is None:
            raise ConfigError(
                f"--device {self.device} needs --mfu, the share of its peak that training reaches: 0.3 to "
                "0.5 is common for large models, far less for small ones"
            )
        require(0 < self.mfu <= 1, f"--mfu is a share of the peak, above 0 and at most 1, got {self.mfu}")
        return Stated(device, self.mfu)


@dataclass(frozen=True)
class Rates:
    """What a GPU-hour costs."""

    price: float | None = None
    """Money per GPU-hour."""
    watts: float | None = None
    """Of a GPU at its power limit; None where energy was not asked for."""
    pue: float = PUE

    def hours(self, plan: Plan, run: PlannedRun) -> float | None:
        """GPU-hours of one run; None without GPUs, or where its time is unknown."""
        if run.seconds is None or not any(plan.allotment.slots):
            return None
        launch = plan.recipe.launch
        return run.seconds * launch.processes * launch.machines / plan.allotment.places_per_gpu / 3600

    def kilowatt_hours(self, hours: float | None) -> float | None:
        """At most: power limit × hours × PUE."""
        return None if hours is None or self.watts is None else self.watts * hours * self.pue / 1000

    def cost(self, hours: float | None) -> float | None:
        """Money."""
        return None if hours is None or self.price is None else self.price * hours

    def notes(self, plan: Plan) -> list[str]:
        """What stands below the table: what the sums leave out and were made with."""
        if not any(plan.allotment.slots):
            return []
        unknown = [j.name for j in plan.stage_jobs if j.state != "done" and j.seconds is None]
        found = [f"GPU-hours: without {' and '.join(unknown)}, whose time is not known"] if unknown else []
        if self.watts is not None:
            found.append(
                f"energy: at most, every GPU at its limit of {self.watts:.0f} W, times a PUE of {self.pue:g}"
            )
        if self.price is not None:
            found.append(f"cost: at {self.price:g} per GPU-hour")
        return found

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Of every run and of all that is still to do."""
        total = plan.device_seconds
        hours = {run.run: self.hours(plan, run) for run in plan.runs}
        hours["to_do"] = None if total is None else total / 3600
        return {
            "price_per_gpu_hour": self.price,
            "watts_per_gpu": self.watts,
            "pue": None if self.watts is None else self.pue,
            **{
                name: {"gpu_hours": h, "kilowatt_hours": self.kilowatt_hours(h), "cost": self.cost(h)}
                for name, h in hours.items()
            },
        }


def rates(plan: Plan, price: float | None, energy: bool, pue: float) -> Rates:
    """What was asked for on the command line, as it applies to the plan's device.

    Raises:
        ConfigError: a price or energy without a GPU, energy of a GPU whose power is not known.
    """
    require(price is None or price >= 0, f"--price must not be negative, got {price}")
    require(pue >= 1, f"--pue is a whole data centre's energy over its computers', at least 1, got {pue}")
    if (price is not None or energy) and not any(plan.allotment.slots):
        raise ConfigError(
            f"--{'price' if price is not None else 'energy'} is of GPU-hours, and this plan is for a CPU; "
            "state a GPU with --device, such as --device h100 --mfu 0.4"
        )
    if not energy:
        return Rates(price, None, pue)
    device = plan.stated.device if plan.stated else known_device(plan.machine.name)
    if device is None:
        raise ConfigError(f"--energy: the power of {plan.machine.name} is not in the table; state a --device")
    return Rates(price, device.watts, pue)
