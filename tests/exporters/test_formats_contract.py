"""One contract for every exporter: it writes, it proves, it records; a proof that fails leaves nothing behind."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from sample_networks import NETWORKS, settled

from edgecompress.errors import BadFileError, EdgeCompressError, GoalMissedError, UnknownNameError, UsageError
from edgecompress.exporters import formats
from edgecompress.exporters.formats import EXPORTERS, export
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.onnx_writing import IR_VERSIONS
from edgecompress.exporters.quantized_file import load_quantized, save_graph, save_quantized
from edgecompress.exporters.record import RECORD, as_record, recorded
from edgecompress.exporters.runners import OnnxRuntimeRunner, has_vnni, is_x86
from edgecompress.exporters.source import ExportSource
from edgecompress.exporters.to_onnx import float_model
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.exporters.verify import Checks, agreement, check_shapes
from edgecompress.files import file_sha256, sha256
from edgecompress.graph import build_graph
from edgecompress.interpret import float_constants, run
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.prune import prune
from edgecompress.quantize import Simulator, calibrate, simulate
from edgecompress.spec import Artifact, CompressionPolicy, LayerChoice, Preprocessing
from edgecompress.trace import trace

SHAPE = (3, 16, 16)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
OWN_RUNTIME = ("ncnn", "executorch", "litert")  # see test_more_runtimes.py and test_litert.py
NAMES = [
    pytest.param(name, marks=needs_openvino) if name == "openvino" else name
    for name in EXPORTERS
    if name not in OWN_RUNTIME
]
HERE = tuple(name for name in EXPORTERS if name not in OWN_RUNTIME and (name != "openvino" or find_spec("openvino")))


def make_source(name: str, target: str = "jetson") -> ExportSource:
    """A pruned network at 4 and 8 bits, with images that its classes differ on."""
    original = settled(NETWORKS[name](4), 11)
    traced = trace(original, SHAPE, name)
    keep = {group.id: max(4, group.width // 2) for group in traced.network.prunable_groups}
    model = prune(original, traced, keep)
    images = 1.5 * torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(2))
    graph = build_graph(model, SHAPE, name)
    simulator = Simulator(graph, calibrate(graph, [images], samples=4000))
    layers = {
        layer.name: LayerChoice(weight_bits=8 if number % 2 else 6, activation_bits=8)
        for number, layer in enumerate(graph.layers)
    }
    device = target_by_name(target)
    return ExportSource(
        graph=graph,
        quantized=simulator.quantized(layers) if device.integer_kernels else None,
        network=traced.network,
        policy=CompressionPolicy(model=traced.network.model, keep_channels=keep, layers=layers),
        target=device,
        preprocessing=Preprocessing(size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3),
        classes=("a", "b", "c", "d"),
        images=images.numpy(),
    )


@pytest.fixture(scope="module", params=["residual", "flat"])
def source(request):
    return make_source(request.param)


def source_for(source: ExportSource, name: str) -> ExportSource:
    """A file that ONNX Runtime optimised ahead runs the fast kernels, which saturate here unless weights have 7 bits."""
    ahead = name in ("ort", "onnxruntime-optimised") and is_x86() and not has_vnni()
    return replace(source, interface=Interface(saturating_cpu=True)) if ahead else source


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def outputs(path, images: np.ndarray, dialect: str) -> np.ndarray:
    runner = OnnxRuntimeRunner(path, optimise=dialect != "trt")
    return np.concatenate([runner.run(image[None]) for image in images])


@pytest.mark.parametrize("name", NAMES)
def test_exporter_writes_proves_and_records(name, source, tmp_path):
    artifact = export(source, name, tmp_path)
    path = tmp_path / artifact.path
    assert artifact.sha256 == file_sha256(path) and artifact.size_bytes == path.stat().st_size
    assert artifact.path == EXPORTERS[name].file_name and artifact.dialect == EXPORTERS[name].dialect
    assert artifact.policy_sha256 == sha256(source.policy.model_dump_json().encode())
    assert artifact.checks and artifact.preprocessing == source.preprocessing
    assert all(np.isfinite(value) for value in artifact.checks.values() if isinstance(value, float))
    record = json.loads((tmp_path / "export.json").read_text())
    assert Artifact.model_validate(record[name]) == artifact
    session = OnnxRuntimeRunner(path, optimise=False).session
    assert {value.name: value.shape for value in session.get_inputs()} == artifact.inputs
    assert {value.name: value.shape for value in session.get_outputs()} == artifact.outputs
    assert [shape[1:] for shape in artifact.inputs.values()] == [list(SHAPE)]
    assert [shape[1:] for shape in artifact.outputs.values()] == [[4]]
    metadata = session.get_modelmeta().custom_metadata_map
    assert Preprocessing.model_validate_json(metadata["edgecompress.preprocess"]) == source.preprocessing
    if path.suffix != ".onnx":
        return
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert (model.opset_import[0].version, model.ir_version) == (artifact.opset, artifact.ir_version)


@pytest.mark.parametrize("name", NAMES)
def test_exported_file_computes_what_was_compressed(name, source, tmp_path):
    artifact = export(source_for(source, name), name, tmp_path)
    found = outputs(tmp_path / artifact.path, source.images, artifact.dialect)
    with torch.no_grad():
        if artifact.dialect == "float":
            wanted = run(source.graph, torch.from_numpy(source.images), float_constants(source.graph)).numpy()
            assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
        else:
            wanted = simulate(source.quantized, torch.from_numpy(source.images)).numpy()
            assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
            assert agreement(found, wanted) >= 0.9


@pytest.mark.parametrize("name", NAMES)
def test_pruned_channels_are_gone_from_the_file(name, source, tmp_path):
    path = tmp_path / export(source, name, tmp_path).path
    if path.suffix != ".onnx":
        pytest.skip("what is in it is compared with the ONNX file that it was made from")
    model = onnx.load(path)
    assert not {node.op_type for node in model.graph.node} & {"ScatterND", "Compress"}
    kept = source.policy.keep_channels
    first = source.network.layers[0]
    weights = [
        tensor for tensor in model.graph.initializer
        if tuple(tensor.dims) == (kept[first.name], first.in_channels, *first.kernel)
    ]  # fmt: skip
    whole = [tensor for tensor in model.graph.initializer if tensor.dims and tensor.dims[0] == first.out_channels]
    assert weights or name == "onnxruntime"  # packed weights have a shape of their own
    assert not [tensor for tensor in whole if list(tensor.dims[1:]) == [first.in_channels, *first.kernel]]
    assert sum(np.prod(tensor.dims) for tensor in model.graph.initializer) < sum(
        layer.params for layer in source.network.layers
    )


@pytest.mark.parametrize("name", NAMES)
def test_failed_proof_leaves_nothing_under_the_final_name(name, source, tmp_path, monkeypatch):
    failing = replace(EXPORTERS[name], check=lambda source, data: Checks({}, ["it computes something else"]))
    monkeypatch.setitem(EXPORTERS, name, failing)
    with pytest.raises(GoalMissedError, match=f"The {name} export failed its proof: it computes something") as caught:
        export(source, name, tmp_path)
    assert caught.value.exit_code == 3 and files(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_failed_proof_leaves_an_earlier_artifact_and_its_record_alone(name, source, tmp_path, monkeypatch):
    artifact = export(source, name, tmp_path)
    before = {path: (tmp_path / path).read_bytes() for path in files(tmp_path)}
    monkeypatch.setitem(EXPORTERS, name, replace(EXPORTERS[name], check=lambda source, data: Checks({}, ["no"])))
    with pytest.raises(GoalMissedError):
        export(source, name, tmp_path)
    assert {path: (tmp_path / path).read_bytes() for path in files(tmp_path)} == before
    assert artifact.path in before


def damaged(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its largest weight tensor turned upside down."""
    largest = max(
        (tensor for tensor in model.graph.initializer if len(tensor.dims) >= 2),
        key=lambda tensor: int(np.prod(tensor.dims)),
    )
    values = numpy_helper.to_array(largest)
    flipped = (-values.astype(np.float32)).astype(values.dtype) if values.dtype != np.uint8 else 255 - values
    largest.CopyFrom(numpy_helper.from_array(flipped, largest.name))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_proof_notices_a_file_that_computes_something_else(name, source, tmp_path, monkeypatch):
    exporter = EXPORTERS[name]
    monkeypatch.setitem(EXPORTERS, name, replace(exporter, write=lambda source: damaged(exporter.write(source))))
    with pytest.raises(GoalMissedError, match="failed its proof"):
        export(source, name, tmp_path)
    assert files(tmp_path) == []


