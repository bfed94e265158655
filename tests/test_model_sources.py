"""Networks that are not ours, end to end: a user's factory, weights from a file, an ONNX file, a torch.export program."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from command_line import call
from sample_networks import Concat, Flat, Mobile, Residual, Vgg, patterns, settled
from torch import nn

import edgecompress
from edgecompress.data import Dataset
from edgecompress.describe import GraphModule, network_of
from edgecompress.errors import BadDataError, BadFileError, BadModelError, GoalMissedError, UsageError
from edgecompress.exporters.runners import OnnxRuntimeRunner, is_x86
from edgecompress.exporters.to_onnx import float_model
from edgecompress.finetune import TrainSettings, accuracy_and_loss, train
from edgecompress.graph import Node, build_graph
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.onnx_files import import_graph, layer_name
from edgecompress.original import fixed_graph_options, original_network
from edgecompress.progress import Silent
from edgecompress.runs import RunFolder
from edgecompress.spec import Config
from edgecompress.trace import trace

TINY = {"episodes": 12, "finetune_epochs": 1, "qat_epochs": 1, "threads": 1}


class Notes(Silent):
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def stage(self, title: str, total: int) -> None:
        self.stages.append(title)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return patterns()


@pytest.fixture(scope="module")
def trained(data: Dataset) -> nn.Module:
    torch.manual_seed(0)
    return train(Residual(4), data, TrainSettings(epochs=6, learning_rate=0.05, distill=0.0))


def written(model: nn.Module, path: Path, size: int = 16) -> Path:
    path.write_bytes(float_model(build_graph(model, (3, size, size), "net")).SerializeToString())
    return path


def text_model(text: str, path: Path, **constants: np.ndarray) -> Path:
    """An ONNX file from onnx's own text syntax, with ``constants`` as initialisers."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.save(model, path)
    return path


def config(**fields: object) -> Config:
    return Config.model_validate({"budget": "size=0.9x", "finetune_epochs": 1, **fields})


def same_outputs(
    first: Callable[[torch.Tensor], torch.Tensor], second: Callable[[torch.Tensor], torch.Tensor], size: int = 16
) -> None:
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(first(images), second(images), atol=1e-5)


# --------------------------------------------------------------------------------------------- an ONNX file, end to end


@pytest.fixture(scope="module")
def onnx_run(
    quick: None, digits: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[edgecompress.Run, Path, Notes]:
    """An ONNX file of a tiny network, compressed on digits through the API."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = train(Residual(10), digits, TrainSettings(epochs=5, learning_rate=0.1, distill=0.0))
    path, notes = written(model, folder / "mine.onnx", 32), Notes()
    run = edgecompress.compress(str(path), "digits", "x86", "size=0.45x", runs=folder / "runs", progress=notes, **TINY)
    return run, path, notes


def test_onnx_file_becomes_a_verified_integer_artifact(onnx_run, digits):
    run, _, _ = onnx_run
    artifact = next(
        row for row in run.report.artifacts if row.format == "onnxruntime" and row.name == "model.int8.onnx"
    )
    assert artifact.checks["integer_layers"] == 7 and artifact.checks["float_conv_or_gemm"] == 0
    assert artifact.checks["emulator_agreement"] >= 0.995
    if is_x86():
        assert artifact.checks["emulator_max_difference"] == 0.0
    assert not run.missed and artifact.size_bytes <= 0.45 * run.report.original.cost.size_bytes
    assert artifact.accuracy > run.report.original.accuracy - 0.1 > 0.3
    found = OnnxRuntimeRunner(run.path / "exports/model.int8.onnx").run(
        digits.normalise(digits.test.images[:8]).numpy()
    )
    assert found.shape == (8, 10)


def test_onnx_run_skips_pruning_and_says_why(onnx_run):
    run, path, notes = onnx_run
    assert run.path.name == "mine-digits-x86"
    assert run.report.config.stages == ("quantize",) and run.report.found_by["prune"] == "skipped"
    assert any("stage 1 (pruning) is skipped, because a file says" in text for text in notes.said)
    assert not any("Stage 1" in title or "Reference" in title for title in notes.stages)
    assert RunFolder(run.path).architecture().fixed_graph and not (run.path / "model.safetensors").exists()
    assert {row.name for row in run.report.layers} == {layer.name for layer in import_graph(path, (3, 32, 32)).layers}
    assert run.report.original.cost.macs == run.report.compressed.cost.macs > 0


def test_onnx_run_loads_with_the_same_outputs_and_without_the_file(onnx_run, tmp_path):
    run, path, _ = onnx_run
    file = OnnxRuntimeRunner(path)
    path.rename(path.with_suffix(".away"))
    try:
        model = edgecompress.load(run.path)
    finally:
        path.with_suffix(".away").rename(path)
    same_outputs(model, lambda x: torch.from_numpy(file.run(x.numpy())), 32)
    (tmp_path / "arch.json").write_bytes((run.path / "arch.json").read_bytes())
    with pytest.raises(BadFileError, match=r"has no graph\.onnx"):
        edgecompress.load(tmp_path)
    (tmp_path / "graph.onnx").write_bytes(b"torn")
    with pytest.raises(BadModelError, match=r"graph\.onnx cannot be read"):
        edgecompress.load(tmp_path)


def test_onnx_run_exports_again_from_its_folder(onnx_run):
    run, _, _ = onnx_run
    before = (run.path / "exports/model.int8.onnx").read_bytes()
    edgecompress.export_run(run.path, "onnxruntime")
    assert (run.path / "exports/model.int8.onnx").read_bytes() == before


def test_onnx_run_resumes_to_the_same_end(onnx_run, digits):
    run, path, _ = onnx_run
    before = (run.path / "policy.json").read_bytes()
    again = edgecompress.compress(
        str(path), "digits", "x86", "size=0.45x", runs=run.path.parent, resume=True, **TINY
    )  # fmt: skip
    assert (again.path / "policy.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--stages", "prune"), "cannot be pruned: a file says what is computed"),
        (("--budget", "flops=0.5x"), "The budget flops=0.5x needs pruning, and"),
        (("--budget", "size=0.5x,params=0.5x"), "The budget params=0.5x needs pruning, and"),
        (("--weights", "none"), "holds its own weights; --weights none cannot be used"),
        (("--model", "away.onnx"), "There is no model file at away.onnx"),
    ],
)
def test_what_a_fixed_graph_cannot_do_is_refused_with_the_reason(tmp_path, options, sentence):
    path = written(settled(Residual(10)), tmp_path / "net.onnx", 32)
    called = call("compress", "--model", path, "--target", "x86", "--runs", tmp_path / "runs", *options)
    assert called.code == 2 and sentence in called.err and "Traceback" not in called.err


def test_default_budget_of_a_fixed_graph_is_one_that_bits_can_meet():
    x86 = target_by_name("x86")
    assert fixed_graph_options("net.onnx", x86, None, ("prune", "quantize")) == {
        "stages": ("quantize",), "budget": "size=0.3x"
    }  # fmt: skip
    assert fixed_graph_options("net.onnx", x86, "bops=0.1x", None)["budget"] == "bops=0.1x"
    with pytest.raises(UsageError, match="computes no integers, so there is nothing to compress"):
        fixed_graph_options("net.onnx", x86.model_copy(update={"integer_kernels": False}), None, None)


def test_budget_that_bits_cannot_meet_names_the_smallest(data, trained, tmp_path):
    path = written(trained, tmp_path / "net.onnx")
    with pytest.raises(GoalMissedError, match=r"The budget size=.* cannot be met: the smallest size"):
        edgecompress.compress(str(path), data, "jetson", "size=0.05x", runs=tmp_path, **TINY)


# --------------------------------------------------------------------------------------------- a torch.export program


@pytest.fixture(scope="module")
def program(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(torch.export.export(trained, (torch.zeros(1, 3, 16, 16),)), path)
    return path


def test_program_is_refused_without_trust(program, data, tmp_path):
    with pytest.raises(BadModelError, match=r"may carry pickles.*--trust"):
        edgecompress.compress(str(program), data, "x86", runs=tmp_path)


def test_trusted_program_is_compressed_and_loads_again(quick, program, trained, data, tmp_path):
    run = edgecompress.compress(str(program), data, "x86", "size=0.5x", runs=tmp_path, trust=True, **TINY)
    assert not run.missed and run.report.config.stages == ("quantize",)
    same_outputs(edgecompress.load(run.path), trained)
    assert {row.weight_bits for row in run.report.layers} <= set(range(2, 9))


def test_broken_program_is_one_sentence(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"no archive")
    with pytest.raises(BadModelError, match=r"cannot be read as a torch\.export program"):
        import_graph(tmp_path / "net.pt2", (3, 16, 16), trust=True)


# -------------------------------------------------------------------------------------- reading other people's ONNX


@pytest.mark.parametrize("network", [Residual, Vgg, Mobile, Concat, Flat])
def test_graph_is_described_as_the_module_is_traced(network, tmp_path):
    model = settled(network(4), 2)
    graph = import_graph(written(model, tmp_path / "net.onnx"), (3, 16, 16))
    bare = {"in_terms", "out_terms", "params"}  # BatchNorm is folded, so a layer has a bias
    wanted = {layer.name: layer.model_dump(exclude=bare) for layer in trace(model, (3, 16, 16), "net").network.layers}
    assert {layer.name: layer.model_dump(exclude=bare) for layer in network_of(graph, "net").layers} == wanted
    described = network_of(graph, "net")
    assert sum(layer.params for layer in described.layers) + described.fixed_params == sum(
        value.size for value in graph.constants.values() if value.dtype.kind == "f"
    )
    same_outputs(GraphModule(graph), model)


HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
CONV = {"w": np.full((4, 3, 3, 3), 0.1, np.float32)}
CONV_BY_CHANNEL = {"w": np.arange(108, dtype=np.float32).reshape(4, 3, 3, 3) / 108}
OLD_STYLE = """
<ir_version: 7, opset_import: ["" : 11]>
g (float[8,3,16,16] x) => (float[8,5] y) {
  c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)
  n = BatchNormalization<epsilon=0.00001>(c, gamma, beta, mean, var)
  a = Clip(n, low, high)
  again = Conv<pads=[1,1,1,1]>(a, w2)
  shared = Conv<pads=[1,1,1,1]>(again, w2)
  r = Relu(shared)
  p = GlobalAveragePool(r)
  s = Shape(p)
  zero = Constant<value = int64 {0}>()
  b = Gather<axis=0>(s, zero)
  first = Constant<value = int64[1] {0}>()
  b1 = Unsqueeze<axes=[0]>(b)
  rest = Constant<value = int64[1] {-1}>()
  to = Concat<axis=0>(b1, rest)
  f = Reshape(p, to)
  h = MatMul(f, w3)
  k = Add(h, b3)
  y = Gemm<alpha=0.5, beta=2.0>(k, w4, b4)
}
"""


def test_old_style_file_with_a_fixed_batch_becomes_our_layers(tmp_path):
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    path = text_model(
        OLD_STYLE, tmp_path / "old.onnx", w=normal(8, 3, 3, 3), w2=normal(8, 8, 3, 3) / 8, gamma=normal(8), beta=normal(8),
        mean=normal(8), var=np.abs(normal(8)) + 0.5, low=np.float32(0), high=np.float32(6), w3=normal(8, 6), b3=normal(6),
        w4=normal(6, 5), b4=normal(5),
    )  # fmt: skip
    graph = import_graph(path, (3, 16, 16))
    assert [node.op for node in graph.nodes] == [
        "Conv", "Clip", "Conv", "Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Gemm"
    ]  # fmt: skip
    names = [layer.name for layer in graph.layers]
    assert names[:3] == ["w", "w2", "w2_again"] and len(set(names)) == 5
    gemm = graph.layers[-1]
    assert gemm.attributes == {"transB": 1} and graph.constants[gemm.inputs[1]].shape == (5, 6)
    file = OnnxRuntimeRunner(path)
    images = torch.from_numpy(normal(8, 3, 16, 16))
    with torch.no_grad():
        found = GraphModule(graph)(torch.cat([images, images]))[:8]  # a batch that the file itself refuses
    assert np.allclose(found.numpy(), file.run(images.numpy()), atol=1e-4)


def test_reshape_of_a_fixed_batch_takes_any_batch(tmp_path):
    text = HEAD + (
        "g (float[1,3,16,16] x) => (float[1,4,14,14] y) "
        "{ c = Conv(x, w) s = Reshape(c, to) t = Transpose<perm=[0,2,1,3]>(s) y = Reshape(t, back) }"
    )
    shapes = {"to": np.array([1, 2, 2, 196]), "back": np.array([1, 4, 14, 14])}
    path = text_model(text, tmp_path / "net.onnx", **CONV_BY_CHANNEL, **shapes)
    module = GraphModule(import_graph(path, (3, 16, 16)))
    images, file = torch.randn(3, 3, 16, 16), OnnxRuntimeRunner(path)
    wanted = np.concatenate([file.run(image[None].numpy()) for image in images])
    with torch.no_grad():
        assert np.allclose(module(images).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("/layer2/layer2.0/downsample/downsample.0/Conv", "layer2.0.downsample.0"),
        ("/features/features.1/conv/conv.0/conv.0.0/Conv", "features.1.conv.0.0"),
        ("/fc/MatMul/MatMulAddFusion", "fc"),
        ("Conv_12", "Conv_12"),
    ],
)
def test_layer_without_a_named_weight_is_called_after_its_module(node, name):
    assert layer_name(Node(node, "Conv", ("x", "onnx::Conv_61"), ("y",), {})) == name
    assert layer_name(Node(node, "Conv", ("x", "ConvBnFusion_W_stem.0.weight"), ("y",), {})) == "stem.0"


BAD_FILES = {
    "two outputs": (
        HEAD + "g (float[N,3,16,16] x) => (float[N,4,14,14] y, float[N,4,14,14] z) { y = Conv(x, w) z = Relu(y) }",
        CONV, "has 1 inputs and 2 outputs",
    ),
    "integers": (
        HEAD + "g (float[N,3,16,16] x) => (float[N,3,16,16] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        {"s": np.float32(0.1), "z": np.uint8(3)}, "is quantised already (it has QuantizeLinear)",
    ),
    "half": (
        HEAD + "g (float16[N,3,16,16] x) => (float16[N,3,16,16] y) { y = Relu(x) }", {}, "is not float32",
    ),
    "no layer": (
        HEAD + "g (float[N,3,16,16] x) => (float[N,3,16,16] y) { y = Relu(x) }", {}, "nothing to compress",
    ),
    "unknown operator": (
        HEAD + "g (float[N,3,16,16] x) => (float[N,4,14,14] y) { c = Conv(x, w) y = Erf(c) }",
        CONV, "The operator Erf at",
    ),
    "NaN": (
        HEAD + "g (float[N,3,16,16] x) => (float[N,4,14,14] y) { y = Conv(x, w) }",
        {"w": np.full((4, 3, 3, 3), np.nan, np.float32)}, "holds NaN or infinity",
    ),
    "other padding": (
        HEAD + 'g (float[N,3,16,16] x) => (float[N,4,16,16] y) { y = Conv<auto_pad="SAME_UPPER">(x, w) }',
        CONV, "outputs of shape",
    ),
    "wrong graph": (
        HEAD + "g (float[N,3,16,16] x) => (float[N,4,14,14] y) { y = Conv(x, v) }", CONV, "ONNX Runtime refuses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_file_that_cannot_be_used_has_its_sentence(tmp_path, case):
    text, constants, sentence = BAD_FILES[case]
    path = text_model(text, tmp_path / "bad.onnx", **constants)
    with pytest.raises(BadModelError) as caught:
        import_graph(path, (3, 16, 16))
    assert sentence in str(caught.value) and "bad.onnx" in str(caught.value) and "\n" not in str(caught.value)


def test_file_for_other_images_names_both_shapes_and_the_option(tmp_path):
    path = written(settled(Flat(4)), tmp_path / "net.onnx")
    with pytest.raises(
        BadDataError, match=r"takes images of shape \[3, 16, 16\], the data has \[3, 32, 32\].*--image-size 16"
    ):
        import_graph(path, (3, 32, 32))
    with pytest.raises(BadDataError, match=r"Export it for \[N, C, H, W\]"):
        import_graph(path, (1, 16, 16))


@pytest.mark.parametrize("content", [b"", b"no protobuf at all"])
def test_torn_file_is_one_sentence(tmp_path, content):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(BadModelError, match=r"net\.onnx cannot be read as an ONNX model"):
        import_graph(tmp_path / "net.onnx", (3, 16, 16))


def test_proof_refuses_a_graph_that_computes_something_else(tmp_path, monkeypatch):
    path = written(settled(Residual(4)), tmp_path / "net.onnx")
    from edgecompress import interpret

    monkeypatch.setitem(interpret.OPERATORS, "Relu", lambda node, args: args[0] * 0.9)
    with pytest.raises(BadModelError, match="computes something that our graph does not"):
        import_graph(path, (3, 16, 16))


# --------------------------------------------------------------------------- whose weights the original network has


FACTORIES = """
import torch
from torch import nn
from sample_networks import Residual
def trained(classes):
    model = Residual(classes)
    model.load_state_dict(torch.load("weights.pt", weights_only=True))
    return model
