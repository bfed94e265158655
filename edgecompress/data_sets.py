"""Images that do not lie in a folder: scikit-learn's digits, and what a user's own factory gives."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgecompress.errors import BadDataError
from edgecompress.images import TOLD_EVERY_S, Pixels, as_pixels, fits_in_memory
from edgecompress.imports import imported, place_of
from edgecompress.spec import Preprocessing
from edgecompress.splits import SPLITS, Augmentation, Dataset, Source, Sources, Split, Wanted, assembled
from edgecompress.tasks import IGNORED, Task

if TYPE_CHECKING:
    from PIL.Image import Image

_KEYS = ("train", "val", "test", "classes")
_BLOCK = 512  # items read between two words of how far it is


def digits(wanted: Wanted) -> Dataset:
    """scikit-learn's 1,797 handwritten digits as 32x32 RGB: 897 train, 150 search-val, 150 select-val, 600 test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    small = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(found.target).long()
    own = Preprocessing(size=(32, 32), mean=(0.305,) * 3, std=(0.323,) * 3)
    how = wanted.preprocessing or (own.at(wanted.image_size) if wanted.image_size else own)
    rest, test = train_test_split(np.arange(len(labels)), test_size=600, random_state=0, stratify=labels)
    train, held = train_test_split(rest, test_size=300, random_state=0, stratify=labels[rest])
    search, select = train_test_split(held, test_size=150, random_state=0, stratify=labels[held])
    whole = Split(_resized(images, how), labels)
    splits = [whole.take(torch.from_numpy(indices)) for indices in (train, search, select, test)]
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        preprocessing=how,
        augmentation="shift",
        train=splits[0],
        calibration=splits[0].take(torch.arange(300)),
        search_val=splits[1],
        select_val=splits[2],
        test=splits[3],
    )


# ---------------------------------------------------------------------------------------------- a user's own factory


def factory_data(name: str, wanted: Wanted) -> Dataset:
    """Call ``package.module:factory``, or take the object of that name.

    It gives a `Dataset`, or splits: ``{"train": ..., "val": ..., "test": ..., "classes": [...]}`` (only train is needed) or
    ``(train, test)`` or ``(train, val, test)``. A split is a `Split`, a pair of images and labels, or a torch data set.

    Raises:
        BadDataError: it cannot be imported, raises, or gives something else.
    """
    found = imported(name, "data factory", BadDataError)
    if callable(found):
        try:
            found = found()
        except Exception as error:
            raise BadDataError(
                f"The data factory '{name}' raised {type(error).__name__}: {error}{place_of(error)}. Mend it there."
            ) from error
    label = name.replace(":", ".")
    if isinstance(found, Dataset):
        return replace(found, task=wanted.task) if found.task.name != wanted.task.name else found
    if isinstance(found, tuple | list) and len(found) in (2, 3):
        found = dict(zip(("train", "test") if len(found) == 2 else ("train", "val", "test"), found, strict=True))
    if not isinstance(found, Mapping) or "train" not in found or not set(found) <= set(_KEYS):
        given = f"a dict of {', '.join(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
        raise BadDataError(
            f"The data factory '{name}' gave {given}; expected an edgecompress.data.Dataset, a dict with train (and "
            f"{', '.join(_KEYS[1:])}) or a tuple (train, test)."
        )
    parts = {key: value for key, value in found.items() if key != "classes" and value is not None}
    sources = {part: _source(value, f"{part} of {name}", wanted) for part, value in parts.items()}
    classes = found.get("classes") or getattr(found["train"], "classes", None) or ()
    augmentation: Augmentation = "none" if wanted.task.outputs_rank is None else "crop_flip"  # labels may be places
    data = assembled(label, tuple(map(str, classes)), Sources(**sources), wanted, augmentation)
    return data if classes or not wanted.task.class_scores else replace(data, classes=numbered(_largest(data) + 1))


def _largest(data: Dataset) -> int:
    """The largest label of any split."""
    labels = torch.cat([getattr(data, name).labels.flatten().long() for name in SPLITS])
    return int(labels[labels != IGNORED].max()) if data.task.outputs_rank == 4 else int(labels.max())


def _source(value: Any, where: str, wanted: Wanted) -> Source:
    if isinstance(value, Split):
        return _arrays(value.images, value.labels, where, wanted)
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, Tensor | np.ndarray) for v in value):
        return _arrays(torch.as_tensor(value[0]), torch.as_tensor(value[1]), where, wanted)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return items_source(value, where, wanted)
    raise BadDataError(
        f"The split {where} is {type(value).__name__}; expected (images, labels), a Split, or a data set with len() and [i]."
    )


def _arrays(images: Tensor, labels: Tensor, where: str, wanted: Wanted) -> Source:
    """Images ``[N, C, H, W]``, ``[N, H, W, C]`` or ``[N, H, W]``, bytes or numbers in [0, 1]."""
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) != len(labels) or len(images) == 0:
        raise BadDataError(
            f"The split {where} has images {list(images.shape)} and labels {list(labels.shape)}; expected [N, C, H, W] with 1 "
            "or 3 channels and as many labels, at least one."
        )
    return _held(_bytes(images, where).contiguous(), labels, where, wanted.task)


