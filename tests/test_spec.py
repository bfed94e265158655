"""The types that everything speaks: every file type survives a round trip, and budgets parse or say why not."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from edgecompress.errors import BadFileError, UnknownNameError, UsageError
from edgecompress.files import read_document, write_document
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.report_spec import (
    ArtifactRow,
    Column,
    Goal,
    LayerRow,
    RunReport,
)
from edgecompress.spec import (
    Architecture,
    Artifact,
    Budget,
    ChannelGroup,
    ChannelTerm,
    CompressionPolicy,
    Config,
    Cost,
    Document,
    LayerChoice,
    LayerSpec,
    Network,
    Preprocessing,
    parse_budgets,
)

LAYER = LayerSpec(
    name="conv1", kind="conv", in_channels=3, out_channels=8, kernel=(3, 3), stride=(2, 2), input_hw=(16, 16),
    output_hw=(8, 8), macs=13_824, params=216, out_terms=(ChannelTerm(group="conv1", per_channel=1),),
)  # fmt: skip
COST = Cost(
    macs=10, sparse_macs=8, params=20, nonzeros=15, size_bytes=300, bops=640, latency_us=3.5, latency_low_us=3.0,
    latency_high_us=4.5, kernels_measured=2, kernels_interpolated=1,
)  # fmt: skip
PREPROCESSING = Preprocessing(size=(16, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
CONFIG = Config(budget="flops=0.5x", max_accuracy_drop=1.5, weights="some.safetensors", table="table.csv")
COLUMN = Column(
    accuracy=0.91, cost=COST, average_weight_bits=4.25, host_latency_us=41.0, host_latency_p90_us=43.0, file="a.onnx"
)
EXAMPLES: dict[type[Document], Document] = {
    Network: Network(
        model="net-0123", input_shape=(3, 16, 16), layers=(LAYER,), fixed_params=7,
        groups=(
            ChannelGroup(id="conv1", width=8, members=("conv1",), norm_params_per_channel=2, prunable=False, reason="it"),
        ),
    ),
    CompressionPolicy: CompressionPolicy(
        model="net-0123", keep_channels={"conv1": 4}, provenance={"found_by_prune": "ddpg"},
        layers={"conv1": LayerChoice(keep_elements=1 / 3, weight_bits=3, activation_bits=7)},
    ),
    Artifact: Artifact(
        path="model.onnx", format="onnx", dialect="float", sha256="ab", size_bytes=9, policy_sha256="cd",
        inputs={"input": ["N", 3, 16, 16]}, outputs={"output": ["N", 10]}, opset=17, ir_version=8,
        preprocessing=PREPROCESSING, checks={"relative_error": 1e-7, "float": 0, "verified": True, "islands": "none"},
    ),
    Config: CONFIG,
    Architecture: Architecture(
        model="resnet8", classes=10, input_shape=(3, 32, 32), keep_channels={"a": 3}, preprocessing=PREPROCESSING
    ),
    RunReport: RunReport(
        name="run", config=CONFIG, target=target_by_name("jetson"), latency_source="ESTIMATED", original=COLUMN,
        compressed=COLUMN, original_int8_us=30.0, original_int8_bytes=None, found_by={"prune": "ddpg"},
        artifacts=(ArtifactRow(name="a.onnx", format="onnx", size_bytes=9, accuracy=0.9, checks={"x": 1}),),
        layers=(
            LayerRow(
                name="conv1", kind="conv", in_channels=(3, 3), out_channels=(8, 4), macs=(10, 5), keep_elements=0.5,
                weight_bits=4, activation_bits=8, stored_bytes=54,
            ),
        ),
        goals=(Goal(goal="flops=0.5x", value=5, limit=5, unit="MACs", holds=True),),
        evaluations={"prune:ddpg": 3}, seconds={"stage 1": 1.25}, provenance={"torch": "2"},
    ),
}  # fmt: skip


def document_types() -> list[type[Document]]:
    own = [kind for kind in Document.__subclasses__() if kind.__module__ == Document.__module__]
    return sorted(own, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", document_types(), ids=lambda kind: kind.__name__)
def test_document_survives_a_round_trip(kind, tmp_path):
    path = tmp_path / "document.json"
    write_document(path, EXAMPLES[kind])
    assert read_document(path, kind, "example") == EXAMPLES[kind]
    assert json.loads(path.read_text())["schema_version"] == 1


@pytest.mark.parametrize("kind", document_types(), ids=lambda kind: kind.__name__)
def test_unknown_key_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "document.json"
    path.write_text(json.dumps(EXAMPLES[kind].model_dump(mode="json") | {"surprise": 1}))
    with pytest.raises(BadFileError, match=r"example .*document\.json is wrong at 'surprise'"):
        read_document(path, kind, "example")


@pytest.mark.parametrize("kind", document_types(), ids=lambda kind: kind.__name__)
def test_other_schema_version_is_refused_and_named(kind, tmp_path):
    path = tmp_path / "document.json"
    for version in (99, None):
        path.write_text(json.dumps(EXAMPLES[kind].model_dump(mode="json") | {"schema_version": version}))
        with pytest.raises(BadFileError, match=f"schema version {version}; this edgecompress reads 1"):
            read_document(path, kind, "example")


def test_values_are_frozen_and_ranges_hold():
    with pytest.raises(ValidationError):
        COST.macs = 3
    for wrong in ({"weight_bits": 1}, {"weight_bits": 33}, {"keep_elements": 0.0}, {"keep_elements": 1.1}):
        with pytest.raises(ValidationError):
            LayerChoice(**wrong)
    for wrong in ({"episodes": 7}, {"finetune_epochs": 0}, {"learning_rate": 0.0}, {"stages": ("cut",)}, {"epochs": 3}):
        with pytest.raises(ValidationError):
            Config(budget="flops=0.5x", **wrong)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("flops=0.5x", [("flops", 0.5, True, None)]),
        ("flops=0.5X, size=0.125x", [("flops", 0.5, True, None), ("size", 0.125, True, None)]),
        ("size=40KB", [("size", 40_000, False, None)]),
        ("size=2MiB", [("size", 2 * 1024**2, False, None)]),
        ("flops = 1.5M", [("flops", 1.5e6, False, None)]),
        ("params=123", [("params", 123, False, None)]),
        ("bops=2T", [("bops", 2e12, False, None)]),
        ("latency@int8=3ms", [("latency", 3000, False, "int8")]),
        ("latency=0.5x", [("latency", 0.5, True, None)]),
        ("latency=250us,params=.5x", [("latency", 250, False, None), ("params", 0.5, True, None)]),
        ("flops=1x", [("flops", 1.0, True, None)]),
        ("flops=1e6", [("flops", 1e6, False, None)]),
    ],
)
def test_budget_parses(text, wanted):
    assert [(b.metric, b.limit, b.relative, b.precision) for b in parse_budgets(text)] == [
        (metric, pytest.approx(limit), relative, precision) for metric, limit, relative, precision in wanted
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "The budget is empty"),
        (" , ", "The budget is empty"),
        ("flops", "Budget 'flops' does not parse; expected METRIC=LIMIT"),
        ("flops=half", "does not parse"),
        ("flops=-0.5x", "does not parse"),
        ("flops=0.5x;size=3KB", "does not parse"),
        ("flop=0.5x", "Unknown budget metric 'flop'. Did you mean 'flops'?"),
        ("latency@int4=3ms", "Unknown precision 'int4'. Did you mean 'int8'?"),
        ("size@int8=3KB", "only latency is measured at a precision; write 'size=3KB'"),
        ("flops=0x", "must be above zero"),
        ("flops=1.5x", "is above the original network; a relative limit lies in (0, 1]"),
        ("size=3ms", "has the unknown unit 'ms'; known for size: x, B, KB, MB, GB, KIB, MIB"),
        ("latency=3", "has the unknown unit ''; known for latency: x, us, ms, s"),
        ("flops=0.5x,flops=0.4x", "names 'flops' twice"),
        ("latency=3ms,latency@int8=2ms", "names 'latency' twice"),
    ],
)
def test_bad_budget_has_its_sentence_and_exit_code_2(text, sentence):
    with pytest.raises(UsageError) as caught:
        parse_budgets(text)
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2


def test_budget_prints_as_it_parses():
    for text in ("flops=0.5x", "latency@int8=3000 us", "size=40000 B", "params=123"):
        assert str(parse_budgets(text)[0]) == text


def test_budget_turns_absolute():
    assert Budget(metric="size", limit=0.25, relative=True).absolute(1000) == 250
    assert Budget(metric="size", limit=640, relative=False).absolute(1000) == 640


def test_cost_answers_each_metric_and_says_its_weakest_evidence():
    assert [COST.metric(name) for name in ("flops", "params", "size", "bops", "latency")] == [10, 20, 300, 640, 3.5]
    assert COST.latency_source == "interpolated"
    assert COST.model_copy(update={"kernels_estimated": 1}).latency_source == "estimated"
    assert COST.model_copy(update={"kernels_interpolated": 0}).latency_source == "measured"
    with pytest.raises(UsageError, match="no latency"):
        COST.model_copy(update={"latency_us": None}).metric("latency")


def test_unknown_name_lists_the_known_and_the_nearest():
    error = UnknownNameError("target", "jetsn", ["jetson", "x86"])
    assert str(error) == "Unknown target 'jetsn'. Did you mean 'jetson'? Known: jetson, x86."
    assert "Did you mean" not in str(UnknownNameError("target", "zzzz", ["jetson", "x86"]))
