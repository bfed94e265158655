"""A LiteRT (TensorFlow Lite) file of integers at the network's own steps, written without a converter.

The scores are what no 8 bits may decide: the last layer runs on s16 inputs (exact, the same step) and gives s16 scores.
How values and operators lie in the file: `litert_draft`, `litert_integers`, `litert_floats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgecompress.errors import UsageError
from edgecompress.exporters.interface import PLAIN, PROPERTY, Interface
from edgecompress.exporters.litert_draft import VALID, Draft, Held, channels_last, final_grid, laid, lower_grid
from edgecompress.exporters.litert_floats import FLOAT_OPERATORS, float_operator
from edgecompress.exporters.litert_integers import OPERATORS, WITH_CONSTANTS, gate
from edgecompress.exporters.litert_writing import Grid, Written
from edgecompress.exporters.to_onnxruntime import gate_of
from edgecompress.graph import LAYER_OPS, Node
from edgecompress.quantize import QuantizedGraph
from edgecompress.spec import Preprocessing

PIXEL_STEPS = 127  # a factor per channel, as the largest s8 weight


@dataclass(frozen=True)
class LiteRtModel:
    """A file with what is known of it.

    ``floats``: operators of the network that compute in float. ``step``: of the scores' integers, 0 where they are floats.
    ``int4``: layers whose weights are stored so. ``values``: the tensor of each quantised value of the graph.
    ``rounded_twice``: values of INT4 layers that XNNPACK leaves to LiteRT's own kernels.
    """

    data: bytes
    inputs: Mapping[str, list[int | str]]
    outputs: Mapping[str, list[int | str]]
    floats: Sequence[str]
    step: float
    int4: int
    values: Mapping[str, Held]
    rounded_twice: frozenset[str] = frozenset()


def integer_model(
    quantized: QuantizedGraph,
    *,
    largest_score: float,
    interface: Interface = PLAIN,
    preprocessing: Preprocessing | None = None,
    metadata: Mapping[str, str] | None = None,
) -> LiteRtModel:
    """Write the integer graph for LiteRT.

    Args:
        largest_score: the largest absolute output seen; scores have 16 bits up to twice that.
        interface: batch (1 by default), layout, pixels, head, ``allow_float`` and ``int4``; see `Interface`.
        preprocessing: needed where the file takes pixels.

    Raises:
        UsageError: an operator has no integer form in LiteRT and ``allow_float`` is not given, or has none at all.
        MissingBackendError: LiteRT, whose schema is needed, is not installed.
    """
    return _write(Draft(quantized, largest_score, interface), preprocessing, metadata or {})


def oldest_runtime(model: LiteRtModel) -> str:
    """The oldest runtime that was seen to run files like ``model``."""
    return "LiteRT 1.2.0" if model.int4 else "TensorFlow Lite 2.14.0"


def _write(draft: Draft, preprocessing: Preprocessing | None, metadata: Mapping[str, str]) -> LiteRtModel:
    if not draft.interface.is_plain:
        metadata = {**metadata, PROPERTY: draft.interface.described}
    entry = _entry(draft, preprocessing)
    absorbed = {node.outputs[0] for node in draft.activations.values()}
    for node in draft.graph.nodes:
        if node.outputs[0] in absorbed:
            continue
        after = draft.activations.get(node.outputs[0])
        _emit(draft, node, after.outputs[0] if after else node.outputs[0])
    name = draft.graph.outputs[0]
    result, step = _answer(draft, name)
    return LiteRtModel(
        data=draft.file.serialised(entry, result, {} if draft.interface.bare else metadata),
        inputs={draft.graph.inputs[0]: list(entry.shape)},
        outputs={name: list(result.shape)},
        floats=tuple(draft.floats),
        step=step,
        int4=draft.file.count_of("INT4"),
        values={name: _place(draft, name, held) for name, held in draft.values.integers.items()},
        rounded_twice=frozenset(draft.rounded_twice),
    )


def _place(draft: Draft, name: str, held: Written) -> Held:
    assert held.grid is not None
    return Held(held.number, held.grid.zero, draft.shape(name), draft.values.flat.get(name))


def _emit(draft: Draft, node: Node, result: str) -> None:
    """One operator with the activation that it absorbs; ``result`` is what both yield."""
    if gate_of(draft.quantized, node.outputs[0]) is not None:
        gate(draft, node)
    elif not _in_integers(draft, node, result):
        _in_float(draft, node, result)


def _in_integers(draft: Draft, node: Node, result: str) -> bool:
    """Write ``node`` as integers; False where it has no such form."""
    held = [name for name in node.inputs if name and name not in draft.graph.constants]
    operands = 1 if node.op in (*LAYER_OPS, *WITH_CONSTANTS) else len(node.inputs)
    if len(held) != operands or any(name not in draft.values.integers for name in held):
        return False
    write = OPERATORS.get(node.op)
    return write is not None and write(draft, node, result)


def _in_float(draft: Draft, node: Node, result: str) -> None:
    """DEQUANTIZE, the float operator, QUANTIZE: around just this one.

    Raises:
        UsageError: floats are not allowed, or LiteRT has no such operator.
    """
    write = FLOAT_OPERATORS.get(node.op)
    if write is None:
        known = ", ".join(sorted({*OPERATORS, *FLOAT_OPERATORS}))
        raise draft.refuse(node, "that we know how to write", f"Known: {known}. Export --format onnx for others.")
    if not draft.interface.allow_float:
        raise draft.refuse(
            node, "as integers", "Export with --allow-float to compute that operator, and no other, in float."
        )
    draft.floats.append(f"{node.op} {node.name}")
    held = write(draft, node)
    how, after = draft.quantized.tensors.get(result), draft.activations.get(node.outputs[0])
    if how is not None:  # its grid saturates where an activation clips
        draft.values.integers[result] = draft.clipped(
            draft.quantize(held, result, lower_grid(how)), final_grid(how), result
        )
        return
    if after is not None:
        held = float_operator(draft, "RELU6" if after.op == "Clip" else "RELU", [held], result)
    draft.values.floats[result] = held


def _entry(draft: Draft, preprocessing: Preprocessing | None) -> Written:
    name, interface = draft.graph.inputs[0], draft.interface
    how = draft.quantized.tensors[name]
    natural = draft.shape(name)
    last = interface.layout == "nhwc"
    shape = laid(natural) if last else natural
    entry = draft.file.value(name, shape, None, interface.input)
    if not interface.takes_pixels:
        held = draft.quantize(entry, name, lower_grid(how))
    else:
        pixels = entry
        if interface.input == "uint8":
            pixels = entry = draft.file.value(f"{name}.bytes", shape, Grid(1.0, 0, "uint8"))
        held = draft.quantize(pixels, f"{name}.pixels", Grid(1.0, -128))
    if not last:
        held = draft.moved(held, channels_last(len(natural)), name)
    if interface.takes_pixels:
        assert preprocessing is not None
        held = _normalised(draft, held, preprocessing, lower_grid(how))
    draft.values.integers[name] = draft.clipped(held, final_grid(how), name)
    return entry


def _normalised(draft: Draft, pixels: Written, how: Preprocessing, on: Grid) -> Written:
    """``pixel / (255 std) - mean / std`` per channel, as a depthwise 1x1 convolution of integers."""
    std, mean = np.array(how.std), np.array(how.mean)
    scale = (1 / (255 * std * PIXEL_STEPS)).astype(np.float32)
    ones = np.full((1, 1, 1, len(std)), PIXEL_STEPS, np.int8)
    shift = np.rint(-mean / std / scale).astype(np.int32)
    weight = draft.file.weight("normalisation", ones, scale, 3)
    bias = draft.file.bias("normalisation.shift", shift, scale)
    output = draft.file.value("normalised", pixels.shape, on)
    options = {"padding": VALID, "strideW": 1, "strideH": 1, "depthMultiplier": 1}
    return draft.file.operator("DEPTHWISE_CONV_2D", [pixels, weight, bias], output, 3, **options)


def _answer(draft: Draft, name: str) -> tuple[Written, float]:
    """The output as float32 in natural order, behind the head that was asked for, and the step of its integers."""
    held, step = draft.values.floats.get(name), 0.0
    if name in draft.values.integers:
        integers = draft.values.integers[name]
        assert integers.grid is not None
        step = integers.grid.scale
        integers = draft.natural(integers, draft.shape(name), name)
        held = draft.dequantize(integers, name)
    elif held is not None:
        held = draft.natural(held, draft.shape(name), name)
    assert held is not None
    return _head(draft, held), step


def _head(draft: Draft, scores: Written) -> Written:
    head = draft.interface.head
    if head == "scores":
        return scores
    if len(scores.shape) != 2:
        raise UsageError(
            f"A LiteRT file puts {head} behind one row of scores only; here they have the shape {list(scores.shape)}. "
            "Leave --head out."
        )
    draft.floats.append(f"{head} head")
    if head == "softmax":
        return draft.file.operator("SOFTMAX", [scores], draft.file.value("softmax", scores.shape), beta=1.0)
    axis = draft.file.constant("argmax.axis", np.array([1], np.int32))
    output = draft.file.value("argmax", scores.shape[:1], kind="int64")
    return draft.file.operator("ARG_MAX", [scores, axis], output, outputType=draft.file.type_of("int64"))
