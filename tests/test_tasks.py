"""Scores and losses by hand, a task of the user's own, less that is better, masks that move with their images."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sample_networks import Residual, patterns, settled
from torch import nn

from edgecompress.data import load_data
from edgecompress.errors import BadDataError, BadModelError, UnknownNameError, UsageError
from edgecompress.finetune import TrainSettings, accuracy_and_loss, train
from edgecompress.original import original_network
from edgecompress.progress import Silent
from edgecompress.quantize import Simulator, calibrate
from edgecompress.report_spec import Score
from edgecompress.spec import Config
from edgecompress.splits import _augment
from edgecompress.tasks import CLASSIFICATION, SEGMENTATION, Task, squared_difference, task_by_name

OWN = """
import torch
from edgecompress.tasks import Task

def loss(outputs, labels, reduction):
    rows = (outputs - labels).abs().mean(1)
    return rows.mean() if reduction == "mean" else rows.sum()

def score(parts):
    return float(torch.cat(list(parts)).mean())

TASK = Task("mean-error", "mean error", loss, lambda o, y: (o - y).abs().mean(1), score, higher_is_better=False, percent=False)
def make(): return TASK
def raises(): raise ValueError("no such thing")
NUMBER = 7
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Task:
    """A regression task in a module of the user's working directory."""
    (tmp_path / "my_task.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    return task_by_name("my_task:TASK")


def test_mean_iou_by_hand():
    masks = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 255]]])
    found = torch.tensor([[[0, 1, 1, 1], [0, 0, 0, 0]]])
    scores = F.one_hot(found, 3).movedim(-1, 1).float()
    # class 0: 3 of 5 pixels; class 1: 2 of 4; class 2 does not occur; the last pixel does not count
    both = [SEGMENTATION.measure(scores, masks)]
    assert SEGMENTATION.merit(both) == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert SEGMENTATION.merit(both * 3) == pytest.approx((3 / 5 + 2 / 4) / 2)  # pixels of all batches together


def test_scores_at_a_fraction_of_the_masks_are_enlarged():
    masks = torch.zeros(2, 8, 8, dtype=torch.long)
    masks[:, :, 4:] = 1
    small = torch.zeros(2, 2, 2, 2)
    small[:, 0, :, 0] = small[:, 1, :, 1] = 9.0
    assert SEGMENTATION.merit([SEGMENTATION.measure(small, masks)]) == 1.0
    assert float(SEGMENTATION.loss(small, masks, "mean")) < float(SEGMENTATION.loss(-small, masks, "mean"))


def test_pixel_loss_counts_every_image_once_and_no_ignored_pixel():
    scores = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 4, (3, 5, 6), generator=torch.Generator().manual_seed(1))
    masks[1, :3] = 255
    masks[2] = 255  # an image without any labelled pixel costs nothing, and is no NaN
    by_hand = [F.cross_entropy(scores[:1], masks[:1]), F.cross_entropy(scores[1:2], masks[1:2], ignore_index=255), 0.0]
    assert float(SEGMENTATION.loss(scores, masks, "sum")) == pytest.approx(float(sum(by_hand)), rel=1e-5)
    assert float(SEGMENTATION.loss(scores, masks, "mean")) == pytest.approx(float(sum(by_hand)) / 3, rel=1e-5)


def test_distillation_of_pixels_is_that_of_classes():
    student, teacher = torch.randn(2, 2, 3, 4, 4).unbind(0)
    rows = [scores.permute(0, 2, 3, 1).reshape(-1, 3) for scores in (student, teacher)]
    assert torch.allclose(SEGMENTATION.distill(student, teacher), CLASSIFICATION.distill(*rows))
    assert float(CLASSIFICATION.distill(*rows[:1] * 2)) == pytest.approx(0, abs=1e-6)


