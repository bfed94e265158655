"""Build a TensorRT engine on the device that will run it, check it and time it.

Copy this file, the .onnx and reference.npz into one folder on the device, then: python3 build_on_device.py [--fp16]
It needs TensorRT 8.2 to 11 (part of JetPack) and numpy, nothing else, and writes beside the .onnx:
  model.engine   valid only for this GPU and this TensorRT version
  engine.json    TensorRT version, GPU, sha256 of both files, precision per layer, errors, latency, power mode
  layers.json    what TensorRT's engine inspector says, as it is
  timing.cache   measured kernels, which make the next build quick
Where there is only TensorRT-RTX, the engine is built, checked and timed, and thrown away: check.json is all that stays.
Exit codes: 0 built and right, 1 refused, 2 wrong usage, 3 wrong outputs (no engine is written), 4 no TensorRT or no GPU.
"""

# No syntax later than Python 3.6, which is what JetPack 4.6 has TensorRT for; hence annotations in quotes.
import argparse
import collections
import ctypes
import ctypes.util
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

WARMUP_S = 0.2
NO_TENSORRT = (
    "There is no Python module 'tensorrt' for {0}. On a Jetson it comes with JetPack: sudo apt install "
    "python3-libnvinfer, then use the system's python3 (a virtual environment needs --system-site-packages). "
    "Elsewhere: pip install tensorrt."
)
HAS_DLA = ((7, 2), (8, 7))  # compute capabilities of Xavier and Orin; the Orin Nano has none all the same
USUAL_LIMITS = {"max_error": 0.1, "min_agreement": 0.95}
NUMPY_TYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64,
}  # fmt: skip


class Problem(Exception):
    """Something the user has to change; ``code`` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        Exception.__init__(self, message)
        self.code = code


def parse_arguments(arguments: "list[str] | None" = None) -> argparse.Namespace:
    """The command line. Nothing here needs TensorRT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--onnx", metavar="FILE", help="the model; by default the only .onnx beside this script")
    add("--out", metavar="FOLDER", help="where everything is written; by default the folder of the .onnx")
    add(
        "--fp16",
        action="store_true",
        help="let float layers run in FP16 (TensorRT 8 to 10; from 11 on the file decides)",
    )
    add("--strongly-typed", action="store_true", help="TensorRT 10: take all precisions from the file, as 11 does")
    add("--sparse", action="store_true", help="use sparse kernels where weights are 2:4 sparse (Ampere and later)")
    add(
        "--dla-core",
        type=int,
        metavar="N",
        help="run on DLA core N of a Xavier or Orin; what it cannot do runs on the GPU",
    )
    add("--batch", type=int, default=1, metavar="N", help="batch size where the file leaves it open (default 1)")
    add(
        "--max-batch",
        type=int,
        metavar="N",
        help="with an open batch: allow 1 to N, tuned for --batch (default --batch)",
    )
    add("--workspace-mb", type=int, default=512, metavar="MB", help="memory for the builder's tactics (default 512)")
    add("--optimization-level", type=int, choices=range(6), help="0 builds fast, 5 searches longest (TensorRT 8.6 on)")
    add(
        "--timing-cache",
        metavar="FILE",
        help="measured kernels to start from and to keep (default timing.cache in --out)",
    )
    add("--no-timing-cache", action="store_true", help="measure every kernel anew and keep nothing")
    add("--seconds", type=float, default=3.0, metavar="S", help="how long to time single batches (default 3)")
    add("--no-check", action="store_true", help="build although there is no reference.npz")
    add("--max-error", type=float, metavar="E", help="relative L2 error allowed (default: see reference.npz, or 0.1)")
    add("--min-agreement", type=float, metavar="A", help="top-1 agreement wanted (default: see reference.npz, or 0.95)")
    args = parser.parse_args(arguments)
    if args.max_batch is None:
        args.max_batch = args.batch
    if not 1 <= args.batch <= args.max_batch:
        parser.error("--batch must be at least 1 and at most --max-batch")
    return args


