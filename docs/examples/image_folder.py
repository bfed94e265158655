"""Compress for a folder of images. The folder is made here from scikit-learn's digits; yours needs the same shape.

python image_folder.py         # writes digits-png/, resnet8.safetensors and runs/image-folder

digits-png/train/<class>/*.png
digits-png/test/<class>/*.png
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import edgecompress
from edgecompress.data import load_data
from edgecompress.models import build_model


def write_folder(root, per_class=60):
    """Save 60 images of each digit, every fifth of them as a test image."""
    digits = load_digits()
    for digit in range(10):
        for number, pixels in enumerate(digits.images[digits.target == digit][:per_class]):
            folder = root / ("test" if number % 5 == 0 else "train") / f"digit-{digit}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
            image.resize((32, 32), Image.Resampling.BILINEAR).save(folder / f"{number:03}.png")


def write_weights(root, path, epochs=8):
    """You have weights already; here a ResNet-8 is trained on the folder first."""
    data = load_data(str(root))
    torch.manual_seed(0)
    model = build_model("resnet8", len(data.classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for epoch in range(epochs):
        for x, y in data.batches(data.train, 32, generator=torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    save_file(model.state_dict(), path)


def main():
    root = Path("digits-png")
    write_folder(root)
    write_weights(root, "resnet8.safetensors")
    run = edgecompress.compress(
        "resnet8", str(root), target="x86", budget="flops=0.6x", weights="resnet8.safetensors",
        name="image-folder", overwrite=True,
        episodes=8, finetune_epochs=1, qat_epochs=1,  # small, to be quick; leave these out for real
    )  # fmt: skip
    after = run.report.compressed
    print(f"accuracy {run.report.original.accuracy:.1%} -> {after.accuracy:.1%} on the folder's test images")
    how = edgecompress.export_run(run.path, "onnxruntime").preprocessing
    print(f"the file expects {how.size[0]}x{how.size[1]} {how.channels} images, mean {how.mean}, std {how.std}")


if __name__ == "__main__":
    main()
