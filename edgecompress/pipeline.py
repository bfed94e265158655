"""compress(): the whole story. Every arrow writes into the run folder, so a run restarts from its last file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from edgecompress.bit_stage import quantize_stage
from edgecompress.channel_stage import prune_stage
from edgecompress.clock import Clock
from edgecompress.cost import LatencyModel
from edgecompress.data import Dataset
from edgecompress.describe import GraphModule, graph_of
from edgecompress.exporters.interface import PLAIN, Interface
from edgecompress.exporters.quantized_file import save_graph, save_quantized
from edgecompress.exporters.sizes import PlannedSize
from edgecompress.files import write_bytes, write_document
from edgecompress.finetune import accuracy_and_loss
from edgecompress.graph import Graph, read_graph
from edgecompress.job import Job
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.options import resolve, run_name
from edgecompress.original import answered, original_network
from edgecompress.posttraining import equalised, without_upper_ends
from edgecompress.prepare import at_8_bits, calibration_batches, calibration_warnings, dataset_of, prepare
from edgecompress.progress import Progress, Silent
from edgecompress.quantize import Simulator, calibrate, simulate
from edgecompress.recover import recover
from edgecompress.report import report_on, write_report
from edgecompress.report_spec import Rounds, RunReport
from edgecompress.run_exports import export_run, formats_for
from edgecompress.runs import RunFolder, opened
from edgecompress.shipped import compressed_run
from edgecompress.spec import Architecture, Artifact, CompressionPolicy, LayerChoice
from edgecompress.threads import torch_threads


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
        progress = clock = Clock(run.file("seconds.json"), progress)
        dataset = dataset_of(data, config, progress)
        original = original_network(model, config, dataset, progress)
        dataset = answered(dataset, original, config)
        job, latency, about, size = prepare(config, device, dataset, original, run, progress)
        pruned, smaller, arm = _stage_one(job, latency, size)
        graph = saved_graph(job, smaller, pruned)
        policy, arms, rounds = pruned, {"prune": arm}, None
        if job.integer:
            policy, arms["quantize"] = _stage_two(job, graph, pruned, latency)
            policy, arms, rounds = _alternated(job, policy, arms, latency, size)
        write_document(
            run.file("policy.json"),
            policy.model_copy(update={"provenance": {f"found_by_{k}": v for k, v in arms.items()}}),
        )
        progress.stage("Export and verify", 3)
        artifacts = [export_run(run.path, format_name, data=dataset, measure=False) for format_name in formats_for(job)]
        clock.tick()
        report = report_on(job, artifacts, latency, about, arms, clock.seconds, rounds)
        write_report(run, report)
        return Run(run, report, data if isinstance(data, Dataset) else None)


def _stage_one(job: Job, latency: LatencyModel, size: PlannedSize) -> tuple[CompressionPolicy, nn.Module, str]:
    if "prune" not in job.config.stages:
        return CompressionPolicy(model=job.network.model), job.original, "skipped"
    policy, arm = prune_stage(job, job.cost_model(size, latency))
    model, policy = recover(job, policy)
    return policy, model, arm


def saved_graph(job: Job, smaller: nn.Module, pruned: CompressionPolicy) -> Graph:
    """Write the pruned float network as safetensors and as ONNX; what comes after reads the latter back."""
    shape = job.network.input_shape
    base = compressed_run(job.config.model)  # what it was cut to before is part of the architecture
    before = base.architecture() if base else None
    architecture = Architecture(
        model=before.model if before else job.config.model,
        classes=len(job.data.classes),
        input_shape=shape,
        keep_channels=(before.keep_channels if before else {}) | pruned.keep_channels,
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


def load(path: Path | str, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The pruned, fine-tuned float network of a run, rebuilt without any pickle (see `runs.RunFolder.load_model`)."""
    return RunFolder(Path(path)).load_model(factory)
