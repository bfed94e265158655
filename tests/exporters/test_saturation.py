"""Weights of 7 bits equal the integer emulator under the kernels that ONNX Runtime chooses on any x86 CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_networks import integer_case

from edgecompress.exporters.artifacts import open_artifact
from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.onnx_writing import metadata_of
from edgecompress.exporters.runners import OnnxRuntimeRunner, has_vnni, is_x86
from edgecompress.exporters.saturation import SATURATION, weights_saturate, without_saturation
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.exporters.to_ort_format import check_same, optimised
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.spec import Preprocessing

needs_x86 = pytest.mark.skipif(not is_x86(), reason="ONNX Runtime is only known to be exact on x86")


def difference(quantized, images, *, precise: bool) -> float:
    found = OnnxRuntimeRunner(integer_model(quantized).SerializeToString(), precise=precise).run(images.numpy())
    with torch.no_grad():
        return float(np.abs(found - emulate(quantized, images).numpy()).max())


@needs_x86
@pytest.mark.parametrize("name", ["residual", "gated", "dense"])
def test_seven_bits_are_exact_with_the_fast_kernels(name):
    case = integer_case(name)
    eight = case.quantized(8, 8)
    safe = without_saturation(eight)
    assert {weight.bits for weight in safe.weights.values()} == {7}
    assert max(int(np.abs(weight.values).max()) for weight in safe.weights.values()) == 63
    assert difference(safe, case.images, precise=False) == 0
    assert difference(eight, case.images, precise=True) == 0
    if not has_vnni():
        assert difference(eight, case.images, precise=False) > 0


def test_fewer_bits_and_pruned_weights_are_left_alone():
    case = integer_case("residual")
    few = case.quantized(4, 8)
    assert without_saturation(few).weights == few.weights
    quantized = case.quantized(8, 8)
    name, weight = next(iter(quantized.weights.items()))
    values = weight.values.copy()
    values[::2] = 0
    pruned = replace(quantized, weights=dict(quantized.weights) | {name: replace(weight, values=values)})
    assert not without_saturation(pruned).weights[name].values[::2].any()


def test_the_target_says_so():
    assert weights_saturate(target_by_name("x86-avx2"))
    assert not any(weights_saturate(target_by_name(name)) for name in ("x86", "raspberry-pi-5", "jetson"))


@needs_x86
def test_the_file_says_that_the_fast_kernels_are_right(tmp_path):
    case = integer_case("residual")
    safe = without_saturation(case.quantized(8, 8))
    metadata = metadata_of(Preprocessing(size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3), ()) | {SATURATION: "none"}
    model = integer_model(safe, metadata=metadata).SerializeToString()
    (tmp_path / "x.onnx").write_bytes(model)
    images = case.images.numpy()
    with torch.no_grad():
        wanted = emulate(safe, case.images).numpy()
    np.testing.assert_array_equal(open_artifact(tmp_path / "x.onnx").runner.run(images), wanted)
    for name, ort_format in (("x.ort", True), ("y.onnx", False)):
        (tmp_path / name).write_bytes(optimised(model, ort_format=ort_format))
        np.testing.assert_array_equal(open_artifact(tmp_path / name).runner.run(images), wanted)
    other = optimised(integer_model(case.quantized(6, 8)).SerializeToString(), ort_format=True)
    assert check_same(other, model, images).failures
