"""Half of every channel group, in every family of networks: python benchmarks/prune_networks.py [--quick]

Each network has random weights. It is traced, every group that the outputs do not fix keeps half of its channels, the smaller
network takes one training step with every head in use, and a fresh process rebuilds it from its widths and a safetensors file.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark
from safetensors.torch import load_file, save_file
from torch import nn

from edgecompress.channel_groups import tensors_of
from edgecompress.cost import count
from edgecompress.errors import EdgeCompressError
from edgecompress.models import build_model
from edgecompress.prune import prune
from edgecompress.raw_heads import RawHeads
from edgecompress.spec import CompressionPolicy, Network
from edgecompress.trace import trace

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


def halved(network: Network) -> dict[str, int]:
    """Half the channels of every group that can be cut."""
    return {group.id: max(1, group.width // 2) for group in network.prunable_groups}


def images(size: int) -> torch.Tensor:
    """Two images, the same in every process."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def unprunable_share(network: Network) -> float:
    """The share of multiply-adds in layers whose groups cannot be cut, though no output fixes them."""
    stuck = {m for group in network.groups if not group.prunable and group.reason != OUTPUT for m in group.members}
    return sum(layer.macs for layer in network.layers if layer.name in stuck) / sum(
        layer.macs for layer in network.layers
    )


def training_step(model: nn.Module, size: int) -> None:
    """Forward and backward in training mode; every output of the network is part of the loss."""
    model.train()
    loss = torch.stack([output.square().mean() for output in tensors_of(model(images(size)))]).sum()
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if without or not torch.isfinite(loss):
        raise EdgeCompressError(f"the loss is {loss.item()}, and {without[:3]} took no part in it")


def examine(bench: Benchmark, name: str, factory: Factory, size: int, folder: Path) -> None:
    """All bars of one network but the reload, for which its files are left in ``folder``."""
    torch.manual_seed(0)
    model, start = factory().eval(), time.monotonic()
    traced = trace(model, (3, size, size), name, shared=True)
    seconds = time.monotonic() - start
    keep = halved(traced.network)
    macs = [count(traced.network, CompressionPolicy(model="", keep_channels=k)).macs for k in ({}, keep)]
    stuck = [g for g in traced.network.groups if not g.prunable and g.reason != OUTPUT]
    why = "; ".join(sorted({group.reason for group in stuck}))
    smaller = prune(model, traced, keep)
    for title, value, limit in (
        ("MACs left", macs[1] / macs[0], 0.4),
        ("MACs in unprunable groups", unprunable_share(traced.network), 0.05),
    ):
        if value <= limit:
            bench.at_most(f"{name}: {title}", value, limit, "x")
        else:
            bench.misses(f"{name}: {title}", value, limit, "x", why)
    with torch.no_grad():
        outputs = tensors_of(smaller.eval()(images(size)))
    save_file({str(i): value.contiguous() for i, value in enumerate(outputs)}, folder / "outputs.safetensors")
    save_file({key: value.contiguous() for key, value in smaller.state_dict().items()}, folder / "model.safetensors")
    (folder / "keep.json").write_text(json.dumps({"name": name, "keep": keep}))
    failure = ""
    try:
        training_step(smaller, size)
    except (EdgeCompressError, RuntimeError, ValueError) as error:
        failure = str(error)
    if failure:
        bench.misses(f"{name}: training steps that failed", 1, 0, "steps", failure)
    else:
        bench.at_most(f"{name}: training steps that failed", 0, 0, "steps")
    bench.details[name] = {
        "pixels": size, "groups": len(traced.network.groups), "cut": len(keep), "macs": macs, "outputs": len(outputs),
        "unprunable": {g.id: g.reason for g in traced.network.groups if not g.prunable}, "trace_seconds": round(seconds, 1),
    }  # fmt: skip


def reload(folder: Path) -> dict[str, float]:
    """Rebuild every network that lies in ``folder``: the largest relative difference of its outputs, per name.

    What was rebuilt is noted beside the network, so that this may be begun while others are still examined.
    """
    found = {}
    for path in sorted(folder.glob("*/keep.json")):
        saved, note = json.loads(path.read_text()), path.with_name("difference.json")
        if not note.exists():
            note.write_text(json.dumps(rebuilt_difference(path.parent, saved["name"], saved["keep"])))
        found[saved["name"]] = json.loads(note.read_text())
    return found


def rebuilt_difference(place: Path, name: str, keep: dict[str, int]) -> float:
    """How far the network that is rebuilt from its widths and weights is from the saved outputs, relative to the largest."""
    factory, size = networks()[name]
    model = factory()
    smaller = prune(model, trace(model, (3, size, size), name, shared=True), keep)
    smaller.load_state_dict(load_file(place / "model.safetensors"))
    wanted = load_file(place / "outputs.safetensors")
    with torch.no_grad():
        outputs = tensors_of(smaller.eval()(images(size)))
    scale = max(float(value.abs().max()) for value in wanted.values())
    return max(float((y - wanted[str(i)]).abs().max()) for i, y in enumerate(outputs)) / scale


def measure(bench: Benchmark, folder: Path) -> None:
    """All networks, or three of them."""
    for number, (name, (factory, size)) in enumerate(networks().items()):
        if bench.quick and name not in QUICK:
            continue
        place = folder / str(number)
        place.mkdir()
        try:
            examine(bench, name, factory, size, place)
        except EdgeCompressError as error:
            bench.not_run(f"{name}: MACs left", 0.4, "x", str(error))
        gc.collect()
    command = [sys.executable, "-W", "ignore", __file__, "--reload", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the networks could not be rebuilt:\n{done.stderr}")
    for name, difference in json.loads(done.stdout).items():
        bench.at_most(f"{name}: difference after a fresh process rebuilt it", difference, 1e-6, "x")


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three networks, nothing is written")
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.reload:
        print(json.dumps(reload(arguments.reload)))
        return
    bench = Benchmark("prune_networks", arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        measure(bench, Path(folder))
    bench.write()


if __name__ == "__main__":
    main()
