"""Networks that are compressed already as models: a run of one's own, and those that come with the package."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_line import MODEL, call

import edgecompress
from edgecompress import shipped
from edgecompress.errors import BadFileError, BadModelError
from edgecompress.files import write_document
from edgecompress.runs import RunFolder

LITTLE = {"episodes": 12, "finetune_epochs": 1, "qat_epochs": 0, "threads": 1}


@pytest.fixture
def package(tiny_run, tmp_path, monkeypatch):
    """A package that brings one network: the tiny run's, as if the run had been given a module in memory."""
    run = RunFolder(tmp_path / "from-memory")
    shutil.copytree(tiny_run, run.path)
    write_document(run.file("arch.json"), run.architecture().model_copy(update={"model": "<Residual>"}))
    card = shipped.Card(
        base=MODEL, data="digits", accuracy=0.98, baseline_accuracy=0.985, params=1, macs=1, average_weight_bits=8,
        size_bytes=1, row="none", licence="Apache-2.0",
    )  # fmt: skip
    shipped.pack(run, tmp_path / "shipped" / "tiny-digits", card)
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr("edgecompress.evaluation.SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


def test_a_run_is_pruned_further_and_its_network_still_stands_alone(tiny_run, quick, tmp_path):
    first = RunFolder(tiny_run)
    run = edgecompress.compress(str(tiny_run), "digits", "jetson", "flops=0.7x", runs=tmp_path, **LITTLE)
    assert run.path.name == f"{tiny_run.name}-digits-jetson-orin-nano"
    kept, before = run.folder.architecture(), first.architecture()
    assert kept.model == before.model and kept.keep_channels.keys() >= before.keep_channels.keys()
    assert all(kept.keep_channels[group] <= count for group, count in before.keep_channels.items())
    assert sum(kept.keep_channels.values()) < sum(before.keep_channels.values())
    assert run.report.original.cost.params == first.report().compressed.cost.params
    model = edgecompress.load(run.path)  # by the base's name: the first run may be gone
    assert sum(value.numel() for value in model.parameters()) == run.report.compressed.cost.params


def test_a_shipped_network_is_evaluated_by_its_name(package, tiny_run):
    mine = json.loads(call("eval", "tiny-digits", "--json").out)
    theirs = json.loads(call("eval", tiny_run, "--json").out)
    assert mine["accuracy"] == theirs["accuracy"] and mine["size_bytes"] == theirs["size_bytes"]


def test_a_shipped_network_is_a_model_with_its_weights(package, tiny_run, digits):
    from edgecompress.original import original_network, preprocessing_of
    from edgecompress.progress import Silent
    from edgecompress.spec import Config

    config = Config.model_validate({"model": "tiny-digits", "budget": "size=0.5x"})
    x, _ = next(digits.batches(digits.test, 2))
    found = original_network("tiny-digits", config, digits, Silent())
    wanted = edgecompress.load(tiny_run)(x).detach()
    assert torch.allclose(found(x), wanted, atol=0.01 * float(wanted.abs().max()))  # its weights were float16
    assert all(value.dtype is torch.float32 for value in found.parameters())
    assert preprocessing_of(config) == RunFolder(tiny_run).architecture().preprocessing
    other = config.model_copy(update={"weights": "none"})
    with pytest.raises(BadModelError, match=r"tiny-digits holds its own weights.*Leave --weights out"):
        original_network("tiny-digits", other, digits, Silent())


def test_a_shipped_network_is_compressed_further(package, quick, tmp_path):
    run = edgecompress.compress("tiny-digits", "digits", "jetson", "flops=0.7x", runs=tmp_path, **LITTLE)
    assert run.folder.architecture().model == MODEL


def test_a_shipped_network_takes_half_the_bytes_and_keeps_its_variances(package, tiny_run):
    small, large = (RunFolder(path) for path in (package / "tiny-digits", tiny_run))
    sizes = [run.file("model.safetensors").stat().st_size for run in (small, large)]
    assert sizes[0] < 0.65 * sizes[1]
    before, after = large.weights(), small.weights()
    for key, value in before.items():
        assert after[key].dtype is value.dtype
        if value.dim() == 1:
            assert torch.equal(after[key], value)


def test_the_zoo_is_listed(package):
    assert f"tiny-digits: {MODEL} on digits" in call("zoo").out
    assert json.loads(call("zoo", "--json").out)["tiny-digits"]["licence"] == "Apache-2.0"


def test_an_empty_zoo_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    assert "No compressed network comes with this version" in call("zoo").out and call("zoo", "--json").out == "{}\n"


def test_a_run_that_did_not_finish_is_no_model(tiny_run, tmp_path):
    shutil.copy(tiny_run / "config.json", tmp_path)
    with pytest.raises(BadFileError, match=r"has no network yet.*--resume"):
        shipped.compressed_run(str(tmp_path))
