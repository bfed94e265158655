"""Rows and tables of benchmarks/prune_cifar10.py, from finished cells alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cells import Cell
from harness import Benchmark
from prune_ablation import KEEPS, WHOLE

BUDGETS = ("flops=0.5x", "flops=0.35x", "latency@fp32=0.6x")
METHODS = ("uniform", "surrogate", "netadapt", "ddpg", "evolution", "gp", "cma-es", "random", "amc")
FIXED = ("uniform", "surrogate", "netadapt")  # no chance in them: one seed is all
SEEDS = (0, 1, 2, 3, 4)
CONDITIONED = "conditioned"
AGENT = "ddpg"
BASELINES = ("amc", "uniform")
# Of this benchmark, so that all methods share evaluations and are compared by one number.
UNLIKE_COMPRESS = (
    "the reward is the accuracy alone (the budget fixes the cost); no policy is given up early, so that methods share evaluations",
    "ten leaders are measured again (five) and none is fine-tuned before one is the final (three are)",
    "AMC's agent sees our layer features, the share of latency with them",
)
OTHERS = tuple(method for method in METHODS if method != AGENT and method not in BASELINES)
NOT_YET = "its cells are not finished"
Figures = dict[int, float]  # by seed


def finals(known: Mapping[str, Cell], budget: str, method: str) -> dict[int, Cell]:
    """Finished searches by seed; a method without chance counts for every seed."""
    found = {seed: known.get(f"search/{budget}/{method}/{0 if method in FIXED else seed}") for seed in SEEDS}
    return {seed: cell for seed, cell in found.items() if cell is not None}


def before(known: Mapping[str, Cell], budget: str, method: str) -> Figures:
    """Accuracy in percent on select-val before fine-tuning."""
    return {seed: cell["select"] for seed, cell in finals(known, budget, method).items()}


def after(known: Mapping[str, Cell], budget: str, method: str) -> Figures:
    """Accuracy in percent on test after fine-tuning, of those whose fine-tuning is finished."""
    return {
        seed: tested
        for seed, cell in finals(known, budget, method).items()
        if (tested := test_of(known, cell["choice"], seed)) is not None
    }


def finetune_name(choice: Sequence[int], seed: int) -> str:
    """The cell of a final policy and a seed of its training; the same for every search that found it."""
    return f"finetune/{'-'.join(map(str, choice))}/{seed}"


def test_of(known: Mapping[str, Cell], choice: Sequence[int], seed: int) -> float | None:
    """Test accuracy in percent after fine-tuning."""
    cell = known.get(finetune_name(choice, seed))
    return None if cell is None else cell["test"]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t, paired)."""
    from scipy.stats import t

    half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), float(half)


def paired(mine: Figures, theirs: Figures) -> list[float]:
    """Differences of the seeds that both have."""
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def best_other(figures: Mapping[str, Figures]) -> str | None:
    """The other arm of the highest mean over its cells."""
    means = {method: statistics.mean(found.values()) for method, found in figures.items() if found}
    return max(means, key=lambda method: means[method], default=None)


def rows(bench: Benchmark, known: Mapping[str, Cell]) -> None:
    """Every figure that is asked for; those without all of their cells do not hold and say why."""
    for budget in BUDGETS:
        for what, figures_of in (("before fine-tuning", before), ("on test after fine-tuning", after)):
            figures = {method: figures_of(known, budget, method) for method in METHODS}
            _against_best(bench, budget, what, figures)
            for method in BASELINES:
                spent = [cell["distinct"] for cell in finals(known, budget, method).values()]
                if what.startswith("before"):
                    _gain(bench, f"{budget}, {what}", figures[AGENT], _called(method, spent), figures[method], 10.0)
                elif method == "uniform":
                    _gain(bench, f"{budget}, {what}", figures[AGENT], _called(method, spent), figures[method], 2.0)
    _conditioned(bench, known)
    _aware(bench, known)
    _cost(bench, known)
    _resnet56(bench, known)
    _dropout(bench, known)
    bench.details["Methods"] = _table(known)
    bench.details[
        "DDPG arm less each other method, before fine-tuning, on all 5,000 held-out images, half of which chose the final"
    ] = _on_all(known)
    bench.details["DDPG arm less each other method, best on the images of the search after so many evaluations"] = (
        _on_the_way(known)
    )
    bench.details["What ran"] = _ran(known)


