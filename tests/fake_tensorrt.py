"""A fake TensorRT of every generation, and a fake CUDA whose device memory is the host's.

Each version has what NVIDIA's migration guides say it has: what was not there yet, or is gone, raises AttributeError, also
when it is set. No real TensorRT has run on a GPU in this project.
"""

from __future__ import annotations

import ctypes
import json
import types
from typing import Any

import numpy as np

from edgecompress.exporters.build_on_device import version_of


class FakeCudaLibrary:
    """libcudart with the host's memory: an address is a real one, an elapsed time is always 0.25 ms."""

    def __init__(self, capability: tuple[int, int] = (8, 7), gpus: int = 1, name: bytes = b"Fake Orin") -> None:
        self.capability, self.gpus, self.name, self.buffers = capability, gpus, name, []

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def cudaGetDeviceProperties(self, buffer: Any, device: Any) -> int:
        buffer.value = self.name
        return 0

    def cudaDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        value._obj.value = self.capability[attribute.value - 75]
        return 0

    def cudaMalloc(self, made: Any, size: Any) -> int:
        self.buffers.append(ctypes.create_string_buffer(size.value))
        made._obj.value = ctypes.addressof(self.buffers[-1])
        return 0

    def cudaMemcpy(self, to: Any, source: Any, size: Any, kind: Any) -> int:
        ctypes.memmove(to, source, size.value)
        return 0

    def cudaEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:
        milliseconds._obj.value = 0.25
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0


SHAPES = {"input": (2, 1, 2, 2), "output": (2, 4)}


class FakeContext:
    """Gives the class ``int(mean)`` of each image, times ``1 + error``; the engine may leave the batch open."""

    def __init__(self, error: float, batch: int = 2, largest: int = 2) -> None:
        self.error, self.batch, self.largest, self.addresses = error, batch, largest, {}

    def set_input_shape(self, key: str, shape: tuple[int, ...]) -> bool:
        right = shape[1:] == SHAPES[key][1:] and (1 <= shape[0] <= self.largest if self.batch == -1 else shape[0] == 2)
        self.batch = shape[0] if right else self.batch
        return right

    def get_tensor_shape(self, key: str) -> tuple[int, ...]:
        return (self.batch, *SHAPES[key][1:])

    def set_tensor_address(self, key: str, address: int) -> None:
        self.addresses[key] = address

    def execute_async_v3(self, stream: object) -> bool:
        source, target, count = self.addresses["input"], self.addresses["output"], 4 * self.batch
        images = np.frombuffer((ctypes.c_float * count).from_address(source), np.float32).reshape(-1, 4)
        result = np.frombuffer((ctypes.c_float * count).from_address(target), np.float32).reshape(-1, 4)
        result[:] = np.eye(4)[images.mean(1).astype(int)] * (1 + self.error)
        return True


class FakeOldContext:
    """Before TensorRT 8.5: bindings by number."""

    def __init__(self, new: FakeContext) -> None:
        self.new = new

    def set_binding_shape(self, number: int, shape: tuple[int, ...]) -> bool:
        return self.new.set_input_shape(list(SHAPES)[number], shape)

    def get_binding_shape(self, number: int) -> tuple[int, ...]:
        return self.new.get_tensor_shape(list(SHAPES)[number])

    def execute_async_v2(self, bindings: list[int], stream: object) -> bool:
        self.new.addresses = {"input": bindings[0], "output": bindings[1]}
        return self.new.execute_async_v3(stream)


def _layers(version: tuple[int, ...]) -> str:
    """The inspector's words; 11 split the type from the format."""
    ends = {"Inputs": [{"Format/Datatype": "Int8"}], "Outputs": [{"Format/Datatype": "Half"}]}
    if version >= (11,):
        ends = {"Inputs": [{"Format": "Row major", "DataType": "Int8"}], "Outputs": [{"DataType": "Half"}]}
    return json.dumps({"Layers": [{"Name": "conv1", "LayerType": "conv", **ends}]})


def fake_engine(version: tuple[int, ...], error: float, batch: int = 2, largest: int = 2) -> types.SimpleNamespace:
    """An engine; ``batch`` -1 is an open one, up to ``largest``."""
    inspector = types.SimpleNamespace(get_engine_information=lambda kind: _layers(version))
    engine = types.SimpleNamespace(create_engine_inspector=lambda: inspector)
    if version < (11,):
        engine.device_memory_size = 4096
    if version >= (10, 1):
        engine.device_memory_size_v2 = 4096
    if version >= (8, 5):
        engine.num_io_tensors, engine.get_tensor_name = 2, lambda number: list(SHAPES)[number]
        engine.get_tensor_mode = lambda key: key
        engine.get_tensor_dtype = lambda key: types.SimpleNamespace(name="FLOAT")
        engine.create_execution_context = lambda: FakeContext(error, batch, largest)
    if version < (10,):
        engine.num_bindings, engine.binding_is_input = 2, lambda number: number == 0
        engine.get_binding_dtype = lambda number: types.SimpleNamespace(name="FLOAT")
        if version < (8, 5):
            engine.create_execution_context = lambda: FakeOldContext(FakeContext(error, batch, largest))
    return engine


