"""Speeds that tests measure, or make up, are never those of this machine."""

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