def _judged(bench: Benchmark, bar: str, value: float, limit: float, reason: str, *, finished: bool) -> None:
    if finished:
        bench.at_least(bar, value, limit, "points")
    else:
        bench.misses(bar, value, limit, "points", f"so far: {reason}")


def _against_best(bench: Benchmark, budget: str, what: str, figures: Mapping[str, Figures]) -> None:
    title = f"{budget}, {what}: DDPG arm less the best other arm"
    other = best_other({method: figures[method] for method in OTHERS})
    differences = paired(figures[AGENT], figures[other]) if other else []
    if len(differences) < 2 or other is None:
        for bar, limit in ((f"{title}, mean", 0.0), (f"{title}, lower end of the 95 % interval", -0.3)):
            bench.not_run(bar, limit, "points", NOT_YET)
        return
    mean, half = interval(differences)
    short = {m: len(figures[m]) for m in (AGENT, *OTHERS) if len(figures[m]) < len(SEEDS)}
    reason = f"{len(differences)} paired seeds; seeds finished where not all are: {short}"
    finished = not short
    _judged(bench, f"{title} ({other}), mean", mean, 0.0, reason, finished=finished)
    _judged(bench, f"{title} ({other}), lower end of the 95 % interval", mean - half, -0.3, reason, finished=finished)


def _called(method: str, spent: Sequence[int]) -> str:
    name = "AMC's agent" if method == "amc" else method
    return f"{name} ({statistics.mean(spent):.0f} evaluations)" if spent else name


def _gain(bench: Benchmark, where: str, mine: Figures, other: str, theirs: Figures, limit: float) -> None:
    bar = f"{where}: DDPG arm less {other}, mean"
    differences = paired(mine, theirs)
    if not differences:
        bench.not_run(bar, limit, "points", NOT_YET)
        return
    finished = len(differences) == len(SEEDS)
    reason = f"{len(differences)} of {len(SEEDS)} seeds"
    _judged(bench, bar, statistics.mean(differences), limit, reason, finished=finished)


def _conditioned(bench: Benchmark, known: Mapping[str, Cell]) -> None:
    bar = "One agent for three budgets with 200 evaluations less three searches with 600, mean on select-val"
    differences = [value for budget in BUDGETS for value in _conditioned_less_apart(known, budget)]
    if not differences:
        bench.not_run(bar, 0.0, "points", NOT_YET)
        return
    bench.details["One agent for three budgets less three searches, points on select-val by budget"] = {
        budget: f"{mean:.2f} ± {half:.2f}"
        for budget in BUDGETS
        if len(apart := _conditioned_less_apart(known, budget)) > 1
        for mean, half in [interval(apart)]
    }
    wanted = len(SEEDS) * len(BUDGETS)
    reason = f"{len(differences)} of {wanted} pairs"
    _judged(bench, bar, statistics.mean(differences), 0.0, reason, finished=len(differences) == wanted)


def _conditioned_less_apart(known: Mapping[str, Cell], budget: str) -> list[float]:
    apart = before(known, budget, AGENT)
    cells = {seed: cell for seed in apart if (cell := known.get(f"{CONDITIONED}/{seed}")) is not None}
    return [cell["finals"][budget]["select"] - apart[seed] for seed, cell in cells.items() if budget in cell["finals"]]


def _aware(bench: Benchmark, known: Mapping[str, Cell]) -> None:
    """What latency found against what FLOPs found, by the clock: the latency-aware finals of the nearest measured time count."""
    bar = "Latency-aware less FLOPs-only, select-val, if it takes no longer by the clock, mean"
    timed = known.get("aware_times")
    if timed is None:
        bench.not_run(bar, 0.0, "points", "the timed cell is not finished (--timed)")
        return
    blind, *aware = timed["finals"].values()
    nearest = min(aware, key=lambda found: abs(_mean(found, "measured_us") - _mean(blind, "measured_us")))
    ratio = _mean(nearest, "measured_us") / _mean(blind, "measured_us")
    gain = _mean(nearest, "select") - _mean(blind, "select")
    if ratio <= 1:
        bench.at_least(bar, gain, 0.0, "points")
    else:
        bench.misses(bar, gain, 0.0, "points", f"at {ratio:.2f} times the time")
    bench.details["Latency-aware and FLOPs-only, three seeds each"] = timed["finals"]
    found = [cell for seed in SEEDS[:3] if (cell := known.get(f"aware/{seed}")) is not None]
    bench.details["Latency-aware less FLOPs-only at the same predicted latency, points on select-val"] = [
        round(cell["select"] - cell["flops_only"]["select"], 2) for cell in found
    ]