def fresh(classes): return Residual(classes)
def narrow(): return Residual(3)
def wide(): return Residual(6)
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch, trained):
    """A user's folder: a module with factories, weights, and the shell standing in it."""
    (tmp_path / "my_networks.py").write_text(FACTORIES)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_factory_of_the_working_directory_is_compressed_as_it_is_returned(quick, workplace, trained, data):
    notes = Notes()
    run = edgecompress.compress(
        "my_networks:trained", data, "x86", "flops=0.8x,size=0.6x", progress=notes, max_accuracy_drop=None, **TINY
    )
    assert run.path == Path("runs/my_networks.trained-patterns-x86") and not run.missed
    assert not any("Reference" in title for title in notes.stages)
    wanted = accuracy_and_loss(trained, data, data.test)[0]
    assert run.report.original.accuracy == pytest.approx(wanted)
    model = edgecompress.load(run.path)
    exported = OnnxRuntimeRunner(run.path / "exports/model.onnx")
    same_outputs(model, lambda x: torch.from_numpy(exported.run(x.numpy())))


def test_factory_with_weights_is_never_retrained(workplace, trained, data):
    for weights in (None, "DEFAULT"):
        notes = Notes()
        network = original_network("my_networks:trained", config(weights=weights), data, notes)
        assert all(torch.equal(value, trained.state_dict()[key]) for key, value in network.state_dict().items())
        assert not notes.said and not notes.stages and not network.training


