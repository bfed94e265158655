"""The three models that an estimator chooses from, fitted to published latencies: MACs, MACs + floor, features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgecompress.latency_tables.estimate import Errors
from edgecompress.latency_tables.features import Features
from edgecompress.latency_tables.recipes import Group

MIN_NETWORKS = 8  # a group of rows with fewer networks that we can build is not fitted on features
# How strongly a coefficient is held at what MACs + floor says; see `fit_features`.
PULL = 0.01
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One published latency of a whole network; ``build`` is the model that it is, where we can build it."""

    network: str
    mmacs: float
    us: float
    group: Group
    build: str = ""
    features: Features | None = None

    @property
    def left_out_as(self) -> str:
        """What leaves together: VGG-16 with normalisation tells of VGG-16 without."""
        return self.build or self.network


@dataclass(frozen=True)
class Fit:
    """Floors and offsets in microseconds, slopes in microseconds per MMAC, each by its name."""

    values: dict[str, float]

    def us(self, mmacs: float, group: Group) -> float:
        """Latency on the devices of ``group``. A fit of MACs alone has neither floors nor offsets."""
        fixed = sum(self.values.get(name, 0.0) for name in (f"floor {group.floor}", f"offset {group.offset}"))
        return fixed + self.values[f"slope {group.slope}"] * mmacs


@dataclass(frozen=True)
class FeatureFit:
    """Latency on the devices of one group: a floor and microseconds for each unit of each feature."""

    floor_us: float
    us_per: Features

    def us(self, features: Features) -> float:
        """Latency of a network of these features."""
        return self.floor_us + features.dot(self.us_per)


def fit(samples: Sequence[Sample], *, floors: bool = True) -> Fit:
    """Least squares on the logarithm of the latency with a robust loss, so that one odd network does not rule."""
    from scipy.optimize import least_squares

    start: dict[str, float] = {}
    for group in {sample.group for sample in samples}:
        own = [sample for sample in samples if sample.group == group]
        smallest = min(sample.us for sample in own)
        start[f"slope {group.slope}"] = min(sample.us / sample.mmacs for sample in own)
        if floors:
            start[f"floor {group.floor}"] = min(smallest / 2, start.get(f"floor {group.floor}", smallest))
        if floors and group.offset:
            start[f"offset {group.offset}"] = smallest / 2
    names = sorted(start)

    def residuals(x: Floats) -> Floats:
        trial = Fit(dict(zip(names, np.exp(x).tolist(), strict=True)))
        return np.array([np.log(trial.us(s.mmacs, s.group) / s.us) for s in samples])

    best = least_squares(
        residuals, np.log([start[name] for name in names]), loss="soft_l1", f_scale=0.2, bounds=(-8, 16)
    )
    return Fit(dict(zip(names, np.exp(best.x).tolist(), strict=True)))


def fit_features(samples: Sequence[Sample], prior: Fit) -> FeatureFit:
    """Non-negative least squares on the relative error, pulled towards ``prior`` so that a few networks suffice.

    Every coefficient is written as the share of time that it stands for in the networks where it stands for most. Where
    the data are silent (no depthwise network among them) the coefficient stays at what the prior says: every
    multiply-add costs the slope, bytes and kernels nothing.

    Args:
        samples: rows of one group, all with features.
        prior: MACs + floor, fitted to the same networks and others.
    """
    from scipy.optimize import nnls

    group = samples[0].group
    slope = prior.values[f"slope {group.slope}"]
    expected = np.array([prior.values[f"floor {group.floor}"], slope, slope, slope, 0.0, 0.0, 0.0])
    work = np.array([(1.0, *s.features.values) for s in samples if s.features])
    shares = work / np.array([[s.us] for s in samples])
    unit = shares.max(axis=0)
    seen = unit > 0
    unit = unit[seen]
    pull = np.sqrt(PULL) * np.eye(int(seen.sum()))
    left = np.vstack([shares[:, seen] / unit / np.sqrt(len(samples)), pull])
    right = np.concatenate([np.ones(len(samples)) / np.sqrt(len(samples)), pull @ (expected[seen] * unit)])
    found = expected.copy()
    found[seen] = nnls(left, right)[0] / unit
    return FeatureFit(float(found[0]), Features(**dict(zip(Features.model_fields, found[1:].tolist(), strict=True))))


def of_slope(samples: Sequence[Sample], slope: str) -> list[Sample]:
    """The samples whose groups share ``slope``."""
    return [sample for sample in samples if sample.group.slope == slope]


def featured(samples: Sequence[Sample], slope: str) -> list[Sample]:
    """The samples of ``slope`` that are fitted on features: none where too few networks can be built."""
    own = [sample for sample in of_slope(samples, slope) if sample.features]
    return own if len({sample.build for sample in own}) >= MIN_NETWORKS else []


def loo_errors(samples: Sequence[Sample]) -> dict[str, Errors]:
    """Errors of the three models by slope, when each network in turn is left out with all its rows and builds.

    Where a slope can be fitted on features, all three are compared on the networks that have them. A network whose
    absence would leave a parameter without any row cannot be left out; a slope whose networks are all of that sort has
    no error here.
    """
    slopes = {sample.group.slope for sample in samples}
    rich = {slope: featured(samples, slope) for slope in slopes}
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for network in sorted({sample.left_out_as for sample in samples}):
        rest = [sample for sample in samples if sample.left_out_as != network]
        rates, floors = fit(rest, floors=False), fit(rest)
        for slope in slopes:
            for s in rich[slope] or of_slope(samples, slope):
                if s.left_out_as != network or not _needed(s.group) <= floors.values.keys():
                    continue
                guess = math.nan
                if rich[slope] and s.features:
                    guess = fit_features([r for r in rich[slope] if r.build != s.build], floors).us(s.features)
                guesses = (rates.us(s.mmacs, s.group), floors.us(s.mmacs, s.group), guess)
                macs, floor, features = (abs(us / s.us - 1) for us in guesses)
                errors.setdefault(slope, []).append((macs, floor, features))
    return {slope: _errors(np.array(found)) for slope, found in errors.items()}


def _needed(group: Group) -> set[str]:
    return {f"floor {group.floor}", f"slope {group.slope}"} | ({f"offset {group.offset}"} if group.offset else set())


def _errors(found: Floats) -> Errors:
    macs, floor, features = (float(value) for value in found.mean(axis=0))
    return Errors(macs=macs, floor=floor, features=None if np.isnan(features) else features)


def worst(errors: Mapping[str, Errors], evidence: Sequence[str], slope: str) -> Errors:
    """The largest error of each model over the groups of ``evidence``; the features' only where ``slope`` has them.

    Evidence without features stands on MACs + floor, whatever model ``slope`` takes.
    """
    known = [errors[name] for name in evidence if name in errors]
    rich = [error.floor if error.features is None else error.features for error in known]
    has_features = slope in errors and errors[slope].features is not None
    return Errors(
        macs=max(error.macs for error in known),
        floor=max(error.floor for error in known),
        features=max(rich) if has_features else None,
    )
