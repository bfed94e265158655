"""The search spaces of the two stages: channels (and single weights) of every group, bits of every layer; their features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgecompress.cost import CostModel, channels, layer_macs, layer_params
from edgecompress.spaces import Choice, Limit, SearchSpace
from edgecompress.spec import FLOAT_BITS, CompressionPolicy, Cost, LayerChoice, Network, Target

ELEMENTS = (1.0, 0.75, 0.5, 0.35, 0.25)  # shares of single weights that a group may keep


def allowed_widths(width: int, divisor: int) -> tuple[int, ...]:
    """Widths that may be built: multiples of the target's divisor; a group narrower than twice the divisor may also be
    cut to powers of two down to 4 (it is then priced at the padded width)."""
    widths = set(range(divisor, width + 1, divisor)) | {width}
    if width < 2 * divisor:
        widths |= {2**power for power in range(2, 16) if 2**power < width}
    return tuple(sorted(widths))


def channel_space(  # noqa: PLR0913 (what a stage knows)
    network: Network,
    target: Target,
    cost: CostModel,
    limits: Sequence[Limit],
    original: Cost,
    divisor: int | None = None,
    *,
    elements: Sequence[float] = (),
    only_if_asked: bool = True,
    bits: int = FLOAT_BITS,
    sensitivity: Callable[[str], float] | None = None,
) -> SearchSpace:
    """Stage 1: per prunable channel group one action, the channels it keeps; with ``elements`` a second one.

    Args:
        elements: shares of single weights that the layers which a group writes may keep, for example `ELEMENTS`. The
            second action's levels are these in thousandths.
        only_if_asked: the second action stays at 1 unless a budget binds it; otherwise a reward decides, as the paper's.
        bits: of weights and inputs in the policies; a latency or a size may be asked for at these.
        sensitivity: group id -> how much the outputs move when it alone is cut (any unit); a feature of the state.
    """
    groups = network.prunable_groups
    width = 2 if elements else 1
    shares = tuple(sorted({round(1000 * share) for share in (*elements, 1.0)}))

    def to_policy(choice: Choice) -> CompressionPolicy:
        kept: dict[str, LayerChoice] = {}
        for group, share in zip(groups, choice[1::2] if elements else (), strict=False):
            for member in group.members:
                # A layer has one output: it is a member of one group.
                kept[member] = LayerChoice.model_construct(
                    keep_elements=share / 1000, weight_bits=bits, activation_bits=bits
                )
        channels_kept = {group.id: count for group, count in zip(groups, choice[::width], strict=True)}
        return CompressionPolicy.model_construct(
            model=network.model, keep_channels=channels_kept, layers=kept, provenance={}
        )

    names = [(group.id, f"{group.id}:elements")[:width] for group in groups]
    levels = [(allowed_widths(group.width, divisor or target.divisor), shares)[:width] for group in groups]
    return SearchSpace(
        names=tuple(name for pair in names for name in pair),
        levels=tuple(values for pair in levels for values in pair),
        steps=tuple(tuple(range(width * i, width * (i + 1))) for i in range(len(groups))),
        features=_group_features(network, original, cost, sensitivity),
        to_policy=to_policy,
        cost=cost,
        limits=tuple(limits),
        only_if_asked=frozenset(range(1, 2 * len(groups), 2)) if elements and only_if_asked else frozenset(),
        inner=frozenset(width * i for i, group in enumerate(groups) if len(group.members) == 1),
    )


def bitwidth_space(  # noqa: PLR0913 (what may be chosen, and what it costs)
    network: Network,
    pruned: CompressionPolicy,
    shared_inputs: Sequence[Sequence[str]],
    target: Target,
    cost: CostModel,
    limits: Sequence[Limit],
    *,
    pinned: Mapping[str, int] | None = None,
    free_activations: bool = False,
    sensitivity: Mapping[str, Sequence[float]] | None = None,
) -> SearchSpace:
    """Stage 2: two actions per layer, the bits of its weights and of its input; layers that share an input are tied.

    ``pruned`` is stage 1's policy: channels and elements stay as it says. ``shared_inputs`` names the quantisable layers,
    those that read one tensor together; a layer of the network that is not named stays float.

    Args:
        pinned: layers whose weights and input have these bits; an input that is shared is pinned for all that read it.
        free_activations: search activation bits although no budget asks for fewer.
        sensitivity: numbers of every layer for the agent to see, such as KL divergences at a few bit-widths.
    """
    named = {name for group in shared_inputs for name in group}
    layers = [layer.name for layer in network.layers if layer.name in named]
    index = {name: i for i, name in enumerate(layers)}

    def to_policy(choice: Choice) -> CompressionPolicy:
        choices = {
            name: LayerChoice.model_construct(
                keep_elements=pruned.layers.get(name, LayerChoice()).keep_elements,
                weight_bits=choice[2 * i],
                activation_bits=choice[2 * i + 1],
            )
            for name, i in index.items()
        }
        return CompressionPolicy.model_construct(
            model=network.model, keep_channels=pruned.keep_channels, layers=choices, provenance={}
        )

    return SearchSpace(
        names=tuple(f"{name}:{what}" for name in layers for what in ("weight", "activation")),
        levels=_bit_levels(layers, shared_inputs, target, pinned or {}),
        steps=tuple((2 * i, 2 * i + 1) for i in range(len(layers))),
        features=_layer_features(network, pruned.keep_channels, named, sensitivity or {}),
        to_policy=to_policy,
        cost=cost,
        limits=tuple(limits),
        tied=tuple(tuple(2 * index[name] + 1 for name in group) for group in shared_inputs if len(group) > 1),
        # No runtime of ours is faster below 8 activation bits, and the file does not shrink: only a bops budget asks.
        only_if_asked=frozenset(() if free_activations else (2 * i + 1 for i in range(len(layers)))),
    )


def _bit_levels(
    layers: Sequence[str], shared_inputs: Sequence[Sequence[str]], target: Target, pinned: Mapping[str, int]
) -> tuple[tuple[int, ...], ...]:
    """Levels of weights and input of every layer; where two pins meet at one input, the larger counts."""
    inputs = {
        name: max(pinned[other] for other in group if other in pinned)
        for group in shared_inputs
        if any(other in pinned for other in group)
        for name in group
    }
    return tuple(
        (bits[name],) if name in bits else levels
        for name in layers
        for bits, levels in ((pinned, target.weight_bits), (inputs, target.activation_bits))
    )


def _scaled(columns: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """Min-max scale every column over the steps; constant columns become 0 (AMC's state)."""
    table = np.array(columns, np.float32).T
    low, high = table.min(0), table.max(0)
    return np.where(high > low, (table - low) / np.where(high > low, high - low, 1), 0).astype(np.float32)


def _group_features(
    network: Network, original: Cost, cost: CostModel, sensitivity: Callable[[str], float] | None
) -> NDArray[np.float32]:
    """AMC's and Distiller's layer features, summed over the layers whose output or input a group cuts; then the share of
    the predicted latency that goes with half of its channels, and its sensitivity, where they are known."""
    rows = []
    whole = cost(CompressionPolicy(model=network.model))
    for number, group in enumerate(network.prunable_groups):
        written = [layer for layer in network.layers if any(term.group == group.id for term in layer.out_terms)]
        read = [layer for layer in network.layers if any(term.group == group.id for term in layer.in_terms)]
        first = written[0]
        rows.append([
            number, group.width, first.in_channels, first.kernel[0], first.stride[0], first.output_hw[0], len(written),
            sum(layer.macs for layer in written) / original.macs, sum(layer.macs for layer in read) / original.macs,
            sum(layer.params for layer in (*written, *read)) / original.params,
            _latency_share(network, group.id, group.width, cost, whole), sensitivity(group.id) if sensitivity else 0.0,
        ])  # fmt: skip
    return _scaled(list(zip(*rows, strict=True)))


def _latency_share(network: Network, group: str, width: int, cost: CostModel, whole: Cost) -> float:
    if not whole.latency_us:
        return 0.0
    halved = cost(CompressionPolicy(model=network.model, keep_channels={group: max(width // 2, 1)}))
    return max(1 - (halved.latency_us or 0.0) / whole.latency_us, 0.0)


def _layer_features(
    network: Network, keep_channels: Mapping[str, int], named: set[str], sensitivity: Mapping[str, Sequence[float]]
) -> NDArray[np.float32]:
    widths = network.widths | dict(keep_channels)
    rows = []
    for number, layer in enumerate(layer for layer in network.layers if layer.name in named):
        inputs, outputs = channels(layer, widths, network.widths)
        rows.append([
            number, layer.kind == "depthwise", inputs, outputs, layer.kernel[0], layer.stride[0], layer.input_hw[0],
            layer_macs(layer, inputs, outputs), layer_params(layer, inputs, outputs), layer.kind == "linear",
            *sensitivity.get(layer.name, ()),
        ])  # fmt: skip
    return _scaled(list(zip(*rows, strict=True)))


__all__ = ["ELEMENTS", "allowed_widths", "bitwidth_space", "channel_space"]
