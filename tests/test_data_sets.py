"""A user's own factory in every form that it may take, torchvision's data sets by name, and labels that fit no class."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import call
from PIL import Image
from sample_networks import patterns

from edgecompress.data import Split, load_data
from edgecompress.errors import BadDataError, UsageError
from edgecompress.published_sets import PUBLISHED
from edgecompress.spec import Preprocessing
from edgecompress.splits import checked

FACTORIES = """
import numpy as np
import torch
from PIL import Image
from sample_networks import patterns

LABELS = np.arange(60) % 3
IMAGES = (np.arange(60)[:, None, None, None] + np.arange(48).reshape(1, 3, 4, 4)).astype(np.uint8)

class Items:
    classes = ["x", "y", "z"]
    def __init__(self, count=60, form="pil"):
        self.count, self.form = count, form
    def __len__(self):
        return self.count
    def __getitem__(self, at):
        image = IMAGES[at].transpose(1, 2, 0)
        if self.form == "pil":
            return Image.fromarray(image), int(LABELS[at])
        if self.form == "tensor":
            return torch.from_numpy(IMAGES[at]).float() / 255, torch.tensor(LABELS[at])
        raise KeyError("no such row")

def whole(): return patterns()
def arrays(): return {"train": (IMAGES, LABELS)}
def last_axis(): return {"train": (IMAGES.transpose(0, 2, 3, 1), LABELS), "classes": ["x", "y", "z"]}
def gray(): return (IMAGES[:, 0], LABELS), (IMAGES[:9, 0] / 255.0, LABELS[:9])
def pictures(): return Items(), Items(9)
def tensors(): return {"train": Items(form="tensor"), "val": Items(12, "tensor"), "test": Items(9, "tensor")}
def broken(): return {"train": Items(form="none")}
def raises(): return 1 / 0
def normalised(): return {"train": (IMAGES - 100.0, LABELS)}
def negative(): return {"train": (IMAGES, LABELS - 1)}
def nothing(): return {"images": IMAGES}
def text(): return "images"
def odd(): return {"train": 7}
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A user's folder with a module of data factories, and the shell standing in it."""
    (tmp_path / "my_data.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import sys

    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    return tmp_path


def sizes(data) -> list[int]:
    return [len(getattr(data, name)) for name in ("train", "search_val", "select_val", "test")]


@pytest.mark.parametrize("form", ["arrays", "last_axis"])
def test_arrays_are_split_and_keep_their_pixels(workplace, form):
    data = load_data(f"my_data:{form}")
    assert data.classes == (("x", "y", "z") if form == "last_axis" else ("0", "1", "2"))
    assert data.train.images.shape[1:] == (3, 4, 4) and sum(sizes(data)) == 60 and data.name == f"my_data.{form}"
    for name in ("train", "search_val", "select_val", "test"):
        split = getattr(data, name)
        assert torch.equal(split.images[:, 0, 0, 0].long() % 3, split.labels)


def test_a_dataset_of_the_users_own_comes_as_it_is(workplace):
    data = load_data("my_data:whole")
    assert data.name == "patterns" and torch.equal(data.train.images, patterns().train.images)


def test_one_channel_stays_one(workplace):
    data = load_data("my_data:gray")
    assert data.train.images.shape[1:] == (1, 4, 4) and data.preprocessing.channels == "L" and len(data.test) == 9
    assert torch.equal(data.test.images[:, 0, 0, 0], torch.arange(9, dtype=torch.uint8))  # shares became bytes again


@pytest.mark.parametrize("form", ["pictures", "tensors"])
def test_torch_data_sets_are_read(workplace, form):
    data = load_data(f"my_data:{form}")
    assert data.classes == ("x", "y", "z") and len(data.test) == 9
    assert sizes(data) == ([54, 3, 3, 9] if form == "pictures" else [60, 6, 6, 9])
    assert torch.equal(data.test.images[:, 0, 0, 0], torch.arange(9, dtype=torch.uint8))
    assert load_data(f"my_data:{form}", image_size=8).train.images.shape[2:] == (8, 8)


def test_images_in_memory_go_through_the_preprocessing_once(workplace):
    how = Preprocessing(size=(4, 4), resize=6, mean=(0.5,) * 3, std=(0.2,) * 3)
    arrays, items = (load_data(f"my_data:{form}", preprocessing=how) for form in ("arrays", "pictures"))
    assert arrays.preprocessing == items.preprocessing == how
    whole = Image.fromarray(np.arange(48).reshape(3, 4, 4).astype(np.uint8).transpose(1, 2, 0))
    middle = np.asarray(whole.resize((6, 6), Image.Resampling.BILINEAR))[1:5, 1:5].transpose(2, 0, 1)
    for data in (arrays, items):
        first = min(
            torch.cat([getattr(data, name).images for name in ("train", "search_val", "select_val", "test")]),
            key=lambda x: int(x.long().sum()),
        )
        assert np.abs(first.numpy().astype(int) - middle).max() <= 1


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ("raises", r"'my_data:raises' raised ZeroDivisionError: division by zero \(.*my_data\.py, line \d+\)"),
        ("broken", r"Item 0 of train of my_data:broken raised KeyError: 'no such row' \(.*my_data\.py, line \d+\)"),
        ("normalised", r"The images of train of my_data:normalised are float64 from -100 to .*Leave out the normalisation"),
        ("negative", r"The split train of my_data:negative has the label -1; expected classes from 0 on"),
        ("nothing", r"gave a dict of images; expected"),
        ("text", r"gave str; expected an edgecompress\.data\.Dataset, a dict with train"),
        ("odd", r"The split train of my_data:odd is int; expected \(images, labels\)"),
        ("absent", r"Cannot import the data factory 'my_data:absent': AttributeError"),
    ],
)  # fmt: skip
def test_factory_that_cannot_be_used_has_its_sentence(workplace, form, sentence):
    with pytest.raises(BadDataError, match=sentence):
        load_data(f"my_data:{form}")


