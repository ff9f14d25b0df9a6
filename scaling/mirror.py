"""Records to disk, and a copy of them to wandb if asked.

``metrics.jsonl`` is the source of truth; wandb is a mirror through Accelerate's trackers, offline
without a key. ``step``, ``flops`` and ``tokens`` are logged as values of their own, because an
offline run that is resumed counts wandb's own steps from 0 again.
"""

from __future__ import annotations

import netrc
import os
from typing import Any
from urllib.parse import urlparse

from accelerate import Accelerator

from scaling.config import LaunchConfig, RunConfig, to_dict
from scaling.records import RunFolder


class Mirror:
    """Where a run's records go; only the main process writes."""

    def __init__(
        self, accelerator: Accelerator, config: RunConfig, launch: LaunchConfig, folder: RunFolder, start: int
    ) -> None:
        """``start``: the steps already done; later lines of a run that was killed are dropped."""
        self._accelerator, self._folder = accelerator, folder
        self._wandb = launch.wandb != "off"
        if accelerator.is_main_process:
            folder.truncate(start)
        if self._wandb:
            online = launch.wandb == "online" and _has_key()
            options = {
                "mode": "online" if online else "offline",
                "id": folder.name,
                "name": folder.name,
                "group": folder.path.parent.name,
                "dir": str(folder.path),
                "resume": "allow",
            }
            accelerator.init_trackers(
                launch.wandb_project, config=to_dict(config), init_kwargs={"wandb": options}
            )

    def log(self, record: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``, mirrored under ``<kind>/<name>``."""
        if not self._accelerator.is_main_process:
            return
        self._folder.append(record)
        if self._wandb:
            kind = record["kind"]
            axes = {name: record[name] for name in ("step", "flops", "tokens", "epochs") if name in record}
            values = {
                f"{kind}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k not in axes
            }
            self._accelerator.log(axes | values)

    def close(self) -> None:
        """Close the file; Accelerate closes its trackers at the end of training."""
        self._folder.close()


def _has_key() -> bool:
    """Whether wandb can log in without asking: from the environment or the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
