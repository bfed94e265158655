"""A mean over other axes than height and width: one form in the graph, and in a file the one that its opset wants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sample_networks import Shuffled, settled
from test_formats_contract import SHAPE, outputs
from torch import Tensor, nn

from edgecompress.describe import network_of
from edgecompress.errors import BadModelError
from edgecompress.exporters.formats import export
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.onnx_writing import IR_VERSIONS
from edgecompress.exporters.quantized_file import load_quantized, save_graph, save_quantized
from edgecompress.exporters.runners import OnnxRuntimeRunner
from edgecompress.exporters.simulate_tensorrt import node_errors
from edgecompress.exporters.source import ExportSource
from edgecompress.exporters.to_onnx import float_model
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.exporters.to_tensorrt import integer_model as tensorrt_model
from edgecompress.graph import Graph, Node, build_graph, normalise, read_graph
from edgecompress.interpret import float_constants, run
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.onnx_files import import_graph
from edgecompress.quantize import QuantizedGraph, Simulator, calibrate
from edgecompress.spec import CompressionPolicy, LayerChoice, Preprocessing

DRAW = torch.Generator().manual_seed(2)
IMAGES = torch.randn(24, 3, 1, 1, generator=DRAW) + torch.randn(24, *SHAPE, generator=DRAW)
SMALL_TYPES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


class SpatialGate(nn.Module):
    """Every position times a gate that reads the mean of its channels (CBAM), before a wide layer with few bits."""

    def __init__(self, axes: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.axes = axes
        self.stem, self.gate = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(1 if axes == (1,) else 16, 1, 1)
        self.wide, self.fc = nn.Conv2d(16, 64, 3, 2, 1), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x * torch.sigmoid(self.gate(x.mean(self.axes, keepdim=True)))
        result: Tensor = self.fc(torch.relu(self.wide(x)).mean((-1, 2)))
        return result


def gated() -> nn.Module:
    """Classes that the images differ on."""
    model = settled(SpatialGate(), 3)
    with torch.no_grad():
        model.fc.bias -= model(IMAGES).mean(0)
    return model


def exported_by_torch(model: nn.Module, path: Path, opset: int, batch: int = 1) -> Path:
    """As a user would: below opset 18 axes are an attribute, from there on an input."""
    torch.onnx.export(
        model, (torch.zeros(batch, *SHAPE),), path, dynamo=True, opset_version=opset, verbose=False, external_data=False
    )
    return path


@dataclass(frozen=True)
class Case:
    graph: Graph
    simulator: Simulator

    def quantized(self, weight_bits: int, activation_bits: int = 8) -> QuantizedGraph:
        """The first layer has 8 bits, so that 4-bit storage raises the opset after the mean was written."""
        few, many = (LayerChoice(weight_bits=bits, activation_bits=activation_bits) for bits in (weight_bits, 8))
        return self.simulator.quantized(
            {layer.name: few if number else many for number, layer in enumerate(self.graph.layers)}
        )

    def source(self, bits: int, opset: int, activation_bits: int = 8) -> ExportSource:
        """For ONNX Runtime or TensorRT, whichever a format is for."""
        quantized, target = self.quantized(bits, activation_bits), target_by_name("jetson")
        return ExportSource(
            graph=self.graph,
            quantized=quantized,
            network=network_of(self.graph, "gate"),
            policy=CompressionPolicy(model="gate"),
            target=target.model_copy(update={"max_opset": max(IR_VERSIONS)}),
            preprocessing=Preprocessing(size=SHAPE[1:], mean=(0.5,) * 3, std=(0.25,) * 3),
            classes=("a", "b", "c", "d"),
            images=IMAGES.numpy(),
            interface=Interface(max_opset=opset),
        )


def made(graph: Graph) -> Case:
    return Case(graph, Simulator(graph, calibrate(graph, [IMAGES], samples=4000)))


@pytest.fixture(scope="module", params=["module", "file of opset 17", "file of opset 18"])
def case(request, tmp_path_factory) -> Case:
    model = gated()
    if request.param == "module":
        return made(build_graph(model, SHAPE, "gate"))
    path = tmp_path_factory.mktemp("gate") / "gate.onnx"
    return made(import_graph(exported_by_torch(model, path, int(request.param[-2:])), SHAPE))


def means(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "ReduceMean"]


def require_form(model: onnx.ModelProto, axes: list[int]) -> None:
    """One mean, its axes in the form of the file's opset."""
    (mean,) = means(model)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    named = {attribute.name: list(attribute.ints) for attribute in mean.attribute if attribute.name == "axes"}
    if model.opset_import[0].version < 18:
        assert named == {"axes": axes} and len(mean.input) == 1
    else:
        assert not named and constants[mean.input[1]].tolist() == axes and constants[mean.input[1]].dtype == np.int64