def _mean(found: Sequence[Mapping[str, float]], key: str) -> float:
    return statistics.mean(row[key] for row in found)


def _cost(bench: Benchmark, known: Mapping[str, Cell]) -> None:
    bar = "Seconds of an episode: full-size masked network on 5,000 images over ours"
    quality = "Same final quality: test accuracy after fine-tuning, the loop of 5,000 images less ours, absolute mean"
    timed = known.get("cost")
    search = known.get(f"search/{BUDGETS[0]}/{AGENT}/0")
    if timed is None:
        bench.not_run(bar, 5.0, "x", "the timed cell is not finished (--timed)")
    else:
        repeats = search["asked"] / search["distinct"] if search else 1.0
        stopped = [cell for s in SEEDS[:3] if (cell := known.get(f"early_stop/{s}")) is not None]
        factors = {
            "fewer images": timed["masked_all_s"] / timed["masked_search_s"],
            "smaller network": timed["masked_search_s"] / timed["pruned_search_s"],
            "cache (policies asked for again within a search)": repeats,
        }
        whole = 1.0
        for factor in factors.values():
            whole *= factor
        bench.at_least(bar, whole, 5.0, "x")
        bench.details["Seconds of an episode, and each factor"] = dict(timed) | {
            name: round(factor, 3) for name, factor in factors.items()
        }
        bench.details["Early stop, not counted above: searches that give up hopeless policies"] = [
            {"share of images": cell["share_of_images"], "select-val %": cell["select"]} for cell in stopped
        ]
    loops = {
        s: test_of(known, c["choice"], s) for s in SEEDS[:3] if (c := known.get(f"reference_loop/{s}")) is not None
    }
    mine = after(known, BUDGETS[0], AGENT)
    ours = [cell["choice"] for cell in finals(known, BUDGETS[0], AGENT).values()]
    bench.details["Finals of the loop of 5,000 images that are also ours"] = sum(
        known[f"reference_loop/{seed}"]["choice"] in ours for seed in loops
    )
    differences = [value - mine[seed] for seed, value in loops.items() if value is not None and seed in mine]
    if len(differences) < 3:
        bench.not_run(quality, 0.2, "points", f"{NOT_YET}: {len(differences)} of 3 seeds")
    else:
        bench.at_most(quality, abs(statistics.mean(differences)), 0.2, "points")


def _resnet56(bench: Benchmark, known: Mapping[str, Cell]) -> None:
    bar = "ResNet-56 at 0.5x FLOPs: drop on test against the unpruned network with the same fine-tuning"
    if "resnet56/pruned" in known and "resnet56/original" in known:
        drop = known["resnet56/original"]["test"] - known["resnet56/pruned"]["test"]
        bench.at_most(bar, drop, 0.3, "points")
    else:
        bench.not_run(bar, 0.3, "points", NOT_YET)


