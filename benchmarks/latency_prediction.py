"""Does the table predict pruned networks? python benchmarks/latency_prediction.py [--quick] [--again]

Profiles four networks on this machine in two precisions, then measures 20 pruned, mixed-bit variants of each that nothing
was fitted to. Nothing else may run meanwhile. Goes on where it was stopped; --again starts over.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, ROOT, Benchmark
from scipy.stats import spearmanr

from edgecompress.cost import Kernel, count, edges, kernels
from edgecompress.edges import with_edges
from edgecompress.files import append_line, read_lines
from edgecompress.graph import Graph, build_graph
from edgecompress.latency_tables.estimate import errors
from edgecompress.latency_tables.measure import this_setting
from edgecompress.latency_tables.onelayer import model_bytes, resized
from edgecompress.latency_tables.points import widths
from edgecompress.latency_tables.predict import TableModel, shipped_tables, table_model, table_path
from edgecompress.latency_tables.profile import FIT_NETWORKS, ProfileOptions, profile
from edgecompress.latency_tables.table import read_table, sidecar
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.latency_tables.whole import networks_file, policy_at, read_networks, whole_us
from edgecompress.models import build_model
from edgecompress.prune import prune
from edgecompress.spec import CompressionPolicy, Frozen, LayerChoice, Network
from edgecompress.trace import trace

NETWORKS = {"resnet56": (32, 10), "vgg16_bn_cifar": (32, 10), "resnet18": (224, 1000), "mobilenet_v2": (224, 1000)}
PRECISIONS = ("fp32", "int8")
VARIANTS = 20
SESSIONS = 2  # of each variant, apart in time; their mean is what counts as measured
WAYS = ("prediction", "MACs only", "isolated layers summed")
REPEATED = "the same network in the other session: mean difference %"
SPREAD = (0.3, 0.95)  # of the original's latency
LIMIT_S = 600
SECONDS = 0.8  # of one session
BUILD = ROOT / "build" / "latency_prediction"
X86 = target_by_name("x86")


class Variant(Frozen):
    """A session of a held-out network: a line of ``build/latency_prediction/<network>-<precision>.jsonl``."""

    policy: CompressionPolicy
    us: float
    contended: bool


@dataclass(frozen=True)
class Case:
    """One network to be pruned."""

    name: str
    network: Network
    graph: Graph


def case_of(name: str, size: int, classes: int) -> Case:
    """Trace ``name``, and check that a resized graph is the graph of the really pruned network."""
    model = build_model(name, classes).eval()
    shape = (3, size, size)
    graph = build_graph(model, shape, name)
    traced = trace(model, shape, name)
    network = with_edges(traced.network, graph)
    keep = {g.id: max(widths(g.width, X86.divisor)[-2:][0], 4) for g in network.prunable_groups}
    timed = resized(graph, network, policy_at(network, keep, "fp32"))
    real = build_graph(prune(model, traced, keep), shape, name)
    if shapes(timed) != shapes(real):
        raise SystemExit(f"{name}: the graph that is timed differs from the really pruned network")
    return Case(name, network, graph)


def shapes(graph: Graph) -> list[Any]:
    """Operators with the sizes of their weights."""
    return [(n.op, [graph.constants[i].shape for i in n.inputs if i in graph.constants]) for n in graph.nodes]


def candidates(network: Network, precision: str, seed: int) -> Iterator[CompressionPolicy]:
    """Random policies of the search's action space: widths on the target's grid, 2 to 8 bits where integers run."""
    generator = np.random.default_rng(seed)
    while True:
        ratio = generator.uniform(0.1, 1.1)
        keep = {}
        for group in network.prunable_groups:
            grid = np.array(widths(group.width, X86.divisor, group.width))
            wish = group.width * min(ratio * generator.lognormal(0, 0.3), 1.0)
            keep[group.id] = int(grid[np.argmin(np.abs(grid - wish))])
        layers = {}
        for layer in network.layers:
            bits = int(generator.integers(2, 9)) if precision == "int8" else 32
            layers[layer.name] = LayerChoice(weight_bits=bits, activation_bits=8 if precision == "int8" else 32)
        yield CompressionPolicy(model=network.model, keep_channels=keep, layers=layers)


def held_out(case: Case, precision: str, model: TableModel, table: Path, number: int) -> list[CompressionPolicy]:
    """``number`` policies spread evenly over `SPREAD` as far as the network reaches, none that was fitted to."""
    fitted = {tuple(row.keep_channels.values()) for row in read_networks(table)}
    original = predicted_us(case.network, policy_at(case.network, {}, precision), model)
    pool = []
    for policy in candidates(case.network, precision, seed=1):
        share = predicted_us(case.network, policy, model) / original
        if share <= SPREAD[1] and tuple(policy.keep_channels.values()) not in fitted:
            pool.append((share, policy))
        if len(pool) == 40 * number:
            break
    lowest = max(SPREAD[0], min(share for share, _ in pool))
    chosen: list[CompressionPolicy] = []
    for wanted in np.linspace(lowest, SPREAD[1], number):
        best = min(pool, key=lambda pair: abs(pair[0] - wanted))
        pool.remove(best)
        chosen.append(best[1])
    return chosen


def predicted_us(network: Network, policy: CompressionPolicy, model: TableModel) -> float:
    """What the table says of ``policy``."""
    return model(kernels(network, policy), edges(network, policy)).us


def measured_us(case: Case, policy: CompressionPolicy, precision: str) -> tuple[float, bool]:
    """Median of a session without profiler, on the file as it is exported at the policy's bits."""
    bits = {name: choice.weight_bits for name, choice in policy.layers.items()}
    graph = resized(case.graph, case.network, policy)
    data = model_bytes(graph, precision, bits=bits)
    runs = whole_us(data, graph.shapes[graph.inputs[0]], threads=1, seconds=SECONDS)
    return float(np.median(runs.wall_us[runs.quiet])), runs.contended


