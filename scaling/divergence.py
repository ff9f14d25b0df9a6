"""When a run is given up: its loss is no number any more, or stays far above what knowing nothing costs.

A model that answers every token with equal probabilities has a loss of ln V nats, and every family starts
close to it. So a run has diverged

- when the loss or the gradient's norm of a log point is not finite (with fp16's loss scaling an infinite norm
  is ordinary: the step is skipped), or the validation loss, or any tensor of a checkpoint to be written;
- when the training loss of ``PATIENCE`` log points in a row is above ``FACTOR``·ln V.

A spike that is over by the next log points is none of these, nor is a run that learns nothing and stays
near ln V: that is a poor result, and counts as one. The bound is high, since a run wrongly given up biases a
study, and one wrongly trained on only costs. Checked where losses leave the device anyway; the log points
before come from the records, so that a resumed run is judged as an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scaling.process import DivergedError
from scaling.records import finite

FACTOR = 3.0
PATIENCE = 5


class Divergence:
    """The judge of one run's log points.

    Args:
        vocab: V.
        scaled: whether the loss is scaled (fp16), so that infinite gradients are ordinary.
        before: ``loss_avg`` of the log points before, oldest first.
    """

    def __init__(self, vocab: int, scaled: bool, before: Iterable[float]) -> None:
        self._bound = FACTOR * math.log(vocab)
        self._scaled = scaled
        self._above = 0
        for loss in before:
            self._count(loss)

    def look(self, loss: float, grad_norm: float, step: int) -> None:
        """Judge a log point.

        Raises:
            DivergedError: with what was found and the step.
        """
        if not finite(loss):
            raise DivergedError(f"the loss became {loss} at step {step}")
        if not finite(grad_norm) and not self._scaled:
            raise DivergedError(f"the gradient's norm became {grad_norm} at step {step}")
        self._count(loss)
        if self._above >= PATIENCE:
            raise DivergedError(
                f"the loss is {loss:.4g} at step {step} and was above {self._bound:.4g}, {FACTOR:g} times a "
                f"uniform guess's, for {PATIENCE} log points in a row"
            )

    def _count(self, loss: float) -> None:
        self._above = self._above + 1 if loss > self._bound else 0
