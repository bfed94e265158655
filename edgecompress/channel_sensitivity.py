"""What halving every channel group alone does to the network's answers: a divergence, computed once and kept."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgecompress.data import Dataset
from edgecompress.files import read_document, write_document
from edgecompress.importance import l2_importance
from edgecompress.prune import prune
from edgecompress.spec import Document
from edgecompress.trace import Traced

IMAGES = 40  # enough to tell groups apart by magnitude, at a tenth of an episode each


class ChannelSensitivities(Document):
    """``divergence[group]``: `Task.distill` (of classes the KL divergence) between the answers of the dense network and
    those with half of the group's channels, mean over ``images``."""

    images: int
    divergence: dict[str, float]


def channel_sensitivities(
    model: nn.Module, traced: Traced, data: Dataset, cache: Path | None = None, images: int = IMAGES
) -> ChannelSensitivities:
    """Measure every prunable group on calibration images, or read what was measured before.

    Nothing is refitted or taken anew: one forward pass of few images per group costs a small part of an episode.

    Args:
        cache: a JSON file that belongs to this network and these images.

    Raises:
        BadFileError: the cache is broken.
    """
    if cache is not None and cache.exists():
        return read_document(cache, ChannelSensitivities, "channel sensitivities")
    few = data.calibration.take(torch.arange(min(images, len(data.calibration))))
    batches = [x for x, _ in data.batches(few, IMAGES)]
    scores = l2_importance(model, traced)
    found = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        wanted = [model(x) for x in batches]
        for group in traced.network.prunable_groups:
            smaller = prune(model, traced, {group.id: max(group.width // 2, 1)}, scores).eval()
            parts = [float(data.task.distill(smaller(x), y)) * len(x) for x, y in zip(batches, wanted, strict=True)]
            found[group.id] = max(sum(parts) / len(few), 0.0)
    model.train(was_training)
    result = ChannelSensitivities(images=len(few), divergence=found)
    if cache is not None:
        write_document(cache, result)
    return result
