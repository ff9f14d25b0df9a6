"""Options of the command line's own commands, apart from a recipe's values and those of requests.

A field's docstring is its line in ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass

from scaling.config import Tracker, WandbMode
from sweeps.costs import Pricing
from sweeps.slurm_options import SlurmOptions


@dataclass(frozen=True)
class Options:
    """Options of ``tokenize`` and of every command."""

    root: str = "runs"
    """The folder of all sweeps, tokenizers and token caches."""


@dataclass(frozen=True)
class PlanOptions(Options, Pricing):
    """Options of ``plan`` on any machine."""

    json: bool = False
    """Print JSON instead of a table."""
    calibrate: bool = False
    """First time the device at hand by about a minute of short real training."""


@dataclass(frozen=True)
class CostOptions(SlurmOptions, PlanOptions):
    """Options of ``plan``."""


@dataclass(frozen=True)
class ShowOptions(Options):
    """Options of every command that writes the report."""

    open: bool = False
    """Open the report in a browser."""


@dataclass(frozen=True)
class RunOptions(SlurmOptions, ShowOptions):
    """Options of ``run``."""

    wait: bool = False
    """Slurm: stay until all jobs have ended, then write the report; else return once they are queued."""


@dataclass(frozen=True)
class SweepOptions(Options):
    """Options of every command that reads a sweep as it is, without planning it."""

    name: str | None = None
    """The sweep's folder under the root; by default the recipe's name."""


@dataclass(frozen=True)
class StatusOptions(SweepOptions):
    """Options of ``status``."""

    json: bool = False
    """Print JSON instead of a table."""
    watch: bool = False
    """Show it anew every few seconds, until nothing is left to wait for; Ctrl-C leaves."""


@dataclass(frozen=True)
class ReportOptions(SweepOptions, ShowOptions):
    """Options of ``report``."""


@dataclass(frozen=True)
class CopyOptions(SweepOptions):
    """Options of every command that copies a sweep's records to trackers."""

    project: str | None = None
    """The project there; by default the sweep's own launch.tracker_project."""


@dataclass(frozen=True)
class SyncOptions(CopyOptions):
    """Options of ``sync``."""

    to: tuple[Tracker, ...] = ()
    """Which; by default the sweep's own launch.trackers."""
    wandb_mode: WandbMode | None = None
    """By default the sweep's own launch.wandb_mode; auto is online with a key, else offline files."""


@dataclass(frozen=True)
class DashboardOptions(CopyOptions):
    """Options of ``dashboard``."""

    local: bool = False
    """Serve trackio's page on this machine until Ctrl-C, not wandb's workspace."""
