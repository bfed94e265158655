"""Image files become bytes: every mode, depth and orientation that photos come in, decoded by several threads.

Decoded images are held in memory where they fit into half of what is free, else in a file in the cache folder that is
mapped into memory, and found there again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecompress.errors import EdgeCompressError
from edgecompress.files import cache_folder, write_text, written_whole
from edgecompress.machine import free_memory_bytes
from edgecompress.spec import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
OnRead = Callable[[int, int], None]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
SHARE_OF_MEMORY = 0.5
TOLD_EVERY_S = 0.5
_BLOCK = 128  # files handed to the threads at once


@dataclass(frozen=True)
class Decoded:
    """``uint8 [N, C, H, W]`` of the files that could be read, their positions, and why the others could not."""

    images: Tensor
    kept: Tensor
    broken: tuple[tuple[Path, str], ...]


def plain(image: Image, channels: Literal["RGB", "L"] = "RGB") -> Image:
    """An upright 8-bit image in ``channels``.

    The orientation that a camera noted is carried out. 16 bits are scaled to 8, an alpha channel is dropped (the colours
    below it stay, as in torchvision), CMYK, palettes and grayscale are converted.

    Raises:
        ValueError: floating-point pixels, which have no known range.
    """
    from PIL import Image as images
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = images.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image if image.mode == channels else image.convert(channels)


def fitted(image: Image, how: Preprocessing, *, nearest: bool = False) -> Image:
    """``image`` at ``how.size``: stretched, or resized by its shorter side and cut out of the middle.

    The latter is torchvision's ``Resize`` and ``CenterCrop``. ``nearest`` is for masks.
    """
    from PIL.Image import Resampling

    height, width = how.size
    method = Resampling.NEAREST if nearest else Resampling[how.interpolation.upper()]
    wanted = (width, height)
    if how.resize is not None:
        long = int(how.resize * max(image.size) / min(image.size))
        wanted = (how.resize, long) if image.width <= image.height else (long, how.resize)
    if image.size != wanted:
        image = image.resize(wanted, method)
    if how.resize is None:
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def as_pixels(image: Image, how: Preprocessing) -> Pixels:
    """One image as ``uint8 [C, H, W]``."""
    pixels = np.array(fitted(plain(image, how.channels), how))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def as_mask(image: Image, how: Preprocessing) -> Pixels:
    """A mask as ``uint8 [1, H, W]``: the number of the class of every pixel; a palette's positions are the numbers.

    Raises:
        ValueError: the mask has colours or more than 8 bits.
    """
    from PIL import ImageOps

    if image.mode not in ("L", "P", "1"):
        raise ValueError(f"a mask of mode {image.mode}; expected one number from 0 to 255 per pixel (L or P)")
    image = ImageOps.exif_transpose(image)
    return np.asarray(fitted(image, how, nearest=True)).astype(np.uint8)[None]


def size_of(paths: Sequence[Path]) -> tuple[int, int] | None:
    """Height and width of the first image that can be read, upright; None if none can."""
    from PIL import Image as images

    for path in paths:
        try:
            with images.open(path) as file:
                image = plain(file)
        except Exception:
            continue
        return image.height, image.width
    return None


def decode(
    paths: Sequence[Path],
    how: Preprocessing,
    *,
    convert: Callable[[Image, Preprocessing], Pixels] = as_pixels,
    channels: int = 3,
    on_read: OnRead = lambda done, total: None,
) -> Decoded:
    """Read files at ``how``, by as many threads as torch uses.

    Args:
        convert: one open image to ``uint8 [channels, H, W]``.
        on_read: told from time to time how many of how many files were read.

    Raises:
        EdgeCompressError: the decoded images fit neither into memory nor on the disk of the cache folder.
    """
    shape = (len(paths), channels, *how.size)
    if fits_in_memory(shape):
        held = np.empty(shape, np.uint8)
        return _decoded(held, _fill(held, paths, how, convert, on_read), paths)
    path = cache_folder() / "images" / f"{_key(paths, how, channels)}.npy"
    record = path.with_suffix(".json")
    if not path.exists():
        with _mapped(path, shape) as held:
            broken = _fill(held, paths, how, convert, on_read)
            write_text(record, json.dumps(broken))
    mapped = np.load(path, mmap_mode="c")  # private: torch wants memory that it may write to
    return _decoded(mapped, [(int(at), why) for at, why in json.loads(record.read_text())], paths)


def fits_in_memory(shape: tuple[int, ...]) -> bool:
    """Whether ``uint8`` images of this shape leave half of the free memory to the rest."""
    return int(np.prod(shape)) <= SHARE_OF_MEMORY * free_memory_bytes()


def _fill(
    held: Pixels,
    paths: Sequence[Path],
    how: Preprocessing,
    convert: Callable[[Image, Preprocessing], Pixels],
    on_read: OnRead,
) -> list[tuple[int, str]]:
    """Decode into ``held``, one behind the other; returns positions that could not be read, with the reason.

    A file that cannot be read leaves no gap: closing one later would copy all images behind it, out of a mapped file into
    memory.
    """
    from PIL import Image as images

    def read(at: int) -> Pixels | str:
        try:
            with images.open(paths[at]) as file:
                return convert(file, how)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise nearly everything on a torn file
            return str(error) or type(error).__name__

    broken: list[tuple[int, str]] = []
    told = time.monotonic()
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for start in range(0, len(paths), _BLOCK):
            block = range(start, min(start + _BLOCK, len(paths)))
            for at, found in zip(block, pool.map(read, block), strict=True):
                if isinstance(found, str):
                    broken.append((at, found))
                else:
                    held[at - len(broken)] = found
            if time.monotonic() - told > TOLD_EVERY_S:
                told = time.monotonic()
                on_read(block.stop, len(paths))
    return broken


def _decoded(held: Pixels, broken: Sequence[tuple[int, str]], paths: Sequence[Path]) -> Decoded:
    """What `_fill` left in ``held``."""
    bad = {at for at, _ in broken}
    kept = [at for at in range(len(paths)) if at not in bad]
    images = torch.from_numpy(held)[: len(kept)]
    return Decoded(images, torch.tensor(kept, dtype=torch.long), tuple((paths[at], why) for at, why in broken))


def _key(paths: Sequence[Path], how: Preprocessing, channels: int) -> str:
    """Names decoded images by everything that decides them: files, sizes, times, and how they are prepared."""
    digest = hashlib.sha256(f"no gaps{how.size}{how.resize}{how.interpolation}{how.channels}{channels}".encode())
    for path in paths:
        facts = path.stat()
        digest.update(f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


@contextmanager
def _mapped(path: Path, shape: tuple[int, ...]) -> Iterator[Pixels]:
    """A file of images mapped into memory; it takes its name when all are in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if wanted > free:
        raise EdgeCompressError(
            f"The {shape[0]:,} images need {wanted / 1e9:.1f} GB at {shape[2]}x{shape[3]} pixels; {free_memory_bytes() / 1e9:.1f} GB of "
            f"memory and {free / 1e9:.1f} GB of disk at {path.parent} are free. Give a smaller --image-size, or set "
            "EDGECOMPRESS_CACHE to a larger disk."
        )
    with written_whole(path) as temporary:
        held = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        yield held
        held.flush()