def _dropout(bench: Benchmark, known: Mapping[str, Cell]) -> None:
    """Weights ranked by learned noise against weights ranked by size: a share of every layer, and one threshold for all."""
    ways = {"without": "by size", "with": "by learned noise"}
    cells = {
        way: {seed: cell for seed in SEEDS[:3] if (cell := known.get(f"dropout/{way}/{seed}")) is not None}
        for way in ways
    }
    kept = {str(share): f"{share} of every layer's weights" for share in KEEPS}
    kept[f"{WHOLE} of all"] = f"{WHOLE} of all layers' weights together"
    for key, what in kept.items():
        tested = {way: {seed: cell["test"][key] for seed, cell in found.items()} for way, found in cells.items()}
        bar = f"ResNet-20, {what} kept: ranked by learned noise less by size, mean on test after recovery"
        differences = paired(tested["with"], tested["without"])
        if differences:
            value, count = statistics.mean(differences), len(differences)
            _judged(bench, bar, value, 0.0, f"{count} of 3 seeds", finished=count == 3)
        else:
            bench.not_run(bar, 0.0, "points", NOT_YET)
    if not all(cells.values()):
        return
    bench.details["Single weights: test % after recovery (mean over seeds) by what is kept"] = [
        {"ranked": ways[way], "seconds of learning": round(_mean(list(found.values()), "learning_s"))}
        | {what: round(statistics.mean(c["test"][key] for c in found.values()), 2) for key, what in kept.items()}
        for way, found in cells.items()
    ]
    bench.details["Single weights, select-val % before recovery (mean over seeds) by the share that stays"] = [
        {"ranked": ways[way], "all": round(_mean(list(found.values()), "select"), 2)}
        | {
            k: round(statistics.mean(c["select_before"][k] for c in found.values()), 2)
            for k in _first(found)["select_before"]
        }
        for way, found in cells.items()
    ]


def _first(cells: Mapping[int, Cell]) -> Cell:
    return next(iter(cells.values()))


def _spread(values: Sequence[float]) -> str | None:
    if not values:
        return None
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _table(known: Mapping[str, Cell]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds; a method without chance has one cell."""
    table = []
    for budget in BUDGETS:
        for method in METHODS:
            cells = finals(known, budget, method)
            cells = {0: cells[0]} if method in FIXED and cells else cells
            if not cells:
                continue
            tested = list(after(known, budget, method).values())
            arms = sorted(cell["arm"] for cell in cells.values())
            table.append({
                "budget": budget,
                "method": method,
                "seeds": len(cells),
                "distinct evaluations": _spread([cell["distinct"] for cell in cells.values()]),
                "search-val %": _spread([cell["search"] for cell in cells.values()]),
                "search-val and 1,500 more %, which chose the final": _spread([cell["again"] for cell in cells.values()]),
                "select-val % before fine-tuning": _spread([cell["select"] for cell in cells.values()]),
                "test % after fine-tuning": _spread(tested),
                "fine-tuned": len(tested),
                "different finals": len({tuple(cell["choice"]) for cell in cells.values()}),
                "arms that found it": ", ".join(f"{arm} x{arms.count(arm)}" for arm in sorted(set(arms))),
            })  # fmt: skip
    return table


def _on_all(known: Mapping[str, Cell]) -> list[dict[str, Any]]:
    """Select-val tells two finals apart by no better than half a point; with the images that chose them there are twice as many."""
    table = []
    for budget in BUDGETS:
        figures = {
            method: {seed: (cell["again"] + cell["select"]) / 2 for seed, cell in finals(known, budget, method).items()}
            for method in METHODS
        }
        gains = {method: paired(figures[AGENT], figures[method]) for method in METHODS if method != AGENT}
        table.append({"budget": budget} | {method: _gained(found) for method, found in gains.items() if len(found) > 1})
    return table


def _on_the_way(known: Mapping[str, Cell]) -> list[dict[str, Any]]:
    """How soon each gets there; the common start takes the first evaluations, so until it is over nothing can differ."""
    table = []
    for budget in BUDGETS:
        cells = {method: finals(known, budget, method) for method in METHODS if method not in FIXED}
        for count in ("75", "100", "150", "200"):
            figures = {
                method: {
                    seed: best for seed, cell in found.items() if (best := cell["best_after"].get(count)) is not None
                }
                for method, found in cells.items()
            }
            gains = {method: paired(figures[AGENT], figures[method]) for method in cells if method != AGENT}
            table.append(
                {"budget": budget, "evaluations": count}
                | {method: _gained(found) for method, found in gains.items() if len(found) > 1}
            )
    return table


def _gained(differences: Sequence[float]) -> str:
    return "{:+.2f} ± {:.2f}".format(*interval(differences))


def _ran(known: Mapping[str, Cell]) -> dict[str, int]:
    kinds = [name.split("/")[0] for name in known]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
