"""Which public measurements each estimator is fitted to, and what is scaled to what. Read by ``fit_estimators``.

All groups of one pool are fitted together: ``us = offset + floor + slope * MMACs``. Groups that name the same floor
share it (launching kernels costs the same at any precision); an ``offset`` belongs to one family of networks on one
device (YOLOs at 640x640 move far more activations per MAC than a classifier, and their times hold more than kernels).
The target then takes ``floor * floor_factor + slope * slope_factor * MMACs``, without any offset.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Rows of ``public_latencies.csv`` with one device, runtime and precision, and the parameters that describe them.

    ``condition`` must be a part of the row's ``conditions``.
    """

    device: str
    runtime: str
    precision: str
    floor: str
    slope: str
    offset: str = ""
    condition: str = ""


@dataclass(frozen=True)
class Recipe:
    """How one (target class, precision) comes out of a pool.

    ``evidence`` names the slopes whose groups tell the error. ``check`` names the experiment that bounds the error of
    the factors (`fit_estimators.scale_errors`). ``ratio`` carries the proportion of two other slopes over to ``slope``.
    ``launches`` is False on a CPU, where a network smaller than any measured one costs in proportion.
    """

    pool: tuple[Group, ...]
    floor: str
    slope: str
    evidence: tuple[str, ...]
    why: str = "rows of the device itself"
    floor_factor: float = 1.0
    slope_factor: float = 1.0
    check: str = "none"
    ratio: tuple[str, str] | None = None
    launches: bool = True


# Clocks and core counts: targets.csv. GPU cores x MHz where two devices differ in both.
_SUPER_TO_ORIN_NANO = 1020 / 625
_AGX_XAVIER_TO_XAVIER_NX = (512 * 1377) / (384 * 1100)
_TX2_TO_XAVIER_NX = (256 * 1300) / (384 * 1100)
# Medians of ResNet-50 int8 in MLPerf Inference 3.1, SingleStream: AGX Orin over Orin NX.
_ORIN_NX_TO_AGX_ORIN = 0.6362 / 1.0785

_T2T, _MLPERF = "TensorRT via torch2trt", "TensorRT (MLPerf LoadGen)"
_PRECISIONS = ("fp32", "fp16", "int8")
_JETSONS = (
    *(Group("JetsonOrinNanoSuper", "TensorRT", p, "jetson", f"super {p}", f"yolo super {p}") for p in _PRECISIONS),
    *(Group("JetsonOrinNX16GB", "TensorRT", p, "jetson", f"orin nx {p}", f"yolo orin nx {p}") for p in _PRECISIONS),
    Group("JetsonOrinNanoSuper", "TensorRT trtexec", "int8", "jetson", "super int8", "yolo super int8"),
    Group("JetsonOrinNX16GB", _MLPERF, "int8", "jetson", "orin nx int8"),
    Group("JetsonXavierNX", _MLPERF, "int8", "jetson", "xavier nx int8"),
    Group("JetsonAGXXavier", _T2T, "fp16", "jetson", "agx xavier fp16"),
    Group("JetsonTX2-maxn", "TensorRT", "fp16", "jetson", "tx2 fp16"),
    Group("JetsonTX2-maxn", "TensorRT", "fp32", "jetson", "tx2 fp32"),
    Group("JetsonNano", _T2T, "fp16", "nano", "nano fp16"),
)
_FLOOR = (
    "floor shared by all Jetsons but the Nano; the spread over networks is the one of AGX Xavier and its 21 networks"
)


def _orin_nano(precision: str) -> Recipe:
    return Recipe(
        _JETSONS, "jetson", f"super {precision}", (f"super {precision}", "agx xavier fp16"),
        f"rate of the Orin Nano Super times its GPU clock over this one's, 1020 / 625 MHz (floor too); {_FLOOR}",
        _SUPER_TO_ORIN_NANO, _SUPER_TO_ORIN_NANO, "clock",
    )  # fmt: skip


def _agx_orin(precision: str) -> Recipe:
    carried = "" if precision == "int8" else ", carried over to this precision"
    return Recipe(
        _JETSONS, "jetson", f"orin nx {precision}", (f"orin nx {precision}", "agx xavier fp16"),
        f"Orin NX times the ratio of both in MLPerf 3.1 (ResNet-50 int8: 0.6362 / 1.0785 ms){carried}; {_FLOOR}",
        _ORIN_NX_TO_AGX_ORIN, _ORIN_NX_TO_AGX_ORIN, "none" if precision == "int8" else "device",
    )  # fmt: skip


def _pi(device: str, precision: str) -> Recipe:
    name = f"{device} {precision}"
    public = "fp32/fp16 auto" if precision == "fp32" else precision
    return Recipe(
        (Group(device, "ncnn CPU", public, name, name, condition="threads=1 "),), name, name, (name,),
        "ncnn at 1 thread stands in for ONNX Runtime: nobody publishes ONNX Runtime at 1 thread on this board; the "
        "scale error is how much slower ONNX Runtime was than ncnn on a Raspberry Pi 5 (two YOLO11, all cores)",
        check="ort over ncnn", launches=False,
    )  # fmt: skip


RECIPES: dict[str, dict[str, Recipe]] = {
    "jetson-orin-nano": {precision: _orin_nano(precision) for precision in _PRECISIONS},
    "jetson-agx-orin": {precision: _agx_orin(precision) for precision in _PRECISIONS},
    "jetson-xavier-nx": {
        "fp32": Recipe(
            _JETSONS, "jetson", "tx2 fp32", ("tx2 fp32", "agx xavier fp16"), f"TX2, cores x clock; {_FLOOR}",
            slope_factor=_TX2_TO_XAVIER_NX, check="device",
        ),
        "fp16": Recipe(
            _JETSONS, "jetson", "agx xavier fp16", ("agx xavier fp16",), f"AGX Xavier, cores x clock; {_FLOOR}",
            slope_factor=_AGX_XAVIER_TO_XAVIER_NX, check="device",
        ),
        "int8": Recipe(
            _JETSONS, "jetson", "xavier nx int8", ("xavier nx int8", "agx xavier fp16"),
            f"two MLPerf networks of the device itself give the rate; {_FLOOR}",
        ),
    },
    "jetson-nano": {
        "fp16": Recipe(_JETSONS, "nano", "nano fp16", ("nano fp16",)),
        "fp32": Recipe(
            _JETSONS, "nano", "nano fp16", ("nano fp16", "tx2 fp32"),
            "fp16 times the ratio of fp32 to fp16 on a TX2",
            check="device", ratio=("tx2 fp32", "tx2 fp16"),
        ),
    },
    "raspberry-pi-5": {precision: _pi("RaspberryPi5", precision) for precision in ("fp32", "int8")},
    "raspberry-pi-4": {precision: _pi("RaspberryPi4B", precision) for precision in ("fp32", "int8")},
}  # fmt: skip
