"""Five splits of uint8 images, one preprocessing and one task for all of them, and how the splits are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgecompress.errors import BadDataError
from edgecompress.spec import Preprocessing
from edgecompress.tasks import CLASSIFICATION, IGNORED, Task

Augmentation = Literal["none", "shift", "crop_flip"]
SPLITS = ("train", "calibration", "search_val", "select_val", "test")


@dataclass(frozen=True)
class Split:
    """Images as ``uint8 [N, C, H, W]``, in memory or mapped from a file, and what they should give.

    ``labels`` are ``int64 [N]``, masks ``uint8 [N, H, W]``, or whatever a task of the user's own reads: one row per image.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """A copy of the images at ``indices``."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """Five disjoint uses of images (calibration is part of train, without augmentation).

    train: weights. calibration: activation ranges and BatchNorm statistics. search_val: the reward.
    select_val: choosing among finished trials. test: once, at the end.
    labelled: otherwise the labels mean nothing until the original network's own answers take their place.
    notes: what a user should know of how the images were read.
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
    task: Task = CLASSIFICATION
    labelled: bool = True
    notes: tuple[str, ...] = ()

    def normalise(self, images: Tensor) -> Tensor:
        """``uint8 [N, C, H, W]`` to the network's float32 input."""
        mean = torch.tensor(self.preprocessing.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.preprocessing.std).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        rows: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(float32 [B, C, H, W], labels [B, ...])``; shuffled when a generator is given, which is then consumed.

        Args:
            rows: only these images of the split.
        """
        count = len(split) if rows is None else len(rows)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for indices in torch.split(order if rows is None else rows[order], batch_size):
            images, labels = split.images[indices], split.labels[indices]
            if augment and generator is not None:
                images, labels = _augment(images, labels, self.augmentation, generator)
            yield self.normalise(images), labels.long() if labels.dtype == torch.uint8 else labels


def _augment(images: Tensor, labels: Tensor, how: Augmentation, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random shift with zero padding (2 pixels, or 4 with a random horizontal flip), one draw for each image.

    Masks move with their images; what comes in at their edge does not count.
    """
    if how == "none":
        return images, labels
    padding = 2 if how == "shift" else 4
    count, _, height, width = images.shape
    rows = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator) + torch.arange(width)
    if how == "crop_flip":
        flip = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(flip[:, None], columns.flip(1), columns)

    def moved(values: Tensor, outside: int) -> Tensor:
        padded = torch.nn.functional.pad(values, (padding,) * 4, value=outside)
        picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()

    masks = labels.shape == (count, height, width) and not labels.is_floating_point()
    return moved(images, 0), moved(labels[:, None], IGNORED)[:, 0] if masks else labels


def checked(data: Dataset) -> Dataset:
    """``data`` itself, if its splits fit each other, its preprocessing and its classes.

    Raises:
        BadDataError: a split is empty, or has images of another kind or shape, or a label that is no class.
    """
    shape = tuple(data.train.images.shape[1:])
    for name in SPLITS:
        split: Split = getattr(data, name)
        images = split.images
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(split.labels) or len(images) == 0:
            raise BadDataError(
                f"The split {name} of {data.name} has images {_described(images)} and labels {_described(split.labels)}; "
                "expected uint8 [N, C, H, W] and as many labels, at least one."
            )
        if tuple(images.shape[1:]) != shape:
            raise BadDataError(
                f"The images of {name} of {data.name} are {tuple(images.shape[1:])}, those of train {shape}. Give all one shape."
            )
        if data.task.class_scores and data.labelled:
            _check_labels(split.labels, name, data)
    if shape[1:] != data.preprocessing.size or len(data.preprocessing.mean) != shape[0]:
        raise BadDataError(
            f"The images of {data.name} are {shape}, its preprocessing says {data.preprocessing.size} pixels and "
            f"{len(data.preprocessing.mean)} channels. Give the preprocessing that the images went through."
        )
    return data


