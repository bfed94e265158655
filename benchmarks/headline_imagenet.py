"""VGG-16 at 224x224 with its 138 million parameters: the whole pipeline on seeded weights, for its size, time and memory alone.

Nothing is said about accuracy: there are no trained weights and no photos here. Whoever has ImageNet runs the command of
docs/benchmarks/headline.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cell
from headline_lab import FOLDER, TARGET

SHARE = 1 / 33  # of the parameters: the paper's ratio on ImageNet
IMAGES = {"train": 96, "calibration": 32, "search_val": 64, "select_val": 64, "test": 64}
RUN = "vgg16-224"


def imagenet_shapes() -> Cell:
    """Runs in a process of its own, so that its peak of memory is its own."""
    start = time.monotonic()
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    cell: Cell = json.loads(done.stdout.splitlines()[-1])
    return cell | {"minutes": round((time.monotonic() - start) / 60, 1)}


def images(count: int, seed: int) -> torch.Tensor:
    """Smooth noise as ``uint8 [count, 3, 224, 224]``."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(count, 3, 8, 8, generator=generator), size=224, mode="bilinear")
    return (255 * smooth).to(torch.uint8)


def data() -> Any:
    """A thousand classes and no labels: the network's own answers take their place."""
    from edgecompress.data import Dataset, Split
    from edgecompress.spec import Preprocessing

    parts = {
        name: Split(images(count, seed), torch.zeros(count, dtype=torch.long))
        for seed, (name, count) in enumerate(IMAGES.items())
    }
    how = Preprocessing(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    classes = tuple(map(str, range(1000)))
    return Dataset(
        name="noise224", classes=classes, preprocessing=how, augmentation="none", labelled=False, **parts
    )  # fmt: skip


def main() -> None:
    """Compress, load the file, and say what it took as one line of JSON."""
    from edgecompress import compress
    from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us
    from edgecompress.models import build_model

    torch.manual_seed(0)
    model = build_model("vgg16", 1000).eval()
    run = compress(
        model, data(), TARGET, f"params={SHARE:.5f}x", name=RUN, runs=FOLDER / "runs", overwrite=True, episodes=24,
        finetune_epochs=1, qat_epochs=1, batch_size=8, reconstruct=False,
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report, exports = run.report, run.path / "exports"
    x = torch.zeros(1, 3, 224, 224).numpy()
    times, loads = {}, {}
    for name in ("original.onnx", report.compressed.file):
        start = time.perf_counter()
        runner = OnnxRuntimeRunner(Path(exports / name))
        loads[name] = time.perf_counter() - start
        times[name] = measure_latency_us(runner, x, seconds=3)["median_us"]
        del runner
    print(json.dumps({
        "params": [report.original.cost.params, report.compressed.cost.params],
        "macs": [report.original.cost.macs, report.compressed.cost.macs],
        "bytes": [(exports / "original.onnx").stat().st_size, (exports / report.compressed.file).stat().st_size],
        "bits": round(report.compressed.average_weight_bits, 3),
        "load_s": [round(value, 3) for value in loads.values()],
        "latency_us": [round(value, 1) for value in times.values()],
        "peak_bytes": peak,
        "arms": report.found_by,
        "seconds": dict(report.seconds),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
