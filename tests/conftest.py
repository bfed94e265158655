"""What all tests share: one thread, a cache folder of their own, the bundled data, and one tiny finished run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import TINY, Called, call

from edgecompress.data import Dataset, load_data


@pytest.fixture(scope="session", autouse=True)
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test trains or measures lands in the user's cache."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """torch.onnx.export collects all of its operators anew each time, which is 40 % of its time for small networks."""
    from torch.onnx._internal.exporter import _registration

    registry = getattr(_registration, "ONNXRegistry", None)
    if registry is None or not hasattr(registry, "from_torchlib"):  # internals of torch: only the time is lost
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """scikit-learn's handwritten digits, loaded once."""
    return load_data("digits")


@pytest.fixture(scope="session")
def quick(house: None) -> Iterator[None]:
    """References are trained for two epochs and latencies measured for 20 ms; numbers mean nothing, the path is whole."""
    import edgecompress.original
    from edgecompress.exporters.runners import measure_latency_us

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(edgecompress.original.REFERENCE_EPOCHS, "digits", 2)
        patch.setitem(measure_latency_us.__kwdefaults__, "seconds", 0.02)
        patch.setitem(measure_latency_us.__kwdefaults__, "warmup_s", 0.0)
        yield


@pytest.fixture(scope="session")
def tiny_call(quick: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Called, Path]:
    """One whole two-stage run through the command line, and its folder. Never change what is in it."""
    runs = tmp_path_factory.mktemp("runs")
    return call("compress", *TINY, "--runs", runs, "--name", "tiny"), runs / "tiny"


@pytest.fixture(scope="session")
def tiny_run(tiny_call: tuple[Called, Path]) -> Path:
    """The folder of the whole run."""
    called, path = tiny_call
    assert called.code == 0, called.err
    return path
