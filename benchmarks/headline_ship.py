"""Puts a network that `headline.py` compressed into the package, with the row that it proves: ``--ship NETWORK[:SEED]``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from cells import Cell
from headline_lab import Effort, Lab

from edgecompress.runs import RunFolder
from edgecompress.shipped import INTEGERS, SHIPPED, Card, pack

LARGEST = 5_000_000  # bytes of all files together
LICENCES = {"resnet56": "BSD-2-Clause: compressed from akamaster/pytorch_resnet_cifar10 (Yerlan Idelbayev)"}
OURS = "Apache-2.0: trained by the authors of edgecompress on CIFAR-10 (Krizhevsky 2009)"


def ship(network: str, seed: int, effort: Effort, known: Mapping[str, Cell]) -> Path:
    """Copy the network, its integer file and a card into the package; ``known`` are the finished cells."""
    lab, at = Lab(network, effort), f"{network}/{effort}"
    needed = f"{at}/ours/{seed}", f"{at}/tuned/{seed}"
    missing = [name for name in needed if name not in known]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: not finished. Run --networks {network} --kinds tuned,ours first.")
    mine, tuned = (known[name] for name in needed)
    run = RunFolder(lab.folder / "runs" / f"ours-ddpg-{seed}")
    target = SHIPPED / f"{network.removesuffix('_cifar')}-cifar10"
    card = Card(
        base=network,
        data="CIFAR-10, 10,000 test images as JPEG files",
        accuracy=mine["test"] / 100,
        baseline_accuracy=tuned["test"] / 100,
        params=mine["params"],
        macs=mine["macs"],
        average_weight_bits=mine["bits"],
        size_bytes=run.file(INTEGERS).stat().st_size,
        row=f"docs/benchmarks/headline.md, {network}: ours/{seed}",
        licence=LICENCES.get(network, OURS),
    )
    pack(run, target, card)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > LARGEST:
        shutil.rmtree(target)
        raise SystemExit(f"{network} has {size:,} bytes; at most {LARGEST:,} are shipped.")
    return target