def load_tensorrt() -> "tuple[Any, bool]":
    """The module, and whether it is TensorRT-RTX, which builds engines of another kind."""
    try:
        import tensorrt

        return tensorrt, False
    except ImportError as error:
        try:
            import tensorrt_rtx

            return tensorrt_rtx, True
        except ImportError:
            raise Problem(NO_TENSORRT.format(sys.executable), 4) from error


def version_of(text: str) -> "tuple[int, ...]":
    """``"10.3.0.post1"`` -> ``(10, 3)``."""
    numbers = re.findall(r"\d+", text)
    return tuple(int(number) for number in [*numbers, "0", "0"][:2])


def has_int8(capability: "tuple[int, ...]") -> bool:
    """Whether GPUs of this compute capability have INT8 kernels (TensorRT support matrix: 6.1 and from 7.0 on)."""
    return capability == (6, 1) or capability >= (7, 0)


def choose_flags(
    version: "tuple[int, ...]", capability: "tuple[int, ...]", quantized: bool, args: argparse.Namespace
) -> "tuple[bool, list[str]]":
    """``(strongly typed, builder flags)`` for this TensorRT, GPU and file, or a Problem that says what to do."""
    name = f"TensorRT {version[0]}.{version[1]}"
    sm = f"SM {capability[0]}.{capability[1]}"
    if version < (8, 2):
        raise Problem(name + " is too old; 8.2 to 11 work. On a Jetson, install JetPack 4.6.1 or later.", 4)
    if quantized and not has_int8(capability):
        raise Problem(
            f"{name} has no INT8 kernels for this GPU ({sm}; a Jetson Nano is 5.3), so this integer model cannot run on "
            "it. Export the float model and build that with --fp16, or run model.int8.onnx on the CPU with ONNX Runtime."
        )
    if args.fp16 and (version >= (11,) or args.strongly_typed):
        why = "has no FP16 flag any more" if version >= (11,) else "ignores --fp16 beside --strongly-typed"
        raise Problem(name + " " + why + ": the file decides every precision. Leave --fp16 out.", 2)
    if args.strongly_typed and version < (10,):
        raise Problem(name + " has no strongly typed networks; leave --strongly-typed out.", 2)
    if args.sparse and capability < (8, 0):
        raise Problem(f"This GPU ({sm}) has no sparse kernels, those from SM 8.0 on do. Leave --sparse out.", 2)
    if args.dla_core is not None:
        check_dla(name, version, capability, quantized, args)
    typed = version >= (11,) or args.strongly_typed
    flags = [] if typed else ["INT8"] * quantized + ["FP16"] * args.fp16
    return typed, flags + ["SPARSE_WEIGHTS"] * args.sparse + ["GPU_FALLBACK"] * (args.dla_core is not None)


def check_dla(
    name: str, version: "tuple[int, ...]", capability: "tuple[int, ...]", quantized: bool, args: argparse.Namespace
) -> None:
    """Refuse what no DLA can do (TensorRT documentation, "Working with DLA")."""
    if capability not in HAS_DLA:
        raise Problem("This GPU has no DLA beside it; a Xavier and an AGX Orin or Orin NX do. Leave --dla-core out.", 2)
    if (10, 7) < version < (11, 4):
        raise Problem(name + " has no DLA: 10.7 was the last before 11.4 (JetPack 7.2.2). Leave --dla-core out.", 2)
    if version < (11,) and quantized:
        raise Problem(
            f"The DLA of {name} takes no model with QuantizeLinear. Export the float model (--format onnx) and build that "
            "with --fp16 --dla-core.", 2
        )  # fmt: skip
    if version < (11,) and not args.fp16:
        raise Problem("The DLA computes float models in FP16 only. Add --fp16.", 2)


