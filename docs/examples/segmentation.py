"""Compress a network that labels every pixel. The images are made here; yours need the same folders.

python segmentation.py         # writes shapes/ and runs/segmentation

shapes/train/images/*.png      shapes/train/masks/*.png     (the same names; a pixel of a mask is the number of its class)
shapes/test/images/*.png       shapes/test/masks/*.png
shapes/classes.txt             (one name a line, in the order of the numbers)
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import edgecompress
from edgecompress.data import load_data
from edgecompress.tasks import SEGMENTATION

SIZE = 32


def write_folder(root):
    """A bright square and a dark disc on noise, with masks: 0 background, 1 square, 2 disc; 255 would not count."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for split, count in (("train", 80), ("test", 16)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            mask = np.zeros((SIZE, SIZE), np.uint8)
            top, left = random.integers(0, SIZE - 12, 2)
            mask[top : top + 12, left : left + 12] = 1
            row, column = random.integers(6, SIZE - 6, 2)
            mask[(rows - row) ** 2 + (columns - column) ** 2 < 36] = 2
            pixels = np.choose(mask, [128, 220, 40])[..., None] + random.normal(0, 20, (SIZE, SIZE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / "images" / f"{number:03}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number:03}.png")
    (root / "classes.txt").write_text("background\nsquare\ndisc\n")


class TinySegmenter(nn.Module):
    """Scores at a quarter of the size: loss and score enlarge them to the masks, and so does your program."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Conv2d(24, classes, 1)

    def forward(self, x):
        return self.head(self.body(x))


def trained(data, epochs=8):
    """You have a trained network already; this one trains on the folder."""
    torch.manual_seed(0)
    model = TinySegmenter(len(data.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for epoch in range(epochs):
        for x, masks in data.batches(data.train, 16, generator=torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            scores = F.interpolate(model(x), size=masks.shape[1:], mode="bilinear")
            F.cross_entropy(scores, masks, ignore_index=255).backward()
            optimizer.step()
    return model.eval()


def main():
    root = Path("shapes")
    write_folder(root)
    data = load_data(str(root), task=SEGMENTATION)  # on the command line: --data shapes --task segmentation
    run = edgecompress.compress(
        trained(data), data, target="x86", budget="flops=0.6x", name="segmentation", overwrite=True,
        episodes=8, finetune_epochs=2, qat_epochs=1, threads=1,  # small, to be quick; leave these out for real
    )  # fmt: skip
    score, before, after = run.report.score, run.report.original, run.report.compressed
    print(f"{score.name} {score.text(before.accuracy)} -> {score.text(after.accuracy)}")
    print(f"{run.path / 'exports' / after.file}: {after.cost.size_bytes:,} bytes")


if __name__ == "__main__":
    main()
