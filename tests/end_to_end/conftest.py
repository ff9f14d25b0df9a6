"""Speeds that tests measure are never taken for those of this machine, in child processes either."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("VARSCALE_CACHE")
    os.environ["VARSCALE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["VARSCALE_CACHE"]
    if before is not None:
        os.environ["VARSCALE_CACHE"] = before
