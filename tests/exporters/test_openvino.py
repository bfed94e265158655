"""OpenVINO's file: every operator compared in OpenVINO itself, and what its CPU kernels saturate."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import onnx
import pytest
from sample_networks import NETWORKS, OPERATOR_NETWORKS, integer_case
from test_formats_contract import files, make_source

from edgecompress.describe import network_of
from edgecompress.errors import GoalMissedError
from edgecompress.exporters import check_openvino
from edgecompress.exporters.formats import export
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.spec import CompressionPolicy

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")

SEVEN_BITS = Interface(saturating_cpu=True)  # on every CPU each product is then exact


def source_of(case, quantized, interface=SEVEN_BITS):
    source = make_source("residual")
    return replace(
        source, graph=case.graph, quantized=quantized, images=case.images.numpy(), interface=interface,
        network=network_of(case.graph, "case"), policy=CompressionPolicy(model="case"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scales"),
    [*((name, "channel") for name in (*NETWORKS, *OPERATOR_NETWORKS)), ("residual", "tensor"), ("mobile", "tensor")],
)
def test_every_operator_is_compared_and_right(name, scales, tmp_path):
    case = integer_case(name, scales)
    artifact = export(source_of(case, case.quantized(8, 8)), "openvino", tmp_path)
    assert artifact.checks["openvino_integer_layers"] == len(case.graph.layers)
    assert artifact.checks["operators_compared"] > len(case.graph.layers)
    assert float(artifact.checks["operator_difference"].split()[0]) <= 1
    assert "openvino_saturates" not in artifact.checks


def test_weights_are_stored_in_types_that_it_runs_in_integers(tmp_path):
    case = integer_case("residual")
    quantized = case.simulator.quantized(case.random_choices(0))
    artifact = export(source_of(case, quantized), "openvino", tmp_path)
    assert artifact.checks["openvino_integer_layers"] == 7 and artifact.opset == 21
    unpacked, written = integer_model(quantized, max_opset=21), onnx.load(tmp_path / artifact.path)
    assert "Gather" in {node.op_type for node in unpacked.graph.node}  # look-ups, which OpenVINO computes wrongly
    assert "Gather" not in {node.op_type for node in written.graph.node}


def test_an_operator_that_computes_something_else_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    case, real = integer_case("residual"), check_openvino.showing_values

    def other_weights(quantized, **how):
        weight = quantized.weights["a1.0"]
        changed = replace(weight, values=weight.values[::-1].copy())
        return real(replace(quantized, weights={**quantized.weights, "a1.0": changed}), **how)

    monkeypatch.setattr(check_openvino, "showing_values", other_weights)
    with pytest.raises(
        GoalMissedError, match=r"openvino export failed its proof: 1 values are not what .* \(relu_?\d*: "
    ):
        export(source_of(case, case.quantized(8, 8)), "openvino", tmp_path)
    assert files(tmp_path) == []


def test_layers_that_saturate_on_this_cpu_are_named_and_answers_must_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(check_openvino, "has_vnni", lambda: False)
    monkeypatch.setattr(check_openvino, "is_x86", lambda: True)
    case = integer_case("residual")
    source = source_of(case, case.quantized(8, 8), Interface())
    artifact = export(source, "openvino", tmp_path)
    assert artifact.checks["openvino_saturates"].startswith("7 layers of 8-bit weights on this CPU: ")
    mixed = case.quantized(4, 8)
    assert "openvino_saturates" not in export(replace(source, quantized=mixed), "openvino", tmp_path).checks
    monkeypatch.setattr(check_openvino, "ENOUGH", 1.1)
    with pytest.raises(GoalMissedError, match=r"saturate on this CPU\. Export with --saturating-cpu"):
        export(source, "openvino", tmp_path)
    assert export(replace(source, quantized=mixed), "openvino", tmp_path).checks["openvino_agreement"] <= 1