def find_onnx(named: "str | None", folder: str) -> str:
    """The file that was named, or the only .onnx in ``folder``."""
    if named:
        if not os.path.isfile(named):
            raise Problem(f"There is no file {named}. Check --onnx.", 2)
        return named
    found = sorted(glob.glob(os.path.join(folder, "*.onnx")))
    if len(found) != 1:
        names = ", ".join(os.path.basename(path) for path in found) or "none"
        raise Problem(f"Expected one .onnx in {folder}, found {names}. Name one with --onnx FILE.", 2)
    return found[0]


def read_reference(path: str) -> "dict[str, Any]":
    """``inputs [N, C, H, W]`` as the file takes them, the expected ``outputs [N, ...]``, and how far off is still right."""
    if not os.path.isfile(path):
        raise Problem(f"There is no {path}. Copy it from the export folder, or build unchecked with --no-check.", 2)
    with np.load(path, allow_pickle=False) as data:
        missing = [key for key in ("inputs", "outputs") if key not in data]
        if missing:
            raise Problem(path + " has no array '" + missing[0] + "'. Export again.", 2)
        limits = {key: float(data[key]) if key in data else usual for key, usual in USUAL_LIMITS.items()}
        return dict(limits, inputs=data["inputs"], outputs=data["outputs"])


def fields(message: Any) -> "Iterator[tuple[int, Any]]":
    """Number and value (an integer or a view of bytes) of each field of a protobuf message; stops at what is none."""
    if isinstance(message, int):
        return
    data, position = memoryview(message), 0

    def varint() -> int:
        nonlocal position
        result = shift = 0
        while True:
            byte = data[position]
            position += 1
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result

    try:
        while position < len(data):
            number, wire = divmod(varint(), 8)
            if wire == 0:
                yield number, varint()
            elif wire == 2:
                size = varint()
                yield number, data[position : position + size]
                position += size
            elif wire in (1, 5):
                position += 8 if wire == 1 else 4
            else:
                return
    except IndexError:
        return


def properties(data: bytes) -> "dict[str, str]":
    """The metadata of an ONNX file (ModelProto field 14): an engine keeps none of it, engine.json does."""
    found = {}
    for number, value in fields(data):
        if number == 14 and isinstance(value, memoryview):
            entry = {part: bytes(text) for part, text in fields(value) if isinstance(text, memoryview)}
            key, text = (entry.get(part, b"").decode("utf-8", "replace") for part in (1, 2))
            found[key] = text
    return found


def casts_to_half(data: bytes) -> bool:
    """Whether an ONNX file has a Cast to FP16: graph (7), nodes (1), operator (4), attributes (5), an integer (3) of 10."""
    for number, graph in fields(data):
        for kind, node in fields(graph) if number == 7 else ():
            parts = list(fields(node)) if kind == 1 else []
            if (4, b"Cast") in parts and any((3, 10) in fields(value) for part, value in parts if part == 5):
                return True
    return False


def holds_int4(data: bytes) -> bool:
    """Whether an ONNX file has an initialiser (5) of its graph (7) whose type (2) is INT4 (22)."""
    return any(
        (2, 22) in fields(tensor)
        for number, graph in fields(data)
        for kind, tensor in (fields(graph) if number == 7 else ())
        if kind == 5
    )


def compare(outputs: Any, expected: Any) -> "dict[str, Any]":
    """Relative L2 error over all outputs (None of class numbers), share of images with the same top-1 class, images."""
    if np.issubdtype(expected.dtype, np.integer):
        same = float((outputs.reshape(len(outputs), -1) == expected.reshape(len(expected), -1)).mean())
        return {"relative_error": None, "top1_agreement": same, "images": len(expected)}
    size = max(float(np.linalg.norm(expected)), 1e-12)
    error = float(np.linalg.norm(outputs.astype(np.float64) - expected)) / size
    same = float((outputs.reshape(len(outputs), -1).argmax(1) == expected.reshape(len(expected), -1).argmax(1)).mean())
    return {"relative_error": error, "top1_agreement": same, "images": len(expected)}


