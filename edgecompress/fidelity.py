"""How closely a compressed network follows the original: what tells policies apart where labels are too few.

One point of accuracy is three images of 300; the outputs of the same 300 say much more. So a search ranks policies by the
accuracy that their divergence from the original lets expect. Rank correlation with the accuracy on several thousand other
images, from 250, ResNet-20 on CIFAR-10 (benchmarks/ranking_signals.py): 40 pruned networks: accuracy 0.75, divergence 0.92; 45
quantised ones: accuracy 0.79, divergence 0.94.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecompress.tasks import Task

KEPT_OUTPUTS = 256_000_000  # bytes of the original's outputs; a split with more is ranked by its score alone


@dataclass(frozen=True)
class Yardstick:
    """``accuracy = accuracy of the original - lost_per_nat * divergence at temperature``.

    lost_per_nat is the slope that the networks above had; it only weighs accuracy against the cost terms of a reward.
    """

    temperature: float
    lost_per_nat: float

    def expected(self, original: float, divergence: float) -> float:
        """The accuracy to expect of a network that diverges so much from one of accuracy ``original``."""
        return original - self.lost_per_nat * divergence


PRUNED = Yardstick(temperature=2.0, lost_per_nat=0.11)
QUANTIZED = Yardstick(temperature=1.0, lost_per_nat=0.3)


@dataclass(frozen=True)
class Original:
    """What the network that policies are compared with says: its score, and the outputs of every batch."""

    accuracy: float
    outputs: list[Tensor]


def said_by(
    forward: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], task: Task
) -> Original | None:
    """The answers of ``forward`` to images and labels; None where they are no scores of classes, or too large to keep."""
    if not task.class_scores:
        return None
    measured, outputs, kept = [], list[Tensor](), 0
    with torch.inference_mode():
        for x, y in batches:
            outputs.append(forward(x))
            measured.append(task.measure(outputs[-1], y))
            kept += outputs[-1].numel() * outputs[-1].element_size()
            if kept > KEPT_OUTPUTS:
                return None
    return Original(task.merit(measured), outputs)


def divergences(wanted: Tensor, found: Tensor, temperature: float = 1.0) -> Tensor:
    """``T**2 * KL(softmax(wanted / T) || softmax(found / T))`` in nats of every image (Hinton et al. 2015).

    Args:
        wanted, found: scores of classes ``[N, classes, ...]``, of the original and of the compressed network.

    Returns:
        ``float64 [N]``; of masks the mean over the pixels.
    """
    log_p, log_q = ((scores.double() / temperature).log_softmax(1) for scores in (wanted, found))
    nats = (log_p.exp() * (log_p - log_q)).sum(1)
    return temperature**2 * nats.view(len(nats), -1).mean(1)


def divergence(wanted: Sequence[Tensor], found: Sequence[Tensor], temperature: float = 1.0) -> float:
    """Mean of `divergences` over the images of all batches; never below 0."""
    total = sum(float(divergences(p, q, temperature).sum()) for p, q in zip(wanted, found, strict=True))
    return max(total / sum(len(p) for p in wanted), 0.0)
