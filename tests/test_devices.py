"""Where networks are trained: a GPU where there is one; they lie where they lay before afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edgecompress.cli.compress import command
from edgecompress.devices import DEVICES, device_by_name, lying_on
from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.finetune import TrainSettings, accuracy_and_loss, train
from edgecompress.graph import build_graph
from edgecompress.learned_steps import LearnedSteps
from edgecompress.models import build_model
from edgecompress.pipeline import compress
from edgecompress.prepare import calibration_batches
from edgecompress.quantize import Simulator, calibrate
from edgecompress.recover import hold_zeros
from edgecompress.spec import LayerChoice
from edgecompress.variational import kl_penalty, with_noise

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


class Travelled(nn.Module):
    """Remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(1))
        self.places: list[str] = []

    def to(self, device, *args, **kwargs):
        self.places.append(str(device))
        return self


def test_auto_takes_a_gpu_only_where_torch_finds_one(monkeypatch):
    for found, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert device_by_name("auto").type == wanted
        assert device_by_name("cpu").type == "cpu"


def test_a_device_that_is_not_there_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda"):
        compress(device="cuda", runs=tmp_path)
    with pytest.raises(UnknownNameError, match="tpu"):
        compress(device="tpu", runs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_line_offers_what_there_is():
    option = next(parameter for parameter in command.params if parameter.name == "device")
    assert tuple(option.type.choices) == DEVICES


def test_networks_come_home_even_from_a_failure():
    network, teacher = Travelled(), Travelled()
    with pytest.raises(ZeroDivisionError), lying_on(torch.device("meta"), network, None, teacher):
        raise ZeroDivisionError
    assert network.places == teacher.places == ["meta", "cpu"]


@GPU
def test_every_kind_of_training_runs_on_the_gpu_and_comes_home(digits):
    few = digits
    settings = TrainSettings(epochs=1, learning_rate=0.01, device="cuda")
    model, teacher = build_model("resnet8", 10), build_model("resnet8", 10).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.fc.weight[0] = 0
    hold_zeros(model)
    train(model, few, settings, teacher=teacher)
    assert not torch.equal(before["conv1.weight"], model.state_dict()["conv1.weight"])
    assert float(model.fc.weight[0].detach().abs().max()) == 0

    noisy, layers = with_noise(build_model("resnet8", 10))
    noise = [parameter for layer in layers.values() for parameter in layer.noise_parameters]
    train(
        noisy, few, settings, noise=noise,
        penalty=lambda p: kl_penalty(layers, len(few.train), weight_scale=0.05, unit_scale=1e-4, progress=p),
    )  # fmt: skip

    graph = build_graph(model, tuple(few.normalise(few.test.images[:1]).shape[1:]), "resnet8")
    simulator = Simulator(graph, calibrate(graph, calibration_batches(few)))
    bits = {layer.name: LayerChoice(weight_bits=4, activation_bits=8) for layer in graph.layers}
    module = LearnedSteps(simulator.quantized(bits))
    train(module, few, settings, teacher=teacher)
    module.finished()
    for network in (model, noisy, module, teacher):
        assert {value.device.type for value in network.state_dict().values()} == {"cpu"}
    on_gpu, on_cpu = (accuracy_and_loss(model, few, few.test, device=name) for name in ("cuda", "cpu"))
    assert on_gpu[0] == pytest.approx(on_cpu[0], abs=0.01)
