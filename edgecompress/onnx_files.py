"""A user's ONNX file or torch.export program becomes our graph, and is proven to compute the same before anything else.

ONNX Runtime's basic optimisation does what needs no opinion (constants folded, BatchNorm folded, MatMul and Add joined);
what is left is to write layers the one way in which the rest of edgecompress reads them.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgecompress.errors import BadDataError, BadModelError
from edgecompress.graph import Array, Graph, Node, normalise, quiet, raw_graph
from edgecompress.interpret import float_constants, run

if TYPE_CHECKING:
    import onnx

OPSETS = (13, 17)  # an older file is lifted to the second; a younger one stays as it is
TOLERANCE = 1e-3
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
_OPERATOR_PARTS = ("Conv", "Gemm", "MatMul", "MatMulAddFusion")
_ANONYMOUS = re.compile(r"^(onnx::|ConvBnFusion|ConvMulFusion|val_|_|\d)|_output_0$|^$")


def import_graph(path: Path, input_shape: tuple[int, ...], *, trust: bool = False) -> Graph:
    """Read a float ``.onnx`` file, or a ``.pt2`` program, that maps one batch of images to one tensor.

    Args:
        input_shape: ``(C, H, W)`` of the data; free sizes of the file are set to it, the batch becomes free.
        trust: whether a ``.pt2`` file may be opened: it may hold pickles, which can run code.

    Raises:
        BadModelError: the file is missing, broken, not trusted, already quantised, not of one input and one output, has an
            operator that we do not know, or computes something else in our graph. BadDataError: it takes other images.
    """
    if not path.is_file():
        raise BadModelError(f"There is no model file at {path}. Check the path.")
    model = _program(path, trust) if path.suffix.lower() == ".pt2" else _file(path)
    batch = _check_input(model, path, input_shape)
    simple = _simplified(model, path, (batch, *input_shape))
    graph = _normal(simple, batch, path)
    _prove(model, graph, path, (batch, *input_shape))
    return graph


def _file(path: Path) -> onnx.ModelProto:
    import onnx
    from onnx import version_converter

    try:
        model = onnx.load(path)
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        return version_converter.convert_version(model, OPSETS[1]) if opset < OPSETS[0] else model
    except Exception as error:
        raise BadModelError(
            f"{path} cannot be read as an ONNX model ({type(error).__name__}: {_first_line(error)}). Export it again, with opset 17."
        ) from error


def _program(path: Path, trust: bool) -> onnx.ModelProto:
    if not trust:
        raise BadModelError(
            f"{path} is a torch.export program, which may carry pickles, and a pickle can run code. If you trust where it "
            "comes from add --trust; or export the network to ONNX."
        )
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:
        raise BadModelError(
            f"{path} cannot be read as a torch.export program ({type(error).__name__}: {_first_line(error)}). Save it again with "
            "torch.export.save and this version of torch."
        ) from error
    try:
        with quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        raise BadModelError(
            f"The program {path} cannot be converted to ONNX ({_first_line(error)}). Export it from model.eval()."
        ) from error
    assert exported is not None
    model: onnx.ModelProto = exported.model_proto
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check_input(model: onnx.ModelProto, path: Path, shape: tuple[int, ...]) -> int:
    """The file's batch size (1 where it is free), once it is sure that the file takes the data's images."""
    quantized = next((node.op_type for node in model.graph.node if node.op_type in _QUANTIZED), None)
    if quantized:
        raise BadModelError(f"{path} is quantised already (it has {quantized}). Give the float file it was made from.")
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise BadModelError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs; expected one of each: images in, scores out."
        )
    kind = inputs[0].type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim]
    if kind.elem_type != 1:  # onnx.TensorProto.FLOAT
        raise BadModelError(f"The input '{inputs[0].name}' of {path} is not float32. Export the network in float32.")
    if len(dims) != 4 or any(size > 0 and size != wanted for size, wanted in zip(dims[1:], shape, strict=True)):
        advice = (
            f"Give --image-size {dims[2]}"
            if len(dims) == 4 and dims[1] in (0, shape[0])
            else "Export it for [N, C, H, W]"
        )
        raise BadDataError(
            f"{path} takes images of shape {[size or '?' for size in dims[1:]]}, the data has {list(shape)}. {advice}."
        )
    return dims[0] if dims[0] > 0 else 1


def _at_shape(model: onnx.ModelProto, shape: tuple[int, ...]) -> bytes:
    """The model with its input at ``[B, C, H, W]``; other shapes are inferred anew."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    constants = {tensor.name for tensor in fixed.graph.initializer}
    value = next(value for value in fixed.graph.input if value.name not in constants)
    for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size
    del fixed.graph.value_info[:]
    fixed.graph.output[0].type.tensor_type.ClearField("shape")
    data: bytes = fixed.SerializeToString()
    return data


