"""The whole story on a tiny network: what a run leaves behind, that it can be repeated, broken off and reloaded."""

from __future__ import annotations

import copy
import json
import signal
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from command_line import BUDGET, TINY, call, call_and_kill, python
from sample_networks import Residual, patterns, settled, unprunable

import edgecompress
from edgecompress.cost import count
from edgecompress.errors import BadFileError, BadModelError, UnknownNameError, UsageError
from edgecompress.exporters.runners import OnnxRuntimeRunner
from edgecompress.files import file_sha256
from edgecompress.finetune import TrainSettings, train
from edgecompress.latency_tables.targets import all_targets, is_this_machine
from edgecompress.progress import Silent
from edgecompress.quantize import simulate
from edgecompress.report_rows import outside_us
from edgecompress.runs import RunFolder
from edgecompress.spec import Artifact

EXPORTED = ("model.onnx", "model.int8.onnx", "tensorrt/model.onnx")
OPTIONS = {"episodes": 12, "finetune_epochs": 1, "noise_epochs": 1, "qat_epochs": 1, "threads": 2}


def test_run_leaves_every_promised_file(tiny_run):
    for name in (
        "config.json", "layers.json", "trials.jsonl", "policy.json", "checkpoints/finetune.safetensors",
        "model.safetensors", "arch.json", "graph.onnx", "quantized.safetensors", "report.json", "report.html",
        "exports/original.onnx", "exports/export.json", *(f"exports/{name}" for name in EXPORTED),
        "exports/tensorrt/build_on_device.py", "exports/tensorrt/reference.npz",
    ):  # fmt: skip
        assert (tiny_run / name).stat().st_size > 0, name
    left = [path.name for path in tiny_run.rglob(".*") if path.name != ".lock"]
    assert not left  # no temporary file


def test_nothing_in_a_run_is_a_pickle(tiny_run):
    for path in tiny_run.rglob("*"):
        if path.is_file():
            assert path.suffix in (
                ".json",
                ".jsonl",
                ".toml",
                ".safetensors",
                ".onnx",
                ".html",
                ".npz",
                ".py",
                ".lock",
                "",
            )
            assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05")
    with np.load(tiny_run / "exports/tensorrt/reference.npz", allow_pickle=False) as file:
        assert set(file.files) == {"inputs", "outputs", "max_error", "min_agreement"}


def test_goals_are_judged_by_the_files_and_hold(tiny_run):
    report = RunFolder(tiny_run).report()
    assert [goal.goal for goal in report.goals] == BUDGET.split(",")
    assert all(goal.holds and goal.value <= goal.limit for goal in report.goals)
    flops, size = report.goals
    assert flops.value == report.compressed.cost.macs <= 0.6 * report.original.cost.macs
    assert size.value == (tiny_run / "exports/tensorrt/model.onnx").stat().st_size
    assert size.limit == pytest.approx(0.5 * (tiny_run / "exports/original.onnx").stat().st_size)
    for row in report.artifacts:
        assert row.size_bytes == (tiny_run / "exports" / row.name).stat().st_size


def test_report_counts_what_was_built(tiny_run):
    folder = RunFolder(tiny_run)
    report, policy = folder.report(), folder.policy()
    model = edgecompress.load(tiny_run)
    assert report.compressed.cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert report.compressed.cost.macs == count(folder.network(), policy).macs
    assert report.original.average_weight_bits == 32 and 2 <= report.compressed.average_weight_bits <= 8
    assert set(policy.layers) == {layer.name for layer in folder.network().layers}
    trials = folder.trials()
    assert sum(report.evaluations.values()) == len(trials) <= 24
    assert {trial.stage for trial in trials} == {"prune", "quantize"}
    for stage in ("prune", "quantize"):
        assert policy.provenance[f"found_by_{stage}"] in {trial.arm for trial in trials if trial.stage == stage}


def test_policy_is_one_that_was_searched(tiny_run):
    folder = RunFolder(tiny_run)
    policy, trials = folder.policy(), folder.trials()
    assert tuple(policy.keep_channels.values()) in {trial.choice for trial in trials if trial.stage == "prune"}
    bits = tuple(b for choice in policy.layers.values() for b in (choice.weight_bits, choice.activation_bits))
    assert bits in {trial.choice for trial in trials if trial.stage == "quantize"}


