"""Five splits that never mix, image folders good and bad, batches that repeat themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sample_networks import patterns

from edgecompress.data import Dataset, load_data
from edgecompress.errors import BadDataError, UnknownNameError

SPLITS = ("train", "search_val", "select_val", "test")


def rows(split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


def test_digits_have_the_promised_sizes(digits):
    assert [len(getattr(digits, name)) for name in SPLITS] == [897, 150, 150, 600]
    assert digits.train.images.shape[1:] == (3, 32, 32) and digits.train.images.dtype == torch.uint8
    assert digits.classes == tuple("0123456789")


def test_digits_splits_are_disjoint_and_together_whole(digits):
    images = [row for name in SPLITS for row in rows(getattr(digits, name))]
    assert len(images) == 1797
    assert len(set(images)) == len(images)
    assert set(rows(digits.calibration)) <= set(rows(digits.train)) and len(digits.calibration) == 300


def test_digits_splits_are_stratified(digits):
    for name in SPLITS:
        labels = getattr(digits, name).labels
        share = torch.bincount(labels, minlength=10) / len(labels)
        assert float((share - 0.1).abs().max()) < 0.02


def test_digits_are_deterministic_and_normalised(digits):
    again = load_data("digits", seed=5)
    for name in (*SPLITS, "calibration"):
        assert torch.equal(getattr(again, name).images, getattr(digits, name).images)
        assert torch.equal(getattr(again, name).labels, getattr(digits, name).labels)
    x = digits.normalise(digits.train.images)
    assert x.dtype == torch.float32 and abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05


def make_images(folder, classes: dict[str, int], size=(12, 10), mode: str = "RGB", seed: int = 0) -> None:
    """``size`` is height, width; every class has a brightness of its own."""
    random = np.random.default_rng(seed)
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            shape = size if mode == "L" else (*size, 3)
            pixels = np.clip(random.normal(60 + 100 * number, 30, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels, mode=None).save(folder / name / f"{index:03}.png")


@pytest.fixture
def folder(tmp_path):
    make_images(tmp_path / "train", {"cat": 30, "dog": 20})
    make_images(tmp_path / "test", {"cat": 6, "dog": 4}, seed=1)
    return tmp_path


def test_image_folder_with_a_test_folder(folder):
    data = load_data(str(folder))
    assert data.classes == ("cat", "dog") and data.name == folder.name
    assert data.preprocessing.size == (12, 10) and data.train.images.shape[1:] == (3, 12, 10)
    assert len(data.test) == 10 and len(data.train) + len(data.search_val) + len(data.select_val) == 50
    everything = [row for name in SPLITS for row in rows(getattr(data, name))]
    assert len(set(everything)) == 60
    for name in SPLITS:
        assert set(getattr(data, name).labels.tolist()) == {0, 1}
    bright = [float(data.test.images[data.test.labels == label].float().mean()) for label in (0, 1)]
    assert bright[0] < 80 < 140 < bright[1]
    x = data.normalise(data.train.images)
    assert float(x.mean((0, 2, 3)).abs().max()) < 0.05


def test_image_folder_alone_is_split_by_its_seed(tmp_path):
    make_images(tmp_path, {"a": 40, "b": 40})
    data, same, other = load_data(str(tmp_path)), load_data(str(tmp_path)), load_data(str(tmp_path), seed=1)
    assert len(data.test) == 16
    assert rows(data.test) == rows(same.test) and rows(data.train) == rows(same.train)
    assert set(rows(data.test)) != set(rows(other.test))
    assert not set(rows(data.test)) & set(rows(data.train))


def test_val_folder_is_the_test_split_and_images_are_resized(tmp_path):
    make_images(tmp_path / "train", {"a": 20, "b": 20}, size=(12, 10))
    make_images(tmp_path / "val", {"a": 3, "b": 3}, size=(30, 8))
    assert load_data(str(tmp_path)).test.images.shape == (6, 3, 12, 10)
    assert load_data(str(tmp_path), image_size=16).train.images.shape[1:] == (3, 16, 16)


def test_grayscale_and_palette_images_become_rgb(tmp_path):
    make_images(tmp_path, {"a": 25, "b": 25}, mode="L")
    Image.open(tmp_path / "a" / "000.png").convert("P").save(tmp_path / "a" / "000.png")
    Image.open(tmp_path / "b" / "000.png").convert("RGBA").save(tmp_path / "b" / "000.png")
    data = load_data(str(tmp_path))
    assert data.train.images.shape[1] == 3
    assert torch.equal(data.test.images[:, 0], data.test.images[:, 2])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("digit", "Unknown data 'digit'. Did you mean 'digits'"), ("cifar", "Unknown data 'cifar'")],
)
def test_unknown_data_is_refused_with_the_nearest_name(name, sentence):
    with pytest.raises(UnknownNameError, match=sentence):
        load_data(name)


def refused(path, sentence: str) -> None:
    with pytest.raises(BadDataError) as caught:
        load_data(str(path))
    assert sentence in str(caught.value) and caught.value.exit_code == 2


def test_folder_that_does_not_exist_is_refused(tmp_path):
    refused(tmp_path / "none", f"There is no data folder at {tmp_path / 'none'}")


def test_folder_without_classes_or_images_is_refused(tmp_path):
    refused(tmp_path, "has no class folders")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    refused(tmp_path, f"The class folder {tmp_path / 'a'} has no images")


def test_folder_with_one_class_is_refused(tmp_path):
    make_images(tmp_path, {"only": 9})
    refused(tmp_path, "has the one class 'only'")


def test_folders_with_different_classes_are_refused(folder):
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    refused(folder, f"The class folders of {folder / 'test'} differ from those of {folder / 'train'}")


def test_class_with_too_few_images_is_refused(tmp_path):
    make_images(tmp_path, {"a": 30, "b": 2})
    refused(tmp_path, "every class needs at least 8 images")


@pytest.mark.parametrize("count", [8, 12])
def test_eight_images_a_class_are_enough_as_the_message_says(tmp_path, count):
    make_images(tmp_path, {"a": count, "b": 40})
    data = load_data(str(tmp_path))
    for name in SPLITS:
        assert set(getattr(data, name).labels.tolist()) == {0, 1}


def test_more_than_one_percent_of_broken_images_is_refused(folder):
    for number in range(3):
        (folder / "train" / "cat" / f"{number:03}.png").write_bytes(b"no image")
    refused(
        folder, f"3 images under {folder / 'train'} cannot be read, the first is {folder / 'train' / 'cat' / '000.png'}"
    )


def test_truncated_image_counts_as_broken(folder):
    path = folder / "train" / "cat" / "000.png"
    path.write_bytes(path.read_bytes()[:-60])
    refused(folder, "1 images under")


def test_few_broken_images_are_left_out(tmp_path):
    make_images(tmp_path, {"a": 60, "b": 60}, size=(4, 4))
    (tmp_path / "a" / "000.png").write_bytes(b"no image")
    data = load_data(str(tmp_path))
    assert sum(len(getattr(data, name)) for name in SPLITS) == 119


def batches(data: Dataset, seed: int | None, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return list(data.batches(data.train, 20, generator=generator, **options))


def test_batches_cover_the_split_and_shuffle_by_their_generator():
    data = patterns()
    plain, first, same, other = (batches(data, seed) for seed in (None, 1, 1, 2))
    assert torch.equal(torch.cat([y for _, y in plain]), data.train.labels)
    assert torch.equal(torch.cat([x for x, _ in plain]), data.normalise(data.train.images))
    assert all(torch.equal(a, b) for pair in zip(first, same, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert sorted(torch.cat([y for _, y in first]).tolist()) == sorted(data.train.labels.tolist())
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(batches(data, 1)[0][0], first[0][0])


@pytest.mark.parametrize("how", ["shift", "crop_flip"])
def test_augmentation_moves_images_by_a_few_pixels_and_repeats_itself(how):
    data = replace(patterns(), augmentation=how)
    plain, first, same = batches(data, 1), batches(data, 1, augment=True), batches(data, 1, augment=True)
    assert torch.equal(first[0][0], same[0][0])
    assert first[0][0].shape == plain[0][0].shape and not torch.equal(first[0][0], plain[0][0])
    reach = 2 if how == "shift" else 4
    found = 0
    for image, moved in zip(plain[0][0], first[0][0], strict=True):
        sides = [image, image.flip(2)] if how == "crop_flip" else [image]
        background = data.normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0]
        for side in sides:
            padded = background.repeat(1, 16 + 2 * reach, 16 + 2 * reach)
            padded[:, reach:-reach, reach:-reach] = side
            windows = padded.unfold(1, 16, 1).unfold(2, 16, 1)
            found += bool((windows == moved[:, None, None]).all(-1).all(-1).all(0).any())
    assert found == len(plain[0][0])
    unshuffled = list(data.batches(data.train, 20, augment=True))
    assert torch.equal(unshuffled[0][0], data.normalise(data.train.images[:20]))
