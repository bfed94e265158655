"""What images cost once they are read: python benchmarks/data_loading.py [--quick]

A folder of 5,000 real images (CIFAR-10 as JPEG, from EDGECOMPRESS_DATA) is compressed for; the time inside
`Dataset.batches` is compared with that of the episodes around it, with images in memory and mapped from a file.
"""

from __future__ import annotations

import argparse
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark

from edgecompress import images, pipeline
from edgecompress.data import Dataset, load_data
from edgecompress.progress import Silent
from edgecompress.spec import Stage, Trial

ARCHIVE = "cifar10-jpeg.tar.gz"
WEIGHTS = "resnet20_cifar10jpeg.safetensors"
LIMIT = 0.1  # share of an episode


class Timed(Dataset):
    """A data set that adds up the seconds that its batches take to come."""

    seconds = 0.0

    def batches(self, *arguments: Any, **options: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As `Dataset.batches`."""
        source = super().batches(*arguments, **options)
        while True:
            started = time.perf_counter()
            batch = next(source, None)
            Timed.seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch


class Episodes(Silent):
    """Seconds of every episode and of the loading within, from one trial to the next of the same stage."""

    def __init__(self) -> None:
        self.found: dict[Stage, list[tuple[float, float]]] = {}
        self._last: tuple[str, float, float] | None = None

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        """An episode ended."""
        now = (stage, time.perf_counter(), Timed.seconds)
        if self._last is not None and self._last[0] == stage:
            self.found.setdefault(stage, []).append((now[1] - self._last[1], now[2] - self._last[2]))
        self._last = now

    def shares(self) -> dict[Stage, float]:
        """Loading over the whole, per stage."""
        return {stage: sum(b for _, b in pairs) / sum(a for a, _ in pairs) for stage, pairs in self.found.items()}


def write_folder(root: Path, per_class: int) -> Path:
    """The first images of every class of the archive: nine of ten for train/, one for test/."""
    counts: Counter[tuple[str, str]] = Counter()
    wanted = {"train": per_class * 9 // 10, "test": per_class // 10}
    with tarfile.open(Path(os.environ["EDGECOMPRESS_DATA"]) / ARCHIVE) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) < 4 or counts[parts[1], parts[2]] >= wanted[parts[1]]:
                continue
            counts[parts[1], parts[2]] += 1
            path = root.joinpath(*parts[1:])
            path.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None
            path.write_bytes(source.read())
    return root


def measure(bench: Benchmark, folder: Path) -> None:
    """Both ways to hold images, on one folder; a quick run takes the slower one."""
    root = write_folder(folder / "photos", 30 if bench.quick else 500)
    torch.set_num_threads(1)
    ways = (("in memory", False), ("mapped from a file", True))
    for where, mapped in ways[bench.quick :]:
        images.fits_in_memory = lambda shape, mapped=mapped: not mapped
        passes = []
        for _ in range(2):
            started = time.perf_counter()
            data = load_data(str(root))
            passes.append(time.perf_counter() - started)
        timed = Timed(**{field.name: getattr(data, field.name) for field in fields(data)})
        listener = Episodes()
        pipeline.compress(
            "resnet20", timed, "x86", "flops=0.5x,size=0.15x", name=f"mapped-{mapped}", runs=folder / "runs",
            progress=listener, weights=str(Path(os.environ["EDGECOMPRESS_DATA"]) / WEIGHTS), threads=1,
            episodes=8 if bench.quick else 20, finetune_epochs=1, qat_epochs=0,
        )  # fmt: skip
        for stage, share in listener.shares().items():
            bench.at_most(f"{where}: loading in an episode of stage '{stage}'", share, LIMIT, "of its time")
        bench.details[where] = {
            "images": sum(len(getattr(data, name)) for name in ("train", "search_val", "select_val", "test")),
            "pixels": list(data.preprocessing.size),
            "first_pass_s": round(passes[0], 3),
            "second_pass_s": round(passes[1], 3),
            "episode_s": {
                stage: round(sum(seconds for seconds, _ in pairs) / len(pairs), 4)
                for stage, pairs in listener.found.items()
            },
            "loading_s": {
                stage: round(sum(loading for _, loading in pairs) / len(pairs), 5)
                for stage, pairs in listener.found.items()
            },
        }


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="300 images, nothing is written")
    bench = Benchmark("data_loading", parser.parse_args().quick)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGECOMPRESS_CACHE"] = f"{folder}/cache"
        measure(bench, Path(folder))
    bench.write()


if __name__ == "__main__":
    main()
