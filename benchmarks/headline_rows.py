"""Rows and tables of benchmarks/headline.py, from finished cells alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cells import Cell
from harness import Benchmark
from headline_imagenet import COMMAND
from headline_lab import divisor_of
from headline_peers import slimming_epochs
from headline_plan import IMAGENET, Job, Network, jobs_of

from edgecompress.channel_stage import SHORT_EPOCHS

PAPER = "vgg19_bn_cifar"
EQUAL = 0.2  # points of accuracy that a peer may be below ours and still count as equal
FASTER = 1.25  # what 20 % faster and 20 % smaller come to
# What did not do, or made no difference; two epochs of VGG-19-BN by a script that is not kept, the others by this benchmark.
TRIED = [
    {
        "network": "ResNet-56, ours, seed 0",
        "tried": "widths in steps of 8 channels; 6 epochs of fine-tuning and 2 quantisation-aware ones",
        "came to": "89.38 % on test, 0.86 points below the tuned network; 428,784 bytes; seen before the change",
        "so": "steps of 4, all epochs in floating point, rounded afterwards",
    },
    {
        "network": "VGG-19-BN cut to 1.38 M parameters and 0.25x of its MACs",
        "tried": "two epochs of fine-tuning at rates of 0.05, 0.01 and, with the teacher's answers alone, 0.01",
        "came to": "86.6, 87.2 and 87.6 % of the held-out images, where the rate of 0.02 gave three policies of that size 87.3 to 87.9 % "
        "of their second half",
        "so": "the rate stays 0.02",
    },
    {
        "network": "VGG-19-BN cut to 1.48 M parameters and 0.38x of its MACs, by hand",
        "tried": "two epochs of fine-tuning, as above",
        "came to": "87.8 % of the held-out images",
        "so": "the budget is 0.25x: fewer MACs for much the same accuracy; the wider network was not timed",
    },
]
Known = Mapping[str, Cell]
Found = dict[Job, Cell]


def rows(bench: Benchmark, known: Known, networks: Sequence[Network]) -> None:
    """Every figure that is asked for; those without all of their cells do not hold and say why."""
    by_name = {network.name: network for network in networks}
    _headline(bench, known, by_name[PAPER])
    _loss(bench, known, by_name[PAPER], 0.0)
    _loss(bench, known, by_name["resnet56"], -0.1)
    for network in networks:
        _peers(bench, known, network)
    _imagenet(bench, known.get(IMAGENET))
    bench.details["Against the paper"] = against_the_paper(known, by_name[PAPER], by_name["resnet56"])
    bench.details["Effort: everyone's epochs after the baseline are the same in all"] = [_effort(n) for n in networks]
    bench.details["What else there is to know"] = {
        "data": "45,000 training images, 2,500 held-out ones for the searches, 2,500 to choose with, the test images once",
        "ResNet-56": "its checkpoint has seen all 50,000 training images, the held-out ones too; the test images it has not",
        "seeds": "of ours and of the tuned original, see the effort; peers and our own baselines have seed 0",
        "hours": "of search: sensitivities, episodes and the finalists' short training; of training: those of the file's own trainings, "
        "one that several files share in the row of each; added up where a run was broken off and went on; what the teacher answers to "
        "a batch is computed once, by the first training of a seed",
        "single weights": "ours removes channels only: a budget in bytes is met by fewer bits",
    }
    bench.details["What was tried"] = TRIED
    agents = [row for network in networks if (row := _own_baselines(known, network))]
    if agents:
        bench.details["Our DDPG arm against the best of our own baselines, seed 0"] = agents
    for network in networks:
        found = table(known, network)
        if found:
            bench.details[f"{network.title}: files"] = found
    if ran := machines(known, networks):
        bench.details["Where it ran"] = ran
    bench.details["ImageNet"] = {
        "command": COMMAND,
        "expects": "an ImageFolder with train/ and val/; the network's published weights are downloaded",
        "cost": "see 'An ImageNet ImageFolder' in guides/data.md; not run by us",
    }


def finished(known: Known, network: Network, *kinds: str) -> tuple[Found, list[str]]:
    """The finished cells of a network, and which ones are missing."""
    jobs = [job for job in jobs_of(network) if job.kind in kinds]
    return {job: known[job.name] for job in jobs if job.name in known}, [j.file for j in jobs if j.name not in known]


def untimed(found: Found) -> list[str]:
    """Files whose latency was not measured."""
    return [job.file for job, cell in found.items() if "latency_us" not in cell]


def owing(missing: Sequence[str], not_timed: Sequence[str] = ()) -> str:
    """What a figure waits for, in words; empty where it waits for nothing."""
    parts = ((missing, "not finished"), (not_timed, "not timed (--time)"))
    return "; ".join(_first_of(files, what) for files, what in parts if files)


def _first_of(files: Sequence[str], what: str) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0]}{more} {'are' if len(files) > 1 else 'is'} {what}"


def judge(
    bench: Benchmark, bar: str, value: float | None, limit: float, unit: str, owed: str, *, least: bool = False
) -> None:
    """A bar holds only where nothing is owed."""
    if value is None:
        bench.not_run(bar, limit, unit, owed)
    elif owed:
        bench.misses(bar, value, limit, unit, f"so far: {owed}")
    else:
        (bench.at_least if least else bench.at_most)(bar, value, limit, unit)


def _headline(bench: Benchmark, known: Known, network: Network) -> None:
    mine, missing = finished(known, network, "ours")
    figures = (("parameters", "params", 1.5, "M"), ("bytes on disk of the exported file", "bytes", 0.8, "MB"))
    for title, key, limit, unit in figures:
        largest = max((cell[key] / 1e6 for cell in mine.values()), default=None)
        judge(bench, f"{network.title}: {title}", largest, limit, unit, owing(missing))
    start, no_start = finished(known, network, "original")
    timed = mine | start
    bar = f"{network.title}: latency of the fp32 file over ours, 1 thread"
    own = [cell["latency_us"] for cell in mine.values() if "latency_us" in cell]
    base = [cell["latency_us"] for cell in start.values() if "latency_us" in cell]
    ratio = base[0] / max(own) if own and base else None
    judge(bench, bar, ratio, 8.0, "x", owing([*no_start, *missing], untimed(timed)), least=True)


def differences(known: Known, network: Network) -> list[float]:
    """Ours less the tuned original by seed, of the seeds that have both: points on test."""
    found = finished(known, network, "ours", "tuned")[0]
    tests = {(job.kind, job.seed): cell["test"] for job, cell in found.items()}
    both = [seed for seed in network.seeds if ("ours", seed) in tests and ("tuned", seed) in tests]
    return [tests["ours", seed] - tests["tuned", seed] for seed in both]


def _loss(bench: Benchmark, known: Known, network: Network, limit: float) -> None:
    found, missing = finished(known, network, "ours", "tuned")
    bar = f"{network.title}: exported file less the unpruned network with the same fine-tuning, test accuracy, mean of seeds"
    lost = differences(known, network)
    mean = statistics.mean(lost) if lost else None
    if network.name != "resnet56":
        judge(bench, bar, mean, limit, "points", owing(missing), least=True)
        return
    bar += ", at 0.5x of its MACs"
    start, no_start = finished(known, network, "original")
    half = 0.5 * next(iter(start.values()))["macs"] if start else math.inf
    above = [
        f"{job.file} has {cell['macs']:,}" for job, cell in found.items() if job.kind == "ours" and cell["macs"] > half
    ]
    if above and mean is not None:
        bench.misses(bar, mean, limit, "points", f"{'; '.join(above)} MACs, more than half of the original's")
    else:
        judge(bench, bar, mean, limit, "points", owing([*no_start, *missing]), least=True)


def _peers(bench: Benchmark, known: Known, network: Network) -> None:
    """At equal accuracy: of the peers that are no worse than ours by more than `EQUAL`, the fastest and the smallest."""
    mine, missing = finished(known, network, "ours")
    peers, no_peers = finished(known, network, "peers")
    accuracy = statistics.mean(cell["test"] for cell in mine.values()) if mine else 0.0
    equals = {job: cell for job, cell in peers.items() if cell["test"] >= accuracy - EQUAL}
    for title, key in (("slower", "latency_us"), ("larger", "bytes")):
        bar = f"{network.title}: the best peer of equal accuracy is {title} than our file by"
        not_timed = untimed(mine | equals) if key == "latency_us" else []
        owed = owing([*missing, *no_peers], not_timed)
        values = {job: cell[key] for job, cell in equals.items() if key in cell}
        own = {job.seed: cell[key] for job, cell in mine.items() if key in cell}
        if not values or not own:
            judge(bench, bar, None, FASTER, "x", owed or _no_equal(peers, accuracy))
            continue
        best = min(values, key=lambda job: values[job])
        first = f"; {values[best] / own[0]:.3f}x against our seed 0" if 0 in own else ""
        about = f" ({described(best, equals[best])}; ours is the mean of seeds {', '.join(map(str, own))}{first})"
        judge(bench, bar + about, values[best] / statistics.mean(own.values()), FASTER, "x", owed, least=True)


def described(job: Job, cell: Cell) -> str:
    """A peer in figures."""
    time = f"{cell['latency_us']:,} us" if "latency_us" in cell else "not timed"
    return f"{job.method}{f'@{job.budget}' if job.budget else ''}, seed {job.seed}: {cell['test']} %, {cell['bytes']:,} bytes, {time}"


def _no_equal(peers: Found, accuracy: float) -> str:
    best = max(peers, key=lambda job: peers[job]["test"])
    return (
        f"no peer is within {EQUAL} points of our {accuracy:.2f} %; the most accurate is {described(best, peers[best])}"
    )


def _imagenet(bench: Benchmark, cell: Cell | None) -> None:
    owed = "" if cell else owing([IMAGENET])
    peak, share = (cell["peak_bytes"] / 1e9, cell["params"][1] / cell["params"][0]) if cell else (None, None)
    start = "VGG-16 at 224x224, seeded weights:"
    judge(bench, f"{start} peak memory of the whole pipeline", peak, 16.0, "GB", owed)
    bar = f"{start} parameters over the original's (the paper: 33x)"
    judge(bench, bar, share, round(1 / 33, 4), "x", owed)
    if cell:
        bench.details["VGG-16 at 224x224: seeded weights, size and speed only, no accuracy"] = cell


def against_the_paper(known: Known, vgg: Network, resnet: Network) -> list[dict[str, Any]]:
    """What others published beside the means of our finished seeds."""
    asked = (
        (vgg, "parameters", "20.04 M -> 2.2 M (9.1x fewer)", _shrunk(known, vgg, "params", "M")),
        (vgg, "accuracy against its own baseline", "slight gain", _gained(known, vgg)),
        (vgg, "bytes of the file against fp32 ONNX", "not given", _shrunk(known, vgg, "bytes", "MB")),
        (resnet, "accuracy at half of the MACs", "AMC (He et al. 2018): -0.9 points", _gained(known, resnet)),
        (resnet, "MACs", "AMC: 0.5x", _shrunk(known, resnet, "macs", "M")),
        (resnet, "bytes of the file against fp32 ONNX", "not given", _shrunk(known, resnet, "bytes", "MB")),
    )
    return [
        {"network": network.title, "what": what, "the paper": theirs, "ours": mine}
        for network, what, theirs, mine in asked
    ]


def _gained(known: Known, network: Network) -> str:
    found = differences(known, network)
    return (
        f"{statistics.mean(found):+.2f} points ({len(found)} of {len(network.seeds)} seeds)"
        if found
        else "not finished"
    )


def _shrunk(known: Known, network: Network, key: str, unit: str) -> str:
    mine, start = (finished(known, network, kind)[0] for kind in ("ours", "original"))
    if not mine or not start:
        return "not finished"
    before, after = (statistics.mean(cell[key] for cell in found.values()) for found in (start, mine))
    return f"{before / 1e6:.2f} {unit} -> {after / 1e6:.2f} {unit} ({before / after:.1f}x fewer, {len(mine)} of {len(network.seeds)} seeds)"


def _effort(network: Network) -> dict[str, Any]:
    effort, epochs = network.effort, network.epochs
    first = slimming_epochs(effort.tune_epochs)
    return {
        "network": network.title,
        "epochs of the baseline": effort.train_epochs or "a checkpoint",
        "epochs after it": effort.tune_epochs,
        "of ours": " + ".join(f"{count} {what}" for what, count in epochs.items() if count),
        "of slimming's": f"{first} with L1 + {effort.tune_epochs - first}",
        "of the search": f"3 finalists x {SHORT_EPOCHS}",
        "training images": effort.train_images,
        "evaluations of each of our stages": effort.episodes,
        "our budget": network.budget,
        "seeds of ours": ", ".join(map(str, network.seeds)),
        "peers keep": ", ".join(network.shares),
        "widths in steps of": divisor_of(network),
    }


def _own_baselines(known: Known, network: Network) -> dict[str, Any] | None:
    """One row: the arm of ours against the best of the baselines that are finished."""
    mine = known.get(Job("ours", network, "ours", 0, network.budget).name)
    others, missing = finished(known, network, "agents")
    if mine is None or not others:
        return None
    best = max(others, key=lambda job: others[job]["test"])
    return {
        "network": network.title,
        "ours, test %": mine["test"],
        "found by": _arms(mine),
        "best of the others": best.method.removeprefix("ours-"),
        "its test %": others[best]["test"],
        "ours less that, points": round(mine["test"] - others[best]["test"], 3),
        "finished": f"{len(network.agents) - len(missing)} of {len(network.agents)}",
    }


def _arms(cell: Cell) -> str:
    return ", ".join(f"{stage}: {arm}" for stage, arm in cell.get("arms", {}).items())


def table(known: Known, network: Network) -> list[dict[str, Any]]:
    """A row for every finished file."""
    found = {job: known[job.name] for job in jobs_of(network) if job.name in known}
    start = next((cell for job, cell in found.items() if job.kind == "original"), {})
    return [_row(job, cell, start) for job, cell in found.items()]


def _row(job: Job, cell: Cell, start: Cell) -> dict[str, Any]:
    hours = cell["hours"]
    return {
        "file": job.file,
        "test %": cell["test"],
        "parameters": cell["params"],
        "non-zeros": cell["nonzeros"],
        "MACs": cell["macs"],
        "BOPs": cell["bops"],
        "bytes": cell["bytes"],
        "times smaller": _ratio(start.get("bytes"), cell["bytes"]),
        "average weight bits": cell.get("bits", 32),
        "latency, us": cell.get("latency_us"),
        "times faster": _ratio(start.get("latency_us"), cell.get("latency_us")),
        "epochs": 0 if job.kind == "original" else job.network.effort.tune_epochs,
        "hours of search": hours.get("search", 0.0),
        "hours of training": hours.get("training", 0.0),
        "hours in all": round(sum(hours.values()), 3),
        "starts from": cell.get("starts_from", "" if job.kind == "original" else "original/0"),
        "found by": _arms(cell),
    }


def _ratio(before: float | None, after: float | None) -> float | None:
    return round(before / after, 2) if before and after else None


def machines(known: Known, networks: Iterable[Network]) -> list[dict[str, Any]]:
    """Every place that cells or latencies come from, and how many."""
    shown = ("machine", "device", "threads", "precision", "torch", "onnxruntime", "edgecompress", "commit")
    counts: dict[tuple[str, ...], int] = {}
    names = [IMAGENET, *(job.name for network in networks for job in jobs_of(network))]
    for cell in (known[name] for name in names if name in known):
        for what, where in (("cells", cell["where"]), ("latencies", cell.get("latency_where"))):
            if where is not None:
                key = (what, *(where.get(field, "") for field in shown))
                counts[key] = counts.get(key, 0) + 1
    return [{"what": key[0], **dict(zip(shown, key[1:], strict=True)), "count": count} for key, count in counts.items()]
