"""compress(): the whole story. Every arrow writes into the run folder, so a run restarts from its last file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgecompress.bit_stage import quantize_stage
from edgecompress.cost import LatencyModel, count, kernels
from edgecompress.data import Dataset, Split, load_data
from edgecompress.describe import GraphModule, graph_of, traced_of
from edgecompress.edges import with_edges
from edgecompress.errors import BadFileError, UnknownNameError, UsageError
from edgecompress.exporters.formats import EXPORTERS, export
from edgecompress.exporters.interface import PLAIN, Interface
from edgecompress.exporters.onnx_writing import metadata_of
from edgecompress.exporters.quantized_file import save_graph, save_quantized
from edgecompress.exporters.sizes import PlannedSize
from edgecompress.exporters.source import ExportSource
from edgecompress.exporters.to_onnx import float_model
from edgecompress.files import write_bytes, write_document
from edgecompress.finetune import accuracy_and_loss
from edgecompress.graph import Graph, read_graph
from edgecompress.latency_tables.half import faster_in_half
from edgecompress.latency_tables.predict import latency_model
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.options import label, resolve, run_name
from edgecompress.original import answered, class_names, original_network, preprocessing_of
from edgecompress.posttraining import equalised, without_upper_ends
from edgecompress.progress import Progress, Silent
from edgecompress.quantize import QuantizedGraph, Simulator, calibrate, simulate
from edgecompress.report import report_on, write_report
from edgecompress.runs import ORIGINAL, ORIGINAL_INT8, RunFolder, opened
from edgecompress.spaces import Limit
from edgecompress.spec import (
    Architecture,
    Artifact,
    CompressionPolicy,
    Config,
    LayerChoice,
    Preprocessing,
    Rounds,
    RunReport,
    Target,
    parse_budgets,
)
from edgecompress.splits import checked
from edgecompress.stages import Job, limits_for, prune_stage, recover
from edgecompress.tasks import AGREEMENT, task_by_name
from edgecompress.threads import torch_threads

if TYPE_CHECKING:
    import onnx

CALIBRATION_BATCH = 100
PLANNED_BITS = 4.5  # average weight bits that stage 1 expects of stage 2 where a file stores them packed


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: RunFolder
    report: RunReport
    data: Dataset | None = None  # kept where it was given in memory, so that the run can be exported again

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def missed(self) -> list[str]:
        """Goals that the run did not keep, as sentences."""
        return [
            f"{goal.goal}: {goal.value:.4g} {goal.unit}, the limit is {goal.limit:.4g} {goal.unit}"
            for goal in self.report.goals
            if not goal.holds
        ]

    def export(self, format_name: str, *, check: bool = True, interface: Interface = PLAIN) -> Artifact:
        """Write one format (a key of `exporters.formats.EXPORTERS`) into the run's ``exports`` folder and prove it."""
        return export_run(self.path, format_name, data=self.data, check=check, interface=interface)


def compress(  # noqa: PLR0913 (the public call: everything beyond what, where and how it is stored goes into options)
    model: str | nn.Module = "resnet8",
    data: str | Dataset = "digits",
    target: str = "jetson-orin-nano",
    budget: str | None = None,
    *,
    name: str | None = None,
    runs: Path | str = "runs",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: object,
) -> Run:
    """Compress a trained network for one device and prove what was exported.

    Args:
        model: a name (see `models.build_model`), a ``.onnx`` or ``.pt2`` file (quantised and exported only), or a trained
            ``nn.Module`` that maps ``[N, C, H, W]`` to ``[N, classes]``. Whose weights it gets: see `original`.
        data: a name, the root of an image folder, ``package.module:factory`` (see `data.load_data`), or a `Dataset`.
        target: a device, see ``edgecompress targets``.
        budget: for example ``"flops=0.5x,size=0.125x"``; the default depends on whether the target runs integers.
        name: of the run folder, by default ``<model>-<data>-<target>``.
        options: further fields of `spec.Config`.

    Raises:
        UsageError: an argument is wrong. GoalMissedError: a budget cannot be met or an artifact failed its proof.
    """
    progress = progress or Silent()
    device = target_by_name(target)
    config = resolve(model, data, device, budget, options)
    name = name or run_name(config)
    with torch_threads(config.threads), opened(Path(runs) / name, config, resume=resume, overwrite=overwrite) as run:
        clock = _Clock()
        dataset = dataset_of(data, config, progress)
        original = original_network(model, config, dataset, progress)
        dataset = answered(dataset, original, config)
        clock.lap("reference")
        job, latency, about, size = prepare(config, device, dataset, original, run, progress)
        clock.lap("trace and original")
        pruned, smaller, arm = _stage_one(job, latency, size)
        clock.lap("stage 1")
        graph = saved_graph(job, smaller, pruned)
        policy, arms, rounds = pruned, {"prune": arm}, None
        if job.integer:
            policy, arms["quantize"] = _stage_two(job, graph, pruned, latency)
            policy, arms, rounds = _alternated(job, policy, arms, latency, size)
        write_document(
            run.file("policy.json"),
            policy.model_copy(update={"provenance": {f"found_by_{k}": v for k, v in arms.items()}}),
        )
        clock.lap("stage 2")
        progress.stage("Export and verify", 3)
        artifacts = [export_run(run.path, format_name, data=dataset) for format_name in formats_for(job)]
        clock.lap("export")
        report = report_on(job, artifacts, latency, about, arms, clock.seconds, rounds)
        write_report(run, report)
        return Run(run, report, data if isinstance(data, Dataset) else None)


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
        len(integers), traced.network.layers, PLANNED_BITS if packed else 8, sparse=packed and target.max_opset >= 21
    )
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
    """That the search cannot tell policies apart, where an accuracy near 90 % has a standard error above 3 points."""
    images = len(data.search_val)
    error = (0.9 * 0.1 / images) ** 0.5
    if not data.task.percent or error <= 0.03:
        return []
    return [
        f"the search judges policies on {images} images: near 90 % the standard error of {data.task.score_name} is "
        f"{100 * error:.1f} points, and policies that differ by less are not told apart; give more images"
    ]