def test_module_that_does_not_parse_names_the_line(workplace):
    (workplace / "torn.py").write_text("a = 1\nb = (\n")
    with pytest.raises(BadDataError, match=r"Cannot import the data factory 'torn:data'.*torn\.py, line 2\)"):
        load_data("torn:data")


def test_command_line_tells_of_a_factory_that_raises_in_one_sentence(workplace):
    called = call("compress", "--data", "my_data:raises", "--target", "x86", "--quiet", "--runs", workplace / "runs")
    assert called.code == 2 and "my_data.py, line" in called.err and "Traceback" not in called.err


# ------------------------------------------------------------------------------------------------- torchvision's


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """The files of a very small MNIST where torchvision looks for them."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train", 120), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(b""))
    monkeypatch.setenv("EDGECOMPRESS_DATA", str(tmp_path))


def test_data_set_of_torchvision_by_name(mnist):
    data = load_data("mnist", image_size=16)
    assert data.train.images.shape[1:] == (3, 16, 16) and len(data.classes) == 10 and data.name == "mnist"
    assert sizes(data) == [100, 10, 10, 20] and data.test.labels.tolist() == [number % 10 for number in range(20)]


def test_folder_of_that_name_is_taken_first(mnist, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "mnist" / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((6, 6, 3), number, np.uint8)).save(tmp_path / "mnist" / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    assert load_data("mnist").classes == ("a", "b") and load_data("./mnist").classes == ("a", "b")


def test_data_set_that_is_not_here_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGECOMPRESS_DATA", str(tmp_path))
    with pytest.raises(
        BadDataError, match=r"The data set cifar10 is not in .*Add --download, or point EDGECOMPRESS_DATA"
    ):
        load_data("cifar10")


def test_download_without_a_network_is_one_sentence(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setenv("EDGECOMPRESS_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    called = call(
        "compress", "--data", "cifar10", "--download", "--target", "x86", "--quiet", "--runs", tmp_path / "runs"
    )
    assert called.code == 2 and "Traceback" not in called.err
    assert "The data set cifar10 cannot be fetched" in called.err and "torchvision.datasets.CIFAR10" in called.err


def test_every_published_name_is_a_data_set_of_torchvision():
    from torchvision import datasets

    assert all(hasattr(datasets, found.kind) for found in PUBLISHED.values())


# ------------------------------------------------------------------------------------------- splits that do not fit


def test_label_outside_the_classes_is_named():
    data = patterns()
    labels = data.select_val.labels.clone()
    labels[5] = 4
    with pytest.raises(
        BadDataError, match=r"label 4 of image 5 of select_val of patterns is outside its 4 classes; expected 0 to 3"
    ):
        checked(replace(data, select_val=Split(data.select_val.images, labels)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda split: Split(split.images.float(), split.labels), r"images float32 \[.*expected uint8"),
        (lambda split: Split(split.images, split.labels[:-1]), "as many labels"),
        (lambda split: Split(split.images[:0], split.labels[:0]), "at least one"),
        (lambda split: Split(split.images[:, :, :8], split.labels), r"are \(3, 8, 16\), those of train \(3, 16, 16\)"),
        (lambda split: Split(split.images, split.labels.float()), r"labels of test of patterns are float32"),
    ],
)
def test_split_that_does_not_fit_is_named(change, sentence):
    data = patterns()
    with pytest.raises(BadDataError, match=sentence):
        checked(replace(data, test=change(data.test)))


def test_preprocessing_of_other_images_is_refused():
    data = patterns()
    with pytest.raises(BadDataError, match=r"its preprocessing says \(8, 8\) pixels"):
        checked(replace(data, preprocessing=data.preprocessing.model_copy(update={"size": (8, 8)})))


def test_classes_and_another_task_exclude_each_other():
    from edgecompress.tasks import SEGMENTATION

    with pytest.raises(UsageError, match="has classes, no labels for the task 'segmentation'"):
        load_data("digits", task=SEGMENTATION)
    with pytest.raises(UsageError, match="Agreement without labels is for classification"):
        load_data("digits", task=SEGMENTATION, unlabelled=True)
