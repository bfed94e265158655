"""The few frozen types that everything speaks. No torch in here.

What is written to or read from a file is a `Document`: it carries ``schema_version`` and unknown keys are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from edgecompress.errors import UnknownNameError, UsageError

SCHEMA_VERSION = 1

Kind = Literal["conv", "depthwise", "grouped", "transposed", "linear"]
EdgeKind = Literal[
    "input", "output", "add", "multiply", "concat", "max_pool", "average_pool", "global_pool", "sigmoid",
    "hard_sigmoid", "hard_swish", "leaky_relu", "softmax"
]  # fmt: skip
Metric = Literal["flops", "params", "size", "bops", "latency"]
Source = Literal["measured", "interpolated", "estimated"]
Stage = Literal["prune", "quantize"]
Precision = Literal["fp32", "fp16", "int8"]
WeightScales = Literal["channel", "tensor"]
FLOAT_BITS = 32


class Frozen(BaseModel):
    """A value: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Document(Frozen):
    """The top of a JSON file. Another ``schema_version`` is refused when it is read (`files.read_document`)."""

    schema_version: int = SCHEMA_VERSION


class ChannelTerm(Frozen):
    """``per_channel`` channels of a layer exist for each channel of ``group`` (more than 1 behind a flatten)."""

    group: str
    per_channel: int = Field(ge=1)


class EdgeSpec(Frozen):
    """An operator without weights that a runtime runs as a kernel of its own: it costs time, and nothing else.

    ``channels`` are those that it writes (a concatenation writes all that it reads); ``terms`` say which groups they come
    from. ``input`` and ``output`` are the conversions at the ends of an integer network.
    """

    name: str
    kind: EdgeKind
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    input_hw: tuple[int, int] = (1, 1)
    output_hw: tuple[int, int] = (1, 1)
    terms: tuple[ChannelTerm, ...] = ()


class LayerSpec(Frozen):
    """One layer with weights, as it was traced. ``in_terms``/``out_terms`` say which groups its channels come from.

    ``macs`` are dense multiply-adds of one image, ``params`` elements of its weight and bias, ``*_hw`` are pixels.
    """

    name: str
    kind: Kind
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    input_hw: tuple[int, int] = (1, 1)
    output_hw: tuple[int, int] = (1, 1)
    macs: int
    params: int
    in_terms: tuple[ChannelTerm, ...] = ()
    out_terms: tuple[ChannelTerm, ...] = ()


class ChannelGroup(Frozen):
    """Channels that must be cut together. ``reason`` says why a group is not prunable, and is empty otherwise.

    ``members`` are the layers whose outputs it cuts; ``norm_params_per_channel`` counts the learned elements of
    normalisation layers that go with one channel. Where a grouped convolution or a GroupNorm is among them, one of ``width``
    stands for one channel in each of its groups, so that these stay equally wide.
    """

    id: str
    width: int
    members: tuple[str, ...]
    norm_params_per_channel: int = 0
    prunable: bool = True
    reason: str = ""


class Network(Document):
    """A traced network: what `layers.json` of a run holds."""

    model: str
    input_shape: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    groups: tuple[ChannelGroup, ...]
    fixed_params: int = 0
    edges: tuple[EdgeSpec, ...] = ()

    @property
    def prunable_groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for group in self.groups if group.prunable)

    @property
    def widths(self) -> dict[str, int]:
        """Original width of every group."""
        return {group.id: group.width for group in self.groups}


class LayerChoice(Frozen):
    """What will be built for one layer: the fraction of single weights kept, bits of its weights and of its input."""

    keep_elements: float = Field(default=1.0, gt=0, le=1)
    weight_bits: int = FLOAT_BITS
    activation_bits: int = FLOAT_BITS

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _are_known(cls, bits: int) -> int:
        if not 2 <= bits <= 8 and bits not in (16, FLOAT_BITS):
            raise ValueError(f"{bits} bits cannot be built; expected 2 to 8, or 16 or {FLOAT_BITS} for float")
        return bits


class CompressionPolicy(Document):
    """The only thing that passes between the stages: channels kept per group and a `LayerChoice` per layer."""

    model: str
    keep_channels: dict[str, int] = {}
    layers: dict[str, LayerChoice] = {}
    provenance: dict[str, str] = {}


