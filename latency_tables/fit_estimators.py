"""Fit ``data/estimators.json``: ``python -m edgecompress.latency_tables.fit_estimators`` (needs EDGECOMPRESS_DATA)."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from edgecompress.errors import BadFileError
from edgecompress.files import file_sha256, write_document
from edgecompress.latency_tables.estimate import Coefficients, Estimators
from edgecompress.latency_tables.recipes import RECIPES, Group, Recipe

PUBLIC = "public_latencies.csv"
OWN = Path(__file__).parent / "data" / "x86_networks.csv"
# fp32, 1 thread, ONNX Runtime 1.32, 2 virtual cores with AVX512-VNNI: the project's first export measurements.
QUIET_RESNET18_US = 16_000.0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One published latency of a whole network."""

    network: str
    mmacs: float
    us: float
    group: Group


@dataclass(frozen=True)
class Fit:
    """Floors and offsets in microseconds, slopes in microseconds per MMAC, each by its name."""

    values: dict[str, float]

    def us(self, mmacs: float, group: Group) -> float:
        """Latency on the devices of ``group``."""
        offset = self.values[f"offset {group.offset}"] if group.offset else 0.0
        return offset + self.values[f"floor {group.floor}"] + self.values[f"slope {group.slope}"] * mmacs


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of the public table whose latency and MACs are numbers, at batch 1.

    Raises:
        BadFileError: the table is not there.
    """
    path = folder / PUBLIC
    if not path.exists():
        raise BadFileError(f"There is no {PUBLIC} in {folder}. Point EDGECOMPRESS_DATA to the folder that holds it.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["macs_M"] and row["batch"] == "1"]
    # Percentiles of one run are one measurement; a run from idle clocks measures the clocks.
    return [
        row
        for row in rows
        if row["statistic"] not in ("p90", "p99")
        and "throughput" not in row["conditions"].replace("throughput-latency", "")
    ]


def samples_of(rows: Sequence[dict[str, str]], groups: Sequence[Group]) -> list[Sample]:
    """The rows that ``groups`` name.

    Raises:
        BadFileError: a group finds no row.
    """
    found = []
    for group in groups:
        own = [
            Sample(row["network"], float(row["macs_M"]), float(row["latency_ms"]) * 1e3, group)
            for row in rows
            if (row["device"], row["runtime"], row["precision"]) == (group.device, group.runtime, group.precision)
            and group.condition in row["conditions"]
        ]
        if not own:
            raise BadFileError(f"{PUBLIC} holds no row of {group}. Use the table that this edgecompress was made for.")
        found += own
    return found


def fit(samples: Sequence[Sample]) -> Fit:
    """Least squares on the logarithm of the latency with a robust loss, so that one odd network does not rule."""
    from scipy.optimize import least_squares

    start: dict[str, float] = {}
    for group in {sample.group for sample in samples}:
        own = [sample for sample in samples if sample.group == group]
        smallest = min(sample.us for sample in own)
        start[f"floor {group.floor}"] = min(smallest / 2, start.get(f"floor {group.floor}", smallest))
        start[f"slope {group.slope}"] = min(sample.us / sample.mmacs for sample in own)
        if group.offset:
            start[f"offset {group.offset}"] = smallest / 2
    names = sorted(start)

    def residuals(x: Floats) -> Floats:
        trial = Fit(dict(zip(names, np.exp(x).tolist(), strict=True)))
        return np.array([np.log(trial.us(s.mmacs, s.group) / s.us) for s in samples])

    best = least_squares(
        residuals, np.log([start[name] for name in names]), loss="soft_l1", f_scale=0.2, bounds=(-8, 16)
    )
    return Fit(dict(zip(names, np.exp(best.x).tolist(), strict=True)))


def loo_errors(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean absolute error by slope, as a fraction, when each network in turn is left out with all its rows.

    A network whose absence would leave a parameter without any row cannot be left out; a slope whose networks are all
    of that sort has no error here.
    """
    errors: dict[str, list[float]] = {}
    for network in sorted({sample.network for sample in samples}):
        rest = [sample for sample in samples if sample.network != network]
        trial = fit(rest)
        for s in samples:
            needed = {f"floor {s.group.floor}", f"slope {s.group.slope}"} | (
                {f"offset {s.group.offset}"} if s.group.offset else set()
            )
            if s.network == network and needed <= set(trial.values):
                errors.setdefault(s.group.slope, []).append(abs(trial.us(s.mmacs, s.group) / s.us - 1))
    return {slope: float(np.mean(values)) for slope, values in errors.items()}


def scale_errors(rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """How far a step from one device or runtime to another is off, each seen where both sides were measured.

    ``clock``: latency over clock on a TX2 at three clocks. ``device``: cores x clock from Jetson Nano to AGX Xavier.
    ``ort over ncnn``: ONNX Runtime over ncnn on a Raspberry Pi 5.
    """
    by: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        by.setdefault((row["device"], row["runtime"], row["precision"]), {})[row["network"]] = float(row["latency_ms"])

    def ratios(slow: tuple[str, str, str], fast: tuple[str, str, str]) -> list[float]:
        return [us / by[fast][network] for network, us in by[slow].items() if network in by[fast]]

    clock = [
        abs(ratio / (1300 / mhz) - 1)
        for mhz, mode in ((1120, "maxp"), (850, "maxq"))
        for precision in ("fp16", "fp32")
        for ratio in ratios((f"JetsonTX2-{mode}", "TensorRT", precision), ("JetsonTX2-maxn", "TensorRT", precision))
    ]
    t2t = "TensorRT via torch2trt"
    device = [
        abs(ratio / ((512 * 1377) / (128 * 921.6)) - 1)
        for ratio in ratios(("JetsonNano", t2t, "fp16"), ("JetsonAGXXavier", t2t, "fp16"))
    ]
    runtime = [
        ratio - 1 for ratio in ratios(("RaspberryPi5", "ONNX Runtime", "fp32"), ("RaspberryPi5", "ncnn", "fp32"))
    ]
    means = {"clock": clock, "device": device, "ort over ncnn": runtime}
    return {"none": 0.0} | {name: float(np.mean(values)) for name, values in means.items()}


def coefficients(samples: Sequence[Sample], recipe: Recipe, scale_error: float, source: str) -> Coefficients:
    """Fit one recipe; the error is that of the worst group of its evidence."""
    found, errors = fit(samples).values, loo_errors(samples)
    slope = found[f"slope {recipe.slope}"] * recipe.slope_factor
    if recipe.ratio is not None:
        slope *= found[f"slope {recipe.ratio[0]}"] / found[f"slope {recipe.ratio[1]}"]
    error = max(errors[name] for name in recipe.evidence if name in errors)
    used = [sample for sample in samples if sample.group.slope in recipe.evidence]
    counts: dict[str, int] = {}
    for sample in used:
        name = f"{sample.group.device} {sample.group.runtime} {sample.group.precision}"
        counts[name] = counts.get(name, 0) + 1
    return Coefficients(
        floor_us=_short(found[f"floor {recipe.floor}"] * recipe.floor_factor),
        us_per_mmac=_short(slope),
        proportional_below_mmacs=0.0 if recipe.launches else min(sample.mmacs for sample in used),
        band=_short(error + scale_error),
        loo_error=_short(error),
        scale_error=_short(scale_error),
        networks=len({sample.network for sample in used}),
        rows=counts,
        floor_factor=_short(recipe.floor_factor),
        slope_factor=_short(recipe.slope_factor),
        why=recipe.why,
        source=source,
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def own_samples() -> dict[str, list[Sample]]:
    """Whole networks that we measured on x86 ourselves, by precision (see the header of the file)."""
    with OWN.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    samples: dict[str, list[Sample]] = {}
    for row in rows:
        group = Group(row["device"], row["runtime"], row["precision"], "x86", "x86")
        samples.setdefault(row["precision"], []).append(
            Sample(row["network"], float(row["mmacs"]), float(row["median_us"]), group)
        )
    return samples


def fit_all(folder: Path) -> Estimators:
    """Fit every recipe to the tables in ``folder`` and to our own measurements on x86."""
    rows = read_rows(folder)
    steps = scale_errors(rows)
    classes: dict[str, dict[str, Coefficients]] = {}
    for name, recipes in RECIPES.items():
        classes[name] = {
            precision: coefficients(samples_of(rows, recipe.pool), recipe, steps[recipe.check], PUBLIC)
            for precision, recipe in recipes.items()
        }
    why = (
        "measured on the machine named in the rows; the scale error is how much faster another virtual machine with "
        "the same CPU flags and ONNX Runtime was (ResNet-18 fp32 16 ms); CPUs without AVX-512 can differ by more"
    )
    x86 = Recipe((), "x86", "x86", ("x86",), why, launches=False)
    own = own_samples()
    resnet18 = next(sample.us for sample in own["fp32"] if sample.network == "resnet18")
    step = resnet18 / QUIET_RESNET18_US - 1
    classes["x86"] = {precision: coefficients(samples, x86, step, OWN.name) for precision, samples in own.items()}
    return Estimators(
        made_by="python -m edgecompress.latency_tables.fit_estimators",
        data_sha256={PUBLIC: file_sha256(folder / PUBLIC), OWN.name: file_sha256(OWN)},
        classes=classes,
    )


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=OWN.parent / "estimators.json", help="File to write.")
def main(out: Path) -> None:
    """Fit the estimators to $EDGECOMPRESS_DATA and print the error of each."""
    folder = os.environ.get("EDGECOMPRESS_DATA")
    if not folder:
        raise click.UsageError(f"EDGECOMPRESS_DATA is not set. Point it to the folder that holds {PUBLIC}.")
    estimators = fit_all(Path(folder))
    for name, fits in estimators.classes.items():
        for precision, known in fits.items():
            click.echo(
                f"{name:18} {precision:5} floor {known.floor_us:9.1f} us  {known.us_per_mmac:8.4f} us/MMAC  "
                f"LOO {known.loo_error:5.0%}  scale {known.scale_error:4.0%}  {known.networks:2} networks"
            )
    write_document(out, estimators)


if __name__ == "__main__":
    main()
