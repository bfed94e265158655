"""How well networks do on one split: their score, and the accuracy that their divergence from the original lets expect."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from edgecompress.data import Dataset, Split
from edgecompress.fidelity import Yardstick, divergence, said_by
from edgecompress.finetune import accuracy_and_loss
from edgecompress.spaces import Outcome

Forward = Callable[[Tensor], Tensor]
BATCH = 256


class Judge:
    """Measures on all of ``split``; the original's answers are taken once.

    Args:
        original: what networks are compared with. Where its outputs are no scores of classes, or too many to keep, an
            `Outcome` has no estimate.
        device: where networks that are modules run, see `devices.device_by_name`.
    """

    def __init__(
        self, data: Dataset, split: Split, original: Forward, yardstick: Yardstick, device: str = "cpu"
    ) -> None:
        self._data, self._split, self._yardstick, self._device = data, split, yardstick, device
        self._original = said_by(original, data.batches(split, BATCH), data.task)

    def __call__(self, network: Forward) -> Outcome:
        found: list[Tensor] = []
        keep = None if self._original is None else found.append
        accuracy, loss = accuracy_and_loss(network, self._data, self._split, BATCH, keep, self._device)
        if self._original is None:
            return Outcome(accuracy, loss)
        lost = divergence(self._original.outputs, found, self._yardstick.temperature)
        return Outcome(accuracy, loss, estimate=self._yardstick.expected(self._original.accuracy, lost))


__all__ = ["Judge"]