def _session(model: bytes, optimised: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _simplified(model: onnx.ModelProto, path: Path, shape: tuple[int, ...]) -> onnx.ModelProto:
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "simple.onnx"
        try:
            _session(_at_shape(model, shape), target)
        except Exception as error:
            raise BadModelError(
                f"ONNX Runtime refuses {path} for images of shape {list(shape[1:])}: {_first_line(error)}. Export it again."
            ) from error
        return onnx.load(target)


def _normal(model: onnx.ModelProto, batch: int, path: Path) -> Graph:
    graph = raw_graph(model)
    names = [node.name or f"{node.op.lower()}_{number}" for number, node in enumerate(graph.nodes)]
    graph = replace(graph, nodes=tuple(replace(n, name=name) for n, name in zip(graph.nodes, names, strict=True)))
    constants = dict(graph.constants)
    taken: set[str] = set()
    nodes = tuple(_written_our_way(node, graph, constants, batch, taken) for node in graph.nodes)
    graph = normalise(replace(graph, nodes=nodes, constants=constants))
    own = [name for layer in graph.layers for name in layer.inputs[1:]]
    bad = next((name for name in own if not np.isfinite(graph.constants[name]).all()), None)
    if bad is not None:
        raise BadModelError(f"The weight '{bad}' of {path} holds NaN or infinity. Export a sound network.")
    if not graph.layers:
        raise BadModelError(
            f"{path} has no convolution or linear layer with constant weights; there is nothing to compress."
        )
    return graph


def _written_our_way(node: Node, graph: Graph, constants: dict[str, Array], batch: int, taken: set[str]) -> Node:
    """One node as the rest of edgecompress reads it; new constants go into ``constants``."""
    known = [graph.constants.get(name) for name in node.inputs]
    if node.op == "Reshape" and known[1] is not None and known[1].size and int(known[1][0]) == batch:
        shape = known[1].copy()
        shape[0] = 0  # "as it is", which ``allowzero`` would deny: the batch becomes free
        constants[f"{node.name}.shape"] = shape
        return replace(node, inputs=(node.inputs[0], f"{node.name}.shape"), attributes={})
    if node.op == "MatMul" and known[1] is not None and known[1].ndim == 2 and len(graph.shapes[node.outputs[0]]) == 1:
        node = replace(node, op="Gemm", attributes={"transB": 0})
    if node.op in ("Conv", "Gemm") and known[1] is not None:
        return _layer(node, constants, taken)
    return node


def _layer(node: Node, constants: dict[str, Array], taken: set[str]) -> Node:
    """A layer with weights of its own (a shared one is copied), ``[out, ...]``, named after its weight or its node."""
    name = layer_name(node)
    while name in taken:
        name += "_again"
    taken.add(name)
    weight = constants[node.inputs[1]]
    attributes = dict(node.attributes)
    if node.op == "Gemm":
        weight = weight if attributes.get("transB", 0) else weight.T
        weight = np.ascontiguousarray(weight * np.float32(attributes.get("alpha", 1.0)))
        attributes = {"transB": 1}
    constants[f"{name}.weight"] = weight
    inputs: tuple[str, ...] = (node.inputs[0], f"{name}.weight")
    if len(node.inputs) > 2 and node.inputs[2] in constants:
        bias = constants[node.inputs[2]] * np.float32(node.attributes.get("beta", 1.0) if node.op == "Gemm" else 1.0)
        constants[f"{name}.bias"] = np.broadcast_to(bias.reshape(-1), (weight.shape[0],)).copy()
        inputs += (f"{name}.bias",)
    return replace(node, inputs=inputs, attributes=attributes)


def layer_name(node: Node) -> str:
    """The module path where the file kept it in the weight's or the node's name (``/layer1/layer1.0/conv1/Conv``)."""
    weight = node.inputs[1].removeprefix("ConvBnFusion_W_").removeprefix("ConvMulFusion_W_").removesuffix(".weight")
    if not _ANONYMOUS.search(weight):
        return weight
    parts = [part for part in node.name.split("/") if part and part not in _OPERATOR_PARTS]
    path = before = ""
    for part in parts:  # a module in a Sequential is written with the Sequential's name before it
        path = f"{path.removesuffix(before)}{part}" if part.startswith(f"{before}.") else f"{path}.{part}"
        before = part
    path = path.removeprefix(".")
    return path or node.name


def _prove(model: onnx.ModelProto, graph: Graph, path: Path, shape: tuple[int, ...]) -> None:
    """Our graph on several batches at once against ONNX Runtime on the file itself, batch by batch."""
    images = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    session = _session(_at_shape(model, shape))
    name = session.get_inputs()[0].name
    wanted = np.concatenate([session.run(None, {name: batch})[0] for batch in images])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run(graph, torch.from_numpy(images.reshape(-1, *shape[1:])), float_constants(graph)).numpy()
    except BadModelError as error:
        raise BadModelError(f"{path}: {error}") from error
    except (RuntimeError, IndexError, KeyError) as error:
        raise BadModelError(f"{path} cannot be run as our graph with a free batch: {_first_line(error)}.") from error
    if found.shape != wanted.shape or not np.isfinite(wanted).all():
        raise BadModelError(f"{path} gives outputs of shape {wanted.shape} that are not finite or depend on the batch.")
    difference = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-9))
    if difference > TOLERANCE:
        raise BadModelError(
            f"{path} computes something that our graph does not: outputs differ by {difference:.2%}. Export it in eval mode, opset 17."
        )
