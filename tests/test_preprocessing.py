"""One preprocessing for a run: that of the published weights, the images' own, or the user's; and never two."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sample_networks import Residual, patterns, settled

from edgecompress.errors import BadFileError, BadModelError, UsageError
from edgecompress.images import as_pixels
from edgecompress.models import own_classes, own_preprocessing
from edgecompress.original import original_network, preprocessing_of
from edgecompress.prepare import _Reading, dataset_of
from edgecompress.progress import Silent
from edgecompress.spec import Config, Preprocessing

DOCS = Path(__file__).resolve().parents[1] / "docs"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Notes(Silent):
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def config(**fields: object) -> Config:
    return Config.model_validate({"budget": "size=0.9x", **fields})


def test_published_weights_of_torchvision_say_how():
    assert own_preprocessing("resnet18") == Preprocessing(size=(224, 224), resize=256, **IMAGENET)
    small = own_preprocessing("efficientnet_b0")
    assert small is not None and small.interpolation == "bicubic"
    assert own_preprocessing("resnet8") is None and own_preprocessing("my.module:net") is None
    assert len(own_classes("resnet18")) == 1000 and own_classes("resnet8") == ()


@pytest.mark.parametrize("method", ["bicubic", "nearest"])
def test_published_weights_of_timm_say_how(monkeypatch, method):
    """Against a stand-in with timm's calls; timm itself is not a dependency."""
    found = {"input_size": (3, 160, 160), "test_input_size": (3, 208, 208), "crop_pct": 0.875, "test_crop_pct": 0.95,
             "interpolation": method, "mean": (0.5,) * 3, "std": (0.25,) * 3}  # fmt: skip
    timm = ModuleType("timm")
    timm.is_model = lambda name: True
    timm.create_model = lambda name, **options: SimpleNamespace(pretrained_cfg=found)
    monkeypatch.setitem(sys.modules, "timm", timm)
    if method == "nearest":
        with pytest.raises(BadModelError, match="want images resized by 'nearest'; known are bilinear and bicubic"):
            own_preprocessing("timm:some")
        return
    wanted = Preprocessing(size=(208, 208), resize=218, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic")
    assert own_preprocessing("timm:some") == wanted


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, False),
        ({"weights": "DEFAULT"}, True),
        ({"weights": "default"}, True),
        ({"weights": "best.pt"}, False),
        ({"weights": "best.pt", "preprocessing": "weights"}, True),
        ({"weights": "DEFAULT", "preprocessing": "data"}, False),
        ({"weights": "none"}, False),
    ],
)
def test_weights_decide_where_they_are_the_published_ones(fields, own):
    found = preprocessing_of(config(model="resnet18", **fields))
    assert (found == own_preprocessing("resnet18")) if own else found is None


def test_network_that_has_no_published_weights_cannot_be_asked():
    with pytest.raises(BadModelError, match="resnet8 has no published weights that say how images are prepared"):
        preprocessing_of(config(model="resnet8", preprocessing="weights"))


def test_a_file_says_how(tmp_path):
    how = {"size": [8, 8], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bicubic"}
    (tmp_path / "how.json").write_text(json.dumps(how))
    found = preprocessing_of(config(preprocessing=str(tmp_path / "how.json")))
    assert found is not None and found.size == (8, 8) and found.interpolation == "bicubic" and found.resize is None
    (tmp_path / "how.json").write_text(json.dumps(how | {"mean": "grey"}))
    with pytest.raises(BadFileError, match=r"how\.json is wrong at 'mean': .*Expected for example"):
        preprocessing_of(config(preprocessing=str(tmp_path / "how.json")))
    with pytest.raises(BadFileError, match="wieghts"):
        preprocessing_of(config(preprocessing="wieghts"))


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number:02}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("size", [None, 56])
def test_images_of_a_run_go_through_what_the_weights_expect(photos, size):
    asked = config(model="resnet18", weights="DEFAULT", data=str(photos), image_size=size)
    notes = Notes()
    data = dataset_of(str(photos), asked, notes)
    assert notes.said[0].startswith(
        f"images are prepared for resnet18: {size or 224}x{size or 224} pixels, cut out of the middle"
    )
    wanted = own_preprocessing("resnet18")
    assert wanted is not None
    assert data.preprocessing == (wanted if size is None else wanted.at(size))
    assert data.train.images.shape[2:] == data.test.images.shape[2:] == ((size or 224), (size or 224))
    assert dataset_of(str(photos), config(data=str(photos)), Silent()).train.images.shape[2:] == (40, 50)


def test_the_same_images_for_training_calibration_and_evaluation(photos):
    data = dataset_of(
        str(photos), config(model="resnet18", weights="DEFAULT", data=str(photos), image_size=32), Silent()
    )
    rows = {image.numpy().tobytes() for image in data.train.images}
    assert {image.numpy().tobytes() for image in data.calibration.images} <= rows
    x, _ = next(data.batches(data.calibration, 4))
    by_hand = (
        data.calibration.images[:4].float() / 255 - torch.tensor(IMAGENET["mean"]).view(1, 3, 1, 1)
    ) / torch.tensor(IMAGENET["std"]).view(1, 3, 1, 1)
    assert torch.allclose(x, by_hand)


def test_images_in_memory_bring_their_own():
    with pytest.raises(UsageError, match="Images in memory bring their own preprocessing"):
        dataset_of(patterns(), config(preprocessing="weights"), Silent())
    assert dataset_of(patterns(), config(weights="DEFAULT"), Silent()).preprocessing == patterns().preprocessing


def test_published_weights_meet_unlabelled_images_with_their_own_classes(monkeypatch, photos):
    """The published state of a stand-in: nine classes, which the images do not name."""
    monkeypatch.setattr("edgecompress.original.own_state", lambda name, download: settled(Residual(9)).state_dict())
    monkeypatch.setattr("edgecompress.original.source_of", lambda name: "torchvision")
    name = "sample_networks:residual"
    asked = config(model=name, weights="DEFAULT", data=str(photos), unlabelled=True, image_size=16)
    data = dataset_of(str(photos), asked, Silent())
    assert not data.labelled
    assert original_network(name, asked, data, Silent()).fc.out_features == 9


@pytest.mark.parametrize("how", [{}, {"resize": 40}, {"resize": 36, "interpolation": "bicubic"}])
def test_the_snippet_for_the_device_prepares_a_photo_as_training_did(how, tmp_path):
    spec = importlib.util.spec_from_file_location("classify", DOCS / "examples" / "classify_onnxruntime.py")
    assert spec is not None and spec.loader is not None
    snippet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(snippet)
    wanted = Preprocessing(size=(32, 24), **IMAGENET, **how)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as photo:
        ours = torch.from_numpy(as_pixels(photo, wanted)).float() / 255
        theirs = snippet.prepare(photo, json.loads(wanted.model_dump_json()))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (wanted.mean, wanted.std))
    assert np.allclose(theirs[0], ((ours - mean) / std).numpy(), atol=1e-5)


def test_reading_tells_how_far_it_is():
    class Listener(Silent):
        def __init__(self) -> None:
            self.heard: list[object] = []

        def stage(self, title: str, total: int) -> None:
            self.heard.append((title, total))

        def step(self, done: int, total: int) -> None:
            self.heard.append(done)

    listener = Listener()
    reading = _Reading(listener, "photos")
    for done, total in ((500, 900), (900, 900), (100, 300)):  # train, then another split
        reading(done, total)
    assert listener.heard == [("Read photos", 900), 500, 900, ("Read photos", 300), 100]