def test_factory_with_fresh_weights_is_trained_and_says_so(workplace, data, monkeypatch):
    monkeypatch.setitem(sys.modules["edgecompress.original"].REFERENCE_EPOCHS, data.name, 6)
    notes = Notes()
    network = original_network("my_networks:fresh", config(), data, notes)
    assert "returns fresh weights" in notes.said[0] and notes.stages == [
        "Reference network my_networks:fresh on patterns"
    ]
    assert accuracy_and_loss(network, data, data.test)[0] > 0.5
    notes = Notes()
    as_returned = original_network("my_networks:fresh", config(weights="DEFAULT"), data, notes)
    assert not notes.stages
    assert accuracy_and_loss(as_returned, data, data.test)[0] < 0.5


def test_weights_none_trains_even_a_factory_with_weights(workplace, data, monkeypatch):
    monkeypatch.setitem(sys.modules["edgecompress.original"].REFERENCE_EPOCHS, data.name, 1)
    notes = Notes()
    original_network("my_networks:trained", config(weights="none"), data, notes)
    assert notes.stages == ["Reference network my_networks:trained on patterns"]


def test_weights_of_a_file_are_used_as_they_are(workplace, trained, data):
    notes = Notes()
    network = original_network("my_networks:fresh", config(weights="weights.pt"), data, notes)
    assert torch.equal(network.fc.weight, trained.fc.weight) and not notes.stages