def scores(predicted: np.ndarray[Any, Any], measured: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """MAPE in percent, percent of the networks within 10 %, Spearman's rank correlation."""
    errors = np.abs(predicted / measured - 1)
    return float(100 * errors.mean()), float(100 * (errors <= 0.1).mean()), float(spearmanr(predicted, measured)[0])


def baselines(case: Case, precision: str, model: TableModel, table: Path, policies: list[CompressionPolicy]) -> Any:
    """Predictions by MACs (a line through the networks that the correction is fitted to) and by summing isolated layers."""

    def macs(policy: CompressionPolicy) -> float:
        return float(count(case.network, policy).macs)

    rows = [row for row in read_networks(table) if row.dtype == precision and row.keep_channels]
    own = [row for row in rows if row.keep_channels.keys() == case.network.widths.keys() - unprunable(case.network)]
    fit = np.polyfit(
        [macs(policy_at(case.network, row.keep_channels, precision)) for row in own], [r.median_us for r in own], 1
    )
    isolated = [
        sum(us for name, us in model.sums(kernels(case.network, p), ()).items() if name != "cold") for p in policies
    ]
    return np.polyval(fit, [macs(policy) for policy in policies]), np.array(isolated)


def unprunable(network: Network) -> set[str]:
    """Groups that no policy names."""
    return {group.id for group in network.groups if not group.prunable}


def run_case(bench: Benchmark, case: Case, precision: str, table: Path, options: ProfileOptions, number: int) -> None:
    """Profile, choose and measure the variants, and state the bars of one network in one precision."""
    label = f"{case.name} {precision}"
    seconds_file = BUILD / f"{case.name}-{precision}.seconds"
    start = time.monotonic()
    if not seconds_file.exists():
        profile(case.network, X86, options, case.graph)
        seconds_file.write_text(str(time.monotonic() - start))
    model = table_model(read_table(table), X86)
    path = BUILD / f"{case.name}-{precision}.jsonl"
    held = read_lines(path, Variant, "held-out variants")
    policies = held_out(case, precision, model, table, number)
    for policy in (policies * SESSIONS)[len(held) :]:
        us, disturbed = measured_us(case, policy, precision)
        held.append(Variant(policy=policy, us=us, contended=disturbed))
        append_line(path, held[-1])
    report(bench, case, precision, model, table, held, float(seconds_file.read_text()), label)


def report(
    bench: Benchmark, case: Case, precision: str, model: TableModel, table: Path, held: list[Variant], seconds: float,
    label: str,
) -> None:  # fmt: skip
    """The bars of one network in one precision, with the baselines beside them."""
    sessions = np.array([variant.us for variant in held]).reshape(SESSIONS, -1)
    policies, measured = [variant.policy for variant in held[: sessions.shape[1]]], sessions.mean(0)
    predicted = np.array([predicted_us(case.network, policy, model) for policy in policies])
    by_macs, isolated = baselines(case, precision, model, table, policies)
    mape, within, rank = scores(predicted, measured)
    bench.at_most(f"{label}: error of the prediction (MAPE)", mape, 5, "%")
    bench.at_least(f"{label}: networks within 10 %", within, 90, "%")
    bench.at_least(f"{label}: rank correlation (Spearman)", rank, 0.95, "")
    bench.at_most(f"{label}: seconds for the table", seconds, LIMIT_S, "s")
    original, _ = measured_us(case, policy_at(case.network, {}, precision), precision)
    kinds = model(kernels(case.network, policies[0]), edges(case.network, policies[0])).counts
    repeated = np.abs(sessions[1] / sessions[0] - 1)
    names = ("MAPE %", "within 10 % (%)", "Spearman")
    bench.details[label] = {
        "original_us": round(original, 1),
        "variants": len(policies),
        "reach": [round(float(value / original), 3) for value in (measured.min(), measured.max())],
        "prediction": dict(zip(names, (round(v, 3) for v in (mape, within, rank)), strict=True)),
        "MACs only": dict(zip(names, (round(v, 3) for v in scores(by_macs, measured)), strict=True)),
        "isolated layers summed": dict(zip(names, (round(v, 3) for v in scores(isolated, measured)), strict=True)),
        REPEATED: round(float(100 * repeated.mean()), 2),
        "sessions disturbed by other work": sum(variant.contended for variant in held),
        "evidence of the first variant": dict(kinds),
        "measured_us": [round(float(value), 1) for value in measured],
        "predicted_us": [round(float(value), 1) for value in predicted],
    }


def lookups(bench: Benchmark, case: Case, table: Path) -> None:
    """What the search pays: one kernel, one network, and reading 20,000 rows."""
    model = table_model(read_table(table), X86)
    policy = policy_at(case.network, {}, "fp32")
    built, between = kernels(case.network, policy), edges(case.network, policy)
    model(built, between)
    bench.at_most("one kernel looked up", 1e6 * best_of(lambda: lookup_all(model, built)) / len(built), 5, "us")
    bench.at_most("one network predicted", 1e3 * best_of(lambda: model(built, between)), 1, "ms")
    large = BUILD / "large.csv"
    write_large(large, table)
    bench.at_most("a table of 20,000 rows loaded", best_of(lambda: read_table(large), times=3), 0.3, "s")


def lookup_all(model: TableModel, built: tuple[Kernel, ...]) -> None:
    """Every layer of a network once."""
    for kernel in built:
        model.kernel(kernel)


def write_large(path: Path, table: Path) -> None:
    """20,000 rows with the values of one: only how long they take to read is of interest."""
    header, line = table.read_text().splitlines()[:2]
    columns, fields = header.split(","), line.split(",")
    sides = [columns.index(name) for name in ("in_channels", "out_channels")]
    lines = [header]
    for number in range(20_000):
        fields[sides[0]], fields[sides[1]] = str(number % 200 + 1), str(number // 200 + 1)
        lines.append(",".join(fields))
    path.write_text("\n".join(lines) + "\n")
    shutil.copy(sidecar(table), sidecar(path))


def best_of(call: Any, times: int = 20) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def estimators(bench: Benchmark) -> None:
    """What an estimate without a table errs by, from the shipped coefficients: one bar for each device class."""
    rows = errors()
    bench.details["Estimators without a table: mean absolute error in %, leaving one network out"] = [
        {
            "target": row.target_class,
            "precision": row.precision,
            "FLOPs only": round(100 * row.errors.macs, 1),
            "MACs + floor": round(100 * row.errors.floor, 1),
            "features": None if row.errors.features is None else round(100 * row.errors.features, 1),
            "taken": row.chosen,
            "networks": row.networks,
        }
        for row in rows
    ]
    for name in dict.fromkeys(row.target_class for row in rows):
        own = [row for row in rows if row.target_class == name]
        worst = max(own, key=lambda row: row.error / row.errors.macs)
        label = f"estimator no worse than FLOPs only: {name} ({worst.precision}, its worst precision)"
        bench.at_most(label, 100 * worst.error, 100 * worst.errors.macs, "%")


def summary(bench: Benchmark) -> None:
    """One line for each network and precision, and a picture of all variants."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {label: values for label, values in bench.details.items() if REPEATED in values}
    rows = []
    for label, values in found.items():
        rows.append(
            {"network": label, "original, us": values["original_us"], "variants": values["variants"],
             "from": f"{values['reach'][0]:.2f}x", "to": f"{values['reach'][1]:.2f}x"}
            | {f"{way}: MAPE %": values[way]["MAPE %"] for way in WAYS}
            | {f"{way}: Spearman": values[way]["Spearman"] for way in WAYS}
            | {"two sessions differ by %": values[REPEATED]}
        )  # fmt: skip
    bench.details = {"Each network": rows} | bench.details
    figure, axes = pyplot.subplots(2, (len(found) + 1) // 2, figsize=(11, 6), squeeze=False)
    for axis, (label, values) in zip(axes.T.ravel(), found.items(), strict=False):
        measured, predicted = (np.array(values[f"{name}_us"]) / 1000 for name in ("measured", "predicted"))
        ends = [min(measured.min(), predicted.min()) * 0.95, max(measured.max(), predicted.max()) * 1.05]
        axis.plot(ends, ends, color="#888", linewidth=0.8)
        axis.fill_between(ends, [end * 0.9 for end in ends], [end * 1.1 for end in ends], color="#888", alpha=0.15)
        axis.plot(measured, predicted, "o", markersize=3.5, color="#3949ab")
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("measured, ms (the band is 10 %)", fontsize=9)
    figure.supylabel("predicted, ms", fontsize=9)
    figure.tight_layout()
    file = "latency_prediction_variants.svg"
    figure.savefig(RESULTS / file, metadata={"Date": None})
    pyplot.close(figure)
    bench.pictures["Held-out variants"] = file


def ship(table: Path) -> None:
    """Copy the table with its provenance and its networks into the package."""
    shipped_tables().mkdir(exist_ok=True)
    for path in (table, sidecar(table), networks_file(table)):
        shutil.copy(path, shipped_tables() / path.name)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small network, few points; nothing is written")
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    arguments = parser.parse_args()
    bench = Benchmark("latency_prediction", arguments.quick)
    global BUILD
    if arguments.quick:
        BUILD = BUILD / "quick"
    if arguments.again or arguments.quick:
        shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    table = table_path(X86, this_setting(1), BUILD)
    chosen = {"resnet8": (32, 10)} if arguments.quick else NETWORKS
    for name, (size, classes) in chosen.items():
        case = case_of(name, size, classes)
        for precision in PRECISIONS:
            small = {"time_cap_s": 0.01, "levels": 2, "networks": 7} if arguments.quick else {"networks": FIT_NETWORKS}
            options = ProfileOptions(precisions=(precision,), out=table, **small)  # type: ignore[arg-type]
            run_case(bench, case, precision, table, options, 4 if arguments.quick else VARIANTS)
        lookups_of = case
    lookups(bench, lookups_of, table)
    estimators(bench)
    if not arguments.quick:
        ship(table)
        summary(bench)
        means = [found[REPEATED] for found in bench.details.values() if REPEATED in found]
        print(f"the same network measured again differs by {statistics.mean(means):.1f} % on average")
    bench.write()


if __name__ == "__main__":
    main()
