"""Puts a network that `headline.py` compressed into the package, with the row that it proves: ``--ship NETWORK[:SEED]``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from cells import Cell
from headline_lab import Lab, run_folder
from headline_plan import Job, Network

from edgecompress.runs import RunFolder
from edgecompress.shipped import INTEGERS, SHIPPED, Card, pack

LARGEST = 5_000_000  # bytes of all files together
LICENCES = {"resnet56": "BSD-2-Clause: compressed from akamaster/pytorch_resnet_cifar10 (Yerlan Idelbayev)"}
OURS = "Apache-2.0: trained by the authors of edgecompress on CIFAR-10 (Krizhevsky 2009)"


def ship(network: Network, seed: int, known: Mapping[str, Cell]) -> Path:
    """Put the network, its integer file and a card into the package; ``known`` are the finished cells."""
    lab, mine = Lab(network), Job("ours", network, "ours", seed, network.budget)
    needed = mine, Job("tuned", network, "tuned", seed)
    missing = [job.name for job in needed if job.name not in known]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: not finished. Run --networks {network.name} --kinds tuned,ours first.")
    cell, tuned = (known[job.name] for job in needed)
    run = RunFolder(run_folder(lab, mine))
    target = SHIPPED / f"{network.name.removesuffix('_cifar')}-cifar10"
    card = Card(
        base=network.name,
        data=f"CIFAR-10 ({cell['data']}), 10,000 test images",
        accuracy=cell["test"] / 100,
        baseline_accuracy=tuned["test"] / 100,
        params=cell["params"],
        macs=cell["macs"],
        average_weight_bits=cell["bits"],
        size_bytes=run.file(INTEGERS).stat().st_size,
        row=f"docs/benchmarks/headline.md, {network.title}: {mine.file}",
        licence=LICENCES.get(network.name, OURS),
    )
    pack(run, target, card)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > LARGEST:
        shutil.rmtree(target)
        raise SystemExit(f"{network.name} has {size:,} bytes; at most {LARGEST:,} are shipped.")
    return target
