"""Half of every channel group, in every family of networks: python benchmarks/prune_networks.py [--quick] [--only resnet18]

Each network has random weights. It is traced, every group that the outputs do not fix keeps half of its channels, the smaller
network takes one training step with every head in use, and a fresh process rebuilds it from its widths and a safetensors file.
Each network has a process of its own and is kept under build/prune_networks, so that a broken run goes on where it stopped;
delete that folder to measure anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, Benchmark
from safetensors.torch import load_file, save_file
from torch import nn

from edgecompress.channel_groups import tensors_of
from edgecompress.checkpoints import load_tensors
from edgecompress.cost import count
from edgecompress.models import build_model
from edgecompress.prune import prune
from edgecompress.raw_heads import RawHeads, TrainingHeads
from edgecompress.shuffle import unshuffled
from edgecompress.spec import CompressionPolicy, Network
from edgecompress.trace import Traced, trace

Factory = Callable[[], nn.Module]
OUTPUT = "its channels are the network's output"  # the one reason that is no fault
QUICK = ("squeezenet1_1", "mobilenet_v3_small", "ssdlite320_mobilenet_v3_large, raw heads")


def torchvision_network(family: str, name: str, **options: Any) -> Factory:
    """A segmentation or detection network of torchvision without published weights."""

    def build() -> nn.Module:
        import importlib

        module = importlib.import_module(f"torchvision.models.{family}")
        model: nn.Module = getattr(module, name)(weights=None, weights_backbone=None, num_classes=10, **options)
        return RawHeads(model) if family == "detection" else model

    return build


def with_auxiliary_heads(name: str) -> Factory:
    """GoogLeNet or Inception with the heads that torchvision runs in training only."""

    def build() -> nn.Module:
        import torchvision

        return TrainingHeads(torchvision.models.get_model(name, num_classes=10, aux_logits=True, init_weights=False))

    return build


def classifiers() -> dict[str, tuple[Factory, int]]:
    """The smallest sensible member of each family, and the pixels of its square images."""
    sizes = {
        "alexnet": 64, "vgg11_bn": 32, "resnet18": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64, "densenet121": 64,
        "googlenet": 64, "inception_v3": 80, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "mnasnet0_5": 64,
        "efficientnet_b0": 64, "efficientnet_v2_s": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64,
        "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "convnext_tiny": 64,
    }  # fmt: skip
    return {name: (lambda name=name: build_model(name, 10), size) for name, size in sizes.items()}


def networks() -> dict[str, tuple[Factory, int]]:
    """All networks of the table."""
    segmentation, detection = "segmentation", "detection"
    return classifiers() | {
        "shufflenet_v2_x0_5, unshuffled": (lambda: unshuffled(build_model("shufflenet_v2_x0_5", 10)), 64),
        "googlenet, both auxiliary heads": (with_auxiliary_heads("googlenet"), 64),
        "inception_v3, auxiliary head": (with_auxiliary_heads("inception_v3"), 299),
        "lraspp_mobilenet_v3_large": (torchvision_network(segmentation, "lraspp_mobilenet_v3_large"), 64),
        "deeplabv3_mobilenet_v3_large, both outputs": (
            torchvision_network(segmentation, "deeplabv3_mobilenet_v3_large", aux_loss=True), 64,
        ),
        "deeplabv3_resnet50, both outputs": (torchvision_network(segmentation, "deeplabv3_resnet50", aux_loss=True), 64),
        "ssdlite320_mobilenet_v3_large, raw heads": (
            torchvision_network(detection, "ssdlite320_mobilenet_v3_large"), 128,
        ),
        "retinanet_resnet50_fpn, raw heads": (torchvision_network(detection, "retinanet_resnet50_fpn"), 64),
    }  # fmt: skip


def built(name: str) -> tuple[nn.Module, Traced, torch.Tensor]:
    """The network with random weights, its trace, and two images, the same in every process."""
    factory, size = networks()[name]
    torch.manual_seed(0)
    model = factory().eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return model, trace(model, (3, size, size), name, shared=True), images


def halved(network: Network) -> dict[str, int]:
    """Half the channels of every group that can be cut."""
    return {group.id: max(1, group.width // 2) for group in network.prunable_groups}


def training_step(model: nn.Module, images: torch.Tensor) -> str:
    """Forward and backward in training mode; every output is part of the loss. Why it failed, or nothing."""
    model.train()
    try:
        loss = torch.stack([output.square().mean() for output in tensors_of(model(images))]).sum()
        loss.backward()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if without or not torch.isfinite(loss):
        return f"the loss is {loss.item()}, and {without[:3]} took no part in it"
    return ""


def examine(name: str, folder: Path) -> None:
    """All figures of one network but the reload, for which its files are left in ``folder``."""
    start = time.monotonic()
    model, traced, images = built(name)
    seconds = time.monotonic() - start
    network = traced.network
    keep = halved(network)
    smaller = prune(model, traced, keep)
    with torch.no_grad():
        outputs = tensors_of(smaller.eval()(images))
    save_file({str(i): value.contiguous() for i, value in enumerate(outputs)}, folder / "outputs.safetensors")
    save_file({key: value.contiguous() for key, value in smaller.state_dict().items()}, folder / "model.safetensors")
    stuck = {group.id: group.reason for group in network.groups if not group.prunable and group.reason != OUTPUT}
    layers = {m for group in network.groups if group.id in stuck for m in group.members}
    macs = [count(network, CompressionPolicy(model="", keep_channels=k)).macs for k in ({}, keep)]
    found = {
        "name": name, "keep": keep, "macs": macs, "pixels": images.shape[-1], "outputs": len(outputs),
        "groups": len(network.groups), "unprunable": stuck,
        "unprunable_macs": sum(layer.macs for layer in network.layers if layer.name in layers),
        "trace_seconds": round(seconds, 1), "training_failure": training_step(smaller, images),
    }  # fmt: skip
    (folder / "found.json").write_text(json.dumps(found, indent=1))


def reload(folders: list[Path]) -> None:
    """Rebuild networks from their widths and weights, and note the difference of their outputs beside each."""
    for folder in folders:
        found = json.loads((folder / "found.json").read_text())
        model, traced, images = built(found["name"])
        with torch.no_grad():
            for parameter in model.parameters():  # which channels go must not matter, only how many
                parameter.normal_(0, 0.05)
        smaller = prune(model, traced, found["keep"])
        load_tensors(smaller, load_file(folder / "model.safetensors"))
        wanted = load_file(folder / "outputs.safetensors")
        with torch.no_grad():
            outputs = tensors_of(smaller.eval()(images))
        scale = max(float(value.abs().max()) for value in wanted.values())
        difference = max(float((y - wanted[str(i)]).abs().max()) for i, y in enumerate(outputs)) / scale
        (folder / "difference.json").write_text(json.dumps(difference))
        for file in ("model", "outputs"):
            (folder / f"{file}.safetensors").unlink()
        del model, smaller, traced
        gc.collect()


def fresh_process(*arguments: str) -> str:
    """Run this file with ``arguments``: the last line of what went wrong, or nothing."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *arguments], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["it was stopped"])[-1] if done.returncode else ""