def test_element_wise_zeros_are_where_the_policy_says(tiny_run):
    folder = RunFolder(tiny_run)
    model = edgecompress.load(tiny_run)
    for name, choice in folder.policy().layers.items():
        weight = model.get_submodule(name).weight
        assert float((weight != 0).float().mean()) == pytest.approx(choice.keep_elements, abs=1e-4)


def test_pruned_onnx_has_truly_smaller_initialisers(tiny_run):
    folder = RunFolder(tiny_run)
    files = {name: onnx.load(tiny_run / "exports" / name) for name in ("original.onnx", "model.onnx")}
    sizes = {name: sum(int(np.prod(tensor.dims)) for tensor in file.graph.initializer) for name, file in files.items()}
    assert sizes["model.onnx"] < 0.7 * sizes["original.onnx"]
    assert not {node.op_type for node in files["model.onnx"].graph.node} & {"Gather", "Mul", "ScatterND", "Where"}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in files["model.onnx"].graph.initializer}
    keep = folder.policy().keep_channels
    assert shapes["stem.0.weight"] == (keep["stem.0"], 3, 3, 3)
    assert shapes["b1.0.weight"] == (keep["b1.0"], keep["stem.0"], 3, 3)


def test_export_record_matches_the_files(tiny_run):
    record = json.loads((tiny_run / "exports/export.json").read_text())
    assert {value["path"] for value in record.values()} == set(EXPORTED)
    for value in record.values():
        artifact = Artifact.model_validate(value)
        assert artifact.sha256 == file_sha256(tiny_run / "exports" / artifact.path)
    assert record["onnxruntime"]["checks"]["float_conv_or_gemm"] == 0


RELOAD = """
import sys
from pathlib import Path
import numpy as np, torch
import edgecompress
from edgecompress.exporters.runners import OnnxRuntimeRunner
from edgecompress.quantize import simulate
from edgecompress.quantize import simulate
from edgecompress.runs import RunFolder
torch.set_num_threads(2)
run, out = Path(sys.argv[1]), sys.argv[2]
images = np.load(run / "exports/tensorrt/reference.npz")["inputs"]
found = {}
with torch.no_grad():
    found["network"] = edgecompress.load(run)(torch.from_numpy(images)).numpy()
    found["integers"] = simulate(RunFolder(run).quantized(), torch.from_numpy(images)).numpy()
for name in ("model.onnx", "model.int8.onnx"):
    found[name] = OnnxRuntimeRunner(run / "exports" / name).run(images)
np.savez(out, **found)
"""


