"""Every operator of an integer file against the emulator's kernel, on the very inputs that it got in the file.

Where a runtime rounds one value in ten thousand otherwise, an untrained network amplifies that until its answers say
nothing about the file. Operator by operator nothing is amplified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.verify import Checks, Images
from edgecompress.quantize import QuantizedGraph, is_fused_activation

IMAGES_FOR_OPERATORS = 2  # run with all values kept
FLOAT_ERROR = 1e-3  # of the largest output, where it is no integer before
OUTPUT = "the output"

# A quantised value by its name, as u8 [N, ...]; None: it is not shown.
Seen = Callable[[str], NDArray[np.integer] | None]


@dataclass(frozen=True)
class Difference:
    """Between what a value is and what its operator should make of its inputs: the largest, in steps, and at how many values."""

    steps: float
    share: float

    def __str__(self) -> str:
        return f"{self.steps:.3g} steps at {self.share:.2g} of the values"

    def within(self, limit: Difference) -> bool:
        """Whether neither is more than ``limit`` has."""
        return self.steps <= limit.steps and self.share <= limit.share


def operator_differences(
    quantized: QuantizedGraph,
    runs: Iterable[tuple[Images, Seen, NDArray[np.float32]]],
    step: float | None = None,
    ends: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Difference]:
    """By quantised value, and `OUTPUT`: what the runtime computes against the emulator's kernel on the same inputs.

    Args:
        runs: of some images each: the images, the values that the runtime held, and its outputs.
        step: of the output's grid; None where the output is float.
        ends: at which the output saturates.
    """
    found: dict[str, Difference] = {}
    for images, seen, outputs in runs:

        def compared(name: str, value: torch.Tensor, seen: Seen = seen) -> torch.Tensor:
            held = seen(name)
            if held is None:
                return value
            found[name] = _difference(held - value.numpy(), found.get(name))
            return torch.from_numpy(np.ascontiguousarray(held)).to(value.dtype)

        with torch.no_grad():
            wanted = emulate(quantized, torch.from_numpy(images), compared).numpy()
        wanted = wanted.clip(*ends)
        scale = step or FLOAT_ERROR * max(float(np.abs(wanted).max()), 1e-9)
        found[OUTPUT] = _difference((outputs - wanted) / scale, found.get(OUTPUT))
    return found


def _difference(steps: NDArray[np.generic], before: Difference | None) -> Difference:
    distance = np.abs(steps)
    count, largest = int((distance >= 1).sum()), float(distance.max())
    share = count / distance.size if count > 1 else 0.0  # a single one is no share: of ten scores it would be a tenth
    if before is not None:
        largest, share = max(largest, before.steps), max(share, before.share)
    return Difference(largest, share)


def require_operators(
    checks: Checks,
    quantized: QuantizedGraph,
    differences: Mapping[str, Difference],
    allowed: Callable[[str], Difference],
) -> None:
    """Record the worst of ``differences``; fail where one is more than ``allowed`` or a quantised value was not seen."""
    absorbed = {node.inputs[0] for node in quantized.graph.nodes if is_fused_activation(quantized.graph, node)}
    wrong = [name for name in quantized.tensors if name not in differences and name not in absorbed]
    wrong += [f"{name}: {found}" for name, found in differences.items() if not found.within(allowed(name))]
    worst = max(differences.values(), key=lambda found: (found.steps, found.share))
    why = f"{len(wrong)} values are not what their operators make of their inputs ({'; '.join(wrong[:3])})"
    checks.require(not wrong, "operator_difference", str(worst), why)
    checks.values["operators_compared"] = len(differences)
