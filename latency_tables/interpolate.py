"""Times between the measured widths of one family of kernels: equal but for their channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgecompress.latency_tables.table import EDGES, Row

BLOCK = 16  # channels that vector kernels run at once: time is a staircase of it
SMALLEST_US = 0.5  # below, relative errors mean nothing: the profiler counts whole microseconds
FEWEST = 4

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """``t = c0 + c1 i + c2 o + c3 i o`` over channels in and out, and the same over whole blocks; what the rows nearby
    depart from it is carried over to a query, weighted by distance in octaves.

    No coefficient is negative, so time never falls with width in the fit itself. Bounds are the 5 % and 95 % points of
    what the same rule errs by at each row when that row is left out.
    """

    rows: Sequence[Row]

    def predict(self, in_channels: int, out_channels: int) -> tuple[float, float, float]:
        """Microseconds with their bounds."""
        us = float(self._predict(np.array([in_channels], float), np.array([out_channels], float))[0])
        low, high = self._band
        return us, us * low, us * high

    def covers(self, in_channels: int, out_channels: int) -> bool:
        """Whether rows lie on both sides of these channels."""
        return bool(
            self._inputs.min() <= in_channels <= self._inputs.max()
            and self._outputs.min() <= out_channels <= self._outputs.max()
        )

    @cached_property
    def _inputs(self) -> Floats:
        return np.array([row.key.in_channels for row in self.rows], float)

    @cached_property
    def _outputs(self) -> Floats:
        return np.array([row.key.out_channels for row in self.rows], float)

    @cached_property
    def _us(self) -> Floats:
        return np.array([row.median_us for row in self.rows])

    @cached_property
    def _coefficients(self) -> Floats:
        from scipy.optimize import nnls

        weight = 1 / np.maximum(self._us, SMALLEST_US)
        terms = self._terms(self._inputs, self._outputs)
        scale = terms.max(0)
        solution: Floats = nnls(terms / scale * weight[:, None], self._us * weight)[0] / scale
        return solution

    @cached_property
    def _departures(self) -> Floats:
        fit = self._terms(self._inputs, self._outputs) @ self._coefficients
        departures: Floats = np.log((self._us + SMALLEST_US) / (fit + SMALLEST_US))
        return departures

    @cached_property
    def departures(self) -> Floats:
        """Each row's time as a multiple of what the other rows say of it."""
        weights = self._weights(self._inputs, self._outputs)
        np.fill_diagonal(weights, 0.0)
        ratios: Floats = np.exp(self._departures - weights @ self._departures / weights.sum(1))
        return ratios

    @cached_property
    def _band(self) -> tuple[float, float]:
        low, high = (float(value) for value in np.percentile(self.departures, (5, 95)))
        return min(low, 1.0), max(high, 1.0)

    def _terms(self, inputs: Floats, outputs: Floats) -> Floats:
        steps_in, steps_out = (np.ceil(side / BLOCK) * BLOCK for side in (inputs, outputs))
        one = np.ones_like(inputs)
        columns = [one, inputs, outputs, inputs * outputs]
        if self.rows[0].key.kind not in EDGES:
            columns += [steps_in, steps_out, steps_in * steps_out]
        return np.stack(columns, 1)

    def _weights(self, inputs: Floats, outputs: Floats) -> Floats:
        """Inverse distance to every row; a width that fills its last block is far from one that does not."""

        def apart(asked: Floats, held: Floats) -> Floats:
            octaves: Floats = np.abs(np.log2(asked[:, None] / held[None]))
            unlike: Floats = 0.5 * ((asked[:, None] % BLOCK == 0) != (held[None] % BLOCK == 0))
            return octaves + unlike

        distance = apart(inputs, self._inputs) + apart(outputs, self._outputs)
        weights: Floats = 1 / (distance + 0.05) ** 3
        return weights

    def _predict(self, inputs: Floats, outputs: Floats) -> Floats:
        weights = self._weights(inputs, outputs)
        departure = weights @ self._departures / weights.sum(1)
        fit = self._terms(inputs, outputs) @ self._coefficients
        result: Floats = np.maximum((fit + SMALLEST_US) * np.exp(departure) - SMALLEST_US, 0.0)
        return result


def family_of(rows: Sequence[Row]) -> Family | None:
    """The family of ``rows``; None where there are too few of them to interpolate."""
    return Family(tuple(rows)) if len({(r.key.in_channels, r.key.out_channels) for r in rows}) >= FEWEST else None