def measure(names: list[str], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The folders of the networks that ran, and why others did not."""
    places, failures = {}, {}
    for name in names:
        place = folder / re.sub(r"\W+", "_", name)
        place.mkdir(parents=True, exist_ok=True)
        failure = "" if (place / "found.json").exists() else fresh_process("--one", name, "--folder", str(place))
        print(f"     {name}: {failure or 'pruned'}", flush=True)
        if failure:
            failures[name] = failure
        else:
            places[name] = place
    waiting = [str(place) for place in places.values() if not (place / "difference.json").exists()]
    if waiting and (failure := fresh_process("--reload", *waiting)):
        print(f"     rebuilding: {failure}", flush=True)
    return places, failures


def judge(bench: Benchmark, places: dict[str, Path], failures: dict[str, str]) -> None:
    """Bars and the row of the table of every network."""
    rows = []
    for name, place in places.items():
        found, noted = json.loads((place / "found.json").read_text()), place / "difference.json"
        difference = json.loads(noted.read_text()) if noted.exists() else None
        left, stuck = found["macs"][1] / found["macs"][0], found["unprunable_macs"] / found["macs"][0]
        reasons = sorted(set(found["unprunable"].values()))
        failure = found["training_failure"]
        for title, value, limit, unit, reason in (
            ("MACs left", left, 0.4, "x", "; ".join(reasons)),
            ("MACs in unprunable groups", stuck, 0.05, "x", "; ".join(reasons)),
            ("training steps that failed", int(bool(failure)), 0, "steps", failure),
            ("difference after a fresh process rebuilt it", difference, 1e-6, "x", "it was not rebuilt"),
        ):
            if value is None:
                bench.not_run(f"{name}: {title}", limit, unit, reason)
            elif value <= limit:
                bench.at_most(f"{name}: {title}", value, limit, unit)
            else:
                bench.misses(f"{name}: {title}", value, limit, unit, reason)
        rows.append({
            "network": name, "pixels": found["pixels"], "groups": found["groups"], "halved": len(found["keep"]),
            "fixed by the outputs": found["groups"] - len(found["keep"]) - len(found["unprunable"]),
            "unprunable": len(found["unprunable"]), "MACs left": f"{left:.4f}x", "MACs in unprunable groups": f"{stuck:.2%}",
            "why": "; ".join(reasons), "training step": failure or "runs",
            "difference after reload": None if difference is None else f"{difference:.2g}",
            "seconds of tracing (others ran beside it)": found["trace_seconds"],
        })  # fmt: skip
    for name, failure in failures.items():
        bench.not_run(f"{name}: MACs left", 0.4, "x", failure)
    bench.details["All networks"] = rows
    bench.details["Why groups stay"] = {
        name: stuck for name, place in places.items() if (stuck := json.loads((place / "found.json").read_text())["unprunable"])
    }  # fmt: skip


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three networks, nothing is written")
    parser.add_argument(
        "--only", action="append", default=[], help="a network of the table; may be repeated; nothing is written"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "prune_networks", help=argparse.SUPPRESS)
    parser.add_argument("--reload", type=Path, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        return examine(arguments.one, arguments.folder)
    if arguments.reload:
        return reload(arguments.reload)
    bench = Benchmark("prune_networks", arguments.quick or bool(arguments.only))
    names = arguments.only or [name for name in networks() if not arguments.quick or name in QUICK]
    with tempfile.TemporaryDirectory() as empty:
        judge(bench, *measure(names, Path(empty) if arguments.quick else arguments.folder))
    bench.write()


if __name__ == "__main__":
    main()