def test_classifier_of_another_size_is_replaced_with_a_note_and_fine_tuned(workplace, data):
    torch.save({f"module.{key}": value for key, value in settled(Residual(9)).state_dict().items()}, "nine.pt")
    notes = Notes()
    network = original_network("my_networks:fresh", config(weights="nine.pt", finetune_epochs=2), data, notes)
    assert network.fc.out_features == 4
    assert (
        "the classifier 'fc' of the weights has another number of outputs than patterns has classes (4)"
        in notes.said[0]
    )
    assert notes.stages == ["Fine-tune my_networks:fresh on patterns"]
    again = original_network("my_networks:fresh", config(weights="nine.pt", finetune_epochs=2), data, Notes())
    assert torch.equal(network.fc.weight, again.fc.weight)
    other = settled(Residual(9), 8).state_dict()
    torch.save(other, "nine.pt")
    changed = original_network("my_networks:fresh", config(weights="nine.pt", finetune_epochs=2), data, Notes())
    assert not torch.equal(network.fc.weight, changed.fc.weight)  # the cache knows the weights, not their file's name


def test_published_weights_get_a_classifier_for_the_data(workplace, data, monkeypatch):
    published = settled(Residual(9)).state_dict()
    monkeypatch.setattr("edgecompress.original.own_state", lambda name, download: published)
    monkeypatch.setattr("edgecompress.original.source_of", lambda name: "torchvision")
    notes = Notes()
    network = original_network("my_networks:fresh", config(weights="DEFAULT"), data, notes)
    assert network.fc.out_features == 4 and "starts anew" in notes.said[0]


