"""Fit ``data/estimators.json``: ``python -m edgecompress.latency_tables.fit_estimators`` (needs EDGECOMPRESS_DATA)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import click
import numpy as np

from edgecompress.errors import BadFileError
from edgecompress.files import file_sha256, write_document
from edgecompress.latency_tables.estimate import Coefficients, Errors, Estimators
from edgecompress.latency_tables.features import Features
from edgecompress.latency_tables.fit_models import (
    FeatureFit,
    Fit,
    Sample,
    featured,
    fit,
    fit_features,
    loo_errors,
    of_slope,
    worst,
)
from edgecompress.latency_tables.rebuild import (
    FEATURES,
    build_id,
    read_features,
    same_network,
    with_traced,
    write_features,
)
from edgecompress.latency_tables.recipes import RECIPES, Group, Recipe

PUBLIC = "public_latencies.csv"
OWN = Path(__file__).parent / "data" / "x86_networks.csv"
# fp32, 1 thread, ONNX Runtime 1.32, 2 virtual cores with AVX512-VNNI: the project's first export measurements.
QUIET_RESNET18_US = 16_000.0


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


def samples_of(
    rows: Sequence[dict[str, str]], groups: Sequence[Group], features: Mapping[str, Features]
) -> list[Sample]:
    """The rows that ``groups`` name, with the features of the networks that we can build.

    Raises:
        BadFileError: a group finds no row.
    """
    found = []
    for group in groups:
        own = [
            _sample(row, float(row["macs_M"]), float(row["latency_ms"]) * 1e3, group, features)
            for row in rows
            if (row["device"], row["runtime"], row["precision"]) == (group.device, group.runtime, group.precision)
            and group.condition in row["conditions"]
        ]
        if not own:
            raise BadFileError(f"{PUBLIC} holds no row of {group}. Use the table that this edgecompress was made for.")
        found += own
    return found


def _sample(row: dict[str, str], mmacs: float, us: float, group: Group, features: Mapping[str, Features]) -> Sample:
    build = build_id(row["network"], row["input"])
    known = features.get(build)
    return Sample(row["network"], mmacs, us, group, build, known if same_network(known, mmacs) else None)


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


@cache
def _fitted(samples: tuple[Sample, ...]) -> tuple[Fit, dict[str, Errors]]:
    """Many recipes read one pool; it is fitted once."""
    return fit(samples), loo_errors(samples)


def coefficients(samples: Sequence[Sample], recipe: Recipe, scale_error: float, source: str) -> Coefficients:
    """Fit one recipe with the model that errs least; the error is that of the worst group of its evidence."""
    prior, by_slope = _fitted(tuple(samples))
    errors = worst(by_slope, recipe.evidence, recipe.slope)
    compared = [s for name in recipe.evidence for s in featured(samples, name) or of_slope(samples, name)]
    if errors.best == "features":
        found = fit_features(featured(samples, recipe.slope), prior)
    else:
        taken = prior if errors.best == "MACs + floor" else fit(samples, floors=False)
        rate = taken.values[f"slope {recipe.slope}"]
        prices = Features(pointwise_mmacs=rate, spatial_mmacs=rate, depthwise_mmacs=rate)
        found = FeatureFit(taken.values.get(f"floor {recipe.floor}", 0.0), prices)
    ratio = 1.0
    if recipe.ratio is not None:
        ratio = prior.values[f"slope {recipe.ratio[0]}"] / prior.values[f"slope {recipe.ratio[1]}"]
    factors = dict.fromkeys(Features.model_fields, recipe.slope_factor * ratio) | {"kernels": recipe.floor_factor}
    counts: dict[str, int] = {}
    for sample in compared:
        name = f"{sample.group.device} {sample.group.runtime} {sample.group.precision}"
        counts[name] = counts.get(name, 0) + 1
    error = errors.of(errors.best)
    return Coefficients(
        model=errors.best,
        floor_us=_short(found.floor_us * recipe.floor_factor),
        us_per=Features(**{name: _short(getattr(found.us_per, name) * by) for name, by in factors.items()}),
        proportional_below_mmacs=0.0 if recipe.launches else min(sample.mmacs for sample in compared),
        band=_short(error + scale_error),
        loo_error=_short(error),
        errors=Errors(
            macs=_short(errors.macs),
            floor=_short(errors.floor),
            features=None if errors.features is None else _short(errors.features),
        ),
        scale_error=_short(scale_error),
        networks=len({sample.left_out_as for sample in compared}),
        rows=counts,
        floor_factor=_short(recipe.floor_factor),
        slope_factor=_short(recipe.slope_factor),
        why=recipe.why,
        source=source,
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def own_rows() -> list[dict[str, str]]:
    """Whole networks that we measured on x86 ourselves (see the header of the file)."""
    with OWN.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def own_samples(features: Mapping[str, Features]) -> dict[str, list[Sample]]:
    """Our own measurements by precision."""
    samples: dict[str, list[Sample]] = {}
    for row in own_rows():
        group = Group(row["device"], row["runtime"], row["precision"], "x86", "x86")
        samples.setdefault(row["precision"], []).append(
            _sample(row, float(row["mmacs"]), float(row["median_us"]), group, features)
        )
    return samples


def builds(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """``model@HxW`` of every network that a recipe reads and that we can build."""
    groups = {group for recipes in RECIPES.values() for recipe in recipes.values() for group in recipe.pool}
    for sample in samples_of(rows, sorted(groups, key=str), {}):
        yield sample.build
    for row in own_rows():
        yield build_id(row["network"], row["input"])


def fit_all(folder: Path, features: Mapping[str, Features]) -> Estimators:
    """Fit every recipe to the tables in ``folder`` and to our own measurements on x86."""
    rows = read_rows(folder)
    steps = scale_errors(rows)
    classes: dict[str, dict[str, Coefficients]] = {}
    for name, recipes in RECIPES.items():
        classes[name] = {
            precision: coefficients(samples_of(rows, recipe.pool, features), recipe, steps[recipe.check], PUBLIC)
            for precision, recipe in recipes.items()
        }
    why = (
        "measured on the machine named in the rows; the scale error is how much faster another virtual machine with "
        "the same CPU flags and ONNX Runtime was (ResNet-18 fp32 16 ms); CPUs without AVX-512 can differ by more"
    )
    x86 = Recipe((), "x86", "x86", ("x86",), why, launches=False)
    own = own_samples(features)
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
@click.option("--trace", is_flag=True, help=f"Trace all networks anew, not only those that {FEATURES.name} lacks.")
def main(out: Path, trace: bool) -> None:
    """Fit the estimators to $EDGECOMPRESS_DATA and print the errors of each model; * is the one that is taken."""
    folder = os.environ.get("EDGECOMPRESS_DATA")
    if not folder:
        raise click.UsageError(f"EDGECOMPRESS_DATA is not set. Point it to the folder that holds {PUBLIC}.")
    features = with_traced({} if trace else read_features(), builds(read_rows(Path(folder))))
    write_features(features)
    estimators = fit_all(Path(folder), features)
    click.echo("Error when a network is left out:     MACs alone  MACs + floor  features   step  networks")
    for name, fits in estimators.classes.items():
        for precision, known in fits.items():
            errors, star = known.errors, {known.model: "*"}
            rich = "-" if errors.features is None else f"{errors.features:.0%}"
            click.echo(
                f"{name:18} {precision:5} {errors.macs:22.0%}{star.get('MACs', ' ')} "
                f"{errors.floor:12.0%}{star.get('MACs + floor', ' ')} {rich:>8}{star.get('features', ' ')} "
                f"{known.scale_error:6.0%} {known.networks:9}"
            )
    write_document(out, estimators)


if __name__ == "__main__":
    main()
