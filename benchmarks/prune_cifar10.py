"""Stage 1 on CIFAR-10: python benchmarks/prune_cifar10.py [--quick] [--collect] [--kinds search] [--methods ddpg,gp] ...

Needs EDGECOMPRESS_DATA with cifar10-jpeg.tar.gz and the ResNet checkpoints. The work is many cells (a search, a
fine-tuning); finished ones lie below build/prune_cifar10 and in docs/benchmarks/prune_cifar10_cells.json, from which any
clone goes on, and several processes may run at once. `--collect` renders the page from finished cells alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from cells import Cell, Cells
from harness import RESULTS, Benchmark
from prune_ablation import without_single_weights
from prune_cost import early_stop, seconds_per_episode
from prune_lab import EPISODES, FOLDER, LEADERS, PARTS, Lab, fine_tuned, latency_from_table, run_search
from prune_rows import (
    AGENT,
    BUDGETS,
    CONDITIONED,
    FIXED,
    METHODS,
    SEEDS,
    UNLIKE_COMPRESS,
    finals,
    finetune_name,
    rows,
)

from edgecompress.episodes import RECALIBRATION_IMAGES
from edgecompress.finetune import TrainSettings
from edgecompress.spaces import Choice
from edgecompress.training_state import precision_on

KINDS = ("search", "finetune", "conditioned", "reference_loop", "early_stop", "aware", "cost", "resnet56", "dropout")
TUNING, TUNING_IMAGES = TrainSettings(epochs=3, learning_rate=0.02, batch_size=128), 10_000
TUNING_56 = TrainSettings(epochs=8, learning_rate=0.02, batch_size=128, precision="fp32")  # as its cells began
TUNING_56_IMAGES = 30_000
Job = tuple[str, str, Callable[[], Cell | None]]  # kind, name of the cell, what computes it (None: not possible yet)


def search_cells(lab: Lab, wanted: argparse.Namespace) -> Iterator[Job]:
    """Budget by budget; three seeds of every method before the other two."""
    for seeds in (SEEDS[:3], SEEDS[3:]):
        for budget in wanted.budgets:
            for seed in seeds:
                for method in wanted.methods:
                    if seed in wanted.seeds and (method not in FIXED or seed == 0):
                        yield "search", f"search/{budget}/{method}/{seed}", _search(lab, budget, method, seed, wanted)


def _search(lab: Lab, budget: str, method: str, seed: int, wanted: argparse.Namespace) -> Callable[[], Cell]:
    def compute() -> Cell:
        latency = latency_from_table() if "latency" in budget else None
        return run_search(lab, method, (budget,), seed, episodes=wanted.episodes, latency=latency)

    return compute


def finetune_cells(lab: Lab, known: dict[str, Cell]) -> Iterator[Job]:
    """Every search's final, trained with the seed of the search; a search without chance is trained with every seed.

    Seed by seed: ours, the arms beside it by their accuracy on select-val, uniform; AMC, of which no figure after it is
    asked for, at last.
    """
    found: dict[tuple[int, Choice], float] = {}
    for budget in BUDGETS:
        for method in METHODS:
            first = {AGENT: 200.0, "uniform": 100.0, "amc": -100.0}.get(method, 0.0)
            for seed, cell in finals(known, budget, method).items():
                key = seed, tuple(cell["choice"])
                found[key] = max(found.get(key, -200.0), cell["select"] + first)
    for name, cell in known.items():
        if name.startswith("reference_loop/"):
            found.setdefault((int(name.split("/")[1]), tuple(cell["choice"])), 300.0)
    for seed, choice in sorted(found, key=lambda key: (key[0], -found[key], key[1])):
        yield "finetune", finetune_name(choice, seed), lambda choice=choice, seed=seed: _fine_tune(lab, choice, seed)


def _fine_tune(lab: Lab, choice: Choice, seed: int) -> Cell:
    model, _ = fine_tuned(lab, choice, replace(TUNING, seed=seed), TUNING_IMAGES)
    precision = precision_on(torch.device("cpu"), TUNING.precision, model)
    return {"test": round(100 * lab.measure(model, "test").accuracy, 3), "precision": precision}


def later_cells(lab: Lab, known: dict[str, Cell], wanted: argparse.Namespace) -> Iterator[Job]:
    """What comes after the comparison of methods."""
    for seed in SEEDS:

        def conditioned(seed: int = seed) -> Cell:
            return run_search(lab, "ddpg", BUDGETS, seed, episodes=wanted.episodes, latency=latency_from_table())

        yield "conditioned", f"{CONDITIONED}/{seed}", conditioned
    for seed in SEEDS[:3]:
        yield (
            "reference_loop",
            f"reference_loop/{seed}",
            lambda seed=seed: run_search(lab, "ddpg", BUDGETS[:1], seed, episodes=wanted.episodes, part="all"),
        )
        yield (
            "early_stop",
            f"early_stop/{seed}",
            lambda seed=seed: early_stop(lab, BUDGETS[0], "ddpg", seed, wanted.episodes),
        )
        yield "aware", f"aware/{seed}", lambda seed=seed: _aware(lab, known, seed, wanted.episodes)
    if wanted.timed:
        yield "cost", "cost", lambda: _cost(lab, known)
        yield "aware", "aware_times", lambda: _aware_times(lab, known)
    for seed in SEEDS[:3]:
        for ranked in ("with", "without"):
            name = f"dropout/{ranked}/{seed}"
            yield "dropout", name, lambda seed=seed, ranked=ranked: _ablated(lab, known, seed, ranked)
    larger = Lab("resnet56")
    yield "resnet56", "resnet56/search", lambda: run_search(larger, "ddpg", BUDGETS[:1], 0, episodes=wanted.episodes)
    yield "resnet56", "resnet56/pruned", lambda: _large(larger, known, "pruned")
    yield "resnet56", "resnet56/original", lambda: _large(larger, known, "original")


def _large(lab: Lab, known: dict[str, Cell], which: str) -> Cell | None:
    if "resnet56/search" not in known:
        return None
    choice = None if which == "original" else tuple(known["resnet56/search"]["choice"])
    model, _ = fine_tuned(lab, choice, TUNING_56, TUNING_56_IMAGES)
    return {"test": round(100 * lab.measure(model, "test").accuracy, 3)}


def _ablated(lab: Lab, known: dict[str, Cell], seed: int, ranked: str) -> Cell | None:
    """One final of the DDPG arm, the same for all."""
    final = known.get(f"search/{BUDGETS[0]}/ddpg/0")
    if final is None:
        return None
    choice = tuple(final["choice"])
    tuned, _ = fine_tuned(lab, choice, TUNING, TUNING_IMAGES)
    return without_single_weights(lab, tuned, choice, seed, ranked=ranked)


def _aware(lab: Lab, known: dict[str, Cell], seed: int, episodes: int) -> Cell | None:
    """A search under the latency that the FLOPs-only search of the same seed ended at, and both finals' times in turns."""
    latency = latency_from_table()
    blind = known.get(f"search/{BUDGETS[0]}/ddpg/{seed}")
    if blind is None:
        return None
    space, _ = lab.space(BUDGETS[0], latency)
    reached = space.price(tuple(blind["choice"])).latency_us
    cell = run_search(lab, "ddpg", (f"latency@fp32={reached:.3f}us",), seed, episodes=episodes, latency=latency)
    times = _measured_us(lab, [tuple(blind["choice"]), tuple(cell["choice"])])
    return cell | {"flops_only": {"choice": blind["choice"], "select": blind["select"]}, "measured_us": times}


