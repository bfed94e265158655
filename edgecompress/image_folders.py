"""Folders of images: a class per folder, images with masks, or images alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgecompress.errors import BadDataError
from edgecompress.images import SUFFIXES, Decoded, as_mask, as_pixels, decode, size_of
from edgecompress.spec import Preprocessing
from edgecompress.splits import Dataset, Source, Sources, Split, Wanted, assembled
from edgecompress.tasks import AGREEMENT, CLASSIFICATION, IGNORED

if TYPE_CHECKING:
    from PIL.Image import Image

HELD_OUT = ("val", "test")
MASKS_TO_COUNT = 500
BROKEN_AT_MOST = 0.01


def folder_data(root: Path, wanted: Wanted) -> Dataset:
    """The images below ``root``, read the way that the task and the folders ask for.

    Raises:
        BadDataError: no images, one class, classes that differ between folders, or more than 1 % that cannot be read.
    """
    if wanted.task.name == "segmentation":
        return _with_masks(root, wanted)
    alone = wanted.unlabelled or _is_flat(root)
    if wanted.task is not CLASSIFICATION:
        raise BadDataError(
            f"A folder of images has no labels for the task '{wanted.task.name}'. Give --data package.module:factory."
        )
    return _alone(root, replace(wanted, unlabelled=True, task=AGREEMENT)) if alone else _with_classes(root, wanted)


@dataclass
class _Reader:
    """Reads images and counts those that it could not."""

    on_read: Callable[[int, int], None]
    tried: int = 0
    broken: list[tuple[Path, str]] = field(default_factory=list)

    def read(
        self, paths: Sequence[Path], how: Preprocessing, convert: Callable[[Image, Preprocessing], np.ndarray] = as_pixels,
        channels: int = 3,
    ) -> Decoded:  # fmt: skip
        decoded = decode(paths, how, convert=convert, channels=channels, on_read=self.on_read)
        self.tried += len(paths)
        self.broken += decoded.broken
        return decoded

    def finished(self, data: Dataset, root: Path) -> Dataset:
        """``data`` with a note of what was skipped.

        Raises:
            BadDataError: more than 1 % could not be read.
        """
        if not self.broken:
            return data
        path, why = min(self.broken)
        told = f"{len(self.broken)} images under {root} cannot be read, the first is {path} ({why})."
        if len(self.broken) > BROKEN_AT_MOST * self.tried:
            raise BadDataError(f"{told} Repair or remove them.")
        return replace(data, notes=(*data.notes, f"{told} They are skipped."))


def _layout(root: Path) -> tuple[Path, dict[str, Path]]:
    """The folder of the training images, and those held out by the split they are for; one alone is the test split."""
    beside = {name: root / name for name in HELD_OUT if (root / name).is_dir()}
    if set(beside) == {"val"}:
        beside = {"test": beside["val"]}
    return root / "train" if (root / "train").is_dir() else root, beside


def _all_finished(data: Dataset, readers: Mapping[Path, _Reader]) -> Dataset:
    for folder, reader in readers.items():
        data = reader.finished(data, folder)
    return data


# ---------------------------------------------------------------------------------------------- a class per folder


def _with_classes(root: Path, wanted: Wanted) -> Dataset:
    train_root, beside = _layout(root)
    classes = _classes(train_root, skip=() if train_root != root else HELD_OUT)
    for other in beside.values():
        _check_same_classes(train_root, classes, other)
    readers = {folder: _Reader(wanted.on_read) for folder in (train_root, *beside.values())}
    sources = {folder: _class_source(folder, classes, reader) for folder, reader in readers.items()}
    held = {name: sources[folder] for name, folder in beside.items()}
    data = assembled(root.name, classes, Sources(sources[train_root], **held), wanted)
    return _all_finished(data, readers)


def _class_source(root: Path, classes: tuple[str, ...], reader: _Reader) -> Source:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = image_paths(root / name)
        if not found:
            raise BadDataError(
                f"The class folder {root / name} has no images ({', '.join(SUFFIXES)}). Fill it or remove it."
            )
        paths += found
        labels += [label] * len(found)
    return _source(paths, torch.tensor(labels), reader, root)


def _source(paths: Sequence[Path], labels: Tensor, reader: _Reader, root: Path) -> Source:
    def read(rows: Tensor, how: Preprocessing) -> Split:
        decoded = reader.read([paths[row] for row in rows.tolist()], how)
        return Split(decoded.images, labels[rows][decoded.kept])

    return Source(labels, read, lambda: _size(paths, root))


def _size(paths: Sequence[Path], root: Path) -> tuple[int, int]:
    size = size_of(paths)
    if size is None:
        raise BadDataError(
            f"{len(paths)} images under {root} cannot be read, the first is {paths[0]}. Repair or remove them."
        )
    return size


def image_paths(root: Path) -> list[Path]:
    """Image files below ``root`` at any depth, sorted; hidden files and folders are left out, links are followed once."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in seen
        ]
        found += [Path(folder, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    return sorted(found)


def _classes(root: Path, skip: tuple[str, ...] = ()) -> tuple[str, ...]:
    names = _folders(root, skip)
    if not names:
        raise BadDataError(f"The data folder {root} has no class folders. Expected {root}/<class>/<image>.jpg.")
    if len(names) == 1:
        raise BadDataError(
            f"The data folder {root} has the one class '{names[0]}'. Expected at least two class folders."
        )
    return names


def _folders(root: Path, skip: tuple[str, ...] = ()) -> tuple[str, ...]:
    names = (entry.name for entry in root.iterdir() if entry.is_dir())
    return tuple(sorted(name for name in names if name not in skip and not name.startswith((".", "__MACOSX"))))


def _check_same_classes(train: Path, classes: tuple[str, ...], other: Path) -> None:
    found = _classes(other)
    differing = [
        f"only {folder.name} has {', '.join(sorted(names))}"
        for folder, names in ((train, set(classes) - set(found)), (other, set(found) - set(classes)))
        if names
    ]
    if differing:
        raise BadDataError(
            f"The class folders of {other} differ from those of {train}: {'; '.join(differing)}. Give both the same."
        )


# --------------------------------------------------------------------------------------------------- images alone


def _is_flat(root: Path) -> bool:
    """Whether images lie in ``root`` itself and no folder is in it."""
    return not _folders(root) and any(
        entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") for entry in root.iterdir()
    )


def _alone(root: Path, wanted: Wanted) -> Dataset:
    paths, reader = image_paths(root), _Reader(wanted.on_read)
    if len(paths) < 20:
        raise BadDataError(
            f"The folder {root} has {len(paths)} images; without labels at least 20 are needed, better 300."
        )
    source = _source(paths, torch.zeros(len(paths), dtype=torch.long), reader, root)
    data = assembled(root.name, (), Sources(source), wanted)
    return reader.finished(data, root)


# ----------------------------------------------------------------------------------------------- images with masks


def _with_masks(root: Path, wanted: Wanted) -> Dataset:
    """``images/`` and ``masks/`` with the same names, below ``train/`` and ``test/`` (or ``val/``) or directly."""
    train_root, beside = _layout(root)
    pairs = {folder: _pairs(folder) for folder in (train_root, *beside.values())}
    classes = _mask_classes(root, [mask for found in pairs.values() for _, mask in found])
    readers = {folder: _Reader(wanted.on_read) for folder in pairs}
    sources = {folder: _mask_source(found, readers[folder], folder) for folder, found in pairs.items()}
    held = {name: sources[folder] for name, folder in beside.items()}
    data = assembled(root.name, classes, Sources(sources[train_root], **held), wanted)
    return _all_finished(data, readers)


def _pairs(root: Path) -> list[tuple[Path, Path]]:
    """Images with their masks: the same path below ``images`` and ``masks``, whatever the suffixes."""
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise BadDataError(
                f"There is no folder {root / name}. Segmentation expects images/ and masks/ with the same names."
            )
    masks = {path.relative_to(root / "masks").with_suffix(""): path for path in image_paths(root / "masks")}
    images = image_paths(root / "images")
    without = [path for path in images if path.relative_to(root / "images").with_suffix("") not in masks]
    if without or not images:
        what = f"{len(without)} images have no mask, the first is {without[0]}" if without else "there are no images"
        raise BadDataError(f"Below {root}, {what}. Give every image a mask of its name in {root / 'masks'}.")
    return [(path, masks[path.relative_to(root / "images").with_suffix("")]) for path in images]


def _mask_classes(root: Path, masks: Sequence[Path]) -> tuple[str, ...]:
    """Lines of ``classes.txt``, or one more than the largest number in the first masks."""
    names = root / "classes.txt"
    if names.is_file():
        return tuple(line.strip() for line in names.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    from PIL import Image

    largest = 0
    for path in masks[:MASKS_TO_COUNT]:
        try:
            with Image.open(path) as file:
                values = np.asarray(file)
        except Exception:
            continue  # counted when it is read
        largest = max(largest, int(values[values != IGNORED].max(initial=0)))
    return tuple(str(number) for number in range(largest + 1))


def _mask_source(pairs: Sequence[tuple[Path, Path]], reader: _Reader, root: Path) -> Source:
    def read(rows: Tensor, how: Preprocessing) -> Split:
        chosen = [pairs[row] for row in rows.tolist()]
        images = reader.read([image for image, _ in chosen], how)
        masks = reader.read([mask for _, mask in chosen], how, as_mask, 1)
        if len(images.kept) == len(masks.kept) == len(chosen):
            return Split(images.images, masks.images[:, 0])
        both = torch.tensor(sorted(set(images.kept.tolist()) & set(masks.kept.tolist())), dtype=torch.long)
        return Split(
            images.images[torch.searchsorted(images.kept, both)], masks.images[torch.searchsorted(masks.kept, both), 0]
        )

    return Source(torch.zeros(len(pairs), dtype=torch.long), read, lambda: _size([image for image, _ in pairs], root))
