"""Rows and tables of benchmarks/headline.py, from finished cells alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from cells import Cell
from harness import Benchmark
from headline_lab import BUDGETS, Effort

SEEDS = (0, 1, 2)
PAPER = "vgg19_bn_cifar"
EQUAL = 0.1  # points of accuracy that a peer may be below ours and still count as equal
NOT_YET = "its cells are not finished"
WHERE = "its baseline is not trained; that wants a GPU"
IMAGENET = "edgecompress compress --model vgg16 --weights DEFAULT --data imagenet --target x86 --budget params=0.03x,size=0.0075x"


def rows(bench: Benchmark, known: Mapping[str, Cell], effort: Effort) -> None:
    """Every figure that is asked for; those without their cells do not hold and say why."""
    _headline(bench, known, effort)
    for network, limit in ((PAPER, 0.0), ("resnet56", -0.1)):
        _loss(bench, known, network, effort, limit)
    for network in BUDGETS:
        _peers(bench, known, network, effort)
    _imagenet(bench, known.get("vgg16_224"))
    bench.details["Effort"] = {
        "epochs of the baseline": effort.train_epochs,
        "epochs of fine-tuning, ours and every peer's": effort.tune_epochs,
        "of ours, quantisation-aware": effort.qat_epochs,
        "training images": effort.train_images,
        "evaluations of each of our stages": effort.episodes,
        "budgets": BUDGETS,
        "seeds": list(SEEDS),
    }
    for network in BUDGETS:
        found = table(known, network, str(effort))
        if found:
            bench.details[f"{network}: files"] = found
    bench.details["ImageNet"] = {
        "command": IMAGENET,
        "expects": "an ImageFolder with train/ and val/; the network's published weights are downloaded",
        "cost": "a guess, not run by us: with 1.28 million images one epoch of fine-tuning is hours on one GPU, days on a CPU",
    }


def of(known: Mapping[str, Cell], network: str, effort: Effort, what: str) -> dict[int, Cell]:
    """Finished cells by seed."""
    found = {seed: known.get(f"{network}/{effort}/{what}/{seed}") for seed in SEEDS}
    return {seed: cell for seed, cell in found.items() if cell is not None}


def _headline(bench: Benchmark, known: Mapping[str, Cell], effort: Effort) -> None:
    mine, start = of(known, PAPER, effort, "ours"), known.get(f"{PAPER}/{effort}/original")
    figures = (("parameters", "params", 1e6, 1.5, "M"), ("bytes on disk of the exported file", "bytes", 1e6, 0.8, "MB"))
    for title, key, scale, limit, unit in figures:
        if mine:
            bench.at_most(f"VGG-19-BN: {title}", max(c[key] for c in mine.values()) / scale, limit, unit)
        else:
            bench.not_run(f"VGG-19-BN: {title}", limit, unit, f"{NOT_YET}: {WHERE}")
    bar = "VGG-19-BN: latency of the fp32 file over ours, 1 thread"
    times = [cell["latency_us"] for cell in mine.values() if "latency_us" in cell]
    if times and start is not None and "latency_us" in start:
        bench.at_least(bar, start["latency_us"] / max(times), 8.0, "x")
    else:
        bench.not_run(bar, 8.0, "x", f"{NOT_YET}: {WHERE}")


def _loss(bench: Benchmark, known: Mapping[str, Cell], network: str, effort: Effort, limit: float) -> None:
    bar = f"{network}: exported file less the unpruned network with the same fine-tuning, test accuracy, mean"
    mine, tuned = of(known, network, effort, "ours"), of(known, network, effort, "tuned")
    differences = [mine[seed]["test"] - tuned[seed]["test"] for seed in SEEDS if seed in mine and seed in tuned]
    if not differences:
        bench.not_run(bar, limit, "points", NOT_YET)
    elif len(differences) < len(SEEDS):
        reason = f"so far: {len(differences)} of {len(SEEDS)} seeds"
        bench.misses(bar, statistics.mean(differences), limit, "points", reason)
    else:
        bench.at_least(bar, statistics.mean(differences), limit, "points")


def _peers(bench: Benchmark, known: Mapping[str, Cell], network: str, effort: Effort) -> None:
    """At equal accuracy: of the peers that are no worse than ours by more than `EQUAL`, the fastest and the smallest."""
    mine = of(known, network, effort, "ours")
    accuracy = statistics.mean(cell["test"] for cell in mine.values()) if mine else 0.0
    equals = {
        name: cell for name, cell in _peer_cells(known, network, str(effort)).items() if cell["test"] >= accuracy - EQUAL
    }  # fmt: skip
    for title, key in (("slower", "latency_us"), ("larger", "bytes")):
        bar = f"{network}: the best peer of equal accuracy is {title} than our file by"
        values = {name: cell[key] for name, cell in equals.items() if key in cell}
        own = [cell[key] for cell in mine.values() if key in cell]
        if not own or not values:
            reason = NOT_YET if not mine or not equals else "its files were not timed (--time)"
            bench.not_run(bar, 1.25, "x", reason)
            continue
        best = min(values, key=lambda name: values[name])
        bench.at_least(f"{bar} ({best})", values[best] / statistics.mean(own), 1.25, "x")


def _peer_cells(known: Mapping[str, Cell], network: str, effort: str) -> dict[str, Cell]:
    found = {}
    for name, cell in known.items():
        where = name.split("/")
        if where[:2] == [network, effort] and len(where) == 4 and not where[2].startswith(("ours", "tuned")):
            found[where[2]] = cell
    return found


def _imagenet(bench: Benchmark, cell: Cell | None) -> None:
    figures = (
        ("VGG-16 at 224x224, seeded weights: peak memory of the whole pipeline", 16.0, "GB"),
        ("VGG-16 at 224x224, seeded weights: parameters over the original's (the paper: 33x)", round(1 / 33, 4), "x"),
    )
    if cell is None:
        for bar, limit, unit in figures:
            bench.not_run(bar, limit, unit, NOT_YET)
        return
    for (bar, limit, unit), value in zip(
        figures, (cell["peak_bytes"] / 1e9, cell["params"][1] / cell["params"][0]), strict=True
    ):
        bench.at_most(bar, value, limit, unit)
    bench.details["VGG-16 at 224x224: seeded weights, size and speed only, no accuracy"] = cell


def table(known: Mapping[str, Cell], network: str, effort: str) -> list[dict[str, Any]]:
    """A row for every file. Hours are of training, search and proof together."""
    start = known.get(f"{network}/{effort}/original", {})
    found = []
    for name, cell in known.items():
        where = name.split("/")
        if where[:2] != [network, effort]:
            continue
        time_us = cell.get("latency_us")
        ratio = start["latency_us"] / time_us if time_us and "latency_us" in start else None
        found.append({
            "file": "/".join(where[2:]),
            "test %": cell["test"],
            "parameters": cell["params"],
            "MACs": cell["macs"],
            "BOPs": cell["bops"],
            "bytes": cell["bytes"],
            "average weight bits": cell.get("bits", 32),
            "latency, us": time_us,
            "times faster": None if ratio is None else round(ratio, 2),
            "hours": round(sum(cell["hours"].values()), 3),
            "found by": ", ".join(f"{stage}: {arm}" for stage, arm in cell.get("arms", {}).items()),
        })  # fmt: skip
    return found
