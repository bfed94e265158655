"""Photos as they come: modes, depths, orientation, torn files; the same bytes in memory, from a mapped file and from torchvision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgecompress import images
from edgecompress.data import load_data
from edgecompress.errors import BadDataError, EdgeCompressError
from edgecompress.image_folders import image_paths
from edgecompress.images import as_mask, as_pixels, decode
from edgecompress.models import own_preprocessing
from edgecompress.spec import Preprocessing

HOW = Preprocessing(size=(8, 6), mean=(0.5,) * 3, std=(0.5,) * 3)


def photo(height: int = 8, width: int = 6, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that JPEG and resizing change little."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 3 + seed), np.cos(columns / 4 - seed), np.sin((rows + columns) / 5)]
    return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


def folder(root: Path, classes: tuple[str, ...] = ("a", "b"), count: int = 40, size: tuple[int, int] = (8, 6)) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(photo(*size, seed=100 * number + index)).save(root / name / f"{index:03}.png")
    return root


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode):
    image = Image.fromarray(photo()).convert(mode)
    found = as_pixels(image, HOW)
    assert found.shape == (3, 8, 6) and found.dtype == np.uint8
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_grayscale_in_one_channel():
    how = Preprocessing(size=(8, 6), mean=(0.5,), std=(0.5,), channels="L")
    assert np.array_equal(
        as_pixels(Image.fromarray(photo()), how)[0], np.asarray(Image.fromarray(photo()).convert("L"))
    )


def test_alpha_is_dropped_and_the_colours_below_stay():
    pixels = np.dstack([photo(), np.zeros((8, 6), np.uint8)])
    assert np.array_equal(as_pixels(Image.fromarray(pixels), HOW), photo().transpose(2, 0, 1))


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(photo()).convert("P")
    image.save(tmp_path / "p.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "p.png") as file:
        assert np.array_equal(as_pixels(file, HOW).transpose(1, 2, 0), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    deep = np.linspace(0, 65535, 48).reshape(8, 6).round().astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep{suffix}")
    with Image.open(tmp_path / f"deep{suffix}") as file:
        assert file.mode.startswith("I")
        found = as_pixels(file, HOW)
    assert np.array_equal(found[0], np.round(deep / 257).astype(np.uint8)) and found.max() == 255
    assert len(np.unique(found)) > 40


def test_floating_point_pixels_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="floating-point pixels"):
        as_pixels(Image.fromarray(np.zeros((8, 6), np.float32)), HOW)


def test_orientation_of_the_camera_is_carried_out(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(photo()).save(tmp_path / "turned.png", exif=exif)
    how = HOW.model_copy(update={"size": (6, 8)})
    with Image.open(tmp_path / "turned.png") as file:
        assert np.array_equal(as_pixels(file, how).transpose(1, 2, 0), np.rot90(photo(), -1))
    assert images.size_of([tmp_path / "turned.png"]) == (6, 8)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (224, 224), (60, 500)])
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])  # bilinear 256 to 224, bicubic 256 to 224
def test_images_are_prepared_as_torchvision_prepares_them_for_its_weights(name, size):
    from torchvision import models

    image = Image.fromarray(photo(*size))
    how = own_preprocessing(name)
    assert how is not None
    wanted = models.get_model_weights(name).DEFAULT.transforms()(image)
    pixels = torch.from_numpy(as_pixels(image, how))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
    assert torch.allclose((pixels.float() / 255 - mean) / std, wanted, atol=1e-6)


def test_another_size_keeps_what_is_cut_off():
    how = own_preprocessing("resnet18")
    assert how is not None and (how.size, how.resize) == ((224, 224), 256)
    assert (how.at(56).size, how.at(56).resize) == ((56, 56), 64)
    assert how.at(56).mean == how.mean and HOW.at(16).resize is None


def test_masks_keep_their_numbers(tmp_path):
    mask = np.zeros((16, 12), np.uint8)
    mask[4:8, 4:8], mask[:2] = 3, 255
    image = Image.fromarray(mask)
    palette = image.copy()
    palette.putpalette([value for number in range(256) for value in (255 - number, number, 7)])
    for one in (image, palette):
        found = as_mask(one, HOW)
        assert found.shape == (1, 8, 6) and set(np.unique(found)) == {0, 3, 255}
    with pytest.raises(ValueError, match="a mask of mode RGB"):
        as_mask(Image.fromarray(photo()), HOW)


@pytest.fixture
def torn(tmp_path):
    """Six files; the second is no image, the fifth is cut off."""
    for index in range(6):
        Image.fromarray(photo(seed=index)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:-40])
    return [tmp_path / f"{index}.png" for index in range(6)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mapped", [False, True])
def test_torn_files_are_left_out_wherever_images_are_held(torn, monkeypatch, tmp_path, threads, mapped):
    monkeypatch.setattr(images.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(images, "fits_in_memory", lambda shape: not mapped)
    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path / "cache"))
    for _ in range(2):  # the second time from the file
        found = decode(torn, HOW)
        assert found.kept.tolist() == [0, 2, 3, 5]
        assert [path.name for path, _ in found.broken] == ["1.png", "4.png"] and all(why for _, why in found.broken)
        for image, index in zip(found.images, (0, 2, 3, 5), strict=True):
            assert np.array_equal(image.numpy().transpose(1, 2, 0), photo(seed=index))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == int(mapped)


def test_the_mapped_file_has_no_gaps_that_would_have_to_be_closed_in_memory(torn, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "fits_in_memory", lambda shape: False)
    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path / "cache"))
    found = decode(torn, HOW).images
    (file,) = (tmp_path / "cache").rglob("*.npy")
    assert np.array_equal(np.load(file)[: len(found)], found.numpy())


def test_mapped_images_are_read_once_and_again_when_a_file_changes(torn, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "fits_in_memory", lambda shape: False)
    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path / "cache"))
    first = decode(torn, HOW).images
    first[0] = 0  # a private copy: what is kept on the disk stays
    with monkeypatch.context() as patch:
        patch.setattr(images, "_fill", lambda *_: pytest.fail("the files are read again"))
        assert np.array_equal(decode(torn, HOW).images[0].numpy().transpose(1, 2, 0), photo(seed=0))
    Image.fromarray(photo(seed=9)).save(torn[0], compress_level=0)
    assert np.array_equal(decode(torn, HOW).images[0].numpy().transpose(1, 2, 0), photo(seed=9))
    other = decode(torn, HOW.model_copy(update={"size": (4, 4)}))
    assert other.images.shape[2:] == (4, 4)


def test_images_that_fit_nowhere_say_what_to_do(torn, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "free_memory_bytes", lambda: 100)
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 50})())
    with pytest.raises(
        EdgeCompressError, match=r"The 6 images need .* at 8x6 pixels.*--image-size.*EDGECOMPRESS_CACHE"
    ):
        decode(torn, HOW)


def test_a_whole_data_set_is_the_same_from_a_mapped_file(tmp_path, monkeypatch):
    root = folder(tmp_path / "photos")
    held = load_data(str(root))
    monkeypatch.setattr(images, "fits_in_memory", lambda shape: False)
    mapped = load_data(str(root))
    assert mapped.preprocessing == held.preprocessing
    for part in ("train", "calibration", "search_val", "select_val", "test"):
        first, second = getattr(held, part), getattr(mapped, part)
        assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_nested_folders_are_read_and_hidden_files_are_not(tmp_path):
    root = folder(tmp_path / "photos", count=20)
    (root / "a" / "deeper" / "still").mkdir(parents=True)
    (root / "a" / "000.png").rename(root / "a" / "deeper" / "still" / "000.png")
    (root / "a" / "._001.png").write_bytes(b"a Macintosh left this")
    (root / ".ipynb_checkpoints").mkdir()
    (root / "a" / "deeper" / "loop").symlink_to(root / "a")
    assert len(image_paths(root / "a")) == 20
    data = load_data(str(root))
    assert data.classes == ("a", "b") and not data.notes
    assert sum(len(split) for split in (data.train, data.search_val, data.select_val, data.test)) == 40


def test_few_torn_images_are_skipped_and_counted(tmp_path):
    root = folder(tmp_path / "photos", count=60)
    (root / "a" / "000.png").write_bytes(b"no image")
    data = load_data(str(root))
    assert (
        len(data.notes) == 1
        and f"1 images under {root} cannot be read, the first is {root / 'a' / '000.png'}" in data.notes[0]
    )
    assert data.notes[0].endswith("They are skipped.")


def test_classes_that_differ_between_folders_are_named(tmp_path):
    folder(tmp_path / "train", ("cat", "dog"), 20)
    folder(tmp_path / "test", ("cat", "wolf"), 5)
    with pytest.raises(BadDataError, match=r"differ from those of .*: only train has dog; only test has wolf"):
        load_data(str(tmp_path))


def test_val_beside_test_is_what_the_search_sees(tmp_path):
    for number, (name, count) in enumerate((("train", 20), ("val", 6), ("test", 4))):
        folder(tmp_path / name, count=count, size=(8, 6))
        for path in image_paths(tmp_path / name):  # a brightness of its own for each folder
            Image.fromarray(np.full((8, 6, 3), 60 * number + 10, np.uint8)).save(path)
    data = load_data(str(tmp_path))
    found = {
        part: set(getattr(data, part).images.unique().tolist())
        for part in ("train", "search_val", "select_val", "test")
    }
    assert found == {"train": {10}, "search_val": {70}, "select_val": {70}, "test": {130}}
    assert (len(data.train), len(data.search_val) + len(data.select_val), len(data.test)) == (40, 12, 8)
