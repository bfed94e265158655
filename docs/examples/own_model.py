"""Compress a network of your own: build it, train it, hand it over in memory, and load the smaller one again.

python own_model.py            # writes runs/own-model
"""

import torch
import torch.nn.functional as F
from torch import nn

import edgecompress
from edgecompress.data import load_data


class TinyNet(nn.Module):
    """Any module will do that maps images ``[N, 3, H, W]`` to logits ``[N, classes]``."""

    def __init__(self, classes=10, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.wide(x))
        x = F.relu(x + self.narrow(x))  # joined layers are cut together
        return self.head(x.mean((2, 3)))


def trained(data, epochs=15):
    """Your own training loop; edgecompress only sees its result."""
    torch.manual_seed(0)
    model = TinyNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for x, y in data.batches(data.train, 64, generator=torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def main():
    data = load_data("digits")
    run = edgecompress.compress(
        trained(data), data, target="x86", budget="flops=0.6x", name="own-model", overwrite=True,
        episodes=8, finetune_epochs=2, qat_epochs=1,  # small, to be quick; leave these out for real
    )  # fmt: skip
    before, after = run.report.original, run.report.compressed
    print(f"accuracy {before.accuracy:.1%} -> {after.accuracy:.1%}, {before.cost.macs:,} -> {after.cost.macs:,} MACs")
    print(f"{run.path / 'exports' / after.file}: {after.cost.size_bytes:,} bytes")

    # A network that came from memory has no name it could be rebuilt from: say how the original is built.
    smaller = edgecompress.load(run.path, factory=TinyNet)
    print(f"the pruned network has {sum(p.numel() for p in smaller.parameters()):,} parameters")


if __name__ == "__main__":
    main()