def _described(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"


def _check_labels(labels: Tensor, split: str, data: Dataset) -> None:
    rank = 1 if data.task.outputs_rank == 2 else 3
    if data.task.outputs_rank is not None and (labels.dim() != rank or labels.is_floating_point()):
        raise BadDataError(
            f"The labels of {split} of {data.name} are {_described(labels)}; the task {data.task.name} wants integers "
            f"{'[N]' if rank == 1 else '[N, H, W]'}. Give such labels, or name another --task."
        )
    wrong = (labels < 0) | (labels >= len(data.classes))
    if labels.dim() > 1:
        wrong &= labels != IGNORED
    if bool(wrong.any()):
        first = wrong.nonzero()[0].tolist()
        raise BadDataError(
            f"The label {int(labels[tuple(first)])} of image {first[0]} of {split} of {data.name} is outside its "
            f"{len(data.classes)} classes; expected 0 to {len(data.classes) - 1}."
        )


# ------------------------------------------------------------------------------------------------ making the splits


@dataclass(frozen=True)
class Source:
    """Images that are not read yet.

    strata: ``int64 [N]``; every split gets its share of each (for classification: the labels).
    read: positions and preprocessing (without mean and std) to the images there; those that cannot be read are left out.
    size: height and width of the first image.
    channels: what the images hold.
    """

    strata: Tensor
    read: Callable[[Tensor, Preprocessing], Split]
    size: Callable[[], tuple[int, int]]
    channels: Literal["RGB", "L"] = "RGB"

    def __len__(self) -> int:
        return len(self.strata)


@dataclass(frozen=True)
class Sources:
    """What a user brings: all images, or train with test and perhaps val beside it."""

    train: Source
    val: Source | None = None
    test: Source | None = None


@dataclass(frozen=True)
class Wanted:
    """How a data set is to be loaded. ``preprocessing`` is None where it is to be found in the images."""

    seed: int = 0
    image_size: int | None = None
    preprocessing: Preprocessing | None = None
    task: Task = CLASSIFICATION
    unlabelled: bool = False
    download: bool = False
    on_read: Callable[[int, int], None] = lambda done, total: None


def assembled(
    name: str, classes: tuple[str, ...], sources: Sources, wanted: Wanted, augmentation: Augmentation = "crop_flip"
) -> Dataset:
    """Split what is not split yet, read the images, and find mean and standard deviation if they are not given.

    A fifth of every class is the test split where there is none, a tenth of the rest is held out for the two validation
    splits where there is no val (3 in 10 without labels: there are few images, and none teaches a label).
    """
    generator = torch.Generator().manual_seed(wanted.seed)
    train, rows = sources.train, torch.arange(len(sources.train))
    how = wanted.preprocessing or _of_images(train, wanted.image_size)
    if sources.test is None:
        rows, test_rows = _split_off(train.strata, rows, 0.2, generator)
    else:
        test_rows = torch.arange(len(sources.test))
    if sources.val is None:
        share = 0.3 if wanted.unlabelled else 0.1
        rows, held = _split_off(train.strata, rows, min(share, 10_000 / len(rows)), generator, least=2)
    else:
        held = torch.arange(len(sources.val))
    val, test = sources.val or train, sources.test or train
    search, select = _split_off(val.strata, held, 0.5, generator)
    images = train.read(rows, how)
    if wanted.preprocessing is None:
        how = _with_statistics(how, images.images)
    return Dataset(
        name=name,
        classes=classes,
        preprocessing=how,
        augmentation=augmentation,
        train=images,
        calibration=images.take(torch.randperm(len(images), generator=generator)[:512]),
        search_val=val.read(search, how),
        select_val=val.read(select, how),
        test=test.read(test_rows, how),
        task=wanted.task,
        labelled=not wanted.unlabelled,
    )


def _of_images(source: Source, image_size: int | None) -> Preprocessing:
    """The size that the images have, or are to have; mean and std follow when they are read."""
    size = (image_size, image_size) if image_size else source.size()
    channels = 1 if source.channels == "L" else 3
    return Preprocessing(size=size, mean=(0.0,) * channels, std=(1.0,) * channels, channels=source.channels)


def _with_statistics(how: Preprocessing, images: Tensor) -> Preprocessing:
    pixels = images[:2000].float() / 255
    return how.model_copy(
        update={
            "mean": tuple(round(value, 4) for value in pixels.mean((0, 2, 3)).tolist()),
            "std": tuple(round(max(value, 1e-3), 4) for value in pixels.std((0, 2, 3)).tolist()),
        }
    )


def _split_off(
    strata: Tensor, rows: Tensor, fraction: float, generator: torch.Generator, least: int = 1
) -> tuple[Tensor, Tensor]:
    """Take ``fraction`` of every stratum off ``rows``, at least ``least`` of each; both parts come shuffled."""
    kept: list[Tensor] = []
    taken: list[Tensor] = []
    labels = strata[rows]
    for label in torch.arange(int(labels.max()) + 1):
        indices = torch.nonzero(labels == label).flatten()
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
    return rows[first], rows[second]
