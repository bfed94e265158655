"""How the step of an activation is set from calibration values: by name, one function each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PERCENTILE = 0.9999
_BINS = 2048


def by_squared_error(values: Tensor, steps: Tensor, low: int, high: int) -> Tensor:
    """The step of least mean squared error of clipping plus rounding."""
    errors = [
        (torch.fake_quantize_per_tensor_affine(values, float(step), 0, low, high) - values).pow(2).mean()
        for step in steps
    ]
    return steps[int(torch.stack(errors).argmin())]


def by_largest(values: Tensor, steps: Tensor, low: int, high: int) -> Tensor:
    """The full range: nothing is clipped."""
    return steps[-1]


def by_percentile(values: Tensor, steps: Tensor, low: int, high: int) -> Tensor:
    """The least step that clips no more than one value in 10,000."""
    size = values.abs() if low < 0 else values.clamp(min=0)
    # kthvalue: torch.quantile refuses more than 16 million values.
    end = size.kthvalue(max(int(PERCENTILE * len(size)), 1)).values
    covering = steps[steps * high >= end * (1 - 1e-6)]
    return covering.min() if len(covering) else steps[-1]


def by_entropy(values: Tensor, steps: Tensor, low: int, high: int) -> Tensor:
    """The step whose levels tell least information away: the KL divergence of Migacz (GTC 2017) over histograms.

    The reference holds what is clipped in its end bins; the candidate spreads each level evenly over its filled bins.
    """
    largest = float(steps[-1]) * high
    start = -largest if low < 0 else 0.0
    width = (largest - start) / _BINS
    counts = torch.histc(values, _BINS, start, largest).double()
    centres = start + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width
    divergences = torch.stack([_divergence(counts, centres, float(step), low, high) for step in steps])
    return steps[int(divergences.argmin())]


def _divergence(counts: Tensor, centres: Tensor, step: float, low: int, high: int) -> Tensor:
    levels = (centres / step).round()
    inside = torch.nonzero((levels >= low) & (levels <= high)).flatten()
    first, last = int(inside[0]), int(inside[-1]) + 1
    reference = counts[first:last].clone()
    filled = (reference > 0).double()
    level = (levels[first:last] - low).long()
    sums = torch.zeros(high - low + 1, dtype=torch.float64).index_add_(0, level, reference)
    members = torch.zeros_like(sums).index_add_(0, level, filled)
    candidate = (sums / members.clamp(min=1))[level] * filled
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    # A little everywhere, so that a value clipped into an empty bin costs much and not infinitely much.
    reference, candidate = reference / reference.sum(), (candidate + 1e-4) / (candidate + 1e-4).sum()
    return torch.xlogy(reference, reference / candidate).sum()


RANGES: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "mse": by_squared_error,
    "minmax": by_largest,
    "percentile": by_percentile,
    "entropy": by_entropy,
}