def test_graph_has_one_form_whatever_it_was_made_from(case):
    (mean,) = (node for node in case.graph.nodes if node.op == "ReduceMean")
    assert mean.attributes == {"axes": (1,), "keepdims": 1} and len(mean.inputs) == 1
    assert [node.op for node in case.graph.nodes].count("GlobalAveragePool") == 1


@pytest.mark.parametrize("opset", [17, 21, 25])
@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "tensorrt"])
def test_channel_mean_is_written_and_proven(name, opset, case, tmp_path):
    artifact = export(case.source(4, opset), name, tmp_path)
    model = onnx.load(tmp_path / artifact.path)
    require_form(model, [1])
    if name == "onnx":
        assert artifact.opset == opset  # from 18 on the mean has another form
    if name == "onnxruntime":
        stored = any(tensor.data_type in SMALL_TYPES for tensor in model.graph.initializer)
        assert stored == (opset > 17) and (artifact.opset > 17) == stored
        assert artifact.checks["float_islands"].startswith("ReduceMean")
    found = outputs(tmp_path / artifact.path, IMAGES.numpy(), artifact.dialect)
    with torch.no_grad():
        wanted = run(case.graph, IMAGES, float_constants(case.graph)).numpy()
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.8 and len(set(wanted.argmax(1).tolist())) > 2


@pytest.mark.parametrize("opset", [17, 21, 25])
def test_tensorrt_keeps_the_mean_in_half_beside_int4(opset, case, tmp_path):
    artifact = export(case.source(4, opset, activation_bits=16), "tensorrt", tmp_path)
    assert artifact.opset == min(opset, 21) and artifact.checks["half_layers"] == len(case.graph.layers)
    require_form(onnx.load(tmp_path / artifact.path), [1])


def test_interface_around_a_mean_keeps_its_axes(case, tmp_path):
    source = case.source(4, 21)
    around = replace(
        source, interface=replace(source.interface, input="uint8", layout="nhwc", head="argmax", bare=True)
    )
    require_form(onnx.load(tmp_path / export(around, "onnxruntime", tmp_path).path), [1])


def test_quantised_mean_survives_its_file(case, tmp_path):
    quantized = case.quantized(4)
    save_graph(tmp_path / "graph.onnx", case.graph)
    save_quantized(tmp_path / "quantized.safetensors", quantized)
    again = load_quantized(tmp_path / "quantized.safetensors", tmp_path / "graph.onnx")
    first, second = (integer_model(found, max_opset=21).SerializeToString() for found in (quantized, again))
    assert np.array_equal(*(OnnxRuntimeRunner(model).run(IMAGES.numpy()) for model in (first, second)))


@pytest.mark.parametrize("axes", [(1,), (-1,), (2,)])
def test_every_opset_takes_the_mean(axes):
    model = settled(SpatialGate(axes), 3)
    graph = build_graph(model, SHAPE, "gate")
    with torch.no_grad():
        wanted = model(IMAGES)
    for opset in IR_VERSIONS:
        written = float_model(graph, opset=opset)
        onnx.checker.check_model(written, full_check=True)
        require_form(written, [axes[0] % 4])
        found = OnnxRuntimeRunner(written.SerializeToString()).run(IMAGES.numpy())
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def reduction(op: str, rank: int, axes: tuple[int, ...], keepdims: int = 1) -> Graph:
    """One operator on an input of ``rank``, its axes an input, as torch writes them."""
    node = Node("it", op, ("x", "axes"), ("y",), {"keepdims": keepdims, "noop_with_empty_axes": 0})
    sizes = (3, 4, 5)[: rank - 1]
    kept = [1 if place in [axis % rank for axis in axes] else size for place, size in enumerate(sizes, 1)]
    return normalise(Graph(("x",), ("y",), (node,), {"axes": np.array(axes)}, {"x": sizes, "y": tuple(kept)}))


@pytest.mark.parametrize("axes", [(2, 3), (3, 2), (-1, -2), (-2, -1), (-1, 2), (2, -1)])
def test_mean_over_height_and_width_is_a_global_pool_however_it_is_said(axes):
    assert [node.op for node in reduction("ReduceMean", 4, axes).nodes] == ["GlobalAveragePool"]


