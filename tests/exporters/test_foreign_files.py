"""Files that `eval` is given and did not write, or that do not say what they are: right answers, or one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sample_networks import integer_case, patterns
from test_formats_contract import make_source
from test_interface import PIXELS
from test_packing import STORAGES, integers

from edgecompress.errors import BadFileError, BadModelError, UsageError
from edgecompress.evaluation import evaluate_artifact
from edgecompress.exporters import packing, to_executorch
from edgecompress.exporters.artifacts import _is_packed, open_artifact
from edgecompress.exporters.formats import export
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.onnx_writing import Names, tensor
from edgecompress.exporters.runners import OnnxRuntimeRunner, OpenVinoRunner, measure_latency_us, run_all
from edgecompress.exporters.to_onnx import float_model
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.tasks import SEGMENTATION, Task

DATA = patterns()
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
needs_ncnn = pytest.mark.skipif(not (find_spec("ncnn") and find_spec("pnnx")), reason="ncnn or pnnx is not installed")
needs_executorch = pytest.mark.skipif(
    find_spec("executorch") is None,
    reason="executorch is not installed: it is no part of the extra 'test'; pip install 'edgecompress[executorch]'",
)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure_latency_us.__kwdefaults__, "seconds", 0.02)
        patch.setitem(measure_latency_us.__kwdefaults__, "warmup_s", 0.0)
        patch.setattr("edgecompress.evaluation.measured_memory", lambda path, batch: {})
        yield


# ------------------------------------------------------------------------------------------------------ packed weights


def sparse(quantized):
    """The same network with nine of ten weights zero."""
    random = np.random.default_rng(0)
    weights = {
        name: replace(
            weight, values=np.where(random.random(weight.values.shape) < 0.9, 0, weight.values).astype(np.int8)
        )
        for name, weight in quantized.weights.items()
    }
    return replace(quantized, weights=weights)


def packed_model(name: str) -> onnx.ModelProto:
    case = integer_case("residual")
    return {
        "planes": lambda: integer_model(case.quantized(5, 8), max_opset=20),
        "look-ups": lambda: integer_model(case.quantized(6, 8), max_opset=21),
        "sparse": lambda: integer_model(sparse(case.quantized(8, 8)), max_opset=21),
        "two bits": lambda: integer_model(case.quantized(2, 8), max_opset=25),
    }[name]()


@pytest.mark.parametrize(
    ("name", "shows"), [("planes", "BitShift"), ("look-ups", "Gather"), ("sparse", "CumSum"), ("two bits", "Cast")]
)
@pytest.mark.parametrize("bare", [False, True])
def test_openvino_is_given_no_packed_weights(name, shows, bare, tmp_path):
    model = packed_model(name)
    assert shows in {node.op_type for node in model.graph.node}
    if bare:
        for found in model.graph.node:
            found.ClearField("name")
        del model.metadata_props[:]
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadFileError, match="Export --format openvino") as caught:
        open_artifact(tmp_path / "x.onnx", runtime="openvino")
    assert caught.value.exit_code == 2
    assert open_artifact(tmp_path / "x.onnx").runner.shape == (3, 16, 16)


@needs_openvino
@pytest.mark.parametrize(
    "model",
    [
        lambda case: float_model(case.graph),
        lambda case: integer_model(case.quantized(8, 8), max_opset=21),
        lambda case: integer_model(case.quantized(5, 8), max_opset=21, unpack=False),
        lambda case: integer_model(case.quantized(4, 8), max_opset=21, unpack=False),
    ],
    ids=["float", "int8", "openvino of 5 bits", "openvino of 4 bits"],
)
@pytest.mark.parametrize("network", ["residual", "shuffled"])
def test_openvino_is_given_what_it_reads(network, model, tmp_path):
    path, images = tmp_path / "x.onnx", DATA.normalise(DATA.test.images).numpy()
    path.write_bytes(model(integer_case(network)).SerializeToString())
    found = run_all(open_artifact(path, runtime="openvino").runner, images)
    wanted = run_all(OnnxRuntimeRunner(path), images)
    assert (found.argmax(1) == wanted.argmax(1)).mean() > 0.9


def dequantized(stored: packing.Stored) -> onnx.ModelProto:
    """A storage and the DequantizeLinear that reads it."""
    nodes = [*stored.nodes, helper.make_node("DequantizeLinear", [stored.output, "scale"], ["weight"])]
    initializers = [*stored.initializers, tensor("scale", np.float32(0.1))]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], initializers))


@pytest.mark.parametrize("name", STORAGES)
def test_each_storage_is_known_by_its_operators(name):
    write, widths = STORAGES[name]
    for bits in widths:
        for shape in ((8, 4, 3, 3), (7, 13)):
            model = dequantized(write(integers(shape, bits, 0.5), bits, Names()))
            assert _is_packed(model) == (name not in ("int8", "int4")), bits


def test_operators_that_unpack_no_weights_count_for_nothing():
    """A position table looked up by constants, and indices of the images."""
    table, places = tensor("table", np.ones((4, 2), np.float32)), tensor("places", np.arange(3, dtype=np.int64))
    nodes = [
        helper.make_node("Gather", ["table", "places"], ["positions"]),
        helper.make_node("Gather", ["table", "x"], ["chosen"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["weight"]),
    ]
    more = [tensor("q", np.ones(3, np.int8)), tensor("scale", np.float32(1))]
    image = helper.make_tensor_value_info("x", TensorProto.INT64, ["N"])
    assert not _is_packed(helper.make_model(helper.make_graph(nodes, "g", [image], [], [table, places, *more])))


# ------------------------------------------------------------------------------------ files that do not say what they are


@pytest.fixture(scope="module")
def source():
    return make_source("residual")


@pytest.mark.parametrize("format_name", ["onnx", "onnxruntime", "tensorrt"])
@pytest.mark.parametrize("interface", [Interface(pixels=True), Interface(input="uint8", layout="nhwc"), Interface()])
def test_bare_file_is_fed_as_its_record_says(format_name, interface, source, tmp_path):
    plain = export(source, format_name, tmp_path / "plain")
    bare = export(replace(source, interface=replace(interface, bare=True)), format_name, tmp_path / "bare")
    path = tmp_path / "bare" / bare.path
    opened = open_artifact(path)
    assert opened.pixels == interface.takes_pixels and opened.preprocessing == source.preprocessing
    data = replace(
        DATA, test=replace(DATA.test, images=torch.from_numpy(PIXELS), labels=DATA.test.labels[: len(PIXELS)])
    )
    found, answers = evaluate_artifact(path, data)
    wanted, expected = evaluate_artifact(tmp_path / "plain" / plain.path, data)
    assert (answers == expected).mean() > 0.98 and abs(found.accuracy - wanted.accuracy) < 0.02
    assert len(set(expected.tolist())) > 1


def test_bare_file_without_saturation_keeps_the_fast_kernels(source, tmp_path, monkeypatch):
    asked = []
    real = OnnxRuntimeRunner.__init__

    def noting(self, model, **how):
        asked.append(how.get("precise", True))
        real(self, model, **how)

    interface = Interface(bare=True, saturating_cpu=True)
    path = tmp_path / export(replace(source, interface=interface), "onnxruntime", tmp_path).path
    monkeypatch.setattr(OnnxRuntimeRunner, "__init__", noting)
    open_artifact(path)
    assert asked == [False]


def test_another_file_under_the_recorded_name_is_not_taken_for_it(source, tmp_path):
    bare = Interface(pixels=True, bare=True)
    path = tmp_path / export(replace(source, interface=bare), "onnx", tmp_path).path
    model = onnx.load(path)
    model.producer_name = "another program"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadFileError, match=r"export\.json describes another file .* Export it again, or move it"):
        open_artifact(path)
    alone = tmp_path / "elsewhere.onnx"
    alone.write_bytes(path.read_bytes())
    opened = open_artifact(alone)
    assert not opened.pixels and opened.preprocessing is None


def test_file_that_speaks_for_itself_needs_no_record(source, tmp_path):
    path = tmp_path / export(replace(source, interface=Interface(pixels=True)), "onnx", tmp_path).path
    (tmp_path / "export.json").write_text("[1]")
    assert open_artifact(path).pixels


RECORD = {
    "path": "x.onnx", "format": "onnx", "dialect": "float", "sha256": "a", "size_bytes": 1, "policy_sha256": "b",
    "inputs": {"input": ["N", 3, 16, 16]}, "outputs": {}, "opset": 17, "ir_version": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([1, 2], "The export record .*export.json is broken"),
        (7, "The export record .*export.json is broken"),
        ({"onnx": RECORD | {"inputs": 5}}, r"wrong at 'onnx\.inputs': .* Export x\.onnx again"),
        ({"onnx": RECORD | {"inputs": {"input": "wide"}}}, r"wrong at 'onnx\.inputs\.input'"),
        ({"onnx": RECORD | {"facts": None}}, r"wrong at 'onnx\.facts'"),
        ({"onnx": RECORD | {"preprocessing": {"size": 1}}}, r"wrong at 'onnx\.preprocessing\.size'"),
        ({"onnx": {"path": "x.onnx"}}, r"wrong at 'onnx\.format'"),
        ({"onnx": RECORD}, "its sha256 differs"),
    ],
)
def test_odd_record_is_one_sentence(record, words, tmp_path):
    (tmp_path / "x.onnx").write_bytes(float_model(integer_case("flat").graph).SerializeToString())
    (tmp_path / "export.json").write_text(json.dumps(record))
    with pytest.raises(BadFileError, match=words) as caught:
        open_artifact(tmp_path / "x.onnx")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_record_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "x.onnx").write_bytes(float_model(integer_case("flat").graph).SerializeToString())
    (tmp_path / "export.json").write_text(json.dumps({"onnx": {"path": "y.onnx"}, "note": "mine", "count": 3}))
    assert open_artifact(tmp_path / "x.onnx").preprocessing is None


@needs_ncnn
def test_ncnn_file_whose_recorded_sizes_are_free_or_missing(source, tmp_path):
    path = tmp_path / export(source, "ncnn", tmp_path).path
    record = json.loads((tmp_path / "export.json").read_text())
    for inputs, shape in (({"in0": ["N", 3, "H", "W"]}, (3, 0, 0)), ({}, ())):
        record["ncnn"]["inputs"] = inputs
        (tmp_path / "export.json").write_text(json.dumps(record))
        assert open_artifact(path).runner.shape == shape
    record["ncnn"]["inputs"] = {"in0": [1, None]}
    (tmp_path / "export.json").write_text(json.dumps(record))
    with pytest.raises(BadFileError, match=r"wrong at 'ncnn\.inputs\.in0"):
        open_artifact(path)


# -------------------------------------------------------------------------------------- files of another purpose or broken


def foreign(path: Path, *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, **constants: np.ndarray) -> Path:
    """A file of images ``x`` and the output ``y`` of ``nodes``."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 16, 16])]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def scores_of(classes: int, output: str = "y") -> list[onnx.NodeProto]:
    """Means of the image, as many as wanted."""
    return [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "one"], ["column"]),
        helper.make_node("Concat", ["column"] * classes, [output], axis=1),
    ]


