"""A few hundred images without labels: everything is agreement with the original, and everything says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import Called, call
from PIL import Image
from safetensors.torch import save_file
from sample_networks import Residual, patterns, settled

from edgecompress.data import load_data
from edgecompress.errors import BadDataError, BadModelError
from edgecompress.finetune import TrainSettings, train
from edgecompress.job import train_settings
from edgecompress.original import original_network
from edgecompress.progress import Silent
from edgecompress.runs import RunFolder
from edgecompress.spec import Config, Preprocessing

HOW = {"size": [16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize": 18, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images without classes, weights, and what the images go through."""
    root = tmp_path_factory.mktemp("unlabelled")
    data = patterns(per_class=40)
    torch.manual_seed(0)
    model = train(Residual(4), data, TrainSettings(epochs=6, learning_rate=0.05, distill=0.0))
    save_file(model.state_dict(), root / "weights.safetensors")
    (root / "photos").mkdir()
    for number, image in enumerate(data.train.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((20, 20)).save(root / "photos" / f"{number:03}.png")
    (root / "how.json").write_text(json.dumps(HOW))
    return root


@pytest.fixture(scope="module")
def ran(quick: None, place: Path) -> tuple[Called, Path]:
    called = call(
        "compress", "--model", "sample_networks:residual", "--weights", place / "weights.safetensors", "--data",
        place / "photos", "--preprocessing", place / "how.json", "--target", "x86", "--budget", "flops=0.7x,size=0.6x",
        "--episodes", "8", "--finetune-epochs", "1", "--qat-epochs", "1", "--threads", "1",
        "--progress", "plain", "--max-accuracy-drop", "100", "--runs", place / "runs", "--name", "first",
    )  # fmt: skip
    assert called.code == 0, called.err
    return called, place / "runs" / "first"


def test_run_measures_agreement_and_says_so_everywhere(ran):
    called, path = ran
    report = RunFolder(path).report()
    assert report.score.name == "agreement with the original" and 0.3 < report.compressed.accuracy <= 1
    assert report.original.accuracy == 1.0  # the file of the original agrees with the network it is
    assert "Agreement" in called.out and "Accuracy" not in called.out and "has no labels" in called.err
    assert [goal.goal for goal in report.goals][-1] == "agreement with the original drop"
    page = (path / "report.html").read_text()
    assert "Agreement with the original of the exported file" in page and "top-1 on the test split" in page
    assert "expected agreement with the original, %" in page and "Accuracy" not in page
    markdown = call("report", path, "--format", "md").out
    assert "Agreement with the original 100.00 %" in markdown and "Accuracy" not in markdown
    compared = json.loads(call("compare", path, "--json").out)
    assert compared["runs"][0]["score"] == "agreement with the original"


def test_eval_agrees_with_the_original_beside_the_file(ran, place, tmp_path):
    _, path = ran
    called = call("eval", path / "exports" / "model.int8.onnx", "--data", place / "photos")
    wanted = RunFolder(path).report().compressed.accuracy
    assert called.code == 0 and f"top-1 agreement with the original {100 * wanted:.2f} % on" in called.out
    alone = tmp_path / "model.int8.onnx"
    alone.write_bytes((path / "exports" / "model.int8.onnx").read_bytes())
    called = call("eval", alone, "--data", place / "photos")
    assert called.code == 2 and "has no labels, and there is no original.onnx beside" in called.err


def test_one_preprocessing_from_the_option_into_every_artifact(ran, place):
    _, path = ran
    how = Preprocessing.model_validate(HOW)
    assert RunFolder(path).architecture().preprocessing == how
    for name in ("original.onnx", "model.onnx", "model.int8.onnx", "tensorrt/model.onnx"):
        session = onnxruntime.InferenceSession(path / "exports" / name, providers=["CPUExecutionProvider"])
        written = session.get_modelmeta().custom_metadata_map["edgecompress.preprocess"]
        assert Preprocessing.model_validate_json(written) == how
    assert all(
        entry["preprocessing"] == HOW | {"channels": "RGB"}
        for entry in json.loads((path / "exports/export.json").read_text()).values()
    )


def test_classes_come_from_the_weights(ran):
    _, path = ran
    assert RunFolder(path).architecture().classes == 4
    session = onnxruntime.InferenceSession(path / "exports/model.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["edgecompress.labels"]) == list("0123")


def test_run_can_be_exported_again_and_resumed(ran, place):
    _, path = ran
    before = (path / "exports/model.int8.onnx").read_bytes()
    called = call("export", path, "--format", "onnxruntime")
    assert called.code == 0, called.err
    assert (path / "exports/model.int8.onnx").read_bytes() == before


def test_only_distillation_trains(place):
    from types import SimpleNamespace

    data = load_data(str(place / "photos"))
    assert not data.labelled and data.task.score_name == "agreement with the original"
    job = SimpleNamespace(config=Config(budget="flops=0.5x"), data=data, original=torch.nn.Identity())
    assert train_settings(job, 1).distill == 1.0


def test_network_without_weights_cannot_be_trained_on_it(place):
    data = load_data(str(place / "photos"))
    for model in ("resnet8", "sample_networks:residual"):
        with pytest.raises(BadModelError, match=r"no labels to train it on|missing 1 required positional argument"):
            original_network(model, Config(budget="flops=0.5x", model=model), data, Silent())


def test_class_folders_are_left_out_of_account_on_request(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.fromarray(np.full((8, 8, 3), 6 * number, np.uint8)).save(tmp_path / name / f"{number}.png")
    data = load_data(str(tmp_path), unlabelled=True)
    assert not data.labelled and data.classes == () and len(data.test) == 8
    assert load_data(str(tmp_path)).labelled
    assert not load_data("digits", unlabelled=True).labelled


def test_a_handful_of_images_is_not_enough(tmp_path):
    for number in range(5):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
    with pytest.raises(BadDataError, match="has 5 images; without labels at least 20 are needed"):
        load_data(str(tmp_path))


def test_settled_network_answers_for_itself(place):
    from edgecompress.original import answered

    data = load_data(str(place / "photos"))
    network = settled(Residual(5))
    found = answered(data, network, Config(budget="flops=0.5x"))
    with torch.no_grad():
        assert torch.equal(found.test.labels, network(data.normalise(data.test.images)).argmax(1))
    assert (
        found.classes == ("0", "1", "2", "3", "4")
        and answered(patterns(), network, Config(budget="flops=0.5x")).classes == patterns().classes
    )
