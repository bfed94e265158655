"""Integer weights at their bits: what ONNX Runtime unpacks is what was packed, and never larger than int8."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompress.exporters import packing
from edgecompress.exporters.onnx_writing import IR_VERSIONS, Names, tensor
from edgecompress.exporters.packing import Stored, store
from edgecompress.exporters.runners import OnnxRuntimeRunner

SHAPES = ((3, 5, 3, 3), (7, 13), (8, 4, 3, 3), (1, 1), (5, 1, 3, 3), (40, 50))
OPSETS = (17, 18, 20, 21, 24, 25)


def integers(shape, bits: int, zeros: float, seed: int = 0) -> np.ndarray:
    """Every code of ``bits`` without the lowest, both ends included, with a share of zeros."""
    random = np.random.default_rng(seed)
    high = 2 ** (bits - 1) - 1
    values = random.integers(-high, high + 1, shape).astype(np.int8)
    values.ravel()[:2] = (high, -high)[: values.size]
    values[random.random(shape) < zeros] = 0
    return values


def unpacked(stored: Stored, dimensions: int) -> np.ndarray:
    """What the nodes yield in ONNX Runtime."""
    output = helper.make_tensor_value_info("unpacked", TensorProto.INT8, [None] * dimensions)
    nodes = [*stored.nodes, helper.make_node("Identity", [stored.output], ["unpacked"])]
    initializers = list(stored.initializers)
    unused = helper.make_tensor_value_info("unused_input", TensorProto.FLOAT, [1])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [unused], [output], initializers),
        opset_imports=[helper.make_opsetid("", max(stored.opset, 17))],
        ir_version=IR_VERSIONS[max(stored.opset, 17)],
    )
    onnx.checker.check_model(model)
    return OnnxRuntimeRunner(model.SerializeToString()).run(np.zeros(1, np.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_integers_come_back_exactly(bits, shape):
    for zeros in (0.0, 0.6, 0.97, 1.0):
        values = integers(shape, bits, zeros, seed=bits)
        found = unpacked(store(values, bits, Names(), max_opset=25), values.ndim)
        assert found.dtype == np.int8 and np.array_equal(found, values)


STORAGES = {
    "int8": (packing._as_int8, range(2, 9)),
    "int4": (packing._as_int4, range(2, 5)),
    "int2": (packing._as_int2, (2,)),
    "planes": (packing._as_planes, range(2, 8)),
    "parts": (packing._as_parts, (2, 3, 5, 6, 7)),
    "parts of no container": (partial(packing._as_parts, container=0), (2, 3)),
    "sparse": (packing._as_sparse, range(2, 9)),
}


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (7, 13), (8, 4, 3, 3)], ids=str)
def test_each_storage_is_exact_where_it_may_be_chosen(name, shape):
    write, widths = STORAGES[name]
    for bits in widths:
        for zeros in (0.0, 0.5, 1.0):
            values = integers(shape, bits, zeros, seed=7)
            assert np.array_equal(unpacked(write(values, bits, Names()), values.ndim), values)


@pytest.mark.parametrize("bits", range(2, 9))
def test_storage_is_never_larger_than_int8(bits):
    for shape in SHAPES:
        for zeros in (0.0, 0.3, 0.9):
            values = integers(shape, bits, zeros)
            plain = packing._as_int8(values, 8, Names()).size_bytes
            assert store(values, bits, Names(), max_opset=25).size_bytes <= plain


def test_size_is_what_the_file_grows_by():
    def file_bytes(stored: Stored) -> int:
        graph = helper.make_graph(list(stored.nodes), "g", [], [], list(stored.initializers))
        return graph.ByteSize() - helper.make_graph([], "g", [], []).ByteSize()

    for bits in (2, 3, 4, 6, 8):
        for shape in ((7, 13), (40, 50), (16, 16, 3, 3)):
            stored = store(integers(shape, bits, 0.4), bits, Names(), max_opset=25)
            assert abs(stored.size_bytes - file_bytes(stored)) <= 2 * len(stored.nodes) + 2 * len(stored.initializers)


def test_large_tensor_takes_its_bits_and_a_sparse_one_less():
    size = 64 * 64 * 9
    for bits in range(2, 8):
        dense = store(integers((64, 64, 3, 3), bits, 0.0), bits, Names(), max_opset=25).size_bytes
        assert size * bits / 8 <= dense < size * bits / 8 + 620
    mostly_zero = store(integers((64, 64, 3, 3), 8, 0.9), 8, Names(), max_opset=25)
    assert mostly_zero.kind == "sparse" and mostly_zero.size_bytes < size * (1 / 8 + 0.1) * 1.1 + 500


@pytest.mark.parametrize("max_opset", OPSETS)
def test_opset_limit_is_obeyed_and_named_truly(max_opset):
    for bits in range(2, 9):
        for zeros in (0.0, 0.9):
            values = integers((40, 50), bits, zeros)
            stored = store(values, bits, Names(), max_opset=max_opset)
            assert stored.opset <= max_opset
            for node in stored.nodes:
                assert onnx.defs.get_schema(node.op_type, max(stored.opset, 17)).since_version <= max(stored.opset, 17)
            assert np.array_equal(unpacked(stored, values.ndim), values)


@pytest.mark.parametrize("bits", (2, 3, 5, 6, 7))
def test_index_of_a_byte_is_exact_too(bits, monkeypatch):
    monkeypatch.setattr(packing, "_BYTE_INDEX", 100)
    for shape in ((8, 4, 3, 3), (7, 17)):
        values = integers(shape, bits, 0.2)
        stored = packing._as_parts(values, bits, Names())
        assert TensorProto.UINT8 in {tensor.data_type for tensor in stored.initializers}
        assert np.array_equal(unpacked(stored, values.ndim), values)


def test_largest_layers_take_the_storages_that_load_in_few_steps(monkeypatch):
    """Each step that is folded costs time and memory in proportion to the layer."""
    monkeypatch.setattr(packing, "LARGE", 16_000)
    monkeypatch.setattr(packing, "_SMALL", 1000)
    for zeros in (0.0, 0.95):
        large, small = integers((128, 128), 7, zeros), integers((120, 120), 7, zeros)
        assert store(large, 7, Names(), max_opset=25).kind == "int8"
        assert store(small, 7, Names(), max_opset=25).kind == ("sparse" if zeros else "dense7")
    for bits in (2, 3, 5, 6):
        values = integers((128, 128), bits, 0.0)
        stored = store(values, bits, Names(), max_opset=25)
        assert len(stored.nodes) <= 5 and stored.size_bytes < values.size * bits / 8 + 500
        assert store(values, bits, Names(), max_opset=18).kind == "int8"


def test_without_unpacking_only_casts_are_chosen():
    for bits in range(2, 9):
        stored = store(integers((40, 50), bits, 0.9), bits, Names(), max_opset=25, unpack=False)
        assert stored.kind == {2: "int2", 3: "int4", 4: "int4"}.get(bits, "int8")
        assert {node.op_type for node in stored.nodes} <= {"Cast"}


def test_names_are_short_unique_and_not_reserved():
    names = Names(("b", "ab"))
    made = [names.new() for _ in range(60)]
    assert made[:3] == ["a", "c", "d"] and len(set(made)) == 60 and not {"b", "ab"} & set(made)
    assert tensor("x", np.float32(3)).dims == []


@pytest.mark.parametrize(
    ("kind", "bits", "zeros", "max_opset"), [("dense6", 6, 0.0, 18), ("dense7", 7, 0.0, 25), ("sparse", 8, 0.9, 25)]
)
def test_layers_share_the_tables_that_unpack_them_but_never_weights(kind, bits, zeros, max_opset):
    names, held, values = Names(), {}, integers((32, 64, 3, 3), bits, zeros)
    first, second = (store(values, bits, names, max_opset=max_opset, held=held) for _ in range(2))
    assert first.kind == second.kind == kind
    assert first.tables and not second.tables and len(second.weights) == len(first.weights) > 0
    both = replace(
        second, nodes=first.nodes + second.nodes, weights=first.weights + second.weights, tables=first.tables
    )
    assert np.array_equal(unpacked(both, 4), values)
    assert np.array_equal(unpacked(replace(both, output=first.output), 4), values)
