"""Where a user's images come in: five splits of uint8 images in memory and one preprocessing for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edgecompress.errors import BadDataError, UnknownNameError
from edgecompress.spec import Preprocessing

Augmentation = Literal["none", "shift", "crop_flip"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
BUILT_IN = ("digits",)


@dataclass(frozen=True)
class Split:
    """Images as ``uint8 [N, C, H, W]`` and labels as ``int64 [N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """The images at ``indices``."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """Five disjoint uses of images (calibration is part of train, without augmentation).

    train: weights. calibration: activation ranges and BatchNorm statistics. search_val: the reward.
    select_val: choosing among finished trials. test: once, at the end.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    augmentation: Augmentation
    train: Split
    calibration: Split
    search_val: Split
    select_val: Split
    test: Split

    def normalise(self, images: Tensor) -> Tensor:
        """``uint8 [N, C, H, W]`` to the network's float32 input."""
        mean = torch.tensor(self.preprocessing.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.preprocessing.std).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std

    def batches(
        self, split: Split, batch_size: int, *, generator: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(float32 [B, C, H, W], int64 [B])``; shuffled when a generator is given, which is then consumed."""
        order = torch.arange(len(split)) if generator is None else torch.randperm(len(split), generator=generator)
        for indices in torch.split(order, batch_size):
            images = split.images[indices]
            if augment and generator is not None:
                images = _augment(images, self.augmentation, generator)
            yield self.normalise(images), split.labels[indices]


def _augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Random shift with zero padding (2 pixels, or 4 with a random horizontal flip), one draw for each image."""
    if how == "none":
        return images
    padding = 2 if how == "shift" else 4
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    rows = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator) + torch.arange(width)
    if how == "crop_flip":
        flip = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def load_data(name: str, *, image_size: int | None = None, seed: int = 0) -> Dataset:
    """Load a data set.

    Args:
        name: ``digits`` or the root of an ImageFolder: ``train/<class>/*`` with ``test/`` or ``val/`` beside it, or
            ``<class>/*`` alone (then split with ``seed``).
        image_size: height and width that images are resized to; by default that of the first image.
        seed: decides the splits that the data does not bring along.

    Raises:
        UnknownNameError: no such data. BadDataError: no images, one class, or classes that differ between folders.
    """
    if name == "digits":
        return _digits()
    root = Path(name)
    if root.is_dir():
        return _image_folder(root, image_size, seed)
    if root.is_file() or len(root.parts) > 1:
        raise BadDataError(f"There is no data folder at {name}. Expected a folder with one sub-folder per class.")
    raise UnknownNameError("data", name, [*BUILT_IN, "<path of an image folder>"])


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits as 32x32 RGB: 897 train, 150 search-val, 150 select-val, 600 test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(np.arange(len(labels)), test_size=600, random_state=0, stratify=labels)
    train, held = train_test_split(rest, test_size=300, random_state=0, stratify=labels[rest])
    search, select = train_test_split(held, test_size=150, random_state=0, stratify=labels[held])
    whole = Split(images, labels)
    splits = [whole.take(torch.from_numpy(indices)) for indices in (train, search, select, test)]
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        preprocessing=Preprocessing(size=(32, 32), mean=(0.305,) * 3, std=(0.323,) * 3),
        augmentation="shift",
        train=splits[0],
        calibration=splits[0].take(torch.arange(300)),
        search_val=splits[1],
        select_val=splits[2],
        test=splits[3],
    )


def _image_folder(root: Path, image_size: int | None, seed: int) -> Dataset:
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    classes = _classes(train_root, skip=() if train_root != root else ("test", "val"))
    generator = torch.Generator().manual_seed(seed)
    size = (image_size, image_size) if image_size else None
    whole = _read_images(train_root, classes, size)
    size = (whole.images.shape[2], whole.images.shape[3])
    if test_root is None:
        whole, test = _split_off(whole, 0.2, generator)
    else:
        if _classes(test_root) != classes:
            raise BadDataError(
                f"The class folders of {test_root} differ from those of {train_root}; give both the same."
            )
        test = _read_images(test_root, classes, size)
    train, held = _split_off(whole, min(0.1, 10_000 / len(whole)), generator, least=2)
    search, select = _split_off(held, 0.5, generator)
    pixels = train.images[:2000].float() / 255
    return Dataset(
        name=root.name,
        classes=classes,
        preprocessing=Preprocessing(
            size=size,
            mean=tuple(round(value, 4) for value in pixels.mean((0, 2, 3)).tolist()),
            std=tuple(round(max(value, 1e-3), 4) for value in pixels.std((0, 2, 3)).tolist()),
        ),
        augmentation="crop_flip",
        train=train,
        calibration=train.take(torch.randperm(len(train), generator=generator)[:512]),
        search_val=search,
        select_val=select,
        test=test,
    )


def _classes(root: Path, skip: tuple[str, ...] = ()) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name not in skip))
    if not names:
        raise BadDataError(f"The data folder {root} has no class folders. Expected {root}/<class>/<image>.jpg.")
    if len(names) == 1:
        raise BadDataError(
            f"The data folder {root} has the one class '{names[0]}'. Expected at least two class folders."
        )
    return names


def _read_images(root: Path, classes: tuple[str, ...], size: tuple[int, int] | None) -> Split:
    from PIL import Image

    images: list[np.ndarray] = []
    labels: list[int] = []
    broken: list[Path] = []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise BadDataError(
                f"The class folder {root / name} has no images ({', '.join(IMAGE_SUFFIXES)}). Fill it or remove it."
            )
        for path in paths:
            try:
                with Image.open(path) as file:
                    image = file.convert("RGB")
            except OSError:
                broken.append(path)
                continue
            size = size or (image.height, image.width)
            if (image.height, image.width) != size:
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            images.append(np.asarray(image))
            labels.append(label)
    if len(broken) > 0.01 * (len(images) + len(broken)):
        raise BadDataError(
            f"{len(broken)} images under {root} cannot be read, the first is {broken[0]}. Repair or remove them."
        )
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(stacked, torch.tensor(labels))


def _split_off(whole: Split, fraction: float, generator: torch.Generator, least: int = 1) -> tuple[Split, Split]:
    """Take ``fraction`` of every class off ``whole``, at least ``least`` images of each; both parts come shuffled."""
    kept: list[Tensor] = []
    taken: list[Tensor] = []
    for label in torch.arange(int(whole.labels.max()) + 1):
        indices = torch.nonzero(whole.labels == label).flatten()
        if len(indices) < 2:
            raise BadDataError(
                f"Class number {int(label)} has {len(indices)} image left to split; every class needs at least 8 images."
            )
        indices = indices[torch.randperm(len(indices), generator=generator)]
        count = max(least, round(fraction * len(indices)))
        taken.append(indices[:count])
        kept.append(indices[count:])
    mixed = [torch.cat(part) for part in (kept, taken)]
    first, second = (part[torch.randperm(len(part), generator=generator)] for part in mixed)
    return whole.take(first), whole.take(second)