class Target(Frozen):
    """A device and the runtime on it. Facts carry their sources in ``sources``; see the files in targets/.

    ``weight_scales``: whether its integer kernels take one step per output channel, or one for a layer's whole weight.
    """

    name: str
    aliases: tuple[str, ...] = ()
    device: str
    runtime: str
    runtime_version: str
    exporter: Literal["onnxruntime", "tensorrt"]
    dialect: Literal["ort", "trt"]
    max_opset: int
    integer_kernels: bool
    precision: Precision
    precisions: tuple[str, ...]
    channel_divisor: dict[str, int]
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    weight_scales: WeightScales = "channel"
    memory_mb: int
    power_modes: str = ""
    notes: str = ""
    facts: dict[str, str] = {}
    sources: str
    estimator: str = ""

    @property
    def divisor(self) -> int:
        """Channel divisor at the precision the target will run."""
        return self.channel_divisor[self.precision]

    @property
    def sparse_kernels(self) -> bool:
        """Whether its runtime is faster on weights of which two of four are zero: TensorRT on Ampere and later."""
        capability = self.facts.get("compute_capability", "").split(".")[0]
        return self.exporter == "tensorrt" and capability.isdigit() and int(capability) >= 8


_UNITS: dict[str, dict[str, float]] = {
    "flops": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9},
    "params": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9},
    "bops": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    "size": {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024, "mib": 1024**2},
    "latency": {"us": 1, "ms": 1e3, "s": 1e6},
}


class Budget(Frozen):
    """An upper limit on one metric, absolute (counts, bytes, microseconds) or relative to the original network."""

    metric: Metric
    limit: float = Field(gt=0)
    relative: bool
    precision: Precision | None = None

    def __str__(self) -> str:
        at = f"@{self.precision}" if self.precision else ""
        unit = "x" if self.relative else {"size": " B", "latency": " us"}.get(self.metric, "")
        return f"{self.metric}{at}={self.limit:g}{unit}"

    def absolute(self, original: float) -> float:
        """The limit in the metric's own unit, given the original network's value."""
        return self.limit * original if self.relative else self.limit


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Read ``"flops=0.5x,size=40KB,latency@int8=3ms"``.

    Raises:
        UsageError: a part does not parse, a metric is unknown or named twice, a relative limit is over 1.
    """
    budgets: list[Budget] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        budgets.append(_parse_budget(part))
    if not budgets:
        raise UsageError("The budget is empty; expected for example 'flops=0.5x,size=0.125x'.")
    names = [budget.metric for budget in budgets]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"The budget names '{name}' twice; give each metric one limit.")
    return tuple(budgets)


def _parse_budget(part: str) -> Budget:
    example = "expected METRIC=LIMIT such as 'flops=0.5x', 'size=40KB' or 'latency@int8=3ms'"
    match = re.fullmatch(r"(\w+)(?:@(\w+))?\s*=\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([a-zA-Z]*)", part)
    if match is None:
        raise UsageError(f"Budget '{part}' does not parse; {example}.")
    metric, precision, number, unit = match.groups()
    if metric not in get_args(Metric):
        raise UnknownNameError("budget metric", metric, get_args(Metric))
    if precision not in (None, *get_args(Precision)):
        raise UnknownNameError("precision", precision, get_args(Precision))
    if precision and metric != "latency":
        raise UsageError(f"Budget '{part}': only latency is measured at a precision; write '{metric}={number}{unit}'.")
    value = float(number)
    if value <= 0:
        raise UsageError(f"Budget '{part}' must be above zero; {example}.")
    if unit.lower() == "x":
        if value > 1:
            raise UsageError(f"Budget '{part}' is above the original network; a relative limit lies in (0, 1].")
        return Budget.model_validate({"metric": metric, "limit": value, "relative": True, "precision": precision})
    scale = _UNITS[metric].get(unit.lower())
    if scale is None:
        units = ", ".join(["x", *(name.upper() if metric != "latency" else name for name in _UNITS[metric] if name)])
        raise UsageError(f"Budget '{part}' has the unknown unit '{unit}'; known for {metric}: {units}.")
    return Budget.model_validate({"metric": metric, "limit": value * scale, "relative": False, "precision": precision})


class Cost(Frozen):
    """What a policy costs. Latency carries its bounds and how many kernels stand on which kind of evidence."""

    macs: int
    sparse_macs: int
    params: int
    nonzeros: int
    size_bytes: int
    bops: int
    latency_us: float | None = None
    latency_low_us: float | None = None
    latency_high_us: float | None = None
    kernels_measured: int = 0
    kernels_interpolated: int = 0
    kernels_estimated: int = 0

    def metric(self, name: Metric) -> float:
        """The value that a budget on ``name`` limits."""
        if name == "latency":
            if self.latency_us is None:
                raise UsageError("This cost has no latency: the target has neither a table nor an estimator.")
            return self.latency_us
        return float({"flops": self.macs, "params": self.params, "size": self.size_bytes, "bops": self.bops}[name])

    @property
    def latency_source(self) -> Source:
        """The weakest evidence that any kernel of this latency stands on."""
        if self.kernels_estimated:
            return "estimated"
        return "interpolated" if self.kernels_interpolated else "measured"


def weakest(sources: Iterable[Source]) -> Source:
    """The weakest evidence among these; there is at least one."""
    return max(sources, key=get_args(Source).index)


class Trial(Frozen):
    """One evaluated policy: a line of ``trials.jsonl``. ``choice`` are the integers that were built, in env order.

    An ``abandoned`` trial was measured on a part of the images only, and is never chosen. ``estimate`` is what the evaluator
    believed of the accuracy on other images; where it is given, the reward is of it.
    """

    stage: Stage
    episode: int
    arm: str
    choice: tuple[int, ...]
    accuracy: float
    loss: float
    reward: float
    cost: Cost
    abandoned: bool = False
    estimate: float | None = None

    @property
    def believed(self) -> float:
        """The estimate where there is one, else the accuracy."""
        return self.accuracy if self.estimate is None else self.estimate


class Preprocessing(Frozen):
    """How an image becomes the network's input: ``(pixel / 255 - mean) / std`` per channel, at ``size`` (H, W).

    The image is stretched to ``size``; with ``resize``, its shorter side is resized to that and ``size`` is cut out of the
    middle. ``resize`` and ``interpolation`` are written only where they are not the default.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Literal["RGB", "L"] = "RGB"
    resize: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def at(self, size: int) -> Preprocessing:
        """The same at ``size x size`` pixels; what is cut off at the edges stays the same share of the image."""
        resize = None if self.resize is None else round(self.resize * size / min(self.size))
        return self.model_copy(update={"size": (size, size), "resize": resize})

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        for name in ("resize", "interpolation"):
            if fields[name] == type(self).model_fields[name].default:
                del fields[name]
        return fields


