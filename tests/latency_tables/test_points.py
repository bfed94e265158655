"""Which kernels are measured: the widths a search may visit, each shape once."""

from edgecompress.latency_tables.points import kernel_points, layer_pairs, widths
from edgecompress.spec import ChannelGroup, ChannelTerm, LayerSpec, Network


def layer(name, inputs, outputs, in_group, out_group, kind="conv", groups=1):
    terms = [(ChannelTerm(group=g, per_channel=1),) if g else () for g in (in_group, out_group)]
    return LayerSpec(
        name=name, kind=kind, in_channels=inputs, out_channels=outputs, kernel=(3, 3), groups=groups, input_hw=(8, 8),
        output_hw=(8, 8), macs=inputs // groups * outputs * 9 * 64, params=1, in_terms=terms[0], out_terms=terms[1],
    )  # fmt: skip


GROUPS = (
    ChannelGroup(id="a", width=64, members=("a",)),
    ChannelGroup(id="b", width=256, members=("b",)),
    ChannelGroup(id="fc", width=10, members=("fc",), prunable=False, reason="output"),
)
LAYERS = (
    layer("a", 3, 64, "", "a"),
    layer("b", 64, 256, "a", "b"),
    layer("c", 64, 64, "a", "a"),
    layer("c2", 64, 64, "a", "a"),
    layer("dw", 256, 256, "b", "b", "depthwise", 256),
    layer("fc", 256, 10, "b", "fc"),
)
NETWORK = Network(model="m-1", input_shape=(3, 8, 8), layers=LAYERS, groups=GROUPS)


def test_widths_are_multiples_and_the_width_itself():
    assert widths(64, 16) == (16, 32, 48, 64)
    assert widths(20, 8) == (8, 16, 20)
    assert widths(16, 32) == (4, 8, 16)
    many = widths(512, 8)
    assert len(many) == 10 and many[0] == 8 and many[-1] == 512


def test_pairs_are_the_diagonal_and_both_axes():
    assert layer_pairs(LAYERS[0], NETWORK, 16) == ((3, 16), (3, 32), (3, 48), (3, 64))
    pairs = layer_pairs(LAYERS[1], NETWORK, 16)
    assert len(pairs) <= 28 and {(64, 256), (16, 16), (16, 256), (64, 16)} <= set(pairs)
    assert layer_pairs(LAYERS[2], NETWORK, 16) == ((16, 16), (32, 32), (48, 48), (64, 64))
    assert all(i == o for i, o in layer_pairs(LAYERS[4], NETWORK, 16))
    assert {o for _, o in layer_pairs(LAYERS[5], NETWORK, 16)} == {10}


def test_equal_shapes_are_one_point_and_each_precision_another():
    points = kernel_points(NETWORK, 16, ("int8",))
    assert len(points) == len(set(points)) < sum(len(layer_pairs(x, NETWORK, 16)) for x in LAYERS)
    both = kernel_points(NETWORK, 16, ("fp32", "int8"))
    assert sum(key.working_set == "warm" for key in both) == 2 * sum(key.working_set == "warm" for key in points)
    depthwise = [key for key in points if key.kind == "depthwise"]
    assert depthwise and all(key.groups == key.out_channels for key in depthwise)
