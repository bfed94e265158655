"""Where a user's network comes in: names, factories and checkpoints, each wrong one with its sentence."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from sample_networks import Residual, settled
from torch import nn

from edgecompress.checkpoints import last_layer, load_weights
from edgecompress.errors import BadModelError, MissingBackendError, UnknownNameError
from edgecompress.models import build_model, from_factory, own_state
from edgecompress.zoo import ZOO


@pytest.mark.parametrize(
    ("name", "params"),
    [("resnet8", 78_042), ("resnet20", 272_474), ("vgg16_bn_cifar", 14_723_136), ("mobilenet_cifar", 126_154)],
)
def test_zoo_networks_have_their_known_sizes(name, params):
    model = build_model(name, 10)
    found = sum(parameter.numel() for parameter in model.parameters())
    if name in ("resnet8", "vgg16_bn_cifar"):
        assert abs(found - params) < 0.01 * params
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_every_zoo_name_builds_with_any_number_of_classes():
    for name in ZOO:
        last = [module for module in build_model(name, 7).modules() if isinstance(module, nn.Linear)][-1]
        assert last.out_features == 7


def test_torchvision_networks_build_by_name():
    model = build_model("squeezenet1_1", 5).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("wrong", "near"), [("resnet88", "resnet8"), ("resnt20", "resnet20"), ("mobilnet_v2", "mobilenet_v2")]
)
def test_unknown_model_is_refused_with_the_nearest_name(wrong, near):
    with pytest.raises(UnknownNameError, match=f"Unknown model '{wrong}'. Did you mean '{near}'"):
        build_model(wrong, 10)


def test_factory_builds_with_the_number_of_classes():
    assert build_model("sample_networks:residual", 6).fc.out_features == 6


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "odd_factories.py").write_text(
        "import torch\ndef raises(classes):\n    raise ValueError('no luck')\ndef number(classes):\n    return 3\n"
        "kind = 'not callable'\n"
    )
    (tmp_path / "broken_factories.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:f", "Cannot import the model factory 'no_such_module:f'"),
        ("odd_factories:missing", "Cannot import the model factory 'odd_factories:missing'"),
        ("odd_factories:raises", "The model factory 'odd_factories:raises' raised ValueError: no luck"),
        ("odd_factories:number", "returned int; expected a torch.nn.Module"),
        ("odd_factories:kind", "The model factory 'odd_factories:kind' raised TypeError"),
        ("broken_factories:f", "Cannot import the model factory 'broken_factories:f'"),
        (":f", "Cannot import the model factory ':f'"),
    ],
)
def test_factory_that_fails_has_its_sentence(factories, name, sentence):
    with pytest.raises(BadModelError) as caught:
        build_model(name, 10)
    assert sentence in str(caught.value) and caught.value.exit_code == 2


def weights() -> dict[str, torch.Tensor]:
    return settled(Residual(4), 3).state_dict()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "form",
    ["plain", "module.", "model.", "_orig_mod.", "module._orig_mod.model.", "nested", "twice", "without counters"],
)
def test_checkpoint_loads_in_every_usual_form(tmp_path, suffix, form):
    state = weights()
    if form.endswith("."):
        state = {f"{form}{key}": value for key, value in state.items()}
    if form == "without counters":
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        wrapped = {"nested": {"state_dict": state, "epoch": 3}, "twice": {"model": {"state_dict": state}}}
        torch.save(wrapped.get(form, state), path)
    else:
        save_file(state, path)
    model = Residual(4)
    assert load_weights(model, path) == ""
    assert all(torch.equal(value, weights()[key]) for key, value in model.state_dict().items())


def test_prefix_that_the_network_has_itself_stays(tmp_path):
    model = nn.ModuleDict({"model": Residual(4)})
    torch.save({f"module.model.{key}": value for key, value in weights().items()}, tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == ""
    assert torch.equal(model["model"].fc.weight, weights()["fc.weight"])


def test_classifier_of_another_size_keeps_its_fresh_weights_and_is_named(tmp_path):
    torch.save(weights(), tmp_path / "w.pt")
    model = Residual(7)
    fresh = model.fc.weight.clone()
    assert load_weights(model, tmp_path / "w.pt") == "fc"
    assert torch.equal(model.fc.weight, fresh)
    assert torch.equal(model.stem[0].weight, weights()["stem.0.weight"])


def test_other_layers_of_another_size_are_refused(tmp_path):
    state = weights()
    state["stem.0.weight"] = torch.zeros(9, 3, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(BadModelError) as caught:
        load_weights(Residual(4), tmp_path / "w.pt")
    assert "'stem.0.weight' is (9, 3, 3, 3) in the file and (8, 3, 3, 3) in the network (1 of another" in str(
        caught.value
    )
    state = weights() | {"fc.weight": torch.zeros(4, 17)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(BadModelError, match=r"'fc.weight' is \(4, 17\)"):
        load_weights(Residual(4), tmp_path / "w.pt")


def test_last_layer_is_the_classifier_of_torchvision_networks():
    names = {"resnet18": "fc", "squeezenet1_1": "classifier.1", "mobilenet_v3_small": "classifier.3"}
    assert {name: last_layer(build_model(name, 3)) for name in names} == names
    assert last_layer(nn.ReLU()) == ""


def test_checkpoint_with_missing_or_unknown_tensors_names_one(tmp_path):
    state = weights()
    torch.save({key: value for key, value in state.items() if not key.startswith("fc")}, tmp_path / "less.pt")
    with pytest.raises(BadModelError, match=r"'fc\.weight' is nothing in the file .*2 missing, 0 unknown"):
        load_weights(Residual(4), tmp_path / "less.pt")
    torch.save(state | {"extra": torch.zeros(2)}, tmp_path / "more.pt")
    with pytest.raises(BadModelError, match=r"'extra' is \(2,\) in the file and nothing in the network"):
        load_weights(Residual(4), tmp_path / "more.pt")


def test_failed_checkpoint_leaves_the_network_alone(tmp_path):
    model = settled(Residual(7), 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(weights() | {"extra": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(BadModelError):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Trap:
    """What an attacker's pickle does: it runs a function of its choice when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_file_with_code_is_refused_and_never_run(tmp_path):
    for number, content in enumerate((Residual(4), {"state_dict": Trap(str(tmp_path / "sprung"))})):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(BadModelError, match="files with code are refused") as caught:
            load_weights(Residual(4), tmp_path / f"{number}.pt")
        assert "safetensors" in str(caught.value) and "weights_only=True" in str(caught.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_broken_or_missing_checkpoint_is_refused(tmp_path, name):
    with pytest.raises(BadModelError, match="There is no checkpoint at"):
        load_weights(Residual(4), tmp_path / name)
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises(BadModelError, match="cannot be read as tensors alone"):
        load_weights(Residual(4), tmp_path / name)


def test_checkpoint_that_is_no_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "w.pt")
    with pytest.raises(BadModelError, match="is no state dict"):
        load_weights(Residual(4), tmp_path / "w.pt")