class Artifact(Document):
    """An exported file with what a deployer must know; ``path`` is relative to the folder of ``export.json``.

    ``layer_bytes``: of every quantised layer the bytes of its weights in the file, and weights x bits / 8.
    """

    path: str
    format: str
    dialect: str
    sha256: str
    size_bytes: int
    policy_sha256: str
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    opset: int
    ir_version: int
    oldest_runtime: str = ""
    facts: dict[str, str] = {}
    preprocessing: Preprocessing | None = None
    checks: dict[str, str | float | int | bool] = {}
    layer_bytes: dict[str, tuple[int, int]] = {}


class Config(Document):
    """Everything that decides a run; written whole as ``config.json`` and compared when a run is resumed."""

    model: str = "resnet8"
    data: str = "digits"
    task: str = "classification"
    unlabelled: bool = False
    weights: str | None = None
    image_size: int | None = None
    preprocessing: str = "auto"
    trust: bool = False
    download: bool = False
    target: str = "jetson-orin-nano"
    budget: str
    max_accuracy_drop: float | None = None
    stages: tuple[Stage, ...] = Field(default=("prune", "quantize"), min_length=1)
    agent: str = "ddpg"
    pick: str | None = None
    episodes: int = Field(default=80, ge=8)
    seed: int = 0
    importance: str = "l2"
    reconstruct: bool = True
    single_weights: bool | None = None
    divisor: int | None = Field(default=None, ge=1)
    prune_reward: str = "accuracy-flops-latency"
    quantize_reward: str = "accuracy-bytes-latency"
    finetune_epochs: int = Field(default=12, ge=1)
    noise_epochs: int = Field(default=0, ge=0)
    two_four: bool = False
    ranges: str = "mse"
    equalise: bool = False
    bias_correction: bool = False
    learned_rounding: bool = False
    pin_bits: str = ""
    free_activations: bool = False
    alternate: int = Field(default=0, ge=0)
    reward_steps: int = Field(default=0, ge=0)
    qat_epochs: int = Field(default=5, ge=0)
    learning_rate: float = Field(default=0.02, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    train_precision: str = "auto"
    batch_size: int = Field(default=64, ge=2)
    table: str | None = None
    require_measured: bool = False
    allow_mismatch: bool = False
    threads: int = Field(default=2, ge=1)
    device: str = "auto"


class Architecture(Document):
    """How `model.safetensors` is rebuilt: ``model`` by name (or the user's factory), then cut to ``keep_channels``.

    A ``fixed_graph`` came as a ``.onnx`` or ``.pt2`` file: then `graph.onnx` itself is the network.
    """

    model: str
    fixed_graph: bool = False
    classes: int
    input_shape: tuple[int, ...]
    keep_channels: dict[str, int]
    preprocessing: Preprocessing