@pytest.mark.parametrize(
    ("rank", "axes", "kept"), [(3, (-2, -1), (1, 2)), (2, (-1,), (1,)), (4, (3, 1), (1, 3)), (4, (1, 2, 3), (1, 2, 3))]
)
def test_other_means_keep_their_axes(rank, axes, kept):
    graph = reduction("ReduceMean", rank, axes)
    assert [node.attributes for node in graph.nodes] == [{"axes": kept, "keepdims": 1}] and not graph.constants
    x = torch.randn(2, *graph.shapes["x"])
    for opset in (17, 21):
        found = OnnxRuntimeRunner(float_model(graph, opset=opset).SerializeToString()).session.run(
            None, {"x": x.numpy()}
        )
        np.testing.assert_allclose(found[0], run(graph, x, float_constants(graph)), atol=1e-6)


@pytest.mark.parametrize("opset", [17, 18])
def test_operators_that_changed_with_the_mean_are_written_like_it_and_refused_by_name(opset):
    graph = reduction("ReduceMax", 4, (1,))
    onnx.checker.check_model(float_model(graph, opset=opset), full_check=True)
    with pytest.raises(BadModelError, match="The operator ReduceMax at 'it' is not one that can be quantised yet"):
        run(graph, torch.zeros(1, 3, 4, 5), {})


@pytest.mark.parametrize("attributes", [{}, {"axes": (0, 1), "keepdims": 1}])
def test_mean_over_the_batch_is_refused(attributes):
    graph = Graph(("x",), ("y",), (Node("it", "ReduceMean", ("x",), ("y",), attributes),), {}, {})
    with pytest.raises(BadModelError, match="The ReduceMean at 'it' is over the batch"):
        run(graph, torch.zeros(1, 3, 4, 4), {})


def test_name_of_written_axes_is_free(case):
    """Short names of the integer file are taken one by one; the axes come last."""
    model = integer_model(case.quantized(4), max_opset=21)
    names = [tensor.name for tensor in model.graph.initializer]
    names += [name for node in model.graph.node for name in node.output] + ["input"]
    assert len(names) == len(set(names)) and means(model)[0].input[1] in names


def test_proof_of_tensorrt_notices_other_axes(case):
    quantized = case.quantized(8)
    other = replace_axes(quantized, (3,))
    errors = node_errors(tensorrt_model(quantized, batch=None), other, IMAGES.numpy())
    (mean,) = (node.name for node in case.graph.nodes if node.op == "ReduceMean")
    assert [name for name, error in errors.items() if not error < 1] == [mean]


def replace_axes(quantized: QuantizedGraph, axes: tuple[int, ...]) -> QuantizedGraph:
    nodes = tuple(
        replace(node, attributes={**node.attributes, "axes": axes}) if node.op == "ReduceMean" else node
        for node in quantized.graph.nodes
    )
    return replace(quantized, graph=replace(quantized.graph, nodes=nodes))


def test_operator_without_a_form_in_the_opset_is_one_sentence():
    node = Node("it", "Gelu", ("x",), ("y",), {})
    graph = Graph(("x",), ("y",), (node,), {}, {"x": (3, 4, 4), "y": (3, 4, 4)})
    float_model(graph, opset=20)
    with pytest.raises(
        BadModelError, match=r"Gelu at 'it' cannot be written as ONNX of opset 17: No Op registered for Gelu"
    ):
        float_model(graph, opset=17)


def test_files_with_a_fixed_batch_that_torch_writes_take_any_batch(tmp_path):
    """Torch's Reshape says ``allowzero``, which a batch left as it is must not."""
    model = settled(Shuffled(4), 5)
    graph = import_graph(exported_by_torch(model, tmp_path / "net.onnx", 18, batch=2), SHAPE)
    written = float_model(graph).SerializeToString()
    with torch.no_grad():
        np.testing.assert_allclose(OnnxRuntimeRunner(written).run(IMAGES[:5].numpy()), model(IMAGES[:5]), atol=1e-4)


def test_graph_of_an_older_run_is_read_in_the_new_form(tmp_path):
    """Before, a run kept the axes as an input whatever its opset."""
    model = float_model(reduction("ReduceMean", 4, (1,)), opset=18)
    model.opset_import[0].version = 17
    onnx.save(model, tmp_path / "graph.onnx")
    assert read_graph(tmp_path / "graph.onnx").nodes[0].attributes == {"axes": (1,), "keepdims": 1}
