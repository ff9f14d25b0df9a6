"""Which trackers can be used here: packages, and wandb's key. No torch."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Iterable
from urllib.parse import urlparse

from scaling.config import ConfigError, LaunchConfig
from scaling.launch import Tracker, WandbMode

EXTRAS = {"trackio": "trackio", "tensorboard": "tensorboard"}
"""Tracker -> the extra that brings its package; wandb is a dependency."""


def check(trackers: Iterable[Tracker], mode: WandbMode = "auto") -> None:
    """Refuse what cannot work before anything is trained or written.

    Raises:
        ConfigError: a package is missing (which extra brings it), or wandb is to be online without a key.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            extra = EXTRAS.get(name)
            how = f'pip install "varscale[{extra}]"' if extra else f"pip install {name}"
            raise ConfigError(f"tracker {name}: its package is not installed; {how}")
    if "wandb" in trackers and mode == "online" and not has_key():
        raise ConfigError(
            "wandb_mode online needs a key; set WANDB_API_KEY or run 'wandb login', or take offline"
        )


def check_launch(launch: LaunchConfig) -> None:
    """``check`` of a recipe's own trackers."""
    check(launch.trackers, launch.wandb_mode)


def online(mode: WandbMode) -> bool:
    """Whether wandb is to be reached over the network."""
    return mode == "online" or (mode == "auto" and has_key())


def has_key() -> bool:
    """Whether wandb can log in without asking: from the environment or the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
