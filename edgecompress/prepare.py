"""What a run starts from: its images, the traced original with its files and its price, and warnings about both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgecompress.bit_stage import pinned_bits
from edgecompress.cost import LatencyModel, count
from edgecompress.data import Dataset, Split, load_data
from edgecompress.describe import graph_of, traced_of
from edgecompress.edges import with_edges
from edgecompress.errors import UsageError
from edgecompress.exporters.onnx_writing import metadata_of
from edgecompress.exporters.sizes import CHANNEL_BYTES, PlannedSize
from edgecompress.exporters.to_onnx import float_model
from edgecompress.files import write_bytes, write_document
from edgecompress.job import Job, limits_for
from edgecompress.latency_tables.predict import latency_model
from edgecompress.options import label
from edgecompress.original import preprocessing_of
from edgecompress.progress import Progress
from edgecompress.quantize import Simulator, calibrate
from edgecompress.runs import ORIGINAL, ORIGINAL_INT8, RunFolder
from edgecompress.spaces import Limit
from edgecompress.spec import (
    CompressionPolicy,
    Config,
    LayerChoice,
    Preprocessing,
    Target,
    parse_budgets,
)
from edgecompress.splits import checked
from edgecompress.tasks import AGREEMENT, task_by_name

if TYPE_CHECKING:
    import onnx

CALIBRATION_BATCH = 100
PLANNED_BITS = 4.5  # average weight bits that stage 1 expects of stage 2 where a file stores them packed


def dataset_of(
    data: str | Dataset, config: Config, progress: Progress, preprocessing: Preprocessing | None = None
) -> Dataset:
    """The images of a run, loaded unless they were handed over.

    Args:
        preprocessing: of a run that was made already.

    Raises:
        BadDataError: see `data.load_data`. UsageError: images in memory are to be prepared in another way.
    """
    task = data.task if isinstance(data, Dataset) and data.task.name == config.task else task_by_name(config.task)
    if isinstance(data, Dataset):
        if config.preprocessing != "auto" or config.image_size:
            raise UsageError(
                "Images in memory bring their own preprocessing; put the wanted one into the Dataset, or name the data."
            )
        return checked(replace(data, task=task if data.labelled else AGREEMENT))
    how = preprocessing or preprocessing_of(config)
    if how is not None and how is not preprocessing:
        at = how.at(config.image_size) if config.image_size else how
        cut = f", cut out of the middle at a shorter side of {at.resize}" if at.resize else ""
        progress.note(
            f"images are prepared for {label(config.model)}: {at.size[0]}x{at.size[1]} pixels{cut}, {at.interpolation}"
        )
    found = load_data(
        config.data, image_size=None if preprocessing else config.image_size, seed=config.seed, task=task,
        preprocessing=how, unlabelled=config.unlabelled, download=config.download,
        on_read=_Reading(progress, config.data),
    )  # fmt: skip
    for text in found.notes:
        progress.note(text)
    if not found.labelled:
        progress.note(f"{found.name} has no labels: what is measured is agreement with the original network")
    return found


class _Reading:
    """Tells of images being read, where that takes long enough to be asked about."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._before = 0

    def __call__(self, done: int, total: int) -> None:
        if done <= self._before or self._before == 0:
            self._progress.stage(f"Read {self._name}", total)
        self._before = done
        self._progress.step(done, total)


