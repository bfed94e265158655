"""torchvision's data sets by name: where they lie, and what to do when they are not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgecompress.data_sets import items_source, numbered
from edgecompress.errors import BadDataError
from edgecompress.files import cache_folder
from edgecompress.splits import Dataset, Sources, Wanted, assembled


@dataclass(frozen=True)
class Published:
    """A data set of torchvision: its class there, and what its constructor takes for each split that it has."""

    kind: str
    train: Mapping[str, object]
    test: Mapping[str, object] | None = None
    val: Mapping[str, object] | None = None


def _by_flag(kind: str) -> Published:
    return Published(kind, {"train": True}, {"train": False})


def _by_name(kind: str, train: str = "train", val: str | None = None) -> Published:
    return Published(kind, {"split": train}, {"split": "test"}, None if val is None else {"split": val})


PUBLISHED: dict[str, Published] = {
    "mnist": _by_flag("MNIST"),
    "kmnist": _by_flag("KMNIST"),
    "fashion_mnist": _by_flag("FashionMNIST"),
    "cifar10": _by_flag("CIFAR10"),
    "cifar100": _by_flag("CIFAR100"),
    "svhn": _by_name("SVHN"),
    "stl10": _by_name("STL10"),
    "gtsrb": _by_name("GTSRB"),
    "food101": _by_name("Food101"),
    "flowers102": _by_name("Flowers102", val="val"),
    "dtd": _by_name("DTD", val="val"),
    "oxford_iiit_pet": _by_name("OxfordIIITPet", train="trainval"),
    "eurosat": Published("EuroSAT", {}),
}


def data_root() -> Path:
    """Where torchvision's data sets lie: ``EDGECOMPRESS_DATA``, or ``data`` in the cache folder."""
    named = os.environ.get("EDGECOMPRESS_DATA")
    return Path(named) if named else cache_folder() / "data"


def torchvision_data(name: str, wanted: Wanted) -> Dataset:
    """A data set of `PUBLISHED`; downloaded if that is allowed and it is not here.

    Raises:
        BadDataError: it is not on this machine, or cannot be fetched.
    """
    found = PUBLISHED[name]
    parts = {
        part: _published(name, found.kind, options, download=wanted.download)
        for part, options in (("train", found.train), ("val", found.val), ("test", found.test))
        if options is not None
    }
    workers = max(1, torch.get_num_threads())
    sources = {part: items_source(value, f"{part} of {name}", wanted, workers) for part, value in parts.items()}
    count, classes = int(sources["train"].strata.max()) + 1, getattr(parts["train"], "classes", ())
    names = tuple(map(str, classes)) if len(classes) == count else numbered(count)
    return assembled(name, names, Sources(**sources), wanted)


def _published(name: str, kind: str, options: Mapping[str, object], *, download: bool) -> Any:
    from torchvision import datasets

    root = data_root()
    build = getattr(datasets, kind)
    try:
        return build(str(root), download=False, **options)
    except RuntimeError as error:  # torchvision's own way to say that the files are not there
        if not download:
            raise BadDataError(
                f"The data set {name} is not in {root}. Add --download, or point EDGECOMPRESS_DATA to the folder that holds "
                f"the files of torchvision.datasets.{kind}."
            ) from error
    try:
        return build(str(root), download=True, **options)
    except Exception as error:
        raise BadDataError(
            f"The data set {name} cannot be fetched ({type(error).__name__}: {error}). Without a network, fetch it elsewhere "
            f"with torchvision.datasets.{kind}, and point EDGECOMPRESS_DATA to that folder."
        ) from error
