"""CIFAR-10 as JPEG files (else torchvision's), the checkpoints that belong to them, and networks trained on them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from harness import ROOT
from torch import Tensor, nn

from edgecompress.checkpoints import load_weights
from edgecompress.data import Dataset, Split
from edgecompress.files import written_whole
from edgecompress.finetune import TrainSettings, trained_once
from edgecompress.graph import Graph, build_graph
from edgecompress.models import build_model
from edgecompress.spec import Preprocessing

KEPT = ROOT / "build" / "quantize_cifar10"
DATA = Path(os.environ.get("EDGECOMPRESS_DATA", "data"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHECKPOINTS = ("resnet20", "resnet56")
DEPTHWISE = "mobilenetv2_cifar"
DEPTHWISE_TRAINING = TrainSettings(epochs=8, learning_rate=0.1, batch_size=128, distill=0.0)


@cache
def images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images ``uint8 [N, 3, 32, 32]`` and labels of ``train`` or ``test``, in the order of their names.

    Where there are no JPEG files, those of torchvision in its order, fetched if need be.
    """
    from PIL import Image

    if not has_jpeg_files():
        return _published(split)
    kept = KEPT / f"{split}.npz"  # reading 60,000 JPEG files takes longer than most cells
    if kept.exists():
        with np.load(kept) as file:
            return file["pixels"], file["labels"]
    with tarfile.open(DATA / "cifar10-jpeg.tar.gz") as archive:
        files = {}
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and parts[-3] == split:
                stream = archive.extractfile(member)
                assert stream is not None
                files[parts[-2], parts[-1]] = stream.read()
    names = sorted(files)
    classes = sorted({label for label, _ in names})
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in names])
    pixels, labels = pixels.transpose(0, 3, 1, 2), np.array([classes.index(label) for label, _ in names])
    KEPT.mkdir(parents=True, exist_ok=True)
    with written_whole(kept) as temporary, temporary.open("wb") as stream:
        np.savez(stream, pixels=pixels, labels=labels)
    return pixels, labels


def has_jpeg_files() -> bool:
    """Whether the images are the JPEG files; their checkpoints lose about ten points on the original pixels."""
    return (DATA / "cifar10-jpeg.tar.gz").exists()


def _published(split: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(str(DATA), train=split == "train", download=True)
    return np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)), np.array(found.targets)


@cache
def held_out_rows() -> np.ndarray:
    """The 5,000 training images that ResNet-20 and the depthwise network never saw, shuffled; ResNet-56 saw them all.

    Of torchvision's images a draw of 5,000.
    """
    if not has_jpeg_files():
        return np.random.default_rng(0).permutation(len(images("train")[1]))[:5000]
    held = np.array(json.loads((DATA / "resnet20_heldout.json").read_text()))
    return np.random.default_rng(0).permutation(held)


@cache
def seen_rows() -> np.ndarray:
    """The other 45,000, shuffled."""
    rows = np.setdiff1d(np.arange(len(images("train")[1])), held_out_rows())
    return np.random.default_rng(0).permutation(rows)


def normalised(pixels: np.ndarray) -> Tensor:
    """The networks' input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255 - mean) / std


def part(split: str, rows: np.ndarray) -> Split:
    """Some images of ``train`` or ``test``."""
    pixels, labels = images(split)
    return Split(torch.from_numpy(np.ascontiguousarray(pixels[rows])), torch.from_numpy(labels[rows]).long())


def dataset(train_images: int) -> Dataset:
    """The first of the 45,000 images to train on, cropped and flipped; everything else held out."""
    held = part("train", held_out_rows()[:500])
    how = Preprocessing(size=(32, 32), mean=MEAN, std=STD)
    return Dataset(
        name="cifar10-jpeg" if has_jpeg_files() else "cifar10",
        classes=CLASSES,
        preprocessing=how,
        augmentation="crop_flip",
        train=part("train", seen_rows()[:train_images]),
        calibration=part("train", seen_rows()[:500]),
        search_val=held,
        select_val=held,
        test=held,
    )


def network(name: str) -> nn.Module:
    """A checkpoint, or the depthwise network after its training (kept under build/)."""
    model = build_model(name, 10)
    if name in CHECKPOINTS and not has_jpeg_files():
        raise FileNotFoundError(
            f"The checkpoint of {name} was trained on JPEG files, and {DATA} has no cifar10-jpeg.tar.gz. Point EDGECOMPRESS_DATA to "
            "the folder that holds both."
        )
    if name != DEPTHWISE:
        load_weights(model, DATA / f"{name}_cifar10jpeg.safetensors")
        return model.eval()
    return trained(model, f"{name}-{DEPTHWISE_TRAINING.epochs}", dataset(45_000), DEPTHWISE_TRAINING)


def trained(
    model: nn.Module, title: str, data: Dataset, settings: TrainSettings, teacher: nn.Module | None = None
) -> nn.Module:
    """``model`` after a training that goes on where it was broken off, and is done once."""
    model.to(memory_format=torch.channels_last)
    if teacher is not None:
        teacher.to(memory_format=torch.channels_last)
    trained_once(model, KEPT / f"{title}.safetensors", data, settings, teacher=teacher, on_epoch=_tell)
    return model.to(memory_format=torch.contiguous_format)


def _tell(epoch: int, epochs: int, loss: float) -> None:
    print(f"     epoch {epoch} of {epochs}: loss {loss:.4f}", flush=True)


@cache
def graph_of(name: str) -> Graph:
    """A network as the internal graph, BatchNorm folded."""
    return build_graph(network(name), (3, 32, 32), name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    network(DEPTHWISE)
