"""VGG-16 at 224x224 with its 138 million parameters: the whole pipeline on seeded weights, for its size, time and memory alone.

Nothing is said about accuracy: there are no trained weights and no photos here. Whoever has ImageNet runs `COMMAND`; its
options are those of the run here, but for the shorter search and training, which take no other memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cell
from headline_lab import FOLDER, TARGET, Stopwatch, search_and_training, where

from edgecompress.files import write_text

BUDGET = "params=0.0303x,size=0.0075x"  # the paper's ratio on ImageNet, 33x
BATCH = 32
COMMAND = (
    "edgecompress compress --model vgg16 --weights DEFAULT --download --data imagenet --target x86 "
    f"--budget {BUDGET} --batch-size {BATCH}"
)
LITTLE: dict[str, Any] = {"episodes": 24, "finetune_epochs": 1, "qat_epochs": 1}
# Select-val is measured 256 images at once, as the real one: that decides the peak of memory.
IMAGES = {"train": 96, "calibration": 32, "search_val": 64, "select_val": 256, "test": 64}
RUN, RUNS = "vgg16-224", FOLDER / "runs"


def imagenet_shapes() -> Cell:
    """Runs in a process of its own, so that its peak of memory is its own; goes on where it was broken off."""
    command = [sys.executable, __file__, str(torch.get_num_threads())]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; what it said stands above.")
    cell: Cell = json.loads((RUNS / f"{RUN}.cell.json").read_text())
    return cell


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


def main(threads: int) -> None:
    """Compress, load the file, and write down what it took."""
    from edgecompress import compress
    from edgecompress.models import build_model

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build_model("vgg16", 1000).eval()
    watch = Stopwatch(RUNS / f"{RUN}.seconds.json", RUN)
    run = compress(
        model, data(), TARGET, BUDGET, name=RUN, runs=RUNS, resume=(RUNS / RUN / "config.json").exists(),
        progress=watch, batch_size=BATCH, threads=threads, **LITTLE,
    )  # fmt: skip
    watch.tick()
    report, exports = run.report, run.path / "exports"
    cell = {
        "params": [report.original.cost.params, report.compressed.cost.params],
        "macs": [report.original.cost.macs, report.compressed.cost.macs],
        "bytes": [(exports / "original.onnx").stat().st_size, (exports / report.compressed.file).stat().st_size],
        "bits": round(report.compressed.average_weight_bits, 3),
        "files": ["original.onnx", report.compressed.file],
        "peak_bytes": watch.peak_bytes,
        "budget": BUDGET,
        "batch": BATCH,
        "images": IMAGES,
        "options": LITTLE,
        "arms": report.found_by,
        "hours": {part: round(value / 3600, 4) for part, value in search_and_training(watch.seconds).items()},
        "where": where(model),
    }
    cell |= timed(cell)
    write_text(RUNS / f"{RUN}.cell.json", json.dumps(cell))


def timed(cell: Cell) -> Cell:
    """Seconds to load and microseconds to run each file of the finished run; nothing where they are gone."""
    from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us

    paths = [RUNS / RUN / "exports" / name for name in cell["files"]]
    if not all(path.exists() for path in paths):
        return {}
    x = torch.zeros(1, 3, 224, 224).numpy()
    loads, times = [], []
    for path in paths:
        start = time.perf_counter()
        runner = OnnxRuntimeRunner(path)
        loads.append(round(time.perf_counter() - start, 3))
        times.append(round(measure_latency_us(runner, x, seconds=3)["median_us"], 1))
        del runner  # one session alive at a time
    return {"load_s": loads, "latency_us": times, "latency_where": where(threads=1)}


if __name__ == "__main__":
    main(int(sys.argv[1]))
