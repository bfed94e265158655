"""What latency models say beside the measured times of a report: of each layer on the target, of each file on this host."""

from __future__ import annotations

from edgecompress.cost import Latency, LatencyModel, edges, kernels
from edgecompress.errors import BadFileError
from edgecompress.latency_tables.predict import latency_model
from edgecompress.latency_tables.targets import all_targets, is_this_machine
from edgecompress.report_spec import Predicted
from edgecompress.spec import CompressionPolicy, LayerChoice, Network, Target, weakest


def latency_of(network: Network, policy: CompressionPolicy, model: LatencyModel) -> Latency:
    """What ``model`` says of a network under ``policy``."""
    return model(kernels(network, policy), edges(network, policy))


def predicted(network: Network, policy: CompressionPolicy, model: LatencyModel) -> Predicted:
    """A whole network's latency with the weakest evidence of its kernels."""
    latency = latency_of(network, policy, model)
    source = weakest(source for source, count in latency.counts.items() if count)
    return Predicted(us=latency.us, low_us=latency.low_us, high_us=latency.high_us, source=source)


def layer_latencies(network: Network, policy: CompressionPolicy, latency: LatencyModel) -> dict[str, Predicted]:
    """The part of every layer in the latency of ``policy``; empty where the model knows no layers."""
    parts = latency_of(network, policy, latency).kernels
    names = [layer.name for layer in network.layers]
    return {name: Predicted(us=us, source=source) for name, (us, source) in zip(names, parts, strict=False)}


def host_model(target: Target, latency: LatencyModel, about: str) -> tuple[LatencyModel | None, str]:
    """The latency model of the machine that this program runs on, and what it stands on.

    That of the run where its ``target`` is this machine. None where this machine is no known target, or its own table
    is broken: a run for another device must not end with that.
    """
    if is_this_machine(target):
        return latency, about
    here = next((known for known in all_targets().values() if is_this_machine(known)), None)
    if here is None:
        return None, "this machine is none of the known targets, so nothing is predicted for it"
    try:
        return latency_model(here)
    except BadFileError as error:
        return None, f"nothing is predicted for this machine: {error}"


def at_bits(network: Network, policy: CompressionPolicy, bits: int) -> CompressionPolicy:
    """``policy`` with its channels, and the same bits everywhere."""
    choice = LayerChoice(weight_bits=bits, activation_bits=bits)
    return policy.model_copy(update={"layers": {layer.name: choice for layer in network.layers}})
