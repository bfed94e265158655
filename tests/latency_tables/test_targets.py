"""Target files: facts load, aliases work, wrong files are refused; what really runs at which bits."""

import pytest

from edgecompress.cost import Kernel
from edgecompress.errors import BadFileError, UnknownNameError
from edgecompress.latency_tables.targets import all_targets, read_target, running_precision, target_by_name
from edgecompress.spec import LayerSpec

LAYER = LayerSpec(name="a", kind="conv", in_channels=8, out_channels=8, macs=64, params=64)
WANTED = (
    "jetson-agx-orin", "jetson-nano", "jetson-orin-nano", "jetson-xavier-nx", "raspberry-pi-4", "raspberry-pi-5", "x86-avx2", "x86",
)  # fmt: skip


def kernel(weight_bits, activation_bits):
    return Kernel(layer=LAYER, in_channels=8, out_channels=8, weight_bits=weight_bits, activation_bits=activation_bits)


def test_shipped_targets_have_names_divisors_and_sources():
    targets = all_targets()
    assert tuple(targets) == WANTED
    for name, target in targets.items():
        assert target.name == name and target.sources and target.estimator
        assert target.divisor == target.channel_divisor[target.precision] >= 1


def test_alias_gives_the_orin_nano_with_its_facts():
    target = target_by_name("jetson")
    assert target is target_by_name("jetson-orin-nano")
    assert (target.dialect, target.precision, target.channel_divisor["int8"], target.max_opset) == (
        "trt",
        "int8",
        32,
        20,
    )
    assert target.facts["compute_capability"] == "8.7"


def test_no_alias_is_given_twice():
    names = [name for target in all_targets().values() for name in (target.name, *target.aliases)]
    assert len(names) == len(set(names))


def test_unknown_target_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'jetson-nano'"):
        target_by_name("jetson-nan")


def test_unknown_key_and_missing_divisor_are_refused():
    good = (
        'name="t"\ndevice="d"\nruntime="r"\nruntime_version="1"\nexporter="onnxruntime"\ndialect="ort"\nmax_opset=17\n'
    )
    good += 'integer_kernels=true\nprecision="int8"\nprecisions=["fp32","int8"]\nmemory_mb=1\nsources="s"\n'
    divisors = "channel_divisor={fp32=4,int8=8}\n"
    assert read_target(good + divisors, "t.toml").divisor == 8
    assert read_target(good + divisors, "t.toml").weight_scales == "channel"
    assert read_target(good + divisors + 'weight_scales="tensor"\n', "t.toml").weight_scales == "tensor"
    with pytest.raises(BadFileError, match=r"t\.toml is wrong at 'weight_scales'.*'channel' or 'tensor'"):
        read_target(good + divisors + 'weight_scales="layer"\n', "t.toml")
    with pytest.raises(BadFileError, match=r"t\.toml is wrong at 'colour'"):
        read_target(good + divisors + 'colour="red"\n', "t.toml")
    with pytest.raises(BadFileError, match="must give a channel_divisor for each"):
        read_target(good + "channel_divisor={fp32=4}\n", "t.toml")
    with pytest.raises(BadFileError, match="no TOML"):
        read_target("name=", "t.toml")


@pytest.mark.parametrize(
    ("target", "bits", "runs"),
    [
        ("x86", (8, 8), "int8"),
        ("x86", (2, 4), "int8"),
        ("x86", (32, 32), "fp32"),
        ("x86", (4, 32), "fp32"),
        ("x86", (16, 16), "fp32"),
        ("jetson", (16, 16), "fp16"),
        ("jetson-nano", (4, 4), "fp16"),
    ],
)
def test_running_precision_is_the_kernel_that_exists(target, bits, runs):
    assert running_precision(kernel(*bits), target_by_name(target)) == runs
