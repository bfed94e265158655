"""Compress a detector with a score of your own. The images are made here: one bright box on noise in each.

python own_task.py             # writes runs/own-task

On the command line: edgecompress compress --model my_detector:build --data own_task:images --task own_task:DETECTION
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import edgecompress
from edgecompress.data import load_data
from edgecompress.tasks import Task

SIZE = 32


def overlap(boxes, wanted):
    """Intersection over union of boxes ``[N, 4]``: left, top, right, bottom in [0, 1]."""
    corner, far = torch.maximum(boxes[:, :2], wanted[:, :2]), torch.minimum(boxes[:, 2:], wanted[:, 2:])
    both = (far - corner).clamp(min=0).prod(1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) for b in (boxes, wanted)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-9)


def loss(outputs, labels, reduction):
    """Trained on: the distance of the corners. ``reduction`` is "mean" or "sum" over the images, as in torch."""
    distance = F.smooth_l1_loss(outputs, labels, reduction="none", beta=0.1).sum(1)
    return distance.mean() if reduction == "mean" else distance.sum()


def found(outputs, labels):
    """What the score needs of one batch. Anything will do: for a mean average precision, the detections themselves."""
    return (overlap(outputs, labels) >= 0.5).float()


def score(batches):
    """One number out of all batches of a split: the share of boxes found with an overlap of at least one half."""
    return float(torch.cat(list(batches)).mean())


DETECTION = Task(name="detection", score_name="boxes found", loss=loss, measure=found, score=score)


def images(counts=(160, 48)):
    """Train and test: images ``uint8 [N, 3, H, W]`` and one box each, ``float32 [N, 4]``."""
    random = np.random.default_rng(0)
    splits = []
    for count in counts:
        pixels = random.normal(90, 20, (count, 3, SIZE, SIZE))
        corners = random.integers(0, SIZE - 16, (count, 2))
        sizes = random.integers(10, 17, (count, 2))
        boxes = np.concatenate([corners, corners + sizes], 1)
        for image, (left, top, right, bottom) in zip(pixels, boxes, strict=True):
            image[:, top:bottom, left:right] += 110
        splits.append((pixels.clip(0, 255).astype(np.uint8), (boxes / SIZE).astype(np.float32)))
    return tuple(splits)


class TinyDetector(nn.Module):
    """Four numbers between 0 and 1."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        )  # fmt: skip
        self.corners = nn.Linear(24 * (SIZE // 8) ** 2, 4)

    def forward(self, x):
        return torch.sigmoid(self.corners(self.body(x).flatten(1)))


def trained(data, epochs=20):
    """You have a trained network already; this one trains here."""
    torch.manual_seed(0)
    model = TinyDetector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for epoch in range(epochs):
        for x, boxes in data.batches(data.train, 16, generator=torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            loss(model(x), boxes, "mean").backward()
            optimizer.step()
    return model.eval()


def main():
    data = load_data("own_task:images", task=DETECTION)  # the function above; a module of yours works the same
    run = edgecompress.compress(
        trained(data), data, target="x86", budget="flops=0.6x", name="own-task", overwrite=True,
        episodes=8, finetune_epochs=2, qat_epochs=1, threads=1,  # small, to be quick; leave these out for real
    )  # fmt: skip
    told, before, after = run.report.score, run.report.original, run.report.compressed
    print(f"{told.name} {told.text(before.accuracy)} -> {told.text(after.accuracy)}")
    print(f"{run.path / 'exports' / after.file}: {after.cost.size_bytes:,} bytes")


if __name__ == "__main__":
    main()
