"""The short form of ``benchmarks.torture``: kills and a damaged checkpoint leave no trace in the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.torture import Torture


@pytest.mark.slow
def test_killed_at_random_and_damaged_once_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    torture = Torture(tmp_path, kills=4, processes=1, steps=40, seed=3, longest_wait=0.4, disk=False)
    torture.run()
    done = [event.what for event in torture.events]
    assert len(done) == 5
    assert sum("flipped" in what for what in done) == 1