def test_masks_move_with_their_images():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 5, (20, 8, 8), generator=generator).to(torch.uint8)
    images = masks[:, None].expand(-1, 3, -1, -1) * 20 + 1
    moved, labels = _augment(images, masks, "crop_flip", generator)
    assert not torch.equal(labels, masks)
    inside = moved[:, 0] > 0
    assert torch.equal(labels[inside].long() * 20 + 1, moved[:, 0][inside].long()) and bool(
        (labels[~inside] == 255).all()
    )


# ----------------------------------------------------------------------------------------------- a user's own task


def test_own_task_is_found_as_object_and_as_function(own):
    assert own.name == "my_task:TASK" and task_by_name("my_task:make").score_name == "mean error"
    assert task_by_name("segmentation") is SEGMENTATION


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("segmentatio", UnknownNameError, "Unknown task 'segmentatio'. Did you mean 'segmentation'"),
        ("my_task:NUMBER", UsageError, "is int; expected an edgecompress.tasks.Task"),
        ("my_task:raises", UsageError, r"raised ValueError: no such thing \(.*my_task\.py, line \d+\)"),
        ("my_task:absent", UsageError, "Cannot import the task 'my_task:absent'"),
    ],
)
def test_task_that_is_none_has_its_sentence(own, name, kind, sentence):
    with pytest.raises(kind, match=sentence):
        task_by_name(name)


@pytest.fixture
def regression(own):
    """Four numbers of every image, and a network that gives four."""
    data = patterns(per_class=16, size=8)
    wanted = F.one_hot(torch.arange(4)).float()
    splits = {
        n: type(data.train)(s.images, wanted[s.labels])
        for n in ("train", "calibration", "search_val", "select_val", "test")
        for s in [getattr(data, n)]
    }
    return replace(data, classes=(), task=own, **splits)


def test_a_network_learns_the_loss_of_the_task_and_less_is_better(regression):
    torch.manual_seed(0)
    model = settled(Residual(4))
    before = accuracy_and_loss(model, regression, regression.test)
    train(model, regression, TrainSettings(epochs=4, learning_rate=0.05, batch_size=16, distill=0.0))
    after = accuracy_and_loss(model, regression, regression.test)
    assert after[1] < 0.5 * before[1] and after[0] > before[0]
    assert after[0] == pytest.approx(-after[1], rel=1e-4)  # here the score is the loss, turned so that more is better


def test_without_knowledge_of_the_outputs_a_student_copies_them(regression):
    teacher, student = settled(Residual(4), 1), settled(Residual(4), 2)
    unlabelled = replace(regression, train=type(regression.train)(regression.train.images, torch.full((64, 4), 50.0)))
    x = regression.normalise(regression.test.images)

    def distance(first: nn.Module, second: nn.Module) -> float:
        with torch.no_grad():
            return float(squared_difference(first(x), second(x)))

    before = distance(student, teacher)
    train(student, unlabelled, TrainSettings(epochs=6, learning_rate=0.02, batch_size=16, distill=1.0), teacher=teacher)
    assert distance(student, teacher) < 0.3 * before


def test_score_that_is_no_number_is_refused(own):
    with pytest.raises(
        UsageError, match="The score 'mean error' of the task 'my_task:TASK' is nan; return a finite number"
    ):
        own.merit([torch.full((3,), float("nan"))])


def test_network_that_the_task_cannot_score_is_refused(regression):
    config = Config(budget="size=0.9x", model="<Residual>")
    with pytest.raises(
        BadModelError,
        match=r"The task 'my_task:TASK' cannot score what <Residual> gives for one image, \(3,\), with labels \(4,\)",
    ):
        original_network(settled(Residual(3)), config, regression, Silent())
    segmented = replace(patterns(), task=SEGMENTATION)
    with pytest.raises(
        BadModelError, match=r"gives \(4,\) for one image; patterns has 4 classes, so expected \(4, height, width\)"
    ):
        original_network(settled(Residual(4)), config, segmented, Silent())


