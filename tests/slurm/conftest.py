"""One Slurm for all tests of a session, or the reason why there is none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import HERE, NOT_POSSIBLE, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    number = int(worker_id.removeprefix("gw")) if worker_id.startswith("gw") else 0
    environment = os.environ | {"PORTS": str(16817 + 10 * number)}
    up = subprocess.run(["bash", HERE / "up.sh", folder], capture_output=True, text=True, env=environment)
    if up.returncode == NOT_POSSIBLE:
        pytest.skip(up.stderr.strip().splitlines()[-1])
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", HERE / "down.sh", folder], check=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No speed that a test measures is taken for this machine's."""
    monkeypatch.setenv("VARSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
