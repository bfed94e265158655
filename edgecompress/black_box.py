"""Two searches that know nothing of layers: CMA-ES, and Bayesian optimisation with a Gaussian process."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgecompress.accuracy_model import AccuracyModel, expected_improvement
from edgecompress.mutations import PARENTS, changed
from edgecompress.scoring import Scorer, top
from edgecompress.spaces import SearchSpace

Floats = NDArray[np.float64]
_IDLE = 60


class CMAES:
    """Covariance matrix adaptation with the default parameters of Hansen 2016 (*The CMA Evolution Strategy: A Tutorial*,
    arXiv 1604.00772, table 1), positive weights only. Minimises."""

    def __init__(self, start: Floats, sigma: float, random: np.random.Generator, population: int | None = None) -> None:
        n = len(start)
        self.mean, self.sigma, self._random = np.array(start, float), sigma, random
        self.population = population or 4 + int(3 * math.log(n))
        weights = math.log((self.population + 1) / 2) - np.log(np.arange(1, self.population // 2 + 1))
        self._weights = weights / weights.sum()
        self._mu = 1 / (self._weights**2).sum()
        self._c_sigma = (self._mu + 2) / (n + self._mu + 5)
        self._damping = 1 + 2 * max(0.0, math.sqrt((self._mu - 1) / (n + 1)) - 1) + self._c_sigma
        self._c_path = (4 + self._mu / n) / (n + 4 + 2 * self._mu / n)
        self._c_one = 2 / ((n + 1.3) ** 2 + self._mu)
        self._c_mu = min(1 - self._c_one, 2 * (self._mu - 2 + 1 / self._mu) / ((n + 2) ** 2 + self._mu))
        self._length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # of a standard normal vector
        self._step_path, self._path, self._covariance = np.zeros(n), np.zeros(n), np.eye(n)
        self._generation = 0

    def ask(self) -> Floats:
        """A generation of candidates ``[population, n]``."""
        values, self._basis = np.linalg.eigh(self._covariance)
        self._roots = np.sqrt(np.maximum(values, 1e-20))
        drawn = self._random.standard_normal((self.population, len(self.mean)))
        result: Floats = self.mean + self.sigma * (drawn * self._roots) @ self._basis.T
        return result

    def tell(self, candidates: Floats, losses: Floats) -> None:
        """Learn from a generation."""
        n = len(self.mean)
        self._generation += 1
        steps = (candidates[np.argsort(losses, kind="stable")][: len(self._weights)] - self.mean) / self.sigma
        step = self._weights @ steps
        self.mean = self.mean + self.sigma * step
        white = self._basis @ ((self._basis.T @ step) / self._roots)
        c = self._c_sigma
        self._step_path = (1 - c) * self._step_path + math.sqrt(c * (2 - c) * self._mu) * white
        norm = float(np.linalg.norm(self._step_path))
        expected = math.sqrt(1 - (1 - c) ** (2 * self._generation)) * self._length
        steady = float(norm / expected < 1.4 + 2 / (n + 1))
        c = self._c_path
        self._path = (1 - c) * self._path + steady * math.sqrt(c * (2 - c) * self._mu) * step
        lost = (1 - steady) * self._c_one * c * (2 - c)
        self._covariance = (
            (1 + lost - self._c_one - self._c_mu) * self._covariance
            + self._c_one * np.outer(self._path, self._path)
            + self._c_mu * (steps.T * self._weights) @ steps
        )
        self.sigma *= math.exp(min(self._c_sigma / self._damping * (norm / self._length - 1), 1.0))


def cma_es(space: SearchSpace, scorer: Scorer, seed: int) -> None:
    """CMA-ES on wishes that are projected, from the best policy of the start; without one from the middle."""
    random = np.random.default_rng(seed)
    leaders = [trial for trial in top(scorer.fitting(), 1) if trial.arm != "uniform"]
    start, sigma = (space.wishes(leaders[0].choice), 0.15) if leaders else (np.full(len(space.levels), 0.6), 0.25)
    strategy = CMAES(start, sigma, random)
    while scorer.idle < _IDLE:
        candidates = strategy.ask()
        losses = []
        for candidate in candidates:
            inside = np.clip(candidate, 0, 1)
            trial = scorer(space.project(inside), "cma-es")
            losses.append(-trial.reward + 0.1 * float(((candidate - inside) ** 2).sum()))  # keeps the mean inside
        strategy.tell(candidates, np.array(losses))


def gaussian_process(space: SearchSpace, scorer: Scorer, seed: int, candidates: int = 128) -> None:
    """Bayesian optimisation: each time the policy of highest expected improvement among random ones and mutations of the best.

    A Gaussian process over all trials within the budgets predicts the reward (Snoek et al. 2012).
    """
    random = np.random.default_rng(seed)
    model = AccuracyModel(space)
    while scorer.left > 0 and scorer.idle < _IDLE:
        trials = scorer.fitting()
        parents = [trial.choice for trial in top(trials, PARENTS)]
        pool = [
            changed(space, parents[int(random.integers(len(parents)))], random)
            if parents and number % 2
            else space.project(np.clip(random.normal(0.6, 0.2, len(space.levels)), 0, 1))
            for number in range(candidates)
        ]
        fresh = [choice for choice in dict.fromkeys(pool) if choice not in scorer.trials]
        if not fresh or len(trials) < 3:
            scorer(fresh[0] if fresh else pool[0], "gp")
            continue
        model.fit([trial.choice for trial in trials], [trial.reward for trial in trials])
        gain = expected_improvement(*model.predict(fresh), max(trial.reward for trial in trials))
        scorer(fresh[int(np.argmax(gain))], "gp")
