"""One Slurm for all tests of a session, or the reason why there is none."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import HERE, NOT_POSSIBLE, Cluster


def free_ports(count: int) -> int:
    """The first of as many in a row that nobody listens on now, below those that the system gives out."""
    for _ in range(100):
        first = random.SystemRandom().randrange(16000, 32000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {"PORTS": str(free_ports(4)), "GUARD": str(os.getpid())}
    up = subprocess.run(["bash", HERE / "up.sh", folder], capture_output=True, text=True, env=environment)
    if up.returncode == NOT_POSSIBLE:
        pytest.skip(up.stderr.strip().splitlines()[-1])
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", HERE / "down.sh", folder], check=True)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose commands are taken for Slurm's (``stand_ins.fake``)."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place