def _statistics(data: Dataset, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation per channel of the first thousand images as the network sees them."""
    x = data.normalise(split.images[:1000])
    return x.mean((0, 2, 3)), x.std((0, 2, 3)).clamp(min=1e-3)


def _listed(values: torch.Tensor) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values.tolist()) + ")"


def _stage_one(job: Job, latency: LatencyModel, size: PlannedSize) -> tuple[CompressionPolicy, nn.Module, str]:
    if "prune" not in job.config.stages:
        return CompressionPolicy(model=job.network.model), job.original, "skipped"
    policy, arm = prune_stage(job, job.cost_model(size, latency))
    model, policy = recover(job, policy)
    return policy, model, arm


def saved_graph(job: Job, smaller: nn.Module, pruned: CompressionPolicy) -> Graph:
    """Write the pruned float network as safetensors and as ONNX; what comes after reads the latter back."""
    shape = job.network.input_shape
    architecture = Architecture(
        model=job.config.model,
        classes=len(job.data.classes),
        input_shape=shape,
        keep_channels=pruned.keep_channels,
        preprocessing=job.data.preprocessing,
        fixed_graph=isinstance(smaller, GraphModule),
    )
    job.run.save_model(smaller, architecture)
    save_graph(job.run.file("graph.onnx"), graph_of(smaller, shape, job.config.model))
    return read_graph(job.run.file("graph.onnx"))


def _stage_two(
    job: Job, graph: Graph, pruned: CompressionPolicy, latency: LatencyModel
) -> tuple[CompressionPolicy, str]:
    if job.config.equalise:
        graph = equalised(without_upper_ends(graph, calibration_batches(job.data)))
    for text in calibration_warnings(job.data):
        job.progress.note(text)
    calibration = calibrate(graph, calibration_batches(job.data), ranges=job.config.ranges)
    simulator = Simulator(graph, calibration, job.target.weight_scales)
    base = len(at_8_bits(simulator, job.target.dialect, job.data).SerializeToString())
    quantized, policy, arm = quantize_stage(job, graph, calibration, pruned, latency, base)
    save_quantized(job.run.file("quantized.safetensors"), quantized)
    return policy, arm


TWO_STAGES = "two stages"


def _alternated(
    job: Job, policy: CompressionPolicy, arms: dict[str, str], latency: LatencyModel, size: PlannedSize
) -> tuple[CompressionPolicy, dict[str, str], Rounds | None]:
    """Open stage 1 again with stage 2's bits in its prices, and stage 2 behind it, ``alternate`` times; the best stays.

    Every round works in a folder of its own. One that does better on select-val takes the run's place.
    """
    if not job.config.alternate or "prune" not in job.config.stages:
        return policy, arms, None
    best = _select_val(job)
    scores, exported = {TWO_STAGES: best[0]}, TWO_STAGES
    bits = policy
    for number in range(1, job.config.alternate + 1):
        folder = RunFolder(job.run.path / f"alternation-{number}")
        folder.path.mkdir(exist_ok=True)
        planned = {
            name: LayerChoice(weight_bits=choice.weight_bits, activation_bits=choice.activation_bits)
            for name, choice in bits.layers.items()
        }
        again = replace(job, run=folder, bits=planned)
        pruned, smaller, arm = _stage_one(again, latency, size.at_known_bits())
        graph = saved_graph(again, smaller, pruned)
        bits, bits_arm = _stage_two(replace(again, bits={}), graph, pruned, latency)
        found = _select_val(again)
        scores[folder.path.name] = found[0]
        if found > best:
            exported = folder.path.name
            best, policy, arms = found, bits, {"prune": arm, "quantize": bits_arm}
            for name in ("graph.onnx", "quantized.safetensors", "model.safetensors", "arch.json"):
                write_bytes(job.run.file(name), folder.file(name).read_bytes())
    said = ", ".join(f"{name} {job.data.task.about.text(score)}" for name, score in scores.items())
    job.progress.note(f"select-val after {said}: {exported} is exported")
    return policy, arms, Rounds(scores=scores, exported=exported)


def _select_val(job: Job) -> tuple[float, float]:
    """Score and negative loss of a run's integers, so that the larger is the better one."""
    score, loss = accuracy_and_loss(partial(simulate, job.run.quantized()), job.data, job.data.select_val)
    return score, -loss


def formats_for(job: Job) -> tuple[str, ...]:
    """Formats that a run writes by itself."""
    if job.integer:
        return ("onnx", "onnxruntime", "tensorrt")
    return ("onnx", "tensorrt") if job.target.exporter == "tensorrt" else ("onnx",)


BY_TABLE = "table"  # in the place of layers: those that the table has faster in FP16


def export_run(
    path: Path,
    format_name: str,
    *,
    data: Dataset | None = None,
    check: bool = True,
    interface: Interface = PLAIN,
    half: Sequence[str] = (),
    out: Path | None = None,
) -> Artifact:
    """Write one format of a finished run into its ``exports`` folder; everything is read back from the run's files.

    Args:
        interface: input type, layout, head, opset and batch of the file.
        half: layers that a TensorRT file computes in FP16 beside those of 16 bits; `BY_TABLE`: those that the run's table
            has faster so.
        out: another folder.

    Raises:
        BadFileError: the run is missing, broken or did not finish. GoalMissedError: the artifact failed its proof.
        UsageError: ``out`` cannot be written; ``half`` with another format. UnknownNameError: ``half`` names no layer
            with integer weights.
    """
    run = RunFolder(path)
    config = run.config()
    if format_name not in EXPORTERS:
        raise UnknownNameError("format", format_name, EXPORTERS)
    integers = run.file("quantized.safetensors").exists() or not run.file("graph.onnx").exists()
    quantized, policy, architecture = run.quantized() if integers else None, run.policy(), run.architecture()
    check_built(run.file("policy.json"), policy, quantized, architecture)
    if half:
        if format_name != "tensorrt":
            raise UsageError(f"Layers in FP16 are for TensorRT files; they do not go with the format '{format_name}'.")
        quantized = _in_half(quantized, half, run, config)
    if data is None:
        data = dataset_of(config.data, config, Silent(), architecture.preprocessing)
    images, labels = next(data.batches(data.select_val, 100))
    source = ExportSource(
        graph=read_graph(run.file("graph.onnx")),
        quantized=quantized,
        network=run.network(),
        policy=policy,
        target=target_by_name(config.target),
        preprocessing=data.preprocessing,
        classes=data.classes if data.labelled else class_names(config, architecture.classes),
        images=images.numpy(),
        labels=labels.numpy() if data.labelled else None,
        task=data.task,
        interface=interface,
        table=Path(config.table).name if config.table else "",
    )
    return export(source, format_name, out or run.file("exports"), check=check)


def check_built(
    path: Path, policy: CompressionPolicy, quantized: QuantizedGraph | None, architecture: Architecture
) -> None:
    """Refuse a policy that was edited after the run had built another one.

    Raises:
        BadFileError: its bits or channels are not those of the run's network.
    """
    weights = {} if quantized is None else quantized.weights
    bits = {name: (choice.weight_bits, weights[name].bits) for name, choice in policy.layers.items() if name in weights}
    kept = architecture.keep_channels
    channels = {group: (width, kept[group]) for group, width in policy.keep_channels.items() if group in kept}
    for kind, found in (("weight bits", bits), ("channels", channels)):
        for name, (says, built) in found.items():
            if says != built:
                raise BadFileError(
                    f"The policy {path} says {says} {kind} for '{name}', but the run built {built}: the file records what was "
                    "chosen, and editing it builds nothing. Write the number back, or compress again (--pin-bits sets bits)."
                )


def _in_half(
    quantized: QuantizedGraph | None, names: Sequence[str], run: RunFolder, config: Config
) -> QuantizedGraph | None:
    """``quantized`` with ``names`` (or what the table says) in FP16; a float network has no layer to choose."""
    if tuple(names) == (BY_TABLE,):
        target = target_by_name(config.target)
        latency, _ = latency_model(
            target,
            tables=Path(config.table) if config.table else None,
            require_measured=True,
            allow_mismatch=config.allow_mismatch,
        )
        names = faster_in_half(kernels(run.network(), run.policy()), latency)
    known = quantized.weights if quantized is not None else {}
    for name in names:
        if name not in known:
            raise UnknownNameError("layer with integer weights", name, known)
    return replace(quantized, half=quantized.half | set(names)) if quantized is not None else None


class _Clock:
    """Seconds of every part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 2), now


def load(path: Path | str, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The pruned, fine-tuned float network of a run, rebuilt without any pickle (see `runs.RunFolder.load_model`)."""
    return RunFolder(Path(path)).load_model(factory)
