"""The headline: python benchmarks/headline.py [--quick] [--networks vgg19_bn_cifar,...] [--kinds original,tuned,ours,...]

VGG-19-BN, VGG-16-BN and ResNet-56 on CIFAR-10 against the paper and against what one would use otherwise; VGG-16 at 224x224 for
its size alone. Takes cifar10-jpeg.tar.gz and ResNet-56's checkpoint out of EDGECOMPRESS_DATA; where there are no JPEG files the
VGGs take torchvision's CIFAR-10. Baselines are trained here (ResNet-56 has its checkpoint). The effort is meant for two CPU
cores, 8 to 20 core-hours a network by estimate; a GPU is better served by

    python benchmarks/headline.py --train-epochs 60 --tune-epochs 24

NNCF comes with `pip install -e '.[peers]'`. Finished cells lie in docs/benchmarks/headline_cells.json and below build/headline,
from which an interrupted run goes on; several processes may work side by side, best with `--threads 1`. A cell that fails is
told, and the others are computed. `--time` measures the latency of all files there in turns and wants a quiet machine; `--ship`
puts a network of ours into the package (`edgecompress zoo`); `--collect` only renders the page. Give these three the same effort.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch
from cells import Cell, Cells
from harness import RESULTS, Benchmark
from headline_imagenet import imagenet_shapes, timed
from headline_lab import FOLDER, BusyError, Lab, original, ours, tuned_original, where
from headline_peers import peer
from headline_picture import draw
from headline_plan import IMAGENET, KINDS, NETWORKS, SEEDS, Effort, Job, Network, all_jobs, jobs_of
from headline_rows import rows, table
from headline_ship import ship

from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us

WAIT_S = 60  # until what another process is at is asked for again


def compute(job: Job, lab: Lab) -> Cell:
    """One cell."""
    if job.kind == "imagenet":
        return imagenet_shapes()
    if job.kind == "original":
        return original(lab)
    if job.kind == "tuned":
        return tuned_original(lab, job.seed)
    return peer(lab, job) if job.kind == "peers" else ours(lab, job)


def work(cells: Cells, jobs: Sequence[Job], lab_of: Callable[[Network], Lab] = Lab) -> list[str]:
    """Compute all cells, those that another process is at or holds up again later; returns the names of those that failed."""
    labs = {job.network: lab_of(job.network) for job in jobs}
    failed: list[str] = []

    def done(job: Job) -> bool:
        try:
            return cells(job.name, lambda: compute(job, labs[job.network])) is not None
        except BusyError as error:
            print(f"     {job.name} waits: {error}", flush=True)
            return False
        except Exception:
            print(f"FAIL {job.name}\n{traceback.format_exc()}", flush=True)
            failed.append(job.name)
            return True

    left = list(jobs)
    while left := [job for job in left if not done(job)]:
        time.sleep(WAIT_S)
    return failed


def latencies(cells: Cells, networks: Sequence[Network], rounds: int = 7) -> None:
    """Time every file that is here in turns, on one thread, and put the medians into its cell."""
    x = torch.zeros(1, 3, 32, 32).numpy()
    known = cells.all()
    for network in networks:
        folder = Lab(network).folder
        names = [job.name for job in jobs_of(network) if job.name in known]
        here = {name: path for name in names if (path := folder / known[name]["file"]).exists()}
        times: dict[str, list[float]] = {name: [] for name in here}
        for _ in range(rounds):
            for name, path in here.items():  # one session alive at a time
                runner = OnnxRuntimeRunner(path, precise=not _exact_in_seven_bits(path, known[name]))
                times[name].append(measure_latency_us(runner, x, seconds=0.7)["median_us"])
        for name, values in times.items():
            middle = round(sorted(values)[rounds // 2], 1)
            cells.replace(name, known[name] | {"latency_us": middle, "latency_where": where(threads=1)})
            print(f"     {name}: {middle:.1f} us", flush=True)
    if IMAGENET in known and (again := timed(known[IMAGENET])):
        cells.replace(IMAGENET, known[IMAGENET] | again)
        print(f"     {IMAGENET}: {again['latency_us']} us", flush=True)


def _exact_in_seven_bits(path: Path, cell: Cell) -> bool:
    """Our files for CPUs without VNNI, and those that ONNX Runtime's quantiser wrote with its reduced range; all others, NNCF's too,
    are timed with the kernels that are exact at 8 bits."""
    import onnx

    from edgecompress.exporters.saturation import SATURATION

    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return properties.get(SATURATION) == "none" or cell.get("quantised", "").startswith("onnxruntime")


def rehearse() -> list[str]:
    """The whole way on a small network and a few images."""
    effort = Effort(train_epochs=1, tune_epochs=2, train_images=300, episodes=10)
    budget, share = "flops=0.5x,size=0.25x", "flops=0.5x"
    network = Network("resnet8", "ResNet-8", budget, (share,), quantised_share=0.5, effort=effort)
    jobs = [
        Job("original", network, "original"),
        Job("tuned", network, "tuned"),
        Job("ours", network, "ours", budget=budget),
        Job("peers", network, "torch-pruning-global+onnxruntime", budget=share),
    ]
    if find_spec("nncf"):
        jobs.append(Job("peers", network, "tuned+nncf"))
    with tempfile.TemporaryDirectory(prefix="headline-") as folder:
        cells = Cells(Path(folder), None)
        failed = work(cells, jobs, lambda network: Lab(network, share=0.02, root=Path(folder)))
        for row in table(cells.all(), network):
            print("    ", row)
    return failed


def main() -> None:
    """Run what is asked for, then render the page."""
    parser = _parser()
    wanted = parser.parse_args()
    shipped, _, seed = (wanted.ship or "").partition(":")
    if unknown := {*wanted.networks, *filter(None, [shipped])} - NETWORKS.keys():
        parser.error(f"no such network: {', '.join(sorted(unknown))}; expected of {', '.join(NETWORKS)}")
    torch.set_num_threads(wanted.threads)
    if wanted.quick:
        _end(rehearse())
        return
    effort = {field.name: getattr(wanted, field.name) for field in fields(Effort)}
    networks = tuple(network.with_effort(**effort) for network in NETWORKS.values())
    cells = Cells(FOLDER, RESULTS / "headline_cells.json")
    if shipped:
        (network,) = (network for network in networks if network.name == shipped)
        print(f"shipped as {ship(network, int(seed or 0), cells.all()).name}")
        return
    chosen = tuple(network for network in networks if network.name in wanted.networks)
    failed: list[str] = []
    if wanted.time:
        latencies(cells, chosen)
    elif not wanted.collect:
        jobs = [
            job
            for job in all_jobs(chosen)
            if job.kind in wanted.kinds and job.seed in wanted.seeds
            and any(fnmatch.fnmatch(job.method, pattern) for pattern in wanted.methods)
        ]  # fmt: skip
        failed = work(cells, jobs)
    bench = Benchmark("headline", quick=False)
    known = cells.all()
    rows(bench, copy.deepcopy(known), networks)
    for network in networks:
        if draw(RESULTS / (file := f"headline_{network.name}.svg"), known, network):
            bench.pictures[f"{network.title}: accuracy over bytes and time"] = file
    cells.publish()
    bench.write()
    _end(failed)


def _end(failed: Sequence[str]) -> None:
    if failed:
        sys.exit(f"{len(failed)} cells failed, see above: {', '.join(failed)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the whole way in about a minute; writes nothing")
    parser.add_argument("--collect", action="store_true", help="only render the page from finished cells")
    parser.add_argument("--ship", metavar="NETWORK[:SEED]", help="put a finished network of ours into the package")
    parser.add_argument("--time", action="store_true", help="time all files in turns; nothing else may run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of training, search and accuracy")
    for name, values in (("kinds", KINDS), ("networks", tuple(NETWORKS)), ("seeds", SEEDS), ("methods", ("*",))):
        parser.add_argument(
            f"--{name}",
            type=lambda text, values=values: tuple(type(values[0])(part) for part in text.split(",")),
            default=values,
            help=f"comma-separated; by default {','.join(map(str, values))}",
        )
    for field in fields(Effort):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int,
            help="in place of the network's own, see `headline_plan.Effort`",
        )
    return parser


if __name__ == "__main__":
    main()