def test_proof_notices_a_policy_that_was_not_built(source, tmp_path):
    group = source.network.prunable_groups[0]
    other = source.policy.model_copy(update={"keep_channels": source.policy.keep_channels | {group.id: group.width}})
    with pytest.raises(GoalMissedError, match="the policy says"):
        export(replace(source, policy=other), "onnx", tmp_path)
    assert check_shapes(source.graph, source.network, source.policy).values["shapes_match_policy"] is True
    last = source.graph.layers[-1]  # a single one, with no right one behind it
    constants = {**source.graph.constants, last.inputs[1]: source.graph.constants[last.inputs[1]][:-1]}
    checks = check_shapes(replace(source.graph, constants=constants), source.network, source.policy)
    assert len(checks.failures) == 1 and checks.values["shapes_match_policy"] is False


@pytest.mark.parametrize("name", NAMES)
def test_full_disk_leaves_nothing_under_the_final_name(name, source, tmp_path, monkeypatch):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(EdgeCompressError, match="The disk is full"):
        export(source, name, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("number", range(1, 5))  # build_on_device.py, reference.npz, model.onnx, export.json
def test_disk_that_fills_later_leaves_what_was_there(source, tmp_path, monkeypatch, number):
    export(source, "tensorrt", tmp_path)
    (tmp_path / "tensorrt/model.engine").write_bytes(b"of the first export")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    real, calls = os.replace, []

    def full_at(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_at)
        with pytest.raises(EdgeCompressError, match="The disk is full"):
            export(replace(source, classes=("e", "f", "g", "h")), "tensorrt", tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_full_folder_for_temporary_files_is_one_sentence(source, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edgecompress.exporters.check_onnxruntime.tempfile.TemporaryDirectory", full)
    with pytest.raises(EdgeCompressError, match="The disk is full"):
        export(source, "onnxruntime", tmp_path)
    assert files(tmp_path) == []


def test_an_engine_of_an_earlier_export_goes_with_it(source, tmp_path):
    artifact = export(source, "tensorrt", tmp_path)
    for name in ("model.engine", "engine.json"):
        (tmp_path / "tensorrt" / name).write_bytes(b"built from it")
    (tmp_path / RECORD).write_bytes(as_record(recorded(tmp_path), "engine", artifact))
    export(source, "tensorrt", tmp_path)
    assert set(recorded(tmp_path)) == {"tensorrt"} and "tensorrt/model.engine" not in files(tmp_path)


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_every_format_audits_its_weights_and_plans_its_memory(name, source, tmp_path):
    artifact = export(replace(source, interface=Interface(batch=4)), name, tmp_path / "four")
    single = export(replace(source, interface=Interface(batch=1)), name, tmp_path / "one")
    assert artifact.checks["activation_peak_bytes"] == 4 * single.checks["activation_peak_bytes"] > 0
    assert set(artifact.layer_bytes) == set(source.quantized.weights)
    for layer, (held, exact) in artifact.layer_bytes.items():
        weight = source.quantized.weights[layer]
        assert exact == math.ceil(weight.values.size * weight.bits / 8)
        assert held == weight.values.size if name == "tensorrt" else exact <= held <= weight.values.size
    model = onnx.load(tmp_path / "four" / artifact.path)
    assert sum(len(found.raw_data) for found in model.graph.initializer) > sum(
        a for a, _ in artifact.layer_bytes.values()
    )


def test_a_file_with_other_channels_than_the_graph_is_refused(source, tmp_path, monkeypatch):
    wrong = make_source("residual" if "flat" in source.network.model else "flat")
    monkeypatch.setitem(
        EXPORTERS, "onnx", replace(EXPORTERS["onnx"], write=lambda _: float_model(wrong.graph, metadata={}))
    )
    with pytest.raises(GoalMissedError, match="lacks"):
        export(source, "onnx", tmp_path)
    assert files(tmp_path) == []


def test_int4_is_stored_for_a_jetson_that_is_asked_for_it(tmp_path):
    source = make_source("flat")
    last = source.graph.layers[-1].name
    weight = source.quantized.weights[last]
    four = replace(weight, values=(weight.values // 16).astype(np.int8), scale=weight.scale * 16, bits=4)
    quantized = replace(
        source.quantized, weights={**source.quantized.weights, last: four}, half=frozenset({last})
    )  # fmt: skip
    source = replace(source, quantized=quantized)
    assert source.target.max_opset == 20 and export(source, "tensorrt", tmp_path / "plain").opset == 17
    artifact = export(replace(source, interface=Interface(max_opset=21)), "tensorrt", tmp_path)
    kinds = {found.data_type for found in onnx.load(tmp_path / artifact.path).graph.initializer}
    assert artifact.opset == 21 and onnx.TensorProto.INT4 in kinds
    old = replace(source, target=target_by_name("jetson-xavier-nx"), interface=Interface(max_opset=21))
    assert export(old, "tensorrt", tmp_path / "old").opset == 17


def test_a_float_file_says_its_score(source, tmp_path):
    labels = np.zeros(len(source.images), np.int64)
    artifact = export(replace(source, labels=labels), "onnx", tmp_path)
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / artifact.path).metadata_props}
    assert float(said["edgecompress.accuracy"]) == pytest.approx(artifact.checks["accuracy"])
    assert said["edgecompress.scored_images"] == "24"


def test_unverified_export_says_so(source, tmp_path):
    assert export(source, "onnx", tmp_path, check=False).checks == {"verified": False}


def test_all_formats_stand_side_by_side(source, tmp_path):
    made = {name: export(source, name, tmp_path) for name in HERE}
    record = json.loads((tmp_path / "export.json").read_text())
    assert set(record) == set(HERE)
    assert {record[name]["sha256"] for name in made} == {artifact.sha256 for artifact in made.values()}
    assert made["onnxruntime"].size_bytes < made["onnx"].size_bytes
    assert (tmp_path / "tensorrt" / "build_on_device.py").is_file()
    with np.load(tmp_path / "tensorrt" / "reference.npz", allow_pickle=False) as reference:
        found = outputs(tmp_path / "tensorrt" / "model.onnx", reference["inputs"], "trt")
        assert np.array_equal(found, reference["outputs"])


def test_same_source_gives_the_same_bytes(source, tmp_path):
    for name in set(HERE) - {"ort"}:  # ONNX Runtime orders what it writes there by chance
        first = export(source, name, tmp_path / "a").sha256
        assert export(source, name, tmp_path / "b").sha256 == first


def test_opset_keeps_the_targets_limit(tmp_path):
    for target in ("jetson", "jetson-nano"):
        source = make_source("flat", target)
        limit = source.target.max_opset
        for name in ("onnx", "tensorrt"):
            assert export(source, name, tmp_path, check=False).opset <= limit


@pytest.mark.parametrize(
    ("target", "asked", "written"),
    [
        ("x86", None, 17), ("x86", 15, 15), ("x86", 18, 18), ("x86", 21, 21), ("x86", 25, 25),
        ("jetson", None, 17), ("jetson", 19, 19), ("jetson", 25, 20), ("jetson-nano", None, 15), ("jetson-nano", 21, 15),
    ],
)  # fmt: skip
def test_float_file_has_the_opset_that_is_asked_for_within_the_targets(source, target, asked, written, tmp_path):
    source = replace(source, target=target_by_name(target))
    plain = export(source, "onnx", tmp_path / "plain")
    artifact = export(replace(source, interface=Interface(max_opset=asked)), "onnx", tmp_path)
    model = onnx.load(tmp_path / artifact.path)
    onnx.checker.check_model(model, full_check=True)
    assert (artifact.opset, model.opset_import[0].version, model.ir_version) == (written, written, IR_VERSIONS[written])
    found = outputs(tmp_path / artifact.path, source.images, "float")
    wanted = outputs(tmp_path / "plain" / plain.path, source.images, "float")
    np.testing.assert_array_equal(found, wanted)


def test_target_without_integers_gets_float_files_and_no_integer_one(tmp_path):
    source = make_source("flat", "jetson-nano")
    assert source.quantized is None
    assert export(source, "tensorrt", tmp_path).checks["relative_error"] < 1e-3
    with pytest.raises(UsageError, match=r"no integer network .*'jetson-nano'"):
        export(source, "onnxruntime", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_unknown_format_is_refused_with_the_nearest(source, tmp_path):
    with pytest.raises(UnknownNameError, match=r"Unknown format 'tensorflow'\. Did you mean 'tensorrt'"):
        export(source, "tensorflow", tmp_path)


def test_record_that_is_broken_is_one_sentence(source, tmp_path):
    (tmp_path / "export.json").write_text("{ torn")
    with pytest.raises(BadFileError, match=r"export\.json"):
        export(source, "onnx", tmp_path)
    assert files(tmp_path) == ["export.json"]


def test_quantised_network_survives_its_file(source, tmp_path):
    save_graph(tmp_path / "graph.onnx", source.graph)
    save_quantized(tmp_path / "quantized.safetensors", source.quantized)
    again = load_quantized(tmp_path / "quantized.safetensors", tmp_path / "graph.onnx")
    assert again.tensors == source.quantized.tensors
    for name, weight in source.quantized.weights.items():
        assert np.array_equal(again.weights[name].values, weight.values) and again.weights[name].bits == weight.bits
        assert np.array_equal(again.weights[name].scale, weight.scale)
    x = torch.from_numpy(source.images)
    with torch.no_grad():
        assert torch.equal(simulate(again, x), simulate(source.quantized, x))
    models = [integer_model(quantized).SerializeToString() for quantized in (source.quantized, again)]
    found = [OnnxRuntimeRunner(model).run(source.images) for model in models]
    assert np.array_equal(*found)


@pytest.mark.parametrize("how", ["missing", "torn", "other version", "without keys", "no graph"])
def test_broken_quantised_file_is_one_sentence(source, tmp_path, how):
    from safetensors.numpy import save_file

    graph, path = tmp_path / "graph.onnx", tmp_path / "quantized.safetensors"
    save_graph(graph, source.graph)
    save_quantized(path, source.quantized)
    if how == "missing":
        path.unlink()
    elif how == "torn":
        path.write_bytes(path.read_bytes()[:300])
    elif how == "other version":
        save_file({"x": np.zeros(1)}, path, metadata={"schema_version": "99"})
    elif how == "without keys":
        save_file({"x": np.zeros(1)}, path, metadata={"schema_version": "1"})
    else:
        graph.unlink()
    with pytest.raises(EdgeCompressError, match=r"quantized\.safetensors|graph\.onnx") as caught:
        load_quantized(path, graph)
    assert caught.value.exit_code == 2


def test_registry_is_one_dictionary_with_distinct_files():
    assert formats.EXPORTERS is EXPORTERS
    assert len({exporter.file_name for exporter in EXPORTERS.values()}) == len(EXPORTERS)
