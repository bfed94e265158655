"""Quantise a network whose labels are gone: a .onnx file and a few hundred photos of the kind that it will see.

python calibration_only.py     # writes network.onnx and runs/calibration-only

Nobody says which answer is right, so the original network's own answers are the labels. "Accuracy" is then agreement: in
how many test images the small file gives the same class as the original. Say so when you pass the number on.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import edgecompress
from edgecompress.data import load_data
from edgecompress.models import build_model


def write_network(data, path, epochs=2):
    """You have the .onnx file already; here a ResNet-8 is trained and exported first."""
    torch.manual_seed(0)
    model = build_model("resnet8", len(data.classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for epoch in range(epochs):
        for x, y in data.batches(data.train, 32, generator=torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    example = torch.zeros(2, 3, 32, 32)
    shape = {0: torch.export.Dim("N")}
    torch.onnx.export(model.eval(), (example,), path, dynamo=True, dynamic_shapes=(shape,), verbose=False)


def answered_by(path, data):
    """``data`` with the answers of the network at ``path`` in place of every label."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def answers(split):
        logits = session.run(None, {name: data.normalise(split.images).numpy()})[0]
        return replace(split, labels=torch.from_numpy(np.argmax(logits, 1)))

    parts = {
        part: answers(getattr(data, part)) for part in ("train", "calibration", "search_val", "select_val", "test")
    }
    return replace(data, name=f"{data.name}-answers", **parts)


def main():
    images = load_data("digits")  # your photos: uint8 [N, 3, H, W] in edgecompress.data.Split
    path = Path("network.onnx")
    write_network(images, path)
    run = edgecompress.compress(
        str(path), answered_by(path, images), target="x86", budget="size=0.3x", name="calibration-only", overwrite=True,
        episodes=8, qat_epochs=0,  # nothing is trained: the images only calibrate and compare
    )  # fmt: skip
    after = run.report.compressed
    print(f"{run.path / 'exports' / after.file}: {after.cost.size_bytes:,} bytes ({path.stat().st_size:,} before)")
    print(f"agreement with the original on {len(images.test)} unseen images: {after.accuracy:.1%}")


if __name__ == "__main__":
    main()
