"""Small tables for the tests of this folder."""

from pathlib import Path

from edgecompress.latency_tables.table import KernelKey, Provenance, Row, Setting, append_row, open_table, read_table

SETTING = Setting(
    device="test-cpu", runtime="ONNX Runtime", runtime_version="1.32.0", provider="CPUExecutionProvider", threads=1
)


def conv_key(in_channels: int, out_channels: int, dtype: str = "int8") -> KernelKey:
    return KernelKey("conv", in_channels, out_channels, 3, 3, 1, 1, 1, 14, 14, 14, 14, dtype, dtype)


def row(key: KernelKey, us: float, status: str = "ok") -> Row:
    return Row(key, us, 0.1, us * 0.9, us * 1.2, 50, "node_time", "QLinearConv", status, "2026-01-01T00:00:00+00:00")


def write_table(path: Path, rows: list[Row], setting: Setting = SETTING, target: str = "x86"):
    provenance = Provenance(
        target=target, setting=setting, machine={"cpu": "Test CPU"}, edgecompress_version="0", created_at="2026-01-01"
    )
    table = open_table(path, provenance)
    for item in rows:
        append_row(table, item)
    return read_table(path)
