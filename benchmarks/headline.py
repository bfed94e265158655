"""The headline: python benchmarks/headline.py [--quick] [--networks vgg19_bn_cifar,...] [--kinds original,tuned,ours,...]

VGG-19-BN, VGG-16-BN and ResNet-56 on CIFAR-10 against the paper and against what one would use otherwise; VGG-16 at 224x224 for
its size alone. Needs EDGECOMPRESS_DATA with cifar10-jpeg.tar.gz. Baselines are trained here (ResNet-56 has a checkpoint), which
wants a GPU for the VGGs. Finished cells lie in docs/benchmarks/headline_cells.json and below
build/headline, from which an interrupted run goes on; `--time` measures the latency of all files there in turns and wants
a quiet machine; `--ship` puts a network of ours into the package (`edgecompress zoo`); `--collect` only renders the page.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from cells import Cell, Cells
from harness import RESULTS, Benchmark
from headline_imagenet import imagenet_shapes
from headline_lab import BUDGETS, FOLDER, Effort, Lab, original, ours, tuned_original
from headline_peers import METHODS, SHARES, peer
from headline_rows import SEEDS, rows, table
from headline_ship import ship

KINDS = ("original", "tuned", "ours", "agents", "peers", "imagenet")
AGENTS = ("uniform", "random", "greedy", "milp")  # our own baselines, in both stages
Job = tuple[str, str, Callable[[], Cell | None]]  # kind, name of the cell, what computes it


def jobs(effort: Effort, networks: tuple[str, ...]) -> Iterator[Job]:
    """Everything, the rows that the headline stands on first."""
    for name in networks:
        lab, at = Lab(name, effort), f"{name}/{effort}"
        yield "original", f"{at}/original", lambda lab=lab: original(lab)
        for seed in SEEDS:
            yield "tuned", f"{at}/tuned/{seed}", lambda lab=lab, seed=seed: tuned_original(lab, seed)
            yield "ours", f"{at}/ours/{seed}", lambda lab=lab, seed=seed: ours(lab, seed)
        for method in METHODS:
            for share in SHARES if method not in ("nncf", "quantize_static") else (1.0,):
                yield (
                    "peers",
                    f"{at}/{method}-{share}/0",
                    lambda lab=lab, method=method, share=share: peer(lab, method, share, 0),
                )
        for agent in AGENTS:
            yield "agents", f"{at}/ours-{agent}/0", lambda lab=lab, agent=agent: ours(lab, 0, agent)
    yield "imagenet", "vgg16_224", imagenet_shapes


def latencies(cells: Cells, effort: Effort, rounds: int = 7) -> None:
    """Time every file that is here in turns, on one thread, and put the medians into its cell."""
    from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us

    x = torch.zeros(1, 3, 32, 32).numpy()
    for network in BUDGETS:
        folder = Lab(network, effort).folder
        known = {name: cell for name, cell in cells.all().items() if name.startswith(f"{network}/{effort}/")}
        here = {name: folder / cell["file"] for name, cell in known.items() if (folder / cell["file"]).exists()}
        times: dict[str, list[float]] = {name: [] for name in here}
        for _ in range(rounds):
            for name, path in here.items():  # one session alive at a time
                runner = OnnxRuntimeRunner(path, precise=not _exact_in_seven_bits(path, known[name]))
                times[name].append(measure_latency_us(runner, x, seconds=0.7)["median_us"])
        for name, values in times.items():
            cells.replace(name, known[name] | {"latency_us": round(sorted(values)[rounds // 2], 1)})
            print(f"     {name}: {sorted(values)[rounds // 2]:.1f} us", flush=True)


def _exact_in_seven_bits(path: Path, cell: Cell) -> bool:
    """Our files for CPUs without VNNI, and those that ONNX Runtime's quantiser wrote with its reduced range; all others, NNCF's too,
    are timed with the kernels that are exact at 8 bits."""
    import onnx

    from edgecompress.exporters.saturation import SATURATION

    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return properties.get(SATURATION) == "none" or cell.get("quantised", "").startswith("onnxruntime")


def rehearse() -> None:
    """The whole way on a small network and a few images."""
    effort = Effort(train_epochs=1, tune_epochs=2, train_images=300, episodes=10)
    with tempfile.TemporaryDirectory(prefix="headline-") as folder:
        lab = Lab("resnet8", effort, share=0.02, root=Path(folder))
        cells = Cells(Path(folder), None)
        cells("resnet8/quick/original", lambda: original(lab))
        cells("resnet8/quick/tuned/0", lambda: tuned_original(lab, 0))
        cells("resnet8/quick/ours/0", lambda: ours(lab, 0, budget="flops=0.5x,size=0.25x"))
        cells("resnet8/quick/torch-pruning-global-0.28/0", lambda: peer(lab, "torch-pruning-global", 0.28, 0))
        cells("resnet8/quick/nncf-1.0/0", lambda: peer(lab, "nncf", 1.0, 0))
        for row in table(cells.all(), "resnet8", "quick"):
            print("    ", row)


def main() -> None:
    """Run what is asked for, then render the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the whole way in about a minute; writes nothing")
    parser.add_argument("--collect", action="store_true", help="only render the page from finished cells")
    parser.add_argument("--ship", metavar="NETWORK[:SEED]", help="put a finished network of ours into the package")
    parser.add_argument("--time", action="store_true", help="time all files in turns; nothing else may run")
    for name, values in (("kinds", KINDS), ("networks", tuple(BUDGETS))):
        parser.add_argument(
            f"--{name}", type=lambda text: tuple(text.split(",")), default=values,
            help=f"comma-separated; by default {','.join(values)}",
        )  # fmt: skip
    for field in fields(Effort):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="see `headline_lab.Effort`"
        )
    wanted = parser.parse_args()
    if wanted.quick:
        rehearse()
        return
    effort = Effort(**{field.name: getattr(wanted, field.name) for field in fields(Effort)})
    cells = Cells(FOLDER, RESULTS / "headline_cells.json")
    if wanted.ship:
        network, _, seed = wanted.ship.partition(":")
        print(f"shipped as {ship(network, int(seed or 0), effort, cells.all()).name}")
        return
    if not wanted.collect and not wanted.time:
        for kind, name, compute in jobs(effort, wanted.networks):
            if kind in wanted.kinds:
                cells(name, compute)
    if wanted.time:
        latencies(cells, effort)
    bench = Benchmark("headline", quick=False)
    rows(bench, copy.deepcopy(cells.all()), effort)
    cells.publish()
    bench.write()


if __name__ == "__main__":
    main()