def summary(times_us: "Iterable[float]") -> "dict[str, float]":
    """Median, 90th and 99th percentile in microseconds, and the number of runs."""
    times = np.asarray(list(times_us), np.float64)
    median, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return {"median_us": median, "p90_us": p90, "p99_us": p99, "runs": len(times)}


def layer_precisions(information: str) -> "list[dict[str, str]]":
    """Name, type and ``input`` or ``input -> output`` precision of each layer, from the engine inspector's JSON."""
    try:
        layers = json.loads(information).get("Layers", [])
    except ValueError:
        return []
    table = []
    for found in layers:
        layer = found if isinstance(found, dict) else {"Name": str(found)}  # type: dict[str, Any]
        ends = [_datatype(layer.get(side) or []) for side in ("Inputs", "Outputs")]
        precision = " -> ".join(ends) if ends[0] != ends[1] else ends[0]
        table.append({"name": layer.get("Name", ""), "type": layer.get("LayerType", "unknown"), "precision": precision})
    return table


def _datatype(tensors: "list[dict[str, Any]]") -> str:
    # TensorRT 8 to 10 say "Format/Datatype": "Row major Int8 NCHW"; 11 split it in two.
    first = tensors[0] if tensors else {}
    text = " ".join(str(first.get(key, "")) for key in ("Format/Datatype", "Datatype", "DataType", "Format"))
    known = (("INT8", "int8"), ("FP8", "fp8"), ("INT4", "int4"), ("BF16", "bf16|bfloat16"), ("FP16", "fp16|half"))
    for name, pattern in (*known, ("FP32", "fp32|float"), ("INT32", "int32"), ("INT64", "int64")):
        if re.search(pattern, text, re.IGNORECASE):
            return name
    return "unknown"


def inspected(trt: Any, engine: Any) -> str:
    """What the engine inspector says, as JSON text; empty where this TensorRT has none."""
    if not hasattr(engine, "create_engine_inspector"):
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def power_state(devfreq: str = "/sys/class/devfreq") -> "dict[str, Any]":
    """nvpmodel's and jetson_clocks' words, and whether the GPU clock is locked (None: cannot be read)."""
    state = {"nvpmodel": _ask("nvpmodel", "-q"), "jetson_clocks": _ask("jetson_clocks", "--show")}  # type: dict[str, Any]
    state["gpu_clock_locked"] = None
    for folder in glob.glob(os.path.join(devfreq, "*.g[apv]*")):  # .gpu, .ga10b, .gv11b, .gp10b
        try:
            with open(os.path.join(folder, "min_freq")) as low, open(os.path.join(folder, "max_freq")) as high:
                state["gpu_clock_locked"] = low.read().strip() == high.read().strip()
        except OSError:
            continue
    return state


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "failed: " + str(error)
    return done.stdout.decode("utf-8", "replace").strip()


