"""What a run reports: every artifact measured as a file, one table, and the page that shows it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

from edgecompress.cost import LatencyModel, average_weight_bits, channels, count, layer_macs
from edgecompress.devices import device_by_name, device_title
from edgecompress.evaluation import scored
from edgecompress.exporters.artifacts import open_artifact
from edgecompress.exporters.runners import measure_latency_us
from edgecompress.files import write_document, write_text
from edgecompress.job import Job, train_settings
from edgecompress.report_latency import at_bits, host_model, layer_latencies, predicted
from edgecompress.report_spec import (
    ArtifactRow,
    Column,
    Goal,
    LayerRow,
    Predicted,
    Rounds,
    RunReport,
)
from edgecompress.runs import ORIGINAL, ORIGINAL_INT8, RunFolder
from edgecompress.spec import FLOAT_BITS, Artifact, CompressionPolicy, LayerChoice, Trial

UNITS = {"flops": "MACs", "params": "parameters", "size": "B", "bops": "BOPs", "latency": "us"}


def report_on(
    job: Job,
    artifacts: Sequence[Artifact],
    latency: LatencyModel,
    about: str,
    arms: Mapping[str, str],
    seconds: Mapping[str, float],
    rounds: Rounds | None = None,
) -> RunReport:
    """Measure every exported file, one session alive at a time, and put it all into one document."""
    folder, policy = job.run.file("exports"), job.run.policy()
    image = job.data.normalise(job.data.test.images[:1]).numpy()
    rows: dict[str, ArtifactRow] = {}
    known = {artifact.path: artifact for artifact in artifacts}
    timing: dict[str, Mapping[str, float]] = {}
    on_host, host_source = host_model(job.target, latency, about)
    for name in [ORIGINAL, ORIGINAL_INT8, *known]:
        path = folder / name
        if not path.exists():
            continue
        opened = open_artifact(path)
        size = sum(file.stat().st_size for file in (path, *opened.beside))
        if not opened.as_written:
            timing[name] = measure_latency_us(opened.runner, image)
        del opened
        rows[name] = ArtifactRow(
            name=name,
            format=known[name].format if name in known else "onnx" if name == ORIGINAL else "onnxruntime",
            size_bytes=size,
            accuracy=scored(path, open_artifact(path, threads=job.config.threads), job.data)[0],
            host_latency_us=timing[name]["median_us"] if name in timing else None,
            predicted_host=predicted(job.network, _as_run(job, name, known, policy), on_host)
            if on_host and name in timing
            else None,
            checks=known[name].checks if name in known else {},
        )
    deployed = next((name for name in known if known[name].format == "onnxruntime"), next(iter(known)))
    on_target = next((name for name in known if known[name].format == job.target.exporter), deployed)
    sizes = {ORIGINAL: rows[ORIGINAL].size_bytes, deployed: rows[on_target].size_bytes}
    columns = {}
    original = CompressionPolicy(model=policy.model)
    # An integer run is compared with the float original; a float run with the original at the target's precision.
    priced = (original, policy) if job.integer else (job.planned(original), job.planned(policy))
    for file, chosen, as_priced in zip((ORIGINAL, deployed), (original, policy), priced, strict=True):
        columns[file] = Column(
            accuracy=rows[file].accuracy or 0.0,
            cost=count(job.network, as_priced, latency, partial(_constant, sizes[file])),
            average_weight_bits=average_weight_bits(job.network, chosen),
            host_latency_us=timing[file]["median_us"],
            host_latency_p90_us=timing[file]["p90_us"],
            file=file,
        )
    int8 = rows.get(ORIGINAL_INT8)
    return RunReport(
        name=job.run.path.name,
        config=job.config,
        target=job.target,
        score=job.data.task.about,
        latency_source=about,
        host_source=host_source,
        original=columns[ORIGINAL],
        compressed=columns[deployed],
        original_int8_us=int8.host_latency_us if int8 else None,
        original_int8_bytes=int8.size_bytes if int8 else None,
        artifacts=tuple(rows.values()),
        layers=_layers(job, policy, [layer_latencies(job.network, one, latency) for one in priced]),
        goals=_goals(job, columns[ORIGINAL], columns[deployed]),
        found_by=dict(arms),
        evaluations=_evaluations(_trials(job.run, rounds)),
        rounds=rounds,
        seconds=dict(seconds),
        provenance=provenance(job.config.threads) | {"trained on": _trained_on(job)},
    )


def _trained_on(job: Job) -> str:
    return f"{device_title(device_by_name(job.config.device))}, {train_settings(job, 1).precision}"


def _as_run(job: Job, name: str, artifacts: Mapping[str, Artifact], policy: CompressionPolicy) -> CompressionPolicy:
    """The policy of a file that was timed here, with the bits at which it computes."""
    if name not in artifacts:
        return at_bits(job.network, CompressionPolicy(model=policy.model), 8 if name == ORIGINAL_INT8 else FLOAT_BITS)
    return policy if artifacts[name].format == "onnxruntime" else at_bits(job.network, policy, FLOAT_BITS)


def _constant(size_bytes: int, kernels: object, params: int) -> int:
    """A size model of a file that is already written."""
    return size_bytes


def _goals(job: Job, original: Column, compressed: Column) -> tuple[Goal, ...]:
    goals = []
    for limit in job.limits:
        value = compressed.cost.metric(limit.budget.metric)
        goals.append(
            Goal(
                goal=str(limit.budget),
                value=value,
                limit=limit.value,
                unit=UNITS[limit.budget.metric],
                holds=value <= limit.value,
            )
        )
    if job.config.max_accuracy_drop is not None:
        drop = 100 * (original.accuracy - compressed.accuracy)
        allowed = job.config.max_accuracy_drop
        goal = f"{job.data.task.score_name} drop"
        goals.append(Goal(goal=goal, value=drop, limit=allowed, unit="points", holds=drop <= allowed))
    return tuple(goals)


def _layers(job: Job, policy: CompressionPolicy, latencies: Sequence[Mapping[str, Predicted]]) -> tuple[LayerRow, ...]:
    from edgecompress.exporters.sizes import stored_bytes

    widths = job.network.widths | policy.keep_channels
    stored = stored_bytes(job.run.quantized(), job.target) if job.run.file("quantized.safetensors").exists() else {}
    rows = []
    for layer in job.network.layers:
        inputs, outputs = channels(layer, widths, job.network.widths)
        choice = policy.layers.get(layer.name, LayerChoice())
        rows.append(
            LayerRow(
                name=layer.name,
                kind=layer.kind,
                in_channels=(layer.in_channels, inputs),
                out_channels=(layer.out_channels, outputs),
                macs=(layer.macs, layer_macs(layer, inputs, outputs)),
                keep_elements=choice.keep_elements,
                weight_bits=choice.weight_bits,
                activation_bits=choice.activation_bits,
                stored_bytes=stored.get(
                    layer.name, 4 * layer.params * inputs * outputs // (layer.in_channels * layer.out_channels)
                ),
                latency=(latencies[0][layer.name], latencies[1][layer.name]) if layer.name in latencies[1] else None,
            )
        )
    return tuple(rows)


def _trials(run: RunFolder, rounds: Rounds | None) -> list[Trial]:
    """The trials of the round that was exported."""
    folder = run.path if rounds is None else run.path / rounds.exported
    return (RunFolder(folder) if folder.is_dir() else run).trials()


def _evaluations(trials: Sequence[Trial]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in trials:
        key = f"{trial.stage}:{trial.arm}"
        counts[key] = counts.get(key, 0) + 1
    return counts


def provenance(threads: int) -> dict[str, str]:
    """Versions, hardware and date of this process."""
    packages = ("edgecompress", "torch", "onnxruntime", "onnx", "stable-baselines3", "torch-pruning", "numpy")
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}",
        "threads": str(threads),
    } | {name: version(name) for name in packages}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def write_report(run: RunFolder, report: RunReport) -> None:
    """Write ``report.json`` and ``report.html``."""
    from edgecompress.report_page import render_html

    write_document(run.file("report.json"), report)
    write_text(run.file("report.html"), render_html(report, _trials(run, report.rounds)))
