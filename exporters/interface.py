"""What a deployer may ask of a file: pixels in, another layout, normalisation inside, a head, no extras.

All of it is added around a finished model, whatever its dialect: the integers in between stay those that were proven.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from edgecompress.errors import UsageError
from edgecompress.exporters.onnx_writing import IR_VERSIONS, Names, node, tensor
from edgecompress.spec import Preprocessing

InputType = Literal["float32", "uint8"]
Layout = Literal["nchw", "nhwc"]
Head = Literal["scores", "softmax", "argmax"]
Int4 = Literal["fast", "never", "always"]
Images = NDArray[np.float32]
PROPERTY = "edgecompress.interface"


@dataclass(frozen=True)
class Interface:
    """How a file is called, and what it may use.

    ``pixels``: the file takes 0 to 255 and normalises itself (always with ``uint8``). ``batch`` 0 is a free batch; None is
    what suits the format. ``bare``: short names, no metadata. ``saturating_cpu``: weights of at most 7 bits, see `saturation`.
    ``allow_float``: what a runtime cannot take as integers may be float. ``int4``: which LiteRT layers of at most 4 bits are
    stored so: those that are not slower for it, none (for older runtimes), or all.
    """

    input: InputType = "float32"
    layout: Layout = "nchw"
    pixels: bool = False
    head: Head = "scores"
    batch: int | None = None
    max_opset: int | None = None
    bare: bool = False
    saturating_cpu: bool = False
    allow_float: bool = False
    int4: Int4 = "fast"

    def __post_init__(self) -> None:
        for value, kind, what in (
            (self.input, InputType, "input"),
            (self.layout, Layout, "layout"),
            (self.head, Head, "head"),
            (self.int4, Int4, "use of INT4"),
        ):
            if value not in get_args(kind):
                raise UsageError(f"Unknown {what} '{value}'; choose {' or '.join(get_args(kind))}.")
        if self.batch is not None and self.batch < 0:
            raise UsageError(f"A batch of {self.batch} cannot be; give 1 or more, or 0 for a free batch.")
        if self.max_opset is not None and self.max_opset not in IR_VERSIONS:
            raise UsageError(
                f"Opset {self.max_opset} cannot be written; choose {min(IR_VERSIONS)} to {max(IR_VERSIONS)}."
            )

    @property
    def takes_pixels(self) -> bool:
        """Whether the file normalises by itself."""
        return self.pixels or self.input == "uint8"

    @property
    def described(self) -> str:
        """What a file says of its own interface, as JSON."""
        return json.dumps({"pixels": self.takes_pixels, "layout": self.layout, "head": self.head})

    @property
    def is_plain(self) -> bool:
        """Whether nothing is added around the network."""
        return not self.takes_pixels and self.layout == "nchw" and self.head == "scores"

    def opset(self, limit: int) -> int:
        """The highest opset that may be written where ``limit`` is the target's."""
        return limit if self.max_opset is None else min(limit, self.max_opset)

    def batch_or(self, usual: int | None) -> int | None:
        """A fixed batch size, or None for a free one."""
        return usual if self.batch is None else self.batch or None

    def images(self, images: Images, how: Preprocessing) -> NDArray[Any]:
        """Normalised ``[N, C, H, W]`` as this file takes them."""
        given: NDArray[Any] = _to_pixels(images, how) if self.takes_pixels else images
        if self.input == "uint8":
            given = given.astype(np.uint8)
        if self.layout == "nhwc":
            given = np.ascontiguousarray(given.transpose(0, 2, 3, 1))
        return given


PLAIN = Interface()


def _channels(values: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(1, -1, 1, 1)


def _to_pixels(images: Images, how: Preprocessing) -> Images:
    pixels: Images = np.rint((images * _channels(how.std) + _channels(how.mean)) * 255).clip(0, 255).astype(np.float32)
    return pixels


def on_pixel_grid(images: Images, how: Preprocessing) -> Images:
    """Normalised images whose pixels are whole numbers from 0 to 255."""
    result: Images = (_to_pixels(images, how) / np.float32(255) - _channels(how.mean)) / _channels(how.std)
    return result


def adapt(model: onnx.ModelProto, interface: Interface, how: Preprocessing) -> onnx.ModelProto:
    """``model`` with ``interface`` around it; a plain one is returned as it is. Input and output keep their names."""
    if interface.bare:
        _strip(model)
    if interface.is_plain:
        return model
    graph = model.graph
    entry, result = graph.input[0].name, graph.output[0].name
    inner, scores = f"{entry}_normalised", f"{result}_scores"
    for found in graph.node:
        found.input[:] = [inner if name == entry else name for name in found.input]
        found.output[:] = [scores if name == result else name for name in found.output]
        found.input[:] = [scores if name == result else name for name in found.input]
    before = _front(graph, interface, how, entry, inner)
    for number, added in enumerate(before):
        graph.node.insert(number, added)
    graph.node.extend(_head(graph, interface, scores, result))
    if not interface.bare:
        model.metadata_props.append(onnx.StringStringEntryProto(key=PROPERTY, value=interface.described))
    return model


def _front(
    graph: onnx.GraphProto, interface: Interface, how: Preprocessing, entry: str, inner: str
) -> list[onnx.NodeProto]:
    """Transpose, Cast, ``pixel * 1/(255 std) - mean/std``; the declared input changes with them."""
    kind = graph.input[0].type.tensor_type
    if interface.layout == "nhwc":
        batch, channels, height, width = (
            onnx.TensorShapeProto.Dimension.FromString(d.SerializeToString()) for d in kind.shape.dim
        )
        del kind.shape.dim[:]
        kind.shape.dim.extend([batch, height, width, channels])
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if interface.layout == "nhwc":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    if interface.input == "uint8":
        kind.elem_type = TensorProto.UINT8
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
    if interface.takes_pixels:
        factor, shift = 1 / (255 * _channels(how.std)), -_channels(how.mean) / _channels(how.std)
        graph.initializer.extend([tensor("pixel_scale", factor.astype(np.float32)), tensor("pixel_shift", shift)])
        steps += [("Mul", ["pixel_scale"], {}), ("Add", ["pixel_shift"], {})]
    names = [entry, *(f"{entry}_{number}" for number in range(1, len(steps))), inner]
    if not steps:
        return [node("Identity", [entry], [inner])]
    return [
        node(op, [names[number], *more], [names[number + 1]], **attributes)
        for number, (op, more, attributes) in enumerate(steps)
    ]


def _head(graph: onnx.GraphProto, interface: Interface, scores: str, result: str) -> list[onnx.NodeProto]:
    if interface.head == "scores":
        return [node("Identity", [scores], [result])]
    if interface.head == "softmax":
        return [node("Softmax", [scores], [result], axis=1)]
    kind = graph.output[0].type.tensor_type
    kind.elem_type = TensorProto.INT64
    del kind.shape.dim[1]
    return [node("ArgMax", [scores], [result], axis=1, keepdims=0)]


def _strip(model: onnx.ModelProto) -> None:
    """Short names for everything inside, no node names, no metadata."""
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    names, new = Names(sorted(kept)), {name: name for name in kept}
    for found in graph.initializer:
        new[found.name] = found.name = new.setdefault(found.name, names.new())
    for found in graph.node:
        found.ClearField("name")
        for value in found.output:
            new.setdefault(value, names.new())
        found.input[:] = [new[name] for name in found.input]
        found.output[:] = [new[name] for name in found.output]
    del model.metadata_props[:]
    del graph.value_info[:]
    model.producer_name = ""


def signature(value: onnx.ValueInfoProto) -> list[int | str]:
    """The declared shape of an input or output."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
