"""A fake TensorRT of every generation, and a fake CUDA whose device memory is the host's."""

from __future__ import annotations

import ctypes
import json
import types
from typing import Any

import numpy as np

from edgecompress.exporters.build_on_device import version_of


class FakeCudaLibrary:
    """libcudart with the host's memory: an address is a real one, an elapsed time is always 0.25 ms."""

    def __init__(self, capability: tuple[int, int] = (8, 7), gpus: int = 1) -> None:
        self.capability, self.gpus, self.buffers = capability, gpus, []

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def cudaGetDeviceProperties(self, buffer: Any, device: Any) -> int:
        buffer.value = b"Fake Orin"
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
    """Gives the class ``int(mean)`` of each image, times ``1 + error``."""

    def __init__(self, error: float) -> None:
        self.error, self.addresses = error, {}

    def set_input_shape(self, key: str, shape: tuple[int, ...]) -> bool:
        return shape == SHAPES[key]

    def get_tensor_shape(self, key: str) -> tuple[int, ...]:
        return SHAPES[key]

    def set_tensor_address(self, key: str, address: int) -> None:
        self.addresses[key] = address

    def execute_async_v3(self, stream: object) -> bool:
        source, target = self.addresses["input"], self.addresses["output"]
        images = np.frombuffer((ctypes.c_float * 8).from_address(source), np.float32).reshape(2, 4)
        result = np.frombuffer((ctypes.c_float * 8).from_address(target), np.float32).reshape(2, 4)
        result[:] = np.eye(4)[images.mean(1).astype(int)] * (1 + self.error)
        return True


class FakeOldContext:
    """Before TensorRT 8.5: bindings by number."""

    def __init__(self, error: float) -> None:
        self.new = FakeContext(error)

    def set_binding_shape(self, number: int, shape: tuple[int, ...]) -> bool:
        return shape == self.get_binding_shape(number)

    def get_binding_shape(self, number: int) -> tuple[int, ...]:
        return list(SHAPES.values())[number]

    def execute_async_v2(self, bindings: list[int], stream: object) -> bool:
        self.new.addresses = {"input": bindings[0], "output": bindings[1]}
        return self.new.execute_async_v3(stream)


def fake_engine(version: tuple[int, ...], error: float) -> types.SimpleNamespace:
    ends = {"Inputs": [{"Format/Datatype": "Int8"}], "Outputs": [{"Format/Datatype": "Half"}]}
    information = json.dumps({"Layers": [{"Name": "conv1", "LayerType": "conv", **ends}]})
    inspector = types.SimpleNamespace(get_engine_information=lambda kind: information)
    engine = types.SimpleNamespace(create_engine_inspector=lambda: inspector)
    if version >= (8, 5):
        engine.num_io_tensors, engine.get_tensor_name = 2, lambda number: list(SHAPES)[number]
        engine.get_tensor_mode = lambda key: key
        engine.create_execution_context = lambda: FakeContext(error)
    else:
        engine.num_bindings, engine.binding_is_input = 2, lambda number: number == 0
        engine.create_execution_context = lambda: FakeOldContext(error)
    return engine


def fake_tensorrt(text: str, *, error: float = 0.0, plan: bytes | None = b"engine") -> types.ModuleType:
    """A ``tensorrt`` with what version ``text`` has and no more. ``made`` records what it was asked."""
    trt: Any = types.ModuleType("tensorrt")
    version, new = version_of(text), types.SimpleNamespace
    made = trt.made = new(flags=[], network=None, config=new(set_flag=lambda flag: made.flags.append(flag)))
    if version >= (8, 4):
        made.config.set_memory_pool_limit = lambda pool, size: setattr(made.config, pool, size)
        trt.MemoryPoolType = new(WORKSPACE="workspace")
    if version >= (8, 5):
        trt.TensorIOMode = new(INPUT="input")
    trt.NetworkDefinitionCreationFlag = new()
    if version < (11,):
        trt.BuilderFlag = new(INT8="int8", FP16="fp16")
        trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH = 0
    if version >= (10,):
        trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1

    def create_network(flags: int) -> object:
        made.network = flags
        return new(get_input=lambda number: new(name="input", shape=SHAPES["input"]))

    trt.__version__ = text
    trt.Logger = lambda severity: None
    trt.Logger.WARNING = 1
    trt.Builder = lambda logger: new(
        create_network=create_network,
        create_builder_config=lambda: made.config,
        build_serialized_network=lambda network, config: plan,
    )
    trt.OnnxParser = lambda network, logger: new(
        parse=lambda data: b"broken" not in data, num_errors=1, get_error=lambda number: "node X is wrong"
    )
    trt.Runtime = lambda logger: new(deserialize_cuda_engine=lambda data: fake_engine(version, error))
    trt.ProfilingVerbosity = new(DETAILED="detailed")
    trt.LayerInformationFormat = new(JSON="json")
    return trt