class FakeConfig:
    """A builder configuration that knows the settings of its version and refuses others; ``flags`` and ``made`` tell."""

    def __init__(self, version: tuple[int, ...], rtx: bool) -> None:
        known = {"profiling_verbosity", "flags", "made", "version", "profiles"}
        known |= set() if rtx else {"default_device_type", "DLA_core", "cache"}
        known |= {"max_workspace_size"} if version < (10,) and not rtx else set()
        known |= {"builder_optimization_level"} if version >= (8, 6) else set()
        object.__setattr__(self, "known", known)
        self.flags, self.profiles, self.version, self.made = [], [], version, {}
        if version >= (8, 6):
            self.builder_optimization_level = 3
        if version >= (8, 4):
            object.__setattr__(self, "set_memory_pool_limit", self.made.__setitem__)
        if not rtx:
            self.cache = None
            for name in ("create_timing_cache", "set_timing_cache", "get_timing_cache"):
                object.__setattr__(self, name, getattr(self, f"_{name}"))

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.known:  # type: ignore[attr-defined]
            raise AttributeError(f"TensorRT {self.version} has no IBuilderConfig.{name}")
        object.__setattr__(self, name, value)

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile)

    def _create_timing_cache(self, content: bytes) -> Any:
        content = bytes(content) or f"cache of {self.version}".encode()
        return types.SimpleNamespace(content=content, serialize=lambda: content + b"+")

    def _set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        right = cache.content.startswith(f"cache of {self.version}".encode())
        self.cache = cache if right else None
        return right

    def _get_timing_cache(self) -> Any:
        return self.cache


def _add_enumerations(trt: Any, version: tuple[int, ...], rtx: bool) -> None:
    if version >= (8, 4):
        trt.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
    if version >= (8, 5):
        trt.TensorIOMode = types.SimpleNamespace(INPUT="input")
    trt.NetworkDefinitionCreationFlag = types.SimpleNamespace()
    trt.BuilderFlag = types.SimpleNamespace(SPARSE_WEIGHTS="sparse")
    if version < (11,):
        trt.BuilderFlag = types.SimpleNamespace(INT8="int8", FP16="fp16", SPARSE_WEIGHTS="sparse")
        trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH = 0
    if (10,) <= version < (11,):
        trt.BuilderFlag.INT4 = "int4"
    if not rtx:
        trt.BuilderFlag.GPU_FALLBACK = "fallback"
        trt.DeviceType = types.SimpleNamespace(GPU="gpu", DLA="dla")
    if version >= (10,):
        trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1


def fake_tensorrt(
    text: str,
    *,
    error: float = 0.0,
    plan: bytes | None = b"engine",
    batch: int = 2,
    dla_cores: int = 2,
    rtx: bool = False,
) -> types.ModuleType:
    """A ``tensorrt`` with what version ``text`` has and no more. ``made`` records what it was asked.

    ``batch`` is that of the model, -1 leaves it open. Plans of another version than that of ``text`` do not load.
    """
    trt: Any = types.ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    new, version = types.SimpleNamespace, (11, 0) if rtx else version_of(text)
    made = trt.made = new(network=None, config=FakeConfig(version, rtx), runtime=None)
    made.flags = made.config.flags
    typed = rtx or version >= (11,)
    _add_enumerations(trt, version, rtx)

    def create_network(flags: int = 0) -> object:
        made.network = flags
        shape = (batch, *SHAPES["input"][1:])
        return new(get_input=lambda number: new(name="input", shape=shape), num_inputs=1)

    def parse(data: bytes) -> bool:
        explicit = version >= (10,) or made.network & 1  # before 10 a network without the flag has an implicit batch
        return b"broken" not in data and bool(explicit)

    def build(network: object, config: FakeConfig) -> bytes | None:
        mixed = (typed or made.network & 2) and {"int8", "fp16", "int4"}.intersection(config.flags)
        return None if mixed or (batch == -1 and not config.profiles) else plan

    def profile() -> Any:
        made.shapes = {}
        return new(set_shape=lambda name, low, best, high: made.shapes.update({name: (low, best, high)}))

    def deserialize(data: bytes) -> object:
        largest = made.shapes["input"][2][0] if batch == -1 and hasattr(made, "shapes") else 8
        return fake_engine(version, error, batch, largest) if data == plan else None

    def runtime(logger: object) -> object:
        made.runtime = new(deserialize_cuda_engine=deserialize)
        return made.runtime

    trt.__version__ = text
    trt.Logger = lambda severity: None
    trt.Logger.WARNING = 1
    trt.Builder = lambda logger: new(
        create_network=create_network,
        create_builder_config=lambda: made.config,
        create_optimization_profile=profile,
        build_serialized_network=build,
        num_DLA_cores=dla_cores,
    )
    trt.OnnxParser = lambda network, logger: new(parse=parse, num_errors=1, get_error=lambda number: "node X is wrong")
    trt.Runtime = runtime
    trt.ProfilingVerbosity = new(DETAILED="detailed")
    trt.LayerInformationFormat = new(JSON="json")
    return trt
