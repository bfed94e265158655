"""Where networks are trained and measured by torch: on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from edgecompress.errors import UnknownNameError, UsageError

DEVICES = ("auto", "cpu", "cuda")


def device_by_name(name: str) -> torch.device:
    """A key of `DEVICES` as torch's device; ``auto`` is CUDA where torch finds a GPU, otherwise the CPU.

    Raises:
        UnknownNameError: no such device. UsageError: ``cuda`` was asked for and torch finds no GPU.
    """
    if name not in DEVICES:
        raise UnknownNameError("device", name, DEVICES)
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UsageError(
            f"--device cuda: torch {torch.__version__} finds no GPU here. Leave it out to train on the CPU, or install a driver "
            "and a build of torch for it."
        )
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def device_title(device: torch.device) -> str:
    """For a report: ``cpu``, or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def lying_on(device: torch.device, *modules: nn.Module | None) -> Iterator[None]:
    """``modules`` lie on ``device`` inside, and where they lay before afterwards, whatever happens; None stands for none."""
    homes = [(module, _home(module)) for module in modules if module is not None]
    try:
        for module, _ in homes:
            module.to(device)
        yield
    finally:
        for module, home in homes:
            module.to(home)


def _home(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))


__all__ = ["DEVICES", "device_by_name", "device_title", "lying_on"]