def test_checkpoint_given_as_model_and_fixed_graph_outside_compress_are_explained():
    with pytest.raises(BadModelError, match=r"my\.pth holds weights but no network\. Name the network with --model"):
        build_model("my.pth", 10)
    with pytest.raises(BadModelError, match="is a fixed graph"):
        build_model("folder/net.onnx", 10)


FACTORIES = """
import torch
from torch import nn
from sample_networks import Residual, settled
def fresh(num_classes=1000, pretrained=False): return Residual(num_classes)
def trained(classes): return settled(Residual(classes), 3)
def nothing_taken(pretrained=True):
    assert pretrained is True
    return settled(Residual(10), 3)
def one_taken(outputs): return settled(Residual(outputs), 3)
ready = settled(Residual(10), 3)
"""


@pytest.fixture
def own_factories(tmp_path, monkeypatch):
    (tmp_path / "own_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_factories", raising=False)


@pytest.mark.parametrize(
    ("name", "classes", "has_weights"),
    [
        ("fresh", 6, False),
        ("trained", 6, True),
        ("nothing_taken", 10, True),
        ("one_taken", 6, True),
        ("ready", 10, True),
    ],
)
def test_factory_in_the_working_directory_gets_the_classes_where_it_wants_them(
    own_factories, name, classes, has_weights
):
    before = torch.random.get_rng_state()
    model, found = from_factory(f"own_factories:{name}", classes)
    assert found is has_weights and model.fc.out_features == classes
    assert torch.equal(torch.random.get_rng_state(), before)
    again = build_model(f"own_factories:{name}", classes)
    assert again is not model
    if has_weights:
        assert torch.equal(model.fc.weight, again.fc.weight)


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'edgecompress\[timm\]'"):
        build_model("timm:resnet18", 10)


def test_timm_names_and_weights(monkeypatch):
    """Against a stand-in with timm's calls; timm itself is not a dependency."""

    def create_model(name, pretrained=False, num_classes=9):
        return settled(Residual(num_classes), 3) if pretrained else Residual(num_classes)

    timm = ModuleType("timm")
    timm.list_models = lambda: ["tiny_residual", "other"]
    timm.is_model = lambda name: name in timm.list_models()
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert build_model("timm:tiny_residual", 5).fc.out_features == 5
    with pytest.raises(BadModelError, match=r"timm has no model 'tiny_residul'\. Near: tiny_residual"):
        build_model("timm:tiny_residul", 5)
    with pytest.raises(BadModelError, match="Add --download"):
        own_state("timm:tiny_residual", download=False)
    assert own_state("timm:tiny_residual", download=True)["fc.weight"].shape == (9, 16)


def test_published_weights_without_file_or_network_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        BadModelError, match=r"not on this machine .*Add --download, or fetch https://.* give --weights FILE"
    ):
        own_state("squeezenet1_1", download=False)

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(BadModelError, match=r"cannot be fetched \(OSError: Name or .* give --weights FILE"):
        own_state("squeezenet1_1", download=True)
    for name in ("resnet8", "sample_networks:residual"):
        with pytest.raises(BadModelError, match=f"{name} has no published weights"):
            own_state(name, download=True)
    with pytest.raises(BadModelError, match="transform the image inside"):
        own_state("inception_v3", download=True)


def test_published_weights_that_are_on_this_machine_load(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = settled(build_model("squeezenet1_1", 1000), 2).state_dict()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(published, tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    state = own_state("squeezenet1_1", download=False)
    assert torch.equal(state["classifier.1.weight"], published["classifier.1.weight"])