ONE = {"one": np.array([1], np.int64)}


@pytest.mark.parametrize(
    ("nodes", "constants", "words"),
    [
        ([helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)], {}, r"outputs of shape \[\] for 64 images"),
        (
            [helper.make_node("ReduceMean", ["x"], ["y"], axes=[0])],
            {},
            r"outputs of shape \[1, 3, 16, 16\] for 64 images",
        ),
        (
            [helper.make_node("Relu", ["x"], ["y"])],
            {},
            r"x\.onnx gives float32 \(3, 16, 16\) .* expected scores \(4,\)",
        ),
        ([helper.make_node("GlobalAveragePool", ["x"], ["y"])], {}, r"gives float32 \(3, 1, 1\) for one image"),
        (scores_of(3), ONE, r"gives float32 \(3,\) for one image; patterns has 4 classes, so expected scores \(4,\)"),
    ],
    ids=["one number for all", "one image for all", "an image", "a map of one pixel", "three scores for four classes"],
)
def test_outputs_that_are_no_scores_of_the_classes_are_refused(nodes, constants, words, tmp_path):
    path = foreign(tmp_path / "x.onnx", *nodes, **constants)
    with pytest.raises(BadModelError, match=words) as caught:
        evaluate_artifact(path, DATA)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("last", "kind", "words"),
    [
        (helper.make_node("ArgMax", ["scores"], ["y"], axis=1, keepdims=1), TensorProto.INT64, r"int64 \(1,\)"),
        (helper.make_node("Cast", ["scores"], ["y"], to=TensorProto.BOOL), TensorProto.BOOL, r"bool \(4,\)"),
        (helper.make_node("Cast", ["scores"], ["y"], to=TensorProto.STRING), TensorProto.STRING, r"object \(4,\)"),
    ],
)
def test_answers_that_are_neither_scores_nor_classes_are_refused(last, kind, words, tmp_path):
    path = foreign(tmp_path / "x.onnx", *scores_of(4, "scores"), last, kind=kind, **ONE)
    with pytest.raises(BadModelError, match=rf"x\.onnx gives {words} for one image"):
        evaluate_artifact(path, DATA)


