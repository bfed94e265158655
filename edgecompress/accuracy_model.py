"""What a search has learned about the accuracy of policies: a Gaussian process over its trials. The cost needs no model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgecompress.spaces import Choice, SearchSpace

Floats = NDArray[np.float64]
_ROOT5 = math.sqrt(5)
_GROWTH = 1.25  # hyperparameters are fitted anew when there are this many times more trials


class AccuracyModel:
    """Gaussian process with a Matern-5/2 kernel, one length scale per input, and a linear trend (Rasmussen and Williams 2006).

    Inputs are the logarithms of all levels, scaled to [0, 1]. Hyperparameters maximise the marginal likelihood under wide
    log-normal priors. Trials outside of a budget count too: single-action sensitivities say most of what few trials can.
    """

    def __init__(self, space: SearchSpace) -> None:
        low = np.array([math.log(max(levels[0], 1e-9)) for levels in space.levels])
        high = np.array([math.log(max(levels[-1], 1e-9)) for levels in space.levels])
        self._free = high > low
        self._low, self._span = low[self._free], (high - low)[self._free]
        self._fitted_at = 0
        self._parameters: Floats | None = None

    def fit(self, choices: Sequence[Choice], scores: Sequence[float]) -> None:
        """Take these trials as the data. Scores may be in any unit; at least two trials are needed."""
        table = np.array(choices, np.int64)
        self._x = self._inputs(table)
        y = np.array(scores, float)
        self._offset, self._scale = float(y.mean()), max(float(y.std()), 1e-9)
        self._y = (y - self._offset) / self._scale
        if self._parameters is None or len(y) >= _GROWTH * self._fitted_at:
            self._fitted_at = len(y)
            self._parameters = self._best_parameters()
        kernel = _kernel(self._x, self._x, self._parameters) + math.exp(self._parameters[0]) * np.eye(len(y))
        self._factor = np.linalg.cholesky(kernel + 1e-8 * np.eye(len(y)))
        self._weights = np.linalg.solve(self._factor.T, np.linalg.solve(self._factor, self._y))

    def predict(self, choices: Sequence[Choice]) -> tuple[Floats, Floats]:
        """Mean and standard deviation (of the accuracy itself, without the noise of its measurement) of each policy."""
        from scipy.linalg import solve_triangular

        assert self._parameters is not None
        x = self._inputs(np.array(choices, np.int64))
        cross = _kernel(x, self._x, self._parameters)
        solved = solve_triangular(self._factor, cross.T, lower=True)
        own = np.exp(self._parameters[1]) + np.exp(self._parameters[2]) * (1 + (x**2).sum(1))
        variance = np.maximum(own - (solved**2).sum(0), 1e-12)
        return self._offset + self._scale * (cross @ self._weights), self._scale * np.sqrt(variance)

    def _inputs(self, table: NDArray[np.int64]) -> Floats:
        result: Floats = (np.log(np.maximum(table[:, self._free], 1e-9)) - self._low) / self._span
        return result

    def _best_parameters(self) -> Floats:
        """Logarithms of: noise variance, Matern variance, trend variance, one length scale per input."""
        from scipy.optimize import minimize

        size = self._x.shape[1]
        centre = np.array([math.log(0.02), 0.0, math.log(0.1), *[math.log(1.0)] * size])
        width = np.array([1.0, 1.0, 1.5, *[1.0] * size])
        squares = (self._x.T[:, :, None] - self._x.T[:, None, :]) ** 2
        linear = 1 + self._x @ self._x.T

        def loss(parameters: Floats) -> tuple[float, Floats]:
            return _negative_evidence(parameters, squares, linear, self._y, centre, width)

        start = centre if self._parameters is None else self._parameters
        bounds = [(math.log(1e-4), 1.0), (-5.0, 4.0), (-7.0, 4.0), *[(math.log(0.05), math.log(30.0))] * size]
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40})
        return np.asarray(found.x, float)


def _kernel(a: Floats, b: Floats, parameters: Floats) -> Floats:
    scaled_a, scaled_b = a / np.exp(parameters[3:]), b / np.exp(parameters[3:])
    squared = (scaled_a**2).sum(1)[:, None] + (scaled_b**2).sum(1)[None] - 2 * scaled_a @ scaled_b.T
    r = np.sqrt(np.maximum(squared, 0.0))
    matern = (1 + _ROOT5 * r + 5 / 3 * r**2) * np.exp(-_ROOT5 * r)
    result: Floats = math.exp(parameters[1]) * matern + math.exp(parameters[2]) * (1 + a @ b.T)
    return result


def _negative_evidence(
    parameters: Floats, squares: Floats, linear: Floats, y: Floats, centre: Floats, width: Floats
) -> tuple[float, Floats]:
    """Negative log marginal likelihood plus priors, and its gradient (Rasmussen and Williams, equations 5.8 and 5.9)."""
    from scipy.linalg import cho_factor, cho_solve

    noise, variance, trend = np.exp(parameters[:3])
    scaled = squares / np.exp(2 * parameters[3:])[:, None, None]
    r = np.sqrt(scaled.sum(0))
    decay = np.exp(-_ROOT5 * r)
    matern = variance * (1 + _ROOT5 * r + 5 / 3 * r**2) * decay
    kernel = matern + trend * linear + (noise + 1e-8) * np.eye(len(y))
    factor = cho_factor(kernel, lower=True)
    alpha = cho_solve(factor, y)
    inner = cho_solve(factor, np.eye(len(y))) - np.outer(alpha, alpha)  # 2 d(nll)/dK
    slope = variance * 5 / 3 * (1 + _ROOT5 * r) * decay
    gradient = 0.5 * np.array([
        noise * np.trace(inner), (inner * matern).sum(), trend * (inner * linear).sum(),
        *np.einsum("ij,kij->k", inner * slope, scaled),
    ])  # fmt: skip
    value = 0.5 * y @ alpha + np.log(np.diag(factor[0])).sum()
    pull = (parameters - centre) / width
    return float(value + 0.5 * (pull**2).sum()), gradient + pull / width


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """``E[max(value - best, 0)]`` of normal values (Jones et al. 1998, equation 15)."""
    from scipy.special import ndtr

    z = (mean - best) / np.maximum(deviation, 1e-12)
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    result: Floats = (mean - best) * ndtr(z) + deviation * density
    return result