def test_outputs_that_do_not_fit_the_classes(workplace, data):
    with pytest.raises(BadModelError, match=r"my_networks:narrow gives \(3,\) for one image; patterns has 4 classes"):
        original_network("my_networks:narrow", config(model="my_networks:narrow", weights="DEFAULT"), data, Notes())
    notes = Notes()
    original_network("my_networks:wide", config(model="my_networks:wide", weights="DEFAULT"), data, notes)
    assert "has 6 outputs, patterns has 4 classes; the first ones count" in notes.said[0]


def test_network_that_only_guesses_is_pointed_out(trained, data):
    notes = Notes()
    original_network(trained, config(model="<Residual>"), data, notes)
    assert not notes.said
    with torch.no_grad():
        torch.manual_seed(0)
        lost = Residual(4)
        lost.fc.weight.zero_()
    original_network(lost, config(model="<Residual>"), data, notes)
    assert "no better than guessing" in notes.said[0]


def test_module_in_memory_is_copied(trained, data):
    network = original_network(trained.train(), config(model="<Residual>"), data, Notes())
    assert network is not trained and not network.training and trained.training
    trained.eval()


def test_network_that_fails_on_an_image_is_one_sentence(data):
    with pytest.raises(BadModelError, match=r"fails on one image of shape \(3, 16, 16\).*Give images of the size"):
        original_network(nn.Sequential(nn.Flatten(), nn.Linear(7, 4)), config(model="<Sequential>"), data, Notes())


class OneRow(Residual):
    """Forgets the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).reshape(1, -1)


def test_a_network_whose_output_forgets_the_batch_is_refused_before_it_is_scored():
    with pytest.raises(BadModelError, match=r"gives \(1, 8\) for 2 images.*one row of scores per image"):
        original_network(settled(OneRow(4)), Config(budget="flops=0.5x"), patterns(), Silent())


def test_weights_without_numbers_are_named():
    model = settled(Residual(4))
    model.fc = nn.Linear(16, 4, device="meta")
    with pytest.raises(BadModelError, match=r"'fc.weight' of Residual is on the meta device.*\(2 such tensors\)"):
        original_network(model, Config(budget="flops=0.5x"), patterns(), Silent())