def _held(pixels: Tensor, labels: Tensor, where: str, task: Task) -> Source:
    """Images in memory, ``uint8 [N, C, H, W]``; brought to another size where one is asked for."""
    strata = torch.zeros(len(labels), dtype=torch.long)
    if task.outputs_rank == 2 and labels.dim() == 1:
        strata = labels = labels.long()
        if bool((labels < 0).any()):
            raise BadDataError(f"The split {where} has the label {int(labels.min())}; expected classes from 0 on.")

    def read(rows: Tensor, how: Preprocessing) -> Split:
        return Split(_resized(pixels[rows], how), labels[rows])

    return Source(strata, read, lambda: (pixels.shape[2], pixels.shape[3]), "L" if pixels.shape[1] == 1 else "RGB")


def _bytes(images: Tensor, where: str) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if images.is_floating_point() and float(images.min()) >= 0 and float(images.max()) <= 1:
        return (images * 255).round().to(torch.uint8)
    raise BadDataError(
        f"The images of {where} are {str(images.dtype).removeprefix('torch.')} from {float(images.min()):.3g} to "
        f"{float(images.max()):.3g}; expected bytes or numbers in [0, 1]. Leave out the normalisation: edgecompress does it."
    )


def items_source(data: Any, where: str, wanted: Wanted, workers: int = 1) -> Source:
    """A data set with ``len()`` and ``[i]`` that gives an image and a label; read whole, once."""

    def item(at: int) -> tuple[Any, Tensor]:
        try:
            image, label = data[at]
            return image, torch.as_tensor(label)
        except BadDataError:
            raise
        except Exception as error:
            raise BadDataError(
                f"Item {at} of {where} raised {type(error).__name__}: {error}{place_of(error)}; expected (image, label). "
                "Mend it there."
            ) from error

    def prepared(at: int) -> tuple[Pixels, Tensor]:
        image, label = item(at)
        return as_pixels(_as_image(image, where), how), label

    how = wanted.preprocessing or _plain_preprocessing(item(0)[0], where, wanted.image_size)
    shape = (len(data), len(how.mean), *how.size)
    if not fits_in_memory(shape):
        raise BadDataError(
            f"The {len(data):,} images of {where} do not fit into memory ({math.prod(shape) / 1e9:.1f} GB). Give a smaller "
            "--image-size, or a folder of images, which need not fit."
        )
    pixels, labels, told = np.empty(shape, np.uint8), [], time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(data), _BLOCK):
            block = range(start, min(start + _BLOCK, len(data)))
            for at, (image, label) in zip(block, pool.map(prepared, block), strict=True):
                pixels[at] = image
                labels.append(label)
            if time.monotonic() - told > TOLD_EVERY_S:
                told = time.monotonic()
                wanted.on_read(block.stop, len(data))
    if len({label.shape for label in labels}) > 1:
        raise BadDataError(
            f"The labels of {where} have different shapes; give all one shape, filled up where they are short."
        )
    source = _held(torch.from_numpy(pixels), torch.stack(labels), where, wanted.task)
    if wanted.preprocessing is None:
        return source
    # The images went through the preprocessing already: it is not applied twice.
    return replace(source, read=lambda rows, _: source.read(rows, how.model_copy(update={"resize": None})))


def _plain_preprocessing(first: Any, where: str, image_size: int | None) -> Preprocessing:
    """The size of the first image, or the one asked for; the single channel of an array stays one."""
    image = _as_image(first, where)
    channels = 1 if image is not first and image.mode == "L" else 3
    size = (image_size, image_size) if image_size else (image.height, image.width)
    return Preprocessing(
        size=size, mean=(0.0,) * channels, std=(1.0,) * channels, channels="L" if channels == 1 else "RGB"
    )


def _as_image(value: Any, where: str) -> Image:
    """An image, or an array ``[C, H, W]``, ``[H, W, C]`` or ``[H, W]`` as an image."""
    from PIL import Image as images

    if isinstance(value, images.Image):
        return value
    pixels = _bytes(torch.as_tensor(value), where).numpy()
    if pixels.ndim == 3:
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels
    return images.fromarray(np.ascontiguousarray(pixels))


def _resized(images: Tensor, how: Preprocessing) -> Tensor:
    """``uint8 [N, C, H, W]`` at ``how``; untouched where they are so already."""
    if tuple(images.shape[1:]) == (len(how.mean), *how.size) and how.resize in (None, min(how.size)):
        return images

    def one(image: Tensor) -> Pixels:
        return as_pixels(_as_image(image, "memory"), how)

    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return torch.from_numpy(np.stack(list(pool.map(one, images))))


def numbered(count: int) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(str(number) for number in range(count))