@pytest.mark.parametrize(
    ("score", "value", "text", "difference"),
    [
        (Score(), 0.9321, "93.21 %", "-2.00 points"),
        (Score(name="error", higher_is_better=False, percent=False), -3.5, "3.5", "-0.02"),
        (Score(name="loss of pixels", higher_is_better=False), -0.25, "25.00 %", "-2.00 points"),
    ],
)
def test_scores_are_shown_as_people_know_them(score, value, text, difference):
    assert score.text(value) == text and score.text(None) == "–" == score.text(float("nan"))
    step = 0.02 if score.higher_is_better else -0.02
    assert score.difference(value - step, value) == difference


# ------------------------------------------------------------------------------------------------ folders of masks


def write_masks(root, count: int = 20, size: int = 8) -> None:
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((size, size), np.uint8)
        mask[:, : 1 + number % (size - 1)] = 2
        Image.fromarray(mask).save(root / "masks" / f"{number:02}.png")
        Image.fromarray((mask * 100)[..., None].repeat(3, 2)).save(root / "images" / f"{number:02}.jpg", quality=100)


def test_images_and_masks_are_paired_by_name(tmp_path):
    write_masks(tmp_path / "train")
    write_masks(tmp_path / "test", 6)
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    data = load_data(str(tmp_path), task=SEGMENTATION, image_size=16)
    assert data.classes == ("sky", "sea", "land") and data.task is SEGMENTATION
    for name in ("train", "search_val", "select_val", "test"):
        split = getattr(data, name)
        assert split.labels.shape == (len(split), 16, 16)
        near = (split.images[:, 0].int() - split.labels.int() * 100).abs() < 60
        assert float(near.float().mean()) > 0.9
    x, y = next(data.batches(data.test, 3))
    assert y.dtype == torch.int64 and x.shape == (3, 3, 16, 16)


def test_torn_image_takes_its_mask_with_it(tmp_path):
    write_masks(tmp_path, 120)
    (tmp_path / "images" / "03.jpg").write_bytes(b"x")
    data = load_data(str(tmp_path), task=SEGMENTATION)
    assert data.classes == ("0", "1", "2") and len(data.notes) == 1 and "03.jpg" in data.notes[0]
    for name in ("train", "search_val", "select_val", "test"):
        split = getattr(data, name)
        assert len(split.images) == len(split.labels)
        near = (split.images[:, 0].int() - split.labels.int() * 100).abs() < 60
        assert float(near.float().mean()) > 0.95


def test_masks_that_do_not_fit_have_their_sentence(tmp_path):
    with pytest.raises(BadDataError, match=r"There is no folder .*images\. Segmentation expects images/ and masks/"):
        load_data(str(tmp_path), task=SEGMENTATION)
    write_masks(tmp_path)
    (tmp_path / "masks" / "07.png").unlink()
    with pytest.raises(BadDataError, match=r"1 images have no mask, the first is .*07\.jpg"):
        load_data(str(tmp_path), task=SEGMENTATION)
    mask = Image.fromarray(np.full((8, 8), 9, np.uint8))
    mask.save(tmp_path / "masks" / "07.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(BadDataError, match=r"The label 9 of image \d+ of \w+ of .* is outside its 3 classes"):
        load_data(str(tmp_path), task=SEGMENTATION)


def test_output_of_a_convolution_is_integer_to_the_end(tmp_path):
    """ONNX Runtime has no integer convolution that gives floats: the scores of every pixel are quantised too."""
    from edgecompress.exporters.check_onnxruntime import check_ort
    from edgecompress.exporters.to_onnxruntime import integer_model
    from edgecompress.graph import build_graph
    from edgecompress.spec import LayerChoice

    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)))
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    graph = build_graph(model, (3, 16, 16), "pixels")
    simulator = Simulator(graph, calibrate(graph, [images]))
    choice = LayerChoice(weight_bits=8, activation_bits=8)
    quantized = simulator.quantized({layer.name: choice for layer in graph.layers})
    checks = check_ort(integer_model(quantized).SerializeToString(), quantized, images.numpy())
    assert not checks.failures and checks.values["float_conv_or_gemm"] == 0 and checks.values["integer_layers"] == 2
    assert checks.values["simulator_agreement"] > 0.99
