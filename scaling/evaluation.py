"""Loss and token error on validation tokens: per scale, last scale, average, with standard errors.

- No label drop and no drop path: the published validation loss is 10 % unconditional and random,
  this one is deterministic.
- Processes take every W-th image; the per-image sums are gathered and averaged in float64 in image
  order, so that the result does not depend on how many processes shared the work.
- Standard errors are over images: the tokens of one image are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from scaling.config import ModelConfig
from scaling.data.cache import CachedSplit
from scaling.data.live import EncodedSplit
from scaling.families.registry import FAMILIES, family_model
from scaling.memory import out_of_memory, release
from scaling.objective import Objective
from scaling.steps import token_columns
from scaling.tokenizer.quantizer import Quantizer


@dataclass(frozen=True)
class Evaluation:
    """Per-image, per-scale means over tokens: ``loss`` (nats) and ``error`` (0 to 1), each (n, K)."""

    loss_nK: np.ndarray
    error_nK: np.ndarray
    sizes_K: np.ndarray
    """Tokens per scale, side²."""

    def record(self) -> dict[str, Any]:
        """The evaluation's numbers under DESIGN's names, for ``metrics.jsonl``."""
        record: dict[str, Any] = {}
        weights = self.sizes_K / self.sizes_K.sum()
        for name, values_nK in (("loss", self.loss_nK), ("error", self.error_nK)):
            for part, per_image in (("avg", values_nK @ weights), ("last", values_nK[:, -1])):
                record[f"{name}_{part}"] = float(per_image.mean())
                # One image has no spread: not a number here, null in metrics.jsonl.
                spread = per_image.std(ddof=1) if len(per_image) > 1 else float("nan")
                record[f"{name}_{part}_se"] = float(spread / np.sqrt(len(per_image)))
            record[f"{name}_scales"] = [float(v) for v in values_nK.mean(axis=0)]
        return record | {"eval_images": len(self.loss_nK)}


def per_scale(values_BL: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Means over each scale's tokens, (B, K)."""
    parts = values_BL.split([s * s for s in scales], dim=1)
    return torch.stack([part.mean(dim=1) for part in parts], dim=1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    config: ModelConfig,
    quantizer: Quantizer,
    split: CachedSplit | EncodedSplit,
    accelerator: Accelerator,
    *,
    cached: tuple[int, ...],
    images: int | None,
    batch: int,
    on_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Evaluate ``model`` on ``images`` of the split (all when None), spread evenly over it.

    Spread, since an image folder is sorted by class. Every process must call it, with the bare model:
    a wrapped one exchanges buffers, and waits for ever for a process that has no images. Every process
    gets the same result. Always with the steps of ``config.scales``, whatever it was trained on.

    Args:
        cached: side lengths of the token maps in the split.
        batch: images at once; half as many whenever memory runs out.
        on_batch: called before each.
    """
    count = split.images if images is None else min(images, split.images)
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = (np.arange(count) * split.images // count)[rank::world]
    inputs, scales = FAMILIES[config.family].inputs, config.scales
    columns = token_columns(cached, scales)
    objective = Objective(family_model(model))

    def measured(indices: np.ndarray) -> Tensor:
        rows_BL = split.tokens(indices, np.zeros_like(indices))[:, columns]
        tokens_BL = torch.from_numpy(rows_BL.astype(np.int64))
        tokens_BL = tokens_BL.to(accelerator.device)
        labels_B = torch.from_numpy(split.labels[indices]).to(accelerator.device)
        with accelerator.autocast():
            given = inputs(quantizer, tokens_BL, config.sizes)
            _, loss_BL, wrong_BL = objective(labels_B, given, tokens_BL, sizes=config.sizes)
        return torch.stack([per_scale(loss_BL, scales), per_scale(wrong_BL, scales)], dim=1).double()

    training = model.training
    model.eval()
    rows: list[Tensor] = []  # on the device until the end, so that no batch waits for the one before
    done = 0
    while done < len(mine):
        on_batch()
        part = mine[done : done + batch]
        try:
            rows.append(measured(part))
        except Exception as error:
            if not out_of_memory(error) or len(part) == 1:
                raise
            batch = len(part) // 2
        else:
            done += len(part)
            continue
        release()  # not while the error, which holds the tensors, is handled
    model.train(training)
    own = torch.cat(rows).cpu().numpy() if rows else np.zeros((0, 2, len(scales)))
    everyone = gather_object([(rank, own)]) if world > 1 else [(0, own)]
    result = np.empty((count, 2, len(scales)))
    for other, values in everyone:
        result[other::world] = values
    return Evaluation(result[:, 0], result[:, 1], np.array([s * s for s in scales]))
