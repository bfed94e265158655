"""Latency of a target that nobody has measured for us: a floor plus a price for each `Features`, fitted to public data.

The coefficients lie in ``data/estimators.json`` with what they were fitted to (``fit_estimators`` writes it). What
comes out is an estimate with a wide band, and is never shown as anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import Literal

from edgecompress.cost import Edge, Kernel, Latency
from edgecompress.errors import BadFileError
from edgecompress.files import read_document
from edgecompress.latency_tables.features import Features, features_of
from edgecompress.latency_tables.targets import running_precision
from edgecompress.spec import Document, Frozen, Source, Target

Model = Literal["MACs", "MACs + floor", "features"]


class Errors(Frozen):
    """Mean absolute percentage error (as a fraction) of the three models over networks that were left out one at a time.

    ``macs``: time in proportion to multiply-adds; ``floor``: MACs + floor; ``features``: None where too few of the
    networks can be built to count anything but their multiply-adds.
    """

    macs: float
    floor: float
    features: float | None = None

    @property
    def best(self) -> Model:
        """The model that errs least; of two that err alike, MACs + floor."""
        models: tuple[Model, ...] = ("MACs + floor", "MACs", "features")
        return min(models, key=self.of)

    def of(self, model: Model) -> float:
        """The error of ``model``."""
        known = {"MACs": self.macs, "MACs + floor": self.floor, "features": self.features}[model]
        return math.inf if known is None else known


class Coefficients(Frozen):
    """One fit: ``us = floor_us + features . us_per`` on the target. MACs (+ floor) has one price for all MACs, 0 for the rest.

    On a CPU nothing is launched: below ``proportional_below_mmacs``, its smallest network, the floor is in proportion.
    ``errors`` are those of all models over ``networks``, and ``loo_error`` that of ``model``; ``scale_error`` is how far
    the step from the measured devices to this target was off where it could be checked; ``band`` is the sum of the last
    two: bounds are ``us / (1 + band)`` and ``us * (1 + band)``.
    """

    model: Model
    floor_us: float
    us_per: Features
    proportional_below_mmacs: float
    band: float
    loo_error: float
    errors: Errors
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
    """A `LatencyModel` from what the kernels do, with channels padded up to the target's divisor as they run them.

    A network that mixes precisions pays each kernel at its own precision, and the largest floor once.
    """

    target: Target
    coefficients: Mapping[str, Coefficients]

    def __call__(self, kernels: Sequence[Kernel], edges: Sequence[Edge] = ()) -> Latency:
        """Estimate one image's latency. Operators without weights run where the kernel of the fewest bits runs.

        Raises:
            BadFileError: nothing is known of a precision that a kernel runs in.
        """
        us = floor = band = mmacs = smallest = 0.0
        parts: list[tuple[float, Source]] = []
        for kernel in kernels:
            precision = running_precision(kernel, self.target)
            known = self._known(precision)
            work = features_of([kernel], (), self.target.channel_divisor.get(precision, 1))
            parts.append((work.dot(known.us_per), "estimated"))
            us, mmacs = us + parts[-1][0], mmacs + work.mmacs
            floor, band = max(floor, known.floor_us), max(band, known.band)
            smallest = max(smallest, known.proportional_below_mmacs)
        if kernels:
            home = running_precision(min(kernels, key=lambda kernel: kernel.weight_bits), self.target)
            between = features_of((), edges, self.target.channel_divisor.get(home, 1))
            us += between.dot(self._known(home).us_per)
        us += floor * min(1.0, mmacs / smallest) if smallest else floor
        return Latency(
            us=us, low_us=us / (1 + band), high_us=us * (1 + band), counts={"estimated": len(parts)},
            kernels=tuple(parts),
        )  # fmt: skip

    def _known(self, precision: str) -> Coefficients:
        if precision not in self.coefficients:
            raise BadFileError(
                f"Nothing is known of {precision} latencies on '{self.target.name}' (known: "
                f"{', '.join(self.coefficients)}). Measure a table with 'edgecompress profile'."
            )
        return self.coefficients[precision]

    @property
    def description(self) -> str:
        """One sentence on what the estimate stands on, with its band."""
        known = self.coefficients.get(self.target.precision) or next(iter(self.coefficients.values()))
        rows = ", ".join(f"{count} of {name}" for name, count in known.rows.items())
        return (
            f"ESTIMATED for {self.target.device} by {known.model} from {known.source} ({rows}), within a factor "
            f"{1 + known.band:.1f} either way at {self.target.precision} (leave-one-network-out error "
            f"{known.loo_error:.0%}, step to this target {known.scale_error:.0%}); not measured"
        )


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


@dataclass(frozen=True)
class ErrorRow:
    """The errors of one target class at one precision, side by side."""

    target_class: str
    precision: str
    networks: int
    errors: Errors
    chosen: Model

    @property
    def error(self) -> float:
        """The error of the model that was chosen."""
        return self.errors.of(self.chosen)


def errors() -> tuple[ErrorRow, ...]:
    """What each shipped estimator errs by when a network is left out, beside the models that it was not chosen over.

    Raises:
        BadFileError: the file of the coefficients is missing or broken.
    """
    return tuple(
        ErrorRow(name, precision, known.networks, known.errors, known.model)
        for name, fits in read_estimators().classes.items()
        for precision, known in fits.items()
    )
