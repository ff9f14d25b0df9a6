"""Trackers' own places are the tests', and no key of the person at the machine is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trackio's store: it reads the variable once, when it is first imported."""
    return Path(os.environ.setdefault("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio"))))


@pytest.fixture(autouse=True)
def _alone(_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
