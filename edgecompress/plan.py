"""The dry run: what `compress` would do, in what time and memory, and what its budget allows. It makes no run."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from edgecompress.channel_stage import channels_of
from edgecompress.cost import count
from edgecompress.data import Dataset, Split
from edgecompress.exporters.formats import EXPORTERS
from edgecompress.finetune import reference_file
from edgecompress.job import Job
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.models import build_model
from edgecompress.options import resolve, run_name
from edgecompress.original import answered, original_network
from edgecompress.prepare import dataset_of, prepare
from edgecompress.progress import Progress, Silent
from edgecompress.prune import reestimate_batchnorm
from edgecompress.rehearsal import PlannedStage, PlannedTraining, Training, planned, rehearse, timed_step
from edgecompress.report import UNITS
from edgecompress.run_exports import formats_for
from edgecompress.runs import RunFolder
from edgecompress.spaces import SearchSpace
from edgecompress.spec import Config, Document, Frozen, LayerChoice, Metric, Source, Stage, Trial

METRICS: tuple[Metric, ...] = ("flops", "params", "size", "bops", "latency")
RUN_FILES = ("run.toml", "policy.json", "model.safetensors", "graph.onnx", "report.html", "report.json")
NOT_TIMED = "exporting, proving and measuring the files"


class PlannedGroup(Frozen):
    """Channels that are cut together, the widths they may take, or the reason why they keep the one they have."""

    id: str
    layers: tuple[str, ...]
    width: int
    widths: tuple[int, ...]
    reason: str = ""


class Reach(Frozen):
    """The smallest value of a metric that the search can build; ``holds`` is None where no budget limits it."""

    metric: Metric
    unit: str
    original: float
    smallest: float
    limit: float | None
    holds: bool | None


class Plan(Document):
    """What `compress` would do with these options. ``seconds`` leaves out what ``not_timed`` says."""

    run: str
    run_exists: bool
    config: Config
    device: str
    images: dict[str, int]
    groups: tuple[PlannedGroup, ...]
    stages: tuple[PlannedStage, ...]
    trainings: tuple[PlannedTraining, ...]
    reach: tuple[Reach, ...]
    latency: Source | None
    latency_about: str
    kernels: dict[Source, int]
    files: tuple[str, ...]
    preparing_s: float
    seconds: float
    not_timed: str = NOT_TIMED
    peak_memory_bytes: int | None


def make_plan(
    model: str | nn.Module = "resnet8",
    data: str | Dataset = "digits",
    target: str = "jetson-orin-nano",
    budget: str | None = None,
    *,
    name: str | None = None,
    runs: Path | str = "runs",
    progress: Progress | None = None,
    **options: object,
) -> Plan:
    """Plan a run; the arguments are those of `pipeline.compress`. Only a temporary folder is written.

    Raises:
        UsageError: what `compress` refuses before its search. A budget out of reach is no error here, see `Reach`.
    """
    progress = progress or Silent()
    device = target_by_name(target)
    config = resolve(model, data, device, budget, options)
    folder = Path(runs) / (name or run_name(config))
    torch.set_num_threads(config.threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edgecompress-plan-") as scratch:
        progress.stage("Load, trace and price the network", 1)
        dataset = dataset_of(data, config, progress)
        original, ahead = _original(model, config, dataset, progress)
        dataset = answered(dataset, original, config)
        job, latency, about, size = prepare(config, device, dataset, original, RunFolder(Path(scratch)), Silent())
        preparing_s = time.perf_counter() - started
        found = rehearse(job, latency, size, progress)
    trainings = found.trainings
    if ahead is not None:
        alone = Training("original", *ahead, timed_step(job, original, None))
        trainings = (*planned(job, [alone]), *trainings)
    cost = job.original_cost
    formats = (EXPORTERS[format_name].file_name for format_name in formats_for(job))
    return Plan(
        run=str(folder),
        run_exists=(folder / "config.json").exists(),
        config=config,
        device=device.device,
        images={
            part.name: len(getattr(dataset, part.name)) for part in fields(dataset) if _is_split(dataset, part.name)
        },
        groups=_groups(job),
        stages=found.stages,
        trainings=trainings,
        reach=_reach(job, found.space),
        latency=None if cost.latency_us is None else cost.latency_source,
        latency_about=about,
        kernels={
            "measured": cost.kernels_measured,
            "interpolated": cost.kernels_interpolated,
            "estimated": cost.kernels_estimated,
        },
        files=(*(f"exports/{file}" for file in formats), *RUN_FILES),
        preparing_s=preparing_s,
        seconds=preparing_s + sum(s.seconds for s in found.stages) + sum(t.seconds for t in trainings),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _is_split(data: Dataset, name: str) -> bool:
    return isinstance(getattr(data, name), Split)


class _TrainingAheadError(Exception):
    """Raised where the original would be trained: a plan only wants to know."""


class _Ahead:
    """Passes notes on and stops before a training of the original."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, title: str, total: int) -> None:
        raise _TrainingAheadError(title, total)

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None: ...

    def epoch(self, epoch: int, epochs: int, loss: float) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None:
        self._progress.note(text)


def _original(
    model: str | nn.Module, config: Config, data: Dataset, progress: Progress
) -> tuple[nn.Module, tuple[str, int] | None]:
    """The network, and title and epochs of the training before the search, if there is one.

    A network that is not trained yet has the same layers and the same speed.
    """
    try:
        return original_network(model, config, data, _Ahead(progress)), None
    except _TrainingAheadError as found:
        title, epochs = found.args
    assert isinstance(model, str)
    torch.manual_seed(0)
    network = build_model(model, len(data.classes))
    if reference_file(model, network, data, epochs=epochs).exists():
        return original_network(model, config, data, Silent()), None
    reestimate_batchnorm(network, data, seed=config.seed)
    return network.eval(), (title, epochs)


def _groups(job: Job) -> tuple[PlannedGroup, ...]:
    allowed: dict[str, tuple[int, ...]] = {}
    if "prune" in job.config.stages:
        space = channels_of(job, job.cost_model(None, None))
        allowed = dict(zip(space.names, space.levels, strict=True))
    return tuple(
        PlannedGroup(
            id=group.id,
            layers=group.members,
            width=group.width,
            widths=allowed.get(group.id, (group.width,)),
            reason="" if group.id in allowed else group.reason or "stage 1 is not run",
        )
        for group in job.network.groups
    )


def _reach(job: Job, space: SearchSpace) -> tuple[Reach, ...]:
    """What the first search can build at the least; it plans the bytes with the bits that it expects of stage 2."""
    price, policy = space.price(space.smallest), space.to_policy(space.smallest)
    if job.integer:
        bits = LayerChoice(weight_bits=min(job.target.weight_bits), activation_bits=min(job.target.activation_bits))
        policy = policy.model_copy(update={"layers": {layer.name: bits for layer in job.network.layers}})
    price = price.model_copy(update={"bops": count(job.network, policy).bops})
    limits = {limit.budget.metric: limit.value for limit in job.limits}
    result = []
    for metric in METRICS:
        if metric == "latency" and price.latency_us is None:
            continue
        smallest, limit = price.metric(metric), limits.get(metric)
        result.append(
            Reach(
                metric=metric,
                unit=UNITS[metric],
                original=job.original_cost.metric(metric),
                smallest=smallest,
                limit=limit,
                holds=None if limit is None else smallest <= limit,
            )
        )
    return tuple(result)


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