def prepare(
    config: Config, target: Target, data: Dataset, original: nn.Module, run: RunFolder, progress: Progress
) -> tuple[Job, LatencyModel, str, PlannedSize]:
    """Trace the original, write its float and int8 files, and price it."""
    shape = tuple(data.test.images.shape[1:])
    for text in validation_warnings(data):
        progress.note(text)
    progress.stage("Trace the network", 1)
    traced = traced_of(original, shape, label(config.model))
    graph = graph_of(original, shape, config.model)
    traced = replace(traced, network=with_edges(traced.network, graph))
    write_document(run.file("layers.json"), traced.network)
    as_float = float_model(graph, metadata=metadata_of(data.preprocessing, data.classes)).SerializeToString()
    _check_same_original(run.file("exports") / ORIGINAL, as_float)
    write_bytes(run.file("exports") / ORIGINAL, as_float)
    budgets = parse_budgets(config.budget)
    free = tuple(
        Limit(budget, 0.0) for budget in budgets
    )  # what is limited; the amounts follow from the original's cost
    job = Job(
        config, target, data, run, progress, original, traced, free, count(traced.network, CompressionPolicy(model=""))
    )
    integers = as_float
    if job.integer:
        calibration = calibrate(graph, calibration_batches(data), ranges=config.ranges)
        simulator = Simulator(graph, calibration, target.weight_scales)
        pinned_bits(config.pin_bits, list(simulator.points.layer_input), target)  # a slip is told before any training
        integers = at_8_bits(simulator, "ort", data).SerializeToString()
        write_bytes(run.file("exports") / ORIGINAL_INT8, integers)
    table = Path(config.table) if config.table else None
    latency, about = latency_model(
        target, tables=table, require_measured=config.require_measured, allow_mismatch=config.allow_mismatch
    )
    planned = job.cost_model(None, latency)(CompressionPolicy(model=""))
    priced = count(traced.network, CompressionPolicy(model=""), None, lambda kernels, params: len(as_float))
    fields = (
        "latency_us",
        "latency_low_us",
        "latency_high_us",
        "kernels_measured",
        "kernels_interpolated",
        "kernels_estimated",
    )
    cost = priced.model_copy(update={name: getattr(planned, name) for name in fields})
    packed = target.dialect != "trt"
    size = PlannedSize.from_file(
        len(integers), traced.network.layers, PLANNED_BITS if packed else 8,
        sparse=packed and target.max_opset >= 21,
        channel_bytes=CHANNEL_BYTES["ort" if packed else "trt", target.weight_scales],
    )  # fmt: skip
    if not job.integer:
        size = PlannedSize(len(as_float) - 4 * cost.params, 32)
    return replace(job, limits=limits_for(budgets, cost), original_cost=cost), latency, about, size


def _check_same_original(path: Path, network: bytes) -> None:
    """Refuse to go on with a run that another network began: its options may name the same file, with other weights."""
    if path.exists() and path.read_bytes() != network:
        raise UsageError(
            f"The run {path.parent.parent} was begun with another network: its {path.name} has other weights or another "
            "preprocessing than --model, --weights and --data give now. Bring back the files that it was begun with, or "
            "start over with --overwrite."
        )


def at_8_bits(simulator: Simulator, dialect: str, data: Dataset) -> onnx.ModelProto:
    """The network with every layer at 8 bits, as the dialect's exporter writes it."""
    from edgecompress.exporters import to_onnxruntime, to_tensorrt

    choices = {layer.name: LayerChoice(weight_bits=8, activation_bits=8) for layer in simulator.graph.layers}
    writer = to_tensorrt.integer_model if dialect == "trt" else to_onnxruntime.integer_model
    return writer(simulator.quantized(choices), metadata=metadata_of(data.preprocessing, data.classes))


def calibration_batches(data: Dataset) -> Iterator[torch.Tensor]:
    """Normalised calibration images, without augmentation."""
    return (x for x, _ in data.batches(data.calibration, CALIBRATION_BATCH))


def calibration_warnings(data: Dataset) -> list[str]:
    """What makes activation ranges doubtful: few images, or images of other brightness or contrast than those to come."""
    warnings = []
    if len(data.calibration) < CALIBRATION_BATCH:
        warnings.append(
            f"there are only {len(data.calibration)} calibration images; give {CALIBRATION_BATCH} or more for safe ranges"
        )
    (mean, deviation), (seen_mean, seen_deviation) = (
        _statistics(data, split) for split in (data.calibration, data.search_val)
    )
    moved = float(((mean - seen_mean).abs() / seen_deviation).max())
    stretched = float((deviation / seen_deviation).log2().abs().max())
    if moved > 0.5 or stretched > 1:
        warnings.append(
            "the calibration images look normalised in another way than those that are evaluated: per channel their mean is "
            f"{_listed(mean)} against {_listed(seen_mean)}, their deviation {_listed(deviation)} against "
            f"{_listed(seen_deviation)}; prepare both alike"
        )
    return warnings


def validation_warnings(data: Dataset) -> list[str]:
    """That policies are not told apart, where an accuracy near 90 % has a standard error above 3 points."""
    if not data.task.percent:
        return []
    judged = {"the search judges policies": data.search_val, "the best of them is chosen": data.select_val}
    errors = {what: (0.9 * 0.1 / len(split)) ** 0.5 for what, split in judged.items()}
    return [
        f"{what} on {len(judged[what])} images: near 90 % the standard error of {data.task.score_name} is "
        f"{100 * error:.1f} points, and policies that differ by less are not told apart; give more images"
        for what, error in errors.items()
        if error > 0.03
    ]


def _statistics(data: Dataset, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation per channel of the first thousand images as the network sees them."""
    x = data.normalise(split.images[:1000])
    return x.mean((0, 2, 3)), x.std((0, 2, 3)).clamp(min=1e-3)


def _listed(values: torch.Tensor) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values.tolist()) + ")"