def test_more_scores_than_classes_are_allowed(tmp_path):
    found, _ = evaluate_artifact(foreign(tmp_path / "x.onnx", *scores_of(6), **ONE), DATA)
    assert found.accuracy == 0.25  # all scores are the same, so that the first class is answered


def class_numbers(path: Path, number: int) -> Path:
    """A file that answers the same number to each image."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "nothing"], ["zeros"]),
        helper.make_node("Add", ["zeros", "number"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.INT64),
    ]
    constants = {"nothing": np.float32([0]), "number": np.float32([number])}
    return foreign(path, *nodes, kind=TensorProto.INT64, **constants)


def test_class_numbers_may_be_of_more_classes_and_not_below_zero(tmp_path):
    for number, accuracy in ((1, 0.25), (4, 0.0), (10**9, 0.0)):
        found, answers = evaluate_artifact(class_numbers(tmp_path / "x.onnx", number), DATA)
        assert found.accuracy == accuracy and set(answers.tolist()) == {number}
    with pytest.raises(BadModelError, match=r"cannot score what x\.onnx gives for 64 images"):
        evaluate_artifact(class_numbers(tmp_path / "x.onnx", -1), DATA)


def test_unlabelled_images_do_not_say_how_many_classes_there_are(tmp_path):
    path = foreign(tmp_path / "x.onnx", *scores_of(3), **ONE)
    assert evaluate_artifact(path, replace(DATA, labelled=False))[0].images == len(DATA.test)


def test_other_tasks_refuse_what_they_cannot_score(tmp_path):
    masks = DATA.test.images[:, 0] % 2
    segmentation = replace(DATA, task=SEGMENTATION, classes=("a", "b", "c", "d"), test=replace(DATA.test, labels=masks))
    path = foreign(tmp_path / "x.onnx", helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(BadModelError, match=r"expected scores \(4, height, width\)"):
        evaluate_artifact(path, segmentation)

    def measure(outputs, labels):
        raise ValueError("these are no keypoints")

    own = Task("keypoints", "error", measure, measure, float)
    with pytest.raises(
        BadModelError, match=r"'keypoints' cannot score .* these are no keypoints \(.*test_foreign_files"
    ):
        evaluate_artifact(path, replace(DATA, task=own))
    with pytest.raises(BadModelError, match="'keypoints' wants one tensor of numbers of 2 dimensions"):
        evaluate_artifact(path, replace(DATA, task=replace(own, outputs_rank=2)))


def test_argmax_of_more_classes_than_a_batch_shows_is_scored_as_masks(tmp_path):
    """Every batch counts the same classes, whichever numbers occur in it."""
    nodes = [
        helper.make_node("Add", ["x", "more"], ["sum"]),
        helper.make_node("ArgMax", ["sum"], ["y"], axis=1, keepdims=0),
    ]
    images = DATA.test.images
    masks = replace(DATA.test, images=images.repeat(2, 1, 1, 1), labels=images.repeat(2, 1, 1, 1)[:, 0] % 2)
    data = replace(DATA, task=SEGMENTATION, classes=("a", "b"), test=masks)
    masks.images[:64, 2], masks.images[64:, 2] = 0, 255
    path = foreign(tmp_path / "x.onnx", *nodes, kind=TensorProto.INT64, more=np.zeros((1, 3, 1, 1), np.float32))
    found, answers = evaluate_artifact(path, data)
    assert 0 < found.accuracy < 1 and answers[:64].max() < 2 and answers[64:].max() == 2


def batch_of_five(path: Path) -> Path:
    """It is written into the graph, but not into its input."""
    five = np.zeros((5, 1, 1, 1), np.float32)
    return foreign(path, helper.make_node("Add", ["x", "five"], ["y"]), five=five)


def test_file_that_fails_while_it_runs_is_one_sentence(tmp_path, capfd):
    with pytest.raises(BadFileError, match=r"cannot run .*x\.onnx on 64 images of shape \[3, 16, 16\]: ") as caught:
        evaluate_artifact(batch_of_five(tmp_path / "x.onnx"), DATA)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # ONNX Runtime does not log beside it what it raises


@needs_openvino
def test_openvino_that_fails_or_drops_images_is_one_sentence(tmp_path):
    with pytest.raises(BadModelError, match=r"outputs of shape \[5, 3, 16, 16\] for 64 images"):
        evaluate_artifact(batch_of_five(tmp_path / "x.onnx"), DATA, runtime="openvino")
    runner = OpenVinoRunner(float_model(integer_case("flat").graph, batch=1).SerializeToString())
    with pytest.raises(
        BadFileError, match=r"OpenVINO \S+ cannot run the model on 2 images .*: Can't set the input"
    ) as caught:
        runner.run(np.zeros((2, 3, 16, 16), np.float32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runner", [OnnxRuntimeRunner, pytest.param(OpenVinoRunner, marks=needs_openvino)])
def test_file_without_images_or_with_more_than_them_is_refused(runner):
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    images = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 16, 16]) for name in "ab"]
    words = [helper.make_tensor_value_info("a", TensorProto.INT64, ["N", 7])]
    for inputs, node, found in (
        ([], helper.make_node("Constant", [], ["y"], value_float=1.0), "0 inputs"),
        (images, helper.make_node("Add", ["a", "b"], ["y"]), "2 inputs, the first of float32"),
        (words, helper.make_node("Cast", ["a"], ["y"], to=TensorProto.FLOAT), "1 inputs, the first of .*int64"),
    ):
        graph = helper.make_graph([node], "g", inputs, [output])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        with pytest.raises(BadFileError, match=rf"takes {found}.*; expected one of float or uint8 images"):
            runner(model.SerializeToString())


# --------------------------------------------------------------------------------------------------- sizes and threads


@needs_ncnn
def test_both_files_of_ncnn_count(source, tmp_path):
    artifact = export(source, "ncnn", tmp_path)
    found, _ = evaluate_artifact(tmp_path / artifact.path, DATA)
    assert found.size_bytes == artifact.size_bytes > (tmp_path / artifact.path).stat().st_size


@needs_openvino
def test_both_files_of_openvino_count(tmp_path):
    import openvino

    model = openvino.Core().read_model(float_model(integer_case("flat").graph).SerializeToString())
    openvino.save_model(model, tmp_path / "x.xml")
    found, _ = evaluate_artifact(tmp_path / "x.xml", DATA)
    assert found.size_bytes == sum((tmp_path / f"x.{kind}").stat().st_size for kind in ("xml", "bin"))


def test_weights_outside_an_onnx_file_count_once(tmp_path):
    whole = tmp_path / "whole.onnx"
    whole.write_bytes(float_model(integer_case("flat").graph).SerializeToString())
    onnx.save_model(
        onnx.load(whole), tmp_path / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0
    )
    found, answers = evaluate_artifact(tmp_path / "x.onnx", DATA)
    assert found.size_bytes == sum((tmp_path / f"x.{kind}").stat().st_size for kind in ("onnx", "data"))
    assert answers.tolist() == evaluate_artifact(whole, DATA)[1].tolist()


@needs_executorch
@pytest.mark.filterwarnings("ignore")  # its interface calls itself experimental
@pytest.mark.slow
def test_executorch_runs_on_the_threads_that_are_asked_for(tmp_path):
    from executorch.extension.pybindings import portable_lib

    path, image = tmp_path / "x.pte", DATA.normalise(DATA.test.images[:1])
    path.write_bytes(to_executorch.program(to_executorch.FloatNetwork(integer_case("vgg").graph), image)[0])
    for threads in (2, 1):
        assert evaluate_artifact(path, DATA, threads=threads)[0].threads == threads
        assert portable_lib._threadpool_get_thread_count() == threads
    alive = open_artifact(path)
    with pytest.raises(UsageError, match="cannot run on 2 threads while another ExecuTorch program is loaded on 1"):
        open_artifact(path, threads=2)
    assert open_artifact(path).runner.run(image.numpy()).tolist() == alive.runner.run(image.numpy()).tolist()
    with pytest.raises(BadFileError, match=r"ExecuTorch \S+ cannot run .*x\.pte on 2 images"):
        alive.runner.run(image.repeat(2, 1, 1, 1).numpy())