class Cuda:
    """The few calls of the CUDA runtime that are needed, through ctypes, so that no other package is."""

    def __init__(self, library: Any = None) -> None:
        self.library = library or _load_cuda()
        count = ctypes.c_int()
        if self.library.cudaGetDeviceCount(ctypes.byref(count)) != 0 or count.value == 0:
            raise Problem("CUDA sees no GPU. Run this on the device, as a user that may use its GPU.", 4)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise Problem(f"{name} failed with CUDA error {code}. Is the GPU free and its memory large enough?")

    def new(self, name: str, *arguments: Any) -> Any:
        """The handle or address that ``name`` creates."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    def copy(self, to: Any, source: Any, size_bytes: int, kind: int) -> None:
        """``kind`` 1: host to device, 2: device to host."""
        to, source = ctypes.c_void_p(to), ctypes.c_void_p(source)
        self.call("cudaMemcpy", to, source, ctypes.c_size_t(size_bytes), ctypes.c_int(kind))

    def elapsed_us(self, start: Any, end: Any) -> float:
        milliseconds = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return milliseconds.value * 1000.0

    def device(self) -> "tuple[str, tuple[int, ...]]":
        """Name and compute capability of GPU 0."""
        properties = ctypes.create_string_buffer(1 << 16)  # more than any version's struct, which starts with the name
        self.call("cudaGetDeviceProperties", properties, ctypes.c_int(0))
        numbers = []
        for attribute in (75, 76):  # cudaDevAttrComputeCapabilityMajor, Minor
            value = ctypes.c_int()
            self.call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(0))
            numbers.append(value.value)
        return properties.value.decode("utf-8", "replace"), tuple(numbers)


def numpy_type(datatype: Any) -> Any:
    """The numpy type of a ``tensorrt.DataType``."""
    name = str(getattr(datatype, "name", datatype))
    if name not in NUMPY_TYPES:
        raise Problem(
            "The engine has an input or output of type " + name + "; expected " + ", ".join(NUMPY_TYPES) + "."
        )
    return NUMPY_TYPES[name]


def _load_cuda() -> Any:
    names = [ctypes.util.find_library("cudart"), "libcudart.so"]
    names += ["libcudart.so." + number for number in ("13", "12", "11.0", "10.2")]
    for folder in ["/usr/local/cuda*/lib64"] + [os.path.join(path, "nvidia", "*", "lib") for path in sys.path]:
        names += sorted(glob.glob(os.path.join(folder, "libcudart.so*")))
    for name in names:
        try:
            if name:
                return ctypes.CDLL(name)
        except OSError:
            continue
    raise Problem("The CUDA runtime (libcudart.so) cannot be loaded. Add its folder to LD_LIBRARY_PATH.", 4)


class Session:
    """An engine with one input and one output, at a fixed batch size."""

    def __init__(self, trt: Any, engine: Any, cuda: Cuda, batch: int) -> None:
        self.cuda, self.stream, self.context = cuda, cuda.new("cudaStreamCreate"), engine.create_execution_context()
        if self.context is None:
            raise Problem("TensorRT made no execution context; its messages stand above. Is the GPU's memory free?")
        self.named = hasattr(engine, "num_io_tensors")  # TensorRT 8.5 replaced bindings by names, 10 removed bindings
        if self.named:
            keys = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
            is_input = [engine.get_tensor_mode(key) == trt.TensorIOMode.INPUT for key in keys]
            get_shape, set_shape = self.context.get_tensor_shape, self.context.set_input_shape
            get_type = engine.get_tensor_dtype
        else:
            keys = list(range(engine.num_bindings))
            is_input = [engine.binding_is_input(key) for key in keys]
            get_shape, set_shape = self.context.get_binding_shape, self.context.set_binding_shape
            get_type = engine.get_binding_dtype
        if sorted(is_input) != [False, True]:
            raise Problem(f"The engine has {len(keys)} inputs and outputs; expected one of each.")
        entry, result = keys[is_input.index(True)], keys[is_input.index(False)]
        declared = tuple(get_shape(entry))
        self.shape = tuple(batch if size == -1 else size for size in declared)
        if not set_shape(entry, self.shape) and -1 in declared:
            raise Problem(
                f"The engine takes no batch of {batch}; its messages stand above. Use --batch and --max-batch.", 2
            )
        self.images = np.zeros(self.shape, numpy_type(get_type(entry)))
        self.result = np.empty(tuple(get_shape(result)), numpy_type(get_type(result)))
        sizes = {entry: self.images.nbytes, result: self.result.nbytes}
        self.addresses = [cuda.new("cudaMalloc", ctypes.c_size_t(sizes[key])).value for key in keys]
        self.source, self.target = self.addresses[keys.index(entry)], self.addresses[keys.index(result)]
        if self.named:
            for key, address in zip(keys, self.addresses):  # noqa: B905
                self.context.set_tensor_address(key, address)

    def enqueue(self) -> None:
        if self.named:
            done = self.context.execute_async_v3(self.stream.value)
        else:
            done = self.context.execute_async_v2(self.addresses, self.stream.value)
        if done is False:
            raise Problem("TensorRT could not execute the engine; its messages stand above.")

    def run(self, images: Any) -> Any:
        """Outputs ``[N, ...]`` for ``images [N, C, H, W]``; the last batch is filled up with what was there before."""
        if images.shape[1:] != self.shape[1:]:
            raise Problem(f"The images are {images.shape[1:]}, the engine takes {self.shape[1:]}.", 2)
        results = []
        for start in range(0, len(images), self.shape[0]):
            part = images[start : start + self.shape[0]]
            self.images[: len(part)] = part
            self.cuda.copy(self.source, self.images.ctypes.data, self.images.nbytes, 1)
            self.enqueue()
            self.cuda.call("cudaStreamSynchronize", self.stream)
            self.cuda.copy(self.result.ctypes.data, self.target, self.result.nbytes, 2)
            results.append(self.result[: len(part)].copy())
        return np.concatenate(results)


def measure(session: Session, seconds: float, clock: "Callable[[], float]" = time.perf_counter) -> "dict[str, Any]":
    """Time one batch at a time without transfers: ``gpu`` between CUDA events, ``host`` until synchronised."""
    cuda, stream = session.cuda, session.stream
    start, end = cuda.new("cudaEventCreate"), cuda.new("cudaEventCreate")
    gpu, host = [], []  # type: list[float], list[float]
    begin = clock()
    while len(host) < 20 or clock() < begin + WARMUP_S + seconds:
        before = clock()
        cuda.call("cudaEventRecord", start, stream)
        session.enqueue()
        cuda.call("cudaEventRecord", end, stream)
        cuda.call("cudaStreamSynchronize", stream)
        after = clock()
        if after > begin + WARMUP_S:
            gpu.append(cuda.elapsed_us(start, end))
            host.append((after - before) * 1e6)
    return {"batch": session.shape[0], "warmup_s": WARMUP_S, "gpu": summary(gpu), "host": summary(host)}


def build_plan(trt: Any, data: bytes, typed: bool, flags: "list[str]", args: argparse.Namespace) -> bytes:
    """Parse and build; the serialised engine."""
    kinds = trt.NetworkDefinitionCreationFlag
    wanted = "STRONGLY_TYPED" if typed else "EXPLICIT_BATCH"  # a version without the flag always does what it says
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(getattr(kinds, wanted)) if hasattr(kinds, wanted) else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data):
        errors = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise Problem(f"TensorRT {trt.__version__} refuses the model: {errors}")
    config = configured(trt, builder, flags, args)
    add_profile(builder, network, config, args)
    cache = args.timing_cache and set_timing_cache(config, args.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Problem(
            f"TensorRT {trt.__version__} could not build an engine; the reason stands above. 'Could not find any "
            "implementation for node X' means that this GPU has no INT8 kernel for X: export again with X left float."
        )
    if cache:
        write(args.timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def configured(trt: Any, builder: Any, flags: "list[str]", args: argparse.Namespace) -> Any:
    """A builder configuration: memory, flags, inspector, DLA."""
    config = builder.create_builder_config()
    if hasattr(config, "set_memory_pool_limit"):  # since 8.4; 10 removed the other
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, args.workspace_mb << 20)
    else:
        config.max_workspace_size = args.workspace_mb << 20
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for flag in flags:
        if not hasattr(trt.BuilderFlag, flag):
            raise Problem(f"TensorRT {trt.__version__} has no builder flag {flag}. Leave the option out.", 2)
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if args.optimization_level is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise Problem("--optimization-level needs TensorRT 8.6 or later; leave it out.", 2)
        config.builder_optimization_level = args.optimization_level
    if args.dla_core is not None:
        cores = builder.num_DLA_cores
        if not 0 <= args.dla_core < cores:
            raise Problem(f"There is no DLA core {args.dla_core} here: this device has {cores}. Check --dla-core.", 2)
        config.default_device_type, config.DLA_core = trt.DeviceType.DLA, args.dla_core
    return config


def add_profile(builder: Any, network: Any, config: Any, args: argparse.Namespace) -> None:
    """The range of batch sizes, where the file leaves them open. A DLA takes one size only."""
    entry = network.get_input(0)
    if -1 not in tuple(entry.shape):
        return
    sizes = (1, args.batch, args.max_batch) if args.dla_core is None else (args.batch,) * 3
    profile = builder.create_optimization_profile()
    profile.set_shape(entry.name, *[tuple(size if free == -1 else free for free in entry.shape) for size in sizes])
    config.add_optimization_profile(profile)


def set_timing_cache(config: Any, path: str) -> bool:
    """Start from the kernels in ``path``, or from none where it was made by another TensorRT or GPU."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        data = b""
    for content in (data, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return True
    return False


def load_engine(trt: Any, plan: bytes, dla_core: "int | None" = None) -> Any:
    """A serialised engine, ready to make contexts; None where this TensorRT or GPU refuses it."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    if dla_core is not None:
        runtime.DLA_core = dla_core
    return runtime.deserialize_cuda_engine(plan)


def choose_for_file(
    version: "tuple[int, ...]", capability: "tuple[int, ...]", data: bytes, args: argparse.Namespace
) -> "tuple[bool, list[str]]":
    """`choose_flags` for an ONNX file, with what its FP16 layers and INT4 weights need of a weakly typed network."""
    if version < (11,) and not args.strongly_typed and casts_to_half(data):
        args.fp16 = True
    # Operator names are plain text in an ONNX file.
    typed, flags = choose_flags(version, capability, b"DequantizeLinear" in data, args)
    if version < (11,) and holds_int4(data):
        if version < (10,):
            raise Problem(f"TensorRT {version[0]} knows no INT4; 10 does. Export again with --max-opset 20.")
        flags += [] if typed else ["INT4"]
    return typed, flags


def build(args: argparse.Namespace, say: "Callable[[str], None]" = print) -> "dict[str, Any]":
    """Build, check, time, write; returns what engine.json holds."""
    trt, is_rtx = load_tensorrt()
    product = "TensorRT-RTX" if is_rtx else "TensorRT"
    path = find_onnx(args.onnx, os.path.dirname(os.path.abspath(__file__)))
    folder = args.out or os.path.dirname(os.path.abspath(path))
    args.timing_cache = args.timing_cache or os.path.join(folder, "timing.cache")
    if args.no_timing_cache or is_rtx:  # TensorRT-RTX compiles on the device and measures nothing
        args.timing_cache = None
    with open(path, "rb") as file:
        data = file.read()
    reference = None if args.no_check else read_reference(os.path.join(os.path.dirname(path), "reference.npz"))
    cuda = Cuda()
    gpu, capability = cuda.device()
    sm = f"{capability[0]}.{capability[1]}"
    version = (11, 0) if is_rtx else version_of(trt.__version__)  # TensorRT-RTX never had weak types
    typed, flags = choose_for_file(version, capability, data, args)
    precisions = "+".join(flags) or ("precisions of the file" if typed else "FP32")
    say(f"{product} {trt.__version__} on {gpu} ({sm}), {precisions}")
    if "FP16" not in flags and not typed:
        say("Float layers run in FP32. --fp16 is usually faster.")
    start = time.time()
    plan = build_plan(trt, data, typed, flags, args)
    record = {
        "schema_version": 1, "product": product, "tensorrt": trt.__version__, "gpu": gpu, "compute_capability": sm,
        "dla_core": args.dla_core, "onnx": os.path.basename(path), "onnx_sha256": hashlib.sha256(data).hexdigest(),
        "engine_sha256": hashlib.sha256(plan).hexdigest(), "size_bytes": len(plan), "strongly_typed": typed,
        "builder_flags": flags, "build_s": time.time() - start, "metadata": properties(data), "power": power_state(),
    }  # type: dict[str, Any]  # fmt: skip
    engine = load_engine(trt, plan, args.dla_core)
    if engine is None:
        raise Problem("The engine was built but cannot be loaded; the reason stands above.")
    information = inspected(trt, engine)
    record.update(examined(trt, engine, information, reference, cuda, args, say))
    if record["power"]["gpu_clock_locked"] is False:
        say("The GPU clock is not locked: for repeatable times run sudo jetson_clocks first.")
    text = (json.dumps(record, indent=1) + "\n").encode()
    if is_rtx:
        say("TensorRT-RTX accepts the model. Its engine is thrown away: pip install tensorrt builds one to keep.")
        write(os.path.join(folder, "check.json"), text)
        return record
    write(os.path.join(folder, "layers.json"), information.encode())
    write(os.path.join(folder, "model.engine"), plan)
    write(os.path.join(folder, "engine.json"), text)  # last: it vouches for the engine
    return record


def examined(
    trt: Any, engine: Any, information: str, reference: "dict[str, Any] | None", cuda: Cuda,
    args: argparse.Namespace, say: "Callable[[str], None]",
) -> "dict[str, Any]":  # fmt: skip
    """What an engine shows of itself: precision per layer, memory, distance to the reference, latency."""
    layers = layer_precisions(information)
    for layer in layers:
        say("  {precision:16s} {type:20s} {name}".format(**layer))
    session, check = Session(trt, engine, cuda, args.batch), None
    if reference is not None:
        check = compare(session.run(reference["inputs"]), reference["outputs"])
        require_right(check, reference, args, say)
    latency = measure(session, args.seconds)
    say("median {median_us:.1f} us, p90 {p90_us:.1f}, p99 {p99_us:.1f} on the GPU".format(**latency["gpu"]))
    memory = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", None)
    return {
        "batch": session.shape[0], "device_memory_bytes": memory, "check": check, "latency": latency,
        "precisions": dict(collections.Counter(row["precision"] for row in layers)), "layers": layers,
    }  # fmt: skip


def require_right(
    check: "dict[str, Any]", reference: "dict[str, Any]", args: argparse.Namespace, say: "Callable[[str], None]"
) -> None:
    """Say how near the outputs are, and refuse those that are too far: the command line's limits, else the reference's."""
    allowed, wanted = (
        reference[key] if given is None else given
        for key, given in (("max_error", args.max_error), ("min_agreement", args.min_agreement))
    )
    error, same = check["relative_error"], check["top1_agreement"]
    words = "" if error is None else f"error {error:.4f}, "
    say("{}top-1 agreement {:.4f} on {} images".format(words, same, check["images"]))
    if not ((error is None or error <= allowed) and same >= wanted):
        raise Problem(
            f"The outputs differ from reference.npz by more than --max-error {allowed:.3g} or agree on less "
            f"than --min-agreement {wanted:.3g}; no engine was written.", 3
        )  # fmt: skip


def write(path: str, data: bytes) -> None:
    """A whole file or nothing."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".part", "wb") as file:
            file.write(data)
        os.replace(path + ".part", path)
    except OSError as error:
        raise Problem(f"Cannot write {path}: {error.strerror}. Name another folder with --out.") from error


def main(arguments: "list[str] | None" = None) -> int:
    try:
        build(parse_arguments(arguments))
    except Problem as problem:
        print("error: " + str(problem), file=sys.stderr)
        return problem.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