def _aware_times(lab: Lab, known: dict[str, Cell]) -> Cell | None:
    """Times, on a quiet machine, of what FLOPs alone found and of what latency found, under either of its budgets."""
    wanted = {
        "FLOPs-only": [known.get(f"search/{BUDGETS[0]}/ddpg/{seed}") for seed in SEEDS[:3]],
        "latency-aware, same predicted latency": [known.get(f"aware/{seed}") for seed in SEEDS[:3]],
        f"latency-aware, {BUDGETS[2]}": [known.get(f"search/{BUDGETS[2]}/ddpg/{seed}") for seed in SEEDS[:3]],
    }
    cells = {name: [cell for cell in found if cell is not None] for name, found in wanted.items()}
    if any(len(found) < len(SEEDS[:3]) for found in cells.values()):
        return None
    choices = sorted({tuple(cell["choice"]) for found in cells.values() for cell in found})
    times = dict(zip(choices, _measured_us(lab, choices), strict=True))
    return {
        "finals": {
            name: [
                {"measured_us": times[tuple(c["choice"])], "predicted_us": c["latency_us"], "select": c["select"]}
                for c in found
            ]
            for name, found in cells.items()
        }
    }


def _measured_us(lab: Lab, choices: list[Choice], rounds: int = 7) -> list[float]:
    """Median time of one image in ONNX Runtime on one thread, the networks in turns."""
    from edgecompress.exporters import to_onnx
    from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us
    from edgecompress.graph import build_graph

    runners = []
    for choice in choices:
        graph = build_graph(lab.pruned(choice).to(memory_format=torch.contiguous_format), (3, 32, 32), lab.name)
        runners.append(OnnxRuntimeRunner(to_onnx.float_model(graph).SerializeToString()))
    x = lab.inputs("search")[0][:1].numpy()
    turns = [[measure_latency_us(runner, x)["median_us"] for runner in runners] for _ in range(rounds)]
    return [round(sorted(column)[rounds // 2], 1) for column in zip(*turns, strict=True)]


def _cost(lab: Lab, known: dict[str, Cell], count: int = 6) -> Cell | None:
    """The best policies of a search, timed in each way."""
    cell = known.get(f"search/{BUDGETS[0]}/ddpg/0")
    return None if cell is None else seconds_per_episode(lab, [tuple(choice) for choice, *_ in cell["leaders"]][:count])


def work(lab: Lab, cells: Cells, wanted: argparse.Namespace) -> None:
    """Every cell that is asked for, in an order in which what is finished means something."""

    def go(jobs: Iterator[Job]) -> None:
        for kind, name, compute in jobs:
            if kind in wanted.kinds and name not in cells.all():
                cells(name, compute)

    searches = list(search_cells(lab, wanted))
    first = [job for job in searches if job[1].rsplit("/", 1)[1] in {"0", "1", "2"}]
    go(iter(first))
    go(finetune_cells(lab, cells.all()))
    go(iter(searches))
    go(finetune_cells(lab, cells.all()))
    go(later_cells(lab, cells.all(), wanted))
    go(later_cells(lab, cells.all(), wanted))  # what waited for another of them
    go(finetune_cells(lab, cells.all()))


def rehearse() -> None:
    """The whole way on a few images and policies."""
    lab = Lab(share=0.2)
    with tempfile.TemporaryDirectory(prefix="prune_cifar10-") as folder:
        cells = Cells(Path(folder), None)
        for method in ("uniform", "evolution", "amc"):
            name = f"search/{BUDGETS[0]}/{method}/0"
            cells(name, lambda method=method: run_search(lab, method, BUDGETS[:1], 0, episodes=10))
        bench = Benchmark("prune_cifar10", True)
        rows(bench, cells.all())
        bench.write()


def main() -> None:
    """Run what is asked for, then render the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the whole way in under a minute; writes nothing")
    parser.add_argument("--collect", action="store_true", help="only render the page from finished cells")
    parser.add_argument("--timed", action="store_true", help="also time episodes; nothing else may run")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="distinct evaluations of each search")
    parser.add_argument("--forget", metavar="PATTERN", help="drop finished cells, e.g. 'search/*/ddpg/*'")
    for name, values in (("kinds", KINDS), ("methods", METHODS), ("budgets", BUDGETS), ("seeds", SEEDS)):
        parser.add_argument(
            f"--{name}",
            type=lambda text, values=values: tuple(type(values[0])(part) for part in text.split(",")),
            default=values,
            help=f"comma-separated; by default {','.join(map(str, values))}",
        )
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    if wanted.quick:
        rehearse()
        return
    default = wanted.episodes == EPISODES
    cells = Cells(
        FOLDER if default else FOLDER / f"episodes-{wanted.episodes}",
        RESULTS / "prune_cifar10_cells.json" if default else None,
    )
    if wanted.forget:
        print("dropped:", *cells.forget(wanted.forget))
        return
    if not wanted.collect:
        work(Lab(), cells, wanted)
    bench = Benchmark("prune_cifar10", quick=False)
    known = cells.all()
    bench.details["How it was run"] = {
        "evaluations a search": wanted.episodes,
        "held-out images": PARTS,
        "BatchNorm re-estimation": f"{RECALIBRATION_IMAGES} augmented training images",
        "final of a search": f"of its {LEADERS} best on 'search' the one that diverges least from the checkpoint on 'search' "
        "and 'again' together, for all methods",
        "fine-tuning": f"{TUNING.epochs} epochs of {TUNING_IMAGES} images, distillation, the same for all, with the seed of the "
        "search; a search without chance is trained with every seed",
        "ResNet-56": f"{TUNING_56.epochs} epochs of {TUNING_56_IMAGES} images; its checkpoint has seen all training images, the "
        "held-out ones of the search too",
        "unlike compress": UNLIKE_COMPRESS,
        "finished cells": len(known),
        "policies that a search asked for and another had evaluated are counted, not computed again": True,
    }
    rows(bench, known)
    cells.publish()
    if default:
        bench.write()
    else:
        print(f"--episodes {wanted.episodes}: the page and its cells are of {EPISODES}; nothing was written")


if __name__ == "__main__":
    main()
