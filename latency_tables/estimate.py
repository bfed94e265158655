"""Latency of a target that nobody has measured for us: ``floor + macs / rate``, fitted to public measurements.

The coefficients lie in ``data/estimators.json`` with what they were fitted to (``fit_estimators`` writes it). What
comes out is an estimate with a wide band, and is never shown as anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

from edgecompress.cost import Edge, Kernel, Latency, layer_macs
from edgecompress.errors import BadFileError
from edgecompress.files import read_document
from edgecompress.latency_tables.targets import running_precision
from edgecompress.spec import Document, Frozen, Source, Target


class Coefficients(Frozen):
    """One fit: ``us = floor_us + mmacs * us_per_mmac`` on the target (MMACs: million multiply-adds).

    On a CPU nothing is launched: below ``proportional_below_mmacs``, its smallest network, time is in proportion.
    ``loo_error`` is the mean absolute percentage error (as a fraction) over networks that were left out one at a time;
    ``scale_error`` how far the step from the measured devices to this target was off where it could be checked;
    ``band`` is their sum: bounds are ``us / (1 + band)`` and ``us * (1 + band)``.
    """

    floor_us: float
    us_per_mmac: float
    proportional_below_mmacs: float
    band: float
    loo_error: float
    scale_error: float
    networks: int
    rows: dict[str, int]
    floor_factor: float
    slope_factor: float
    why: str
    source: str


class Estimators(Document):
    """The file ``data/estimators.json``: target class, then precision."""

    made_by: str
    data_sha256: dict[str, str]
    classes: dict[str, dict[str, Coefficients]]


@dataclass(frozen=True)
class Estimator:
    """A `LatencyModel` from MACs alone, with channels padded up to the target's divisor as its kernels run them.

    A network that mixes precisions pays each kernel its own rate, and the largest floor once.
    """

    target: Target
    coefficients: Mapping[str, Coefficients]

    def __call__(self, kernels: Sequence[Kernel], edges: Sequence[Edge] = ()) -> Latency:
        """Estimate one image's latency; operators without weights are part of what was fitted to whole networks.

        Raises:
            BadFileError: nothing is known of a precision that a kernel runs in.
        """
        us = floor = band = mmacs = smallest = 0.0
        parts: list[tuple[float, Source]] = []
        for kernel in kernels:
            precision = running_precision(kernel, self.target)
            known = self.coefficients.get(precision)
            if known is None:
                raise BadFileError(
                    f"Nothing is known of {precision} latencies on '{self.target.name}' (known: "
                    f"{', '.join(self.coefficients)}). Measure a table with 'edgecompress profile'."
                )
            million = padded_macs(kernel, self.target.channel_divisor.get(precision, 1)) / 1e6
            parts.append((million * known.us_per_mmac, "estimated"))
            us, mmacs = us + parts[-1][0], mmacs + million
            floor, band = max(floor, known.floor_us), max(band, known.band)
            smallest = max(smallest, known.proportional_below_mmacs)
        us += floor * min(1.0, mmacs / smallest) if smallest else floor
        return Latency(
            us=us, low_us=us / (1 + band), high_us=us * (1 + band), counts={"estimated": len(parts)},
            kernels=tuple(parts),
        )  # fmt: skip

    @property
    def description(self) -> str:
        """One sentence on what the estimate stands on, with its band."""
        known = self.coefficients.get(self.target.precision) or next(iter(self.coefficients.values()))
        rows = ", ".join(f"{count} of {name}" for name, count in known.rows.items())
        return (
            f"ESTIMATED for {self.target.device} from {known.source} ({rows}), within a factor {1 + known.band:.1f} "
            f"either way at {self.target.precision}; not measured"
        )


def padded_macs(kernel: Kernel, divisor: int) -> int:
    """Multiply-adds that really run: channels rounded up to the next multiple of ``divisor``.

    The network's own input is not padded: runtimes have special kernels for 3 channels.
    """
    layer = kernel.layer
    wide_in = _up(kernel.in_channels, divisor) if layer.in_terms else kernel.in_channels
    return layer_macs(layer, wide_in, _up(kernel.out_channels, divisor))


def _up(channels: int, divisor: int) -> int:
    return -(-channels // divisor) * divisor


@cache
def read_estimators() -> Estimators:
    """The coefficients that ship with edgecompress.

    Raises:
        BadFileError: the file is missing or broken.
    """
    with as_file(files("edgecompress.latency_tables").joinpath("data", "estimators.json")) as path:
        return read_document(path, Estimators, "estimators")


def estimator_for(target: Target) -> Estimator:
    """The estimator of ``target``.

    Raises:
        BadFileError: no estimator was fitted for it.
    """
    known = read_estimators().classes.get(target.estimator)
    if not known:
        raise BadFileError(f"There is no estimator for '{target.name}'. Measure a table with 'edgecompress profile'.")
    return Estimator(target, known)
