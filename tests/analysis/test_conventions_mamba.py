"""Conventions over runs of several families: a Mamba has parts of its own, which are 0 elsewhere."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from analysis.conventions import with_conventions
from scaling.config import Family, ModelConfig
from scaling.flops import forward_flops_by_part, params, params_by_part, params_total, train_flops

IMAGES = 1000


def test_every_family_can_leave_out_the_scan() -> None:
    families: tuple[Family, ...] = ("flexvar", "flexvar-mamba")
    rows, costs = [], dict[str, Any]()
    for family in families:
        model = ModelConfig.from_depth(2, family=family)
        rows.append(
            {
                "run": family, "params": params(model), "params_total": params_total(model),
                "tokens": IMAGES * model.seq_len, "flops": IMAGES * train_flops(model),
            }
        )  # fmt: skip
        costs[family] = {
            "params": params_by_part(model),
            "flops_per_image": {part: 3 * n for part, n in forward_flops_by_part(model).items()},
            "tokens_per_image": model.seq_len,
        }
    runs = pd.DataFrame(rows)
    frame = with_conventions(runs, costs, "blocks_with_biases", "without_scan_and_conv")
    left_out = runs["flops"] - frame["C"]
    own = costs["flexvar-mamba"]["flops_per_image"]
    assert left_out.tolist() == pytest.approx([0, IMAGES * (own["scan"] + own["conv"])], rel=1e-9)
