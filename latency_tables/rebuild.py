"""Published networks that we can build: their features, traced when the estimators are fitted and kept in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from edgecompress.cost import edges, kernels
from edgecompress.files import read_document, write_document
from edgecompress.latency_tables.features import Features, features_of
from edgecompress.spec import CompressionPolicy, Document

FEATURES = Path(__file__).parent / "data" / "network_features.json"
# A published name stands for another build where the multiply-adds differ by more than this share.
SAME_MACS = 0.1
# Published names that are not the name of the model. Normalisation is folded: a network with it costs as one without.
STANDS_FOR: Mapping[str, str] = {
    "GoogLeNetv1": "googlenet", "ResNet-50": "resnet50", "efficientnetv2_b0": "timm:tf_efficientnetv2_b0",
    "mnasnet": "mnasnet1_0", "mobilenet": "timm:mobilenetv1_100", "mobilenet_v3": "mobilenet_v3_large",
    "regnety_400m": "regnet_y_400mf", "shufflenet_v2": "shufflenet_v2_x1_0", "squeezenet": "squeezenet1_1",
    "vgg11_bn": "vgg11", "vgg13_bn": "vgg13", "vgg16_bn": "vgg16", "vgg19_bn": "vgg19",
}  # fmt: skip
MODELS = frozenset(STANDS_FOR.values()) | {
    "alexnet", "densenet121", "densenet161", "densenet169", "densenet201", "efficientnet_b0", "mobilenet_cifar",
    "mobilenet_v2", "resnet101", "resnet152", "resnet18", "resnet20", "resnet34", "resnet56", "resnet8", "squeezenet1_0",
    "squeezenet1_1", "vgg16_bn_cifar",
}  # fmt: skip
SMALL = 32  # pixels of the networks that classify CIFAR


class NetworkFeatures(Document):
    """The file ``data/network_features.json``: a model with its input's height and width, then its features."""

    made_by: str
    networks: dict[str, Features]


def build_id(network: str, size: str) -> str:
    """``model@HxW`` of a published network at an input of ``size`` (``224x224``); empty where we have no such model."""
    model = STANDS_FOR.get(network, network)
    return f"{model}@{size}" if model in MODELS else ""


def same_network(features: Features | None, mmacs: float) -> bool:
    """Whether the multiply-adds that were published are those of the model that we trace."""
    return features is not None and abs(features.mmacs / mmacs - 1) <= SAME_MACS


def traced_features(build: str) -> Features:
    """Build ``model@HxW`` with fresh weights and count what it does.

    Raises:
        MissingBackendError: it needs timm. BadModelError: it cannot be exported.
    """
    from edgecompress.describe import network_of
    from edgecompress.edges import with_edges
    from edgecompress.graph import build_graph
    from edgecompress.models import build_model

    name, size = build.split("@")
    height, width = (int(pixels) for pixels in size.split("x"))
    graph = build_graph(build_model(name, 10 if height == SMALL else 1000), (3, height, width), name)
    network = with_edges(network_of(graph, name), graph)
    policy = CompressionPolicy(model=name)
    return features_of(kernels(network, policy), edges(network, policy))


def read_features(path: Path = FEATURES) -> dict[str, Features]:
    """Features by ``model@HxW``; none where there is no file yet.

    Raises:
        BadFileError: the file is broken.
    """
    return dict(read_document(path, NetworkFeatures, "network features").networks) if path.exists() else {}


def with_traced(known: Mapping[str, Features], builds: Iterable[str]) -> dict[str, Features]:
    """``known`` cut to ``builds``, with those traced that are new."""
    return {build: known.get(build) or traced_features(build) for build in sorted(set(builds) - {""})}


def write_features(features: Mapping[str, Features], path: Path = FEATURES) -> None:
    """Write the file."""
    made_by = "python -m edgecompress.latency_tables.fit_estimators"
    write_document(path, NetworkFeatures(made_by=made_by, networks=dict(features)))
