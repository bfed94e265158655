"""Operators without weights are found with the channels they will have in a pruned network."""

import pytest
from torch import nn

from edgecompress.cost import edges
from edgecompress.edges import with_edges
from edgecompress.graph import build_graph
from edgecompress.models import build_model
from edgecompress.prune import prune
from edgecompress.spec import CompressionPolicy
from edgecompress.trace import trace


def channels(graph):
    """What the operators of a graph write, by kind of operator."""
    return sorted((n.op, graph.shapes[n.outputs[0]]) for n in graph.nodes if n.op in ("Add", "GlobalAveragePool"))


def test_edges_of_a_pruned_network_are_those_of_its_graph():
    model = build_model("resnet8", 10).eval()
    traced = trace(model, (3, 32, 32), "resnet8")
    network = with_edges(traced.network, build_graph(model, (3, 32, 32), "resnet8"))
    assert [edge.kind for edge in network.edges] == ["input", "add", "add", "add", "global_pool", "output"]
    keep = {group.id: max(group.width // 2, 4) for group in network.prunable_groups}
    found = edges(network, CompressionPolicy(model="", keep_channels=keep))
    names = {"add": "Add", "global_pool": "GlobalAveragePool"}
    assert sorted(
        (names[e.spec.kind], (e.channels, *e.spec.output_hw)) for e in found if e.spec.kind in names
    ) == channels(build_graph(prune(model, traced, keep), (3, 32, 32), "pruned"))
    assert found[0].channels == 3 and found[-1].channels == 10 and {e.bits for e in found} == {32}


class _Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.c = nn.Conv2d(20, 6, 1)
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x):
        import torch

        a = torch.relu(self.a(x))
        return self.fc(self.c(nn.functional.max_pool2d(torch.cat([a, self.b(a)], 1), 2)).flatten(1))


def test_a_concatenation_carries_the_channels_of_all_that_it_joins():
    model = _Joined().eval()
    network = with_edges(trace(model, (3, 8, 8), "joined").network, build_graph(model, (3, 8, 8), "joined"))
    cut = edges(network, CompressionPolicy(model="", keep_channels={"a": 4, "b": 7}))
    found = {edge.spec.kind: edge.channels for edge in cut}
    assert found == {"input": 3, "concat": 11, "max_pool": 11, "output": 5}


@pytest.mark.parametrize(("bits", "expected"), [(32, 32), (4, 8)])
def test_one_integer_layer_makes_the_network_run_integers(bits, expected):
    from edgecompress.spec import LayerChoice

    model = build_model("resnet8", 10).eval()
    graph = build_graph(model, (3, 32, 32), "resnet8")
    network = with_edges(trace(model, (3, 32, 32), "resnet8").network, graph)
    layers = {network.layers[0].name: LayerChoice(weight_bits=bits, activation_bits=8)}
    assert {edge.bits for edge in edges(network, CompressionPolicy(model="", layers=layers))} == {expected}
