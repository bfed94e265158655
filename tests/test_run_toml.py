"""run.toml: what is written is read back as the same configuration, from the file's folder and from anywhere else."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edgecompress.run_toml import from_file, to_toml
from edgecompress.spec import Config

AWKWARD = Config(
    model='a "quoted" \\ name\n\ttab', data="päth 😀 \x7f", budget="flops=0.5x", learning_rate=1e-05, seed=-3,
    stages=("quantize",), trust=True, max_accuracy_drop=1.0,
)  # fmt: skip


def test_every_value_is_read_back_as_it_was(tmp_path: Path) -> None:
    found = tomllib.loads(to_toml(AWKWARD, tmp_path / "first"))
    assert (found.pop("name"), found.pop("runs")) == ("first", "..")
    assert Config.model_validate(found) == AWKWARD
    assert "image_size" not in found and found["learning_rate"] == 1e-05 and found["max_accuracy_drop"] == 1.0


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("data", "photos", "../../photos"),
        ("data", "../photos", "../../../photos"),
        ("data", "digits", "digits"),
        ("data", "package.module:images", "package.module:images"),
        ("model", "nets/net.onnx", "../../nets/net.onnx"),
        ("model", "resnet8", "resnet8"),
        ("model", "package.module:net", "package.module:net"),
        ("weights", "w.pt", "../../w.pt"),
        ("weights", "DEFAULT", "DEFAULT"),
        ("weights", "none", "none"),
        ("table", "t.csv", "../../t.csv"),
    ],
)
def test_paths_are_relative_to_the_file_and_come_back(tmp_path, monkeypatch, key, value, written) -> None:
    (tmp_path / "here" / "photos").mkdir(parents=True)
    (tmp_path / "here" / "digits").mkdir()  # a folder does not hide the name
    monkeypatch.chdir(tmp_path / "here")
    run = Path("runs/first")
    run.mkdir(parents=True)
    config = Config(budget="flops=0.5x").model_copy(update={key: value})
    found = tomllib.loads(to_toml(config, run))
    assert found[key] == written
    assert from_file(key, found[key], run) == value
    monkeypatch.chdir(tmp_path)
    again = from_file(key, found[key], Path("here/runs/first"))
    same = Path(again).resolve() == (tmp_path / "here" / value).resolve()
    assert again == value if written == value else same


def test_absolute_path_stays(tmp_path: Path) -> None:
    config = Config(budget="flops=0.5x", data=str(tmp_path))
    assert tomllib.loads(to_toml(config, Path("x")))["data"] == str(tmp_path)
    assert from_file("data", str(tmp_path), Path("y")) == str(tmp_path)


def test_run_reached_through_a_link_names_the_same_paths(tmp_path, monkeypatch) -> None:
    (tmp_path / "big" / "disk" / "first").mkdir(parents=True)
    (tmp_path / "here" / "photos").mkdir(parents=True)
    (tmp_path / "here" / "runs").symlink_to(tmp_path / "big" / "disk")
    monkeypatch.chdir(tmp_path / "here")
    found = tomllib.loads(to_toml(Config(budget="flops=0.5x", data="photos"), Path("runs/first")))
    assert from_file("data", found["data"], tmp_path / "big" / "disk" / "first") == "photos"


def test_network_from_memory_says_what_to_do(tmp_path: Path) -> None:
    text = to_toml(Config(budget="flops=0.5x", model="<Net>"), tmp_path)
    assert "package.module:factory" in text and tomllib.loads(text)["model"] == "<Net>"


@pytest.mark.parametrize(("value", "written"), [("auto", "auto"), ("weights", "weights"), ("how.json", "../how.json")])
def test_preprocessing_is_a_word_or_a_path(tmp_path, monkeypatch, value, written) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    found = tomllib.loads(to_toml(Config(budget="flops=0.5x", preprocessing=value), Path("first")))
    assert found["preprocessing"] == written and from_file("preprocessing", written, Path("first")) == value
