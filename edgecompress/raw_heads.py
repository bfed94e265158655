"""Wrappers that make all outputs of a network traceable: the raw heads of detectors, auxiliary heads of classifiers."""

from __future__ import annotations

from torch import Tensor, nn

from edgecompress.errors import BadModelError


class RawHeads(nn.Module):
    """Backbone and heads of an SSD, SSDLite or RetinaNet, for tracing and pruning.

    Maps ``[N, C, H, W]`` to the raw outputs of the heads, one ``[N, anchors, values]`` each, in training as in eval mode.
    ``detector.backbone`` and ``detector.head`` of the pruned copy go back into the detector.

    Raises:
        BadModelError: the detector has no such parts (networks with a region proposal stage cut images apart).
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        backbone, head = getattr(detector, "backbone", None), getattr(detector, "head", None)
        if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module):
            raise BadModelError(
                f"{type(detector).__name__} has no 'backbone' and 'head' side by side; only one-stage detectors (SSD, SSDLite, "
                "RetinaNet) have raw heads that can be traced."
            )
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(x)
        outputs: dict[str, Tensor] = self.head([features] if isinstance(features, Tensor) else list(features.values()))
        return tuple(outputs.values())


class TrainingHeads(nn.Module):
    """A network with the heads that it runs in training only (GoogLeNet, Inception with ``aux_logits``), in eval mode too.

    Its modules with children stay in training mode, so that they return all outputs; its layers follow ``train`` and
    ``eval``, so that statistics and dropout do. ``network`` of the pruned copy is the network itself.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def train(self, mode: bool = True) -> TrainingHeads:
        super().train(mode)
        for module in self.network.modules():
            module.training = mode or any(True for _ in module.children())
        return self

    def forward(self, x: Tensor) -> object:
        return self.network(x)
