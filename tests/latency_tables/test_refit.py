"""Rows that are added for another network leave the corrections of the earlier ones right."""

import pytest
from sample_tables import row, write_table

from edgecompress.cost import Kernel, kernels
from edgecompress.files import append_line
from edgecompress.latency_tables.correct import network_id
from edgecompress.latency_tables.points import kernel_points
from edgecompress.latency_tables.predict import table_model
from edgecompress.latency_tables.profile import ProfileOptions, fit_and_check
from edgecompress.latency_tables.table import KernelKey, append_row, kernel_key, read_table
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.latency_tables.whole import NetworkRow, networks_file, policy_at
from edgecompress.spec import ChannelGroup, ChannelTerm, LayerSpec, Network

X86 = target_by_name("x86")
KEEPS = [{"a": width, "b": other} for width in (16, 24, 32, 48, 64) for other in (16, 40, 64)]


def layer(name, inputs, outputs, in_group, out_group):
    terms = [(ChannelTerm(group=g, per_channel=1),) if g else () for g in (in_group, out_group)]
    return LayerSpec(
        name=name, kind="conv", in_channels=inputs, out_channels=outputs, kernel=(3, 3), input_hw=(8, 8), output_hw=(8, 8),
        macs=inputs * outputs * 9 * 64, params=1, in_terms=terms[0], out_terms=terms[1],
    )  # fmt: skip


def network(*layers):
    groups = (ChannelGroup(id="a", width=64, members=("a",)), ChannelGroup(id="b", width=64, members=("b",)))
    return Network(model="m-1", input_shape=(3, 8, 8), layers=layers, groups=groups)


FIRST = network(layer("a", 3, 64, "", "a"), layer("b", 64, 64, "a", "b"), layer("c", 64, 64, "b", "b"))
SECOND = network(layer("a", 3, 64, "", "a"), layer("b", 64, 64, "a", "b"))


def us(key: KernelKey, factor: float) -> float:
    return 3 + factor * key.in_channels * key.out_channels / 100


def test_corrections_follow_the_rows(tmp_path):
    points = kernel_points(FIRST, X86.divisor, ("int8",))
    table = write_table(tmp_path / "t.csv", [row(key, us(key, 1.0)) for key in points])
    for keep in KEEPS:
        built = kernels(FIRST, policy_at(FIRST, keep, "int8"))
        whole = 1.2 * sum(us(kernel_key(kernel, "int8"), 1.0) for kernel in built) + 40
        append_line(
            networks_file(table.path),
            NetworkRow(
                network=network_id(built), dtype="int8", keep_channels=keep, median_us=whole, p10_us=whole, p90_us=whole,
                n_runs=9, measured_at="2026-01-01",
            ),
        )  # fmt: skip
    options = ProfileOptions(precisions=("int8",), networks=len(KEEPS) - 2)
    checks = fit_and_check(FIRST, X86, table, KEEPS, options)
    assert len(checks) == 2 and all(abs(check.error) < 0.03 for check in checks)

    # The same kernels, measured again for another network, come out dearer than they did.
    table = read_table(table.path)
    for key in points:
        append_row(table, row(key, us(key, 1.5)))
    fit_and_check(SECOND, X86, read_table(table.path), [], options)
    after = read_table(table.path)
    assert set(after.provenance.networks) == {
        network_id(kernels(known, policy_at(known, {}, "int8"))) for known in (FIRST, SECOND)
    }
    built: tuple[Kernel, ...] = kernels(FIRST, policy_at(FIRST, KEEPS[7], "int8"))
    expected = 1.2 * sum(us(kernel_key(kernel, "int8"), 1.0) for kernel in built) + 40
    assert table_model(after, X86)(built).us == pytest.approx(expected, rel=0.05)