def test_fresh_process_reloads_the_run_to_the_same_outputs(tiny_run, tmp_path):
    done = python(RELOAD, tiny_run, tmp_path / "fresh.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tiny_run / "exports/tensorrt/reference.npz") as reference:
        images = reference["inputs"]
    x = torch.from_numpy(images)
    with torch.no_grad():
        mine = {"network": edgecompress.load(tiny_run)(x), "integers": simulate(RunFolder(tiny_run).quantized(), x)}
    for name in ("model.onnx", "model.int8.onnx"):
        mine[name] = OnnxRuntimeRunner(tiny_run / "exports" / name).run(images)
    with np.load(tmp_path / "fresh.npz") as fresh:
        assert set(fresh.files) == set(mine)
        for name in fresh.files:
            assert np.array_equal(fresh[name], np.asarray(mine[name])), name
        assert np.abs(fresh["network"] - fresh["model.onnx"]).max() < 1e-4
        assert (fresh["integers"].argmax(1) == fresh["model.int8.onnx"].argmax(1)).mean() >= 0.9


@pytest.mark.slow  # three processes
def test_run_killed_in_both_searches_resumes_to_the_policy_of_the_unbroken_one(tiny_run, tmp_path):
    """Also the proof that a seed decides: three other processes evaluated all of this again."""
    arguments = ("compress", *TINY, "--runs", tmp_path, "--name", "killed")
    first = call_and_kill(9, *arguments)
    assert first.returncode == -signal.SIGKILL, first.stderr
    journal = tmp_path / "killed" / "trials.jsonl"
    assert len(journal.read_bytes().splitlines()) == 10  # the last is torn
    assert not (tmp_path / "killed" / "policy.json").exists()
    second = call_and_kill(3 + 8, *arguments, "--resume")
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert len(journal.read_bytes().splitlines()) == 21
    worked = json.loads((tmp_path / "killed/seconds.json").read_text())["seconds"]
    third = call(*arguments, "--resume")
    assert third.code == 0, third.err
    in_all = RunFolder(tmp_path / "killed").report().seconds
    assert worked["Stage 1: channels"] > 0 and all(in_all[part] >= seconds for part, seconds in worked.items())
    for name in ("policy.json", "trials.jsonl", "layers.json", "arch.json", *(f"exports/{name}" for name in EXPORTED)):
        assert (tmp_path / "killed" / name).read_bytes() == (tiny_run / name).read_bytes(), name


@pytest.mark.slow  # three runs of twice two stages
@pytest.mark.timeout(900)  # minutes where another program takes the cores
def test_alternation_killed_in_its_own_round_resumes_to_the_unbroken_one(quick, tmp_path):
    arguments = ("compress", *TINY, "--episodes", "8", "--alternate", "1", "--runs", tmp_path, "--name")
    assert call(*arguments, "unbroken").code == 0
    assert call_and_kill(8 + 8 + 3, *arguments, "killed").returncode == -signal.SIGKILL
    assert (tmp_path / "killed/alternation-1/trials.jsonl").exists()
    assert not (tmp_path / "killed/policy.json").exists()
    resumed = call(*arguments, "killed", "--resume")
    assert resumed.code == 0, resumed.err
    for name in ("policy.json", "alternation-1/trials.jsonl", *(f"exports/{name}" for name in EXPORTED)):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    report = RunFolder(tmp_path / "killed").report()
    assert list(report.rounds.scores) == ["two stages", "alternation-1"]
    assert report.rounds.scores[report.rounds.exported] == max(report.rounds.scores.values())
    assert f"the files hold {report.rounds.exported}" in (tmp_path / "killed/report.html").read_text()
    folder = tmp_path / "killed" / ("" if report.rounds.exported == "two stages" else "alternation-1")
    assert sum(report.evaluations.values()) == len(RunFolder(folder).trials())
    architecture, policy = RunFolder(tmp_path / "killed").architecture(), RunFolder(tmp_path / "killed").policy()
    assert architecture.keep_channels == policy.keep_channels


# --------------------------------------------------------------------------------------- the Python API, on its own data


def trained(data):
    torch.manual_seed(0)
    return train(Residual(4), data, TrainSettings(epochs=4, learning_rate=0.05, batch_size=16, distill=0.0))


@pytest.fixture(scope="module")
def own():
    """A user's trained network and data in memory."""
    data = patterns(per_class=32)
    return trained(data), data


class Notes(Silent):
    """Keeps all that a run notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def notes():
    return Notes()


@pytest.fixture(scope="module")
def own_run(own, notes, quick, tmp_path_factory):
    """The story of the issue: ``edgecompress.compress(model, data, target="x86", budget=...)``; its search never sees class3."""
    model, data = own
    kept = (data.search_val.labels != 3).nonzero().flatten()
    return edgecompress.compress(
        model, replace(data, search_val=data.search_val.take(kept)), target="x86", budget="flops=0.6x,size=0.3x",
        runs=tmp_path_factory.mktemp("own"), name="own", progress=notes, **OPTIONS,
    )  # fmt: skip


def test_module_and_data_in_memory_are_compressed(own, own_run):
    report = own_run.report
    assert report.config.model == "<Residual>" and report.config.data == "patterns"
    assert report.original.accuracy > 0.9 and report.compressed.accuracy > 0.6
    assert report.compressed.cost.macs <= 0.6 * report.original.cost.macs


def test_run_notes_that_images_and_classes_are_too_few_for_its_search(own_run, notes):
    few = [text for text in notes.texts if text.startswith("the search judges policies on 24 images")]
    lacking = [text for text in notes.texts if text.startswith("search-val holds no image of 1 of 4 classes (class3)")]
    assert len(few) == len(lacking) == 1 and notes.texts.index(few[0]) < notes.texts.index(lacking[0])


def test_size_budget_of_packed_weights_is_kept_by_the_written_file(own_run):
    written = (own_run.path / "exports/model.int8.onnx").stat().st_size
    assert written <= 0.3 * (own_run.path / "exports/original.onnx").stat().st_size
    assert own_run.missed == []


def test_run_of_memory_exports_again(own_run):
    artifact = own_run.export("onnxruntime")
    assert artifact.sha256 == file_sha256(own_run.path / "exports" / artifact.path)


def test_run_of_memory_reloads_with_its_factory(own, own_run):
    with pytest.raises(UsageError, match="made from a module in memory; pass factory="):
        edgecompress.load(own_run.path)
    model = edgecompress.load(own_run.path, lambda: Residual(4))
    images = own[1].normalise(own[1].test.images)
    with torch.no_grad():
        wanted = model(images).numpy()
    found = OnnxRuntimeRunner(own_run.path / "exports/model.onnx").run(images.numpy())
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    with pytest.raises((BadModelError, UsageError)):
        edgecompress.load(own_run.path, lambda: Residual(9))


def test_users_network_is_not_changed(own, own_run):
    model, data = own
    again = trained(data).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_network_with_nothing_to_prune_says_so_and_can_be_quantised(quick, tmp_path):
    data = patterns()
    model = settled(unprunable(4))
    with pytest.raises(BadModelError, match=r"nothing to prune \(2: its channels are the network's output\).*--stages"):
        edgecompress.compress(model, data, budget="flops=0.5x", runs=tmp_path, **OPTIONS)
    run = edgecompress.compress(
        model, data, budget="size=1x", runs=tmp_path, name="q", stages=("quantize",), target="x86", **OPTIONS
    )
    assert (run.path / "exports/model.int8.onnx").exists() and run.missed == []
    assert run.report.compressed.cost.macs == run.report.original.cost.macs
    assert {trial.stage for trial in run.folder.trials()} == {"quantize"}


def test_target_without_integers_gets_float_artifacts_only(own, quick, tmp_path):
    model, data = own
    run = edgecompress.compress(model, data, target="jetson-nano", runs=tmp_path, **OPTIONS)
    assert sorted(artifact.format for artifact in run.report.artifacts) == ["onnx", "onnx", "tensorrt"]
    assert not (run.path / "exports/model.int8.onnx").exists() and run.missed == []
    assert {choice.weight_bits for choice in run.folder.policy().layers.values()} <= {16, 32}


def test_accuracy_drop_looks_for_the_cheapest_policy_and_is_a_goal(own, quick, tmp_path):
    model, data = own
    run = edgecompress.compress(
        model, data, target="x86", budget="flops=0.5x", max_accuracy_drop=60.0, runs=tmp_path, **OPTIONS
    )
    assert run.report.goals[-1].goal == "accuracy drop" and run.report.goals[-1].limit == 60
    assert run.report.compressed.cost.macs < 0.4 * run.report.original.cost.macs
    assert run.report.goals[-1].value == pytest.approx(
        100 * (run.report.original.accuracy - run.report.compressed.accuracy)
    )


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"target": "jetsn"}, UnknownNameError, "Did you mean 'jetson'"),
        ({"agent": "dpg"}, UnknownNameError, "Did you mean 'ddpg'"),
        ({"importance": "l22"}, UnknownNameError, "Did you mean 'l2'"),
        ({"prune_reward": "acuracy"}, UnknownNameError, "Did you mean 'accuracy'"),
        ({"budget": "flops=2x"}, UsageError, "above the original network"),
        ({"episodes": 3}, UsageError, "Option 'episodes' is wrong"),
        ({"epoch": 3}, UsageError, "Unknown option 'epoch'"),
        ({"stages": ("prun",)}, UsageError, "Option 'stages"),
        ({"stages": ()}, UsageError, "Option 'stages'"),
    ],
)
def test_wrong_option_is_refused_before_anything_is_traced_or_written(
    own, tmp_path, monkeypatch, options, kind, sentence
):
    monkeypatch.setattr("torch.nn.Conv2d.forward", lambda *a, **k: pytest.fail("work began before the check"))
    with pytest.raises(kind) as caught:
        edgecompress.compress(*own, **({"runs": tmp_path / "runs"} | OPTIONS | options))
    assert sentence in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", None, "There is no run configuration at"),
        ("policy.json", None, "There is no policy at"),
        ("policy.json", b"{ torn", "is broken"),
        ("policy.json", b'{"schema_version": 99}', "has schema version 99"),
        ("layers.json", b'{"schema_version": 1}', "is wrong at 'model'"),
        ("quantized.safetensors", None, "no integer network"),
        ("quantized.safetensors", b"torn", "cannot be read"),
        ("graph.onnx", b"torn", "cannot be read as an ONNX model"),
    ],
)
def test_broken_run_is_one_sentence(tiny_run, tmp_path, file, content, sentence):
    for name in ("config.json", "arch.json", "policy.json", "layers.json", "quantized.safetensors", "graph.onnx"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        edgecompress.export_run(tmp_path, "onnxruntime")
    assert sentence in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize("file", ["arch.json", "model.safetensors"])
def test_broken_network_of_a_run_is_one_sentence(tiny_run, tmp_path, file):
    for name in ("arch.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    (tmp_path / file).write_bytes(b"torn")
    with pytest.raises(BadFileError, match=file.replace(".", r"\.")):
        edgecompress.load(tmp_path)
    with pytest.raises(BadFileError, match="There is no run at"):
        edgecompress.load(tmp_path / "none")


def test_weights_of_another_network_are_refused(tiny_run, tmp_path):
    architecture = json.loads((tiny_run / "arch.json").read_text())
    architecture["keep_channels"] = {"stem.0": 3}
    (tmp_path / "arch.json").write_text(json.dumps(architecture))
    (tmp_path / "model.safetensors").write_bytes((tiny_run / "model.safetensors").read_bytes())
    with pytest.raises(BadModelError, match="do not fit the network"):
        edgecompress.load(tmp_path)


def test_resume_with_other_weights_is_refused(own, own_run):
    """The options are the same, what they name is not: here a module in memory, elsewhere a file behind --weights."""
    model, data = copy.deepcopy(own[0]), own[1]
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    before = (own_run.path / "exports/original.onnx").read_bytes()
    with pytest.raises(UsageError, match=r"was begun with another network.*--weights.*--overwrite"):
        edgecompress.compress(
            model, data, target="x86", budget="flops=0.6x,size=0.3x", runs=own_run.path.parent, name="own", resume=True,
            **OPTIONS,
        )  # fmt: skip
    assert (own_run.path / "exports/original.onnx").read_bytes() == before


def test_every_file_carries_preprocessing_and_labels(tiny_run, digits):
    wanted = {"edgecompress.preprocess": digits.preprocessing.model_dump_json()}
    wanted["edgecompress.labels"] = json.dumps(list(digits.classes))
    for name in (*EXPORTED, "original.onnx", "original.int8.onnx"):
        found = {prop.key: prop.value for prop in onnx.load(tiny_run / "exports" / name).metadata_props}
        assert found.items() >= wanted.items(), name


def test_report_holds_predictions_for_layers_and_for_this_host(tiny_run):
    folder = RunFolder(tiny_run)
    report = folder.report()
    assert all(row.latency is not None and row.latency[0].source == "estimated" for row in report.layers)
    outside = outside_us(report)
    assert outside is not None and 0 < outside[1] <= outside[0] < report.original.cost.latency_us
    timed = [row for row in report.artifacts if row.host_latency_us is not None]
    if any(is_this_machine(target) for target in all_targets().values()):
        said = {row.name: row.predicted_host for row in timed}
        assert all(value is not None and value.low_us <= value.us <= value.high_us for value in said.values())
        assert said["original.int8.onnx"].us != said["original.onnx"].us  # each at the precision that it computes in
        assert said["model.onnx"].us <= said["original.onnx"].us and report.host_source
