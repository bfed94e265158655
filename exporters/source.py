"""What every exporter is given."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.exporters.interface import PLAIN, Interface
from edgecompress.exporters.onnx_writing import metadata_of
from edgecompress.files import sha256
from edgecompress.graph import Graph
from edgecompress.quantize import QuantizedGraph
from edgecompress.spec import CompressionPolicy, Network, Preprocessing, Target
from edgecompress.tasks import CLASSIFICATION, Task


@dataclass(frozen=True)
class ExportSource:
    """A compressed network and what a deployer must know of it. ``quantized`` is None where the target runs no integers.

    ``images`` are normalised ``float32 [N, C, H, W]``: what the checks run on. ``labels`` are theirs, as ``task`` reads them.
    """

    graph: Graph
    quantized: QuantizedGraph | None
    network: Network
    policy: CompressionPolicy
    target: Target
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    images: NDArray[np.float32]
    labels: NDArray[Any] | None = None
    task: Task = CLASSIFICATION
    interface: Interface = PLAIN
    table: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """What is written into every file; everything else is in ``export.json``."""
        return metadata_of(self.preprocessing, self.classes)

    @property
    def facts(self) -> dict[str, str]:
        """What a deployer must know beyond the preprocessing."""
        return {
            "version": version("edgecompress"),
            "target": self.target.name,
            "policy": sha256(self.policy.model_dump_json().encode()),
            "labels": self.metadata["labels"],
            "table": self.table,
            **{name: str(value) for name, value in vars(self.interface).items() if value is not None},
        }
