"""What a whole network takes beyond the sum of its rows, fitted on random sub-networks that were measured end to end.

Rows are timed one by one with warm caches and under the profiler; a network's kernels find each other's data in the
cache, and no profiler. The correction is linear: a factor per class of kernel and a constant per network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgecompress.cost import Kernel
from edgecompress.spec import Frozen

CLASSES = ("kxk", "1x1", "depthwise", "linear", "edges", "cold")
CACHES = tuple(float(1 << power) for power in range(19, 27))  # bytes that are tried as the size of the cache
PRIOR = 0.05  # weight of "a factor is 1" against the squared relative errors of the networks
FEWEST_NETWORKS = 6

Sums = Mapping[str, float]
Floats = NDArray[np.float64]


class Correction(Frozen):
    """``us = sum of factors[c] * sums[c] + constant_us`` for one network (`network_id`) in one precision.

    The class ``cold`` is what the kernels take longer with their weights out of the cache, times the share of weights
    that are (`share_cold`): it grows with the network's weights around ``cache_bytes``.

    ``error`` is the mean absolute relative error over ``networks`` sub-networks, each predicted by a fit without it;
    ``spread`` the standard deviation of those errors.
    """

    network: str
    dtype: str
    factors: dict[str, float]
    constant_us: float
    cache_bytes: float
    networks: int
    error: float
    spread: float

    def __call__(self, sums: Sums, weight_bytes: int) -> float:
        """Microseconds of a network whose rows sum up to ``sums`` by class."""
        us = sum(self.factors[name] * us for name, us in sums.items() if name != "cold")
        return us + self.factors["cold"] * share_cold(weight_bytes, self.cache_bytes) * sums["cold"] + self.constant_us


@dataclass(frozen=True)
class Sample:
    """One sub-network: what its rows sum up to by class, the bytes of its weights, and what it takes."""

    sums: Sums
    weight_bytes: int
    measured_us: float


def share_cold(weight_bytes: int, cache_bytes: float) -> float:
    """Share of the weights that a run finds out of the cache: one half where they just fill it."""
    return 1 / (1 + (cache_bytes / max(weight_bytes, 1)) ** 2)


def class_of(kernel: Kernel) -> str:
    """The class of a layer; an operator without weights is of the class ``edges``."""
    layer = kernel.layer
    if layer.kind in ("depthwise", "linear"):
        return layer.kind
    return "1x1" if layer.kernel == (1, 1) else "kxk"


def network_id(kernels: Sequence[Kernel]) -> str:
    """What all pruned versions of one network share: the original's layers, MACs and image size."""
    height, width = kernels[0].layer.input_hw
    return f"{len(kernels)}-{sum(kernel.layer.macs for kernel in kernels)}-{height}x{width}"


def fit(network: str, dtype: str, samples: Sequence[Sample]) -> Correction | None:
    """Least squares of relative errors with a pull of every factor towards 1. None with too few samples.

    The cache's size is the one of `CACHES` that predicts left-out samples best.
    """
    if len(samples) < FEWEST_NETWORKS:
        return None
    cache_bytes = min(CACHES, key=lambda size: float(np.abs(_left_out(_terms(samples, size), samples)).mean()))
    terms = _terms(samples, cache_bytes)
    errors = _left_out(terms, samples)
    *factors, constant = (float(value) for value in _solve(terms, _measured(samples)))
    return Correction(
        network=network, dtype=dtype, factors=dict(zip(CLASSES, factors, strict=True)), constant_us=constant,
        cache_bytes=cache_bytes, networks=len(samples), error=float(np.abs(errors).mean()), spread=float(errors.std()),
    )  # fmt: skip


def _terms(samples: Sequence[Sample], cache_bytes: float) -> Floats:
    shares = [share_cold(sample.weight_bytes, cache_bytes) for sample in samples]
    rows = [
        [sample.sums.get(name, 0.0) * (share if name == "cold" else 1.0) for name in CLASSES] + [1.0]
        for sample, share in zip(samples, shares, strict=True)
    ]
    return np.array(rows)


def _measured(samples: Sequence[Sample]) -> Floats:
    return np.array([sample.measured_us for sample in samples])


def _left_out(terms: Floats, samples: Sequence[Sample]) -> Floats:
    """Relative error of each sample, predicted by a fit to all others."""
    measured = _measured(samples)
    errors = []
    for i in range(len(samples)):
        others = np.arange(len(samples)) != i
        errors.append(float(terms[i] @ _solve(terms[others], measured[others])) / measured[i] - 1)
    return np.array(errors)


def _solve(terms: Floats, measured: Floats) -> Floats:
    pull = np.sqrt(PRIOR) * np.eye(len(CLASSES), len(CLASSES) + 1)
    left = np.concatenate([terms / measured[:, None], pull])
    right = np.concatenate([np.ones(len(measured)), pull.sum(1)])
    solution: Floats = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution
