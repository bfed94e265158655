"""From a measured table to one network's latency. Every kernel was measured, or is interpolated, or estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgecompress.cost import Kernel, Latency, LatencyModel
from edgecompress.errors import BadFileError, MissingBackendError
from edgecompress.files import cache_folder
from edgecompress.latency_tables.estimate import estimator_for
from edgecompress.latency_tables.table import (
    OTHER,
    KernelKey,
    Provenance,
    Row,
    Setting,
    Table,
    kernel_key,
    mismatch,
    read_table,
    refuse_mismatch,
    sidecar,
)
from edgecompress.latency_tables.targets import is_this_machine, running_precision
from edgecompress.spec import Source, Target


@dataclass(frozen=True)
class Value:
    """Microseconds of one kernel with bounds, and the evidence they stand on."""

    us: float
    low_us: float
    high_us: float
    source: Source


@dataclass(frozen=True)
class TableModel:
    """A `LatencyModel` over one table: the sum of the kernels, and what the network spends outside of them.

    A kernel is measured (its row is there), interpolated (its family has rows with fewer and with more channels; the
    bounds are those rows), or estimated (scaled by MACs from rows of its kind; the bounds are their spread). Build it
    with `table_model`.
    """

    target: Target
    rows: Mapping[KernelKey, Row]
    families: Mapping[tuple[object, ...], tuple[Row, ...]]
    kinds: Mapping[tuple[str, str], tuple[Row, ...]]
    others: Mapping[tuple[object, ...], tuple[Row, ...]]
    _answers: dict[tuple[object, ...], Value] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, kernels: Sequence[Kernel]) -> Latency:
        """Predict one image's latency.

        Raises:
            BadFileError: the table holds nothing that such a kernel could be predicted from.
        """
        counts: dict[Source, int] = {"measured": 0, "interpolated": 0, "estimated": 0}
        us = low = high = 0.0
        for kernel in kernels:
            value = self.kernel(kernel)
            us, low, high = us + value.us, low + value.low_us, high + value.high_us
            counts[value.source] += 1
        # The rest may be below zero (see `KernelKey`), but never takes more than half of the kernels away.
        other = max(self.other_us(kernels) or 0.0, -low / 2)
        return Latency(us=us + other, low_us=low + other, high_us=high + other, counts=counts)

    def kernel(self, kernel: Kernel) -> Value:
        """Predict one kernel. Answers are kept: asked again, it is one dictionary lookup."""
        layer = kernel.layer
        asked = (
            kernel.in_channels, kernel.out_channels, kernel.weight_bits, kernel.activation_bits, layer.kind,
            layer.kernel, layer.stride, layer.groups, layer.input_hw, layer.output_hw,
        )  # fmt: skip
        value = self._answers.get(asked)
        if value is None:
            value = self._answers[asked] = self.predict(kernel_key(kernel, running_precision(kernel, self.target)))
        return value

    def predict(self, key: KernelKey) -> Value:
        """Predict the kernel ``key`` from the best evidence there is."""
        row = self.rows.get(key)
        if row is not None:
            return Value(row.median_us, min(row.p10_us, row.median_us), max(row.p90_us, row.median_us), "measured")
        return _interpolated(key, self.families.get(key.family, ())) or _estimated(key, self._of_kind(key))

    def _of_kind(self, key: KernelKey) -> tuple[Row, ...]:
        same = self.kinds.get((key.kind, key.weight_dtype))
        if same:
            return same
        found = tuple(row for (_, dtype), rows in self.kinds.items() if dtype == key.weight_dtype for row in rows)
        if not found:
            raise BadFileError(
                f"The latency table holds no {key.weight_dtype} kernel to predict {key.kind} {key.in_channels} -> "
                f"{key.out_channels} from. Profile this network with --precision {key.weight_dtype}."
            )
        return found

    def other_us(self, kernels: Sequence[Kernel]) -> float | None:
        """Time outside of the layers' kernels: a line over the elements that the layers put out, through the rows of
        such a network. None where the table has no such row."""
        integer = any(running_precision(kernel, self.target) == "int8" for kernel in kernels)
        asked = other_key(kernels, "int8" if integer else "fp32")
        rows = self.others.get(_network_of(asked))
        if not rows:
            return None
        first, last = rows[0], rows[-1]
        if first is last:
            return first.median_us
        slope = (last.median_us - first.median_us) / (last.key.out_channels - first.key.out_channels)
        return first.median_us + slope * (asked.out_channels - first.key.out_channels)


def table_model(table: Table, target: Target) -> TableModel:
    """Index the usable rows of ``table``.

    Raises:
        BadFileError: there is no usable row.
    """
    rows = table.usable
    if not any(key.kind != OTHER for key in rows):
        raise BadFileError(
            f"The latency table {table.path} holds no measured kernel. Go on with 'edgecompress profile'."
        )
    families: dict[tuple[object, ...], list[Row]] = {}
    kinds: dict[tuple[str, str], list[Row]] = {}
    others: dict[tuple[object, ...], list[Row]] = {}
    for key, row in sorted(rows.items()):
        if key.kind == OTHER:
            others.setdefault(_network_of(key), []).append(row)
        else:
            families.setdefault(key.family, []).append(row)
            kinds.setdefault((key.kind, key.weight_dtype), []).append(row)
    return TableModel(
        target, rows, {k: tuple(v) for k, v in families.items()}, {k: tuple(v) for k, v in kinds.items()},
        {k: tuple(v) for k, v in others.items()},
    )  # fmt: skip


def other_key(kernels: Sequence[Kernel], dtype: str) -> KernelKey:
    """The key of what a network of these kernels spends outside of them (see `KernelKey`)."""
    elements = sum(k.out_channels * k.layer.output_hw[0] * k.layer.output_hw[1] for k in kernels)
    in_h, in_w = kernels[0].layer.input_hw
    return KernelKey(OTHER, len(kernels), elements, 1, 1, 1, 1, 1, in_h, in_w, 1, 1, dtype, dtype)


def _network_of(key: KernelKey) -> tuple[object, ...]:
    return (key.in_channels, key.in_h, key.in_w, key.weight_dtype)


def _interpolated(key: KernelKey, family: Sequence[Row]) -> Value | None:
    """A line over MACs between the largest row with fewer and the smallest with more channels on both sides.

    The rows lie on the target's channel grid, where time grows with width; one that a noisy machine turned over gives
    the mean of the two.
    """
    fewer = [r for r in family if r.key.in_channels <= key.in_channels and r.key.out_channels <= key.out_channels]
    more = [r for r in family if r.key.in_channels >= key.in_channels and r.key.out_channels >= key.out_channels]
    if not fewer or not more:
        return None
    below = max(fewer, key=lambda row: row.key.macs)
    above = min(more, key=lambda row: row.key.macs)
    low, high = sorted((below.median_us, above.median_us))
    share = (key.macs - below.key.macs) / max(above.key.macs - below.key.macs, 1)
    us = (
        below.median_us + share * (above.median_us - below.median_us)
        if below.median_us <= above.median_us
        else (low + high) / 2
    )
    return Value(us, low, high, "interpolated")


def _estimated(key: KernelKey, rows: Sequence[Row]) -> Value:
    """Microseconds per MAC of the row nearest in MACs; the bounds are the 10 % and 90 % points of all those rates."""
    rates = [row.median_us / row.key.macs for row in rows]
    nearest = min(rows, key=lambda row: abs(np.log(row.key.macs / key.macs)))
    us = nearest.median_us / nearest.key.macs * key.macs
    low, high = (float(rate) * key.macs for rate in np.percentile(rates, (10, 90)))
    return Value(us, min(low, us), max(high, us), "estimated")


def tables_folder() -> Path:
    """Where `edgecompress profile` keeps tables unless it is told otherwise."""
    return cache_folder() / "tables"


def table_path(target: Target, setting: Setting, folder: Path | None = None) -> Path:
    """The file of ``target``'s table in this setting; runtime versions and thread counts have their own."""
    runtime = setting.runtime.lower().replace(" ", "")
    name = f"{target.name}--{setting.device}--{runtime}-{setting.runtime_version}--t{setting.threads}.csv"
    return (folder or tables_folder()) / name


def find_table(
    target: Target, tables: Path | None = None, *, threads: int = 1, allow_mismatch: bool = False
) -> Table | None:
    """The table of ``target``: the file ``tables``, or one in the folder ``tables`` (by default the cache).

    A file that was named is taken or refused; ``allow_mismatch`` takes it although it is of another setting. In a
    folder, only a table of this very device and runtime counts for the
    machine that this program runs on; for another device, the newest of its tables.

    Raises:
        BadFileError: the named file is missing, broken, of another target or setting.
    """
    here = _setting_here(threads) if is_this_machine(target) else None
    if tables is not None and not tables.is_dir():
        table = read_table(tables)
        if not allow_mismatch:
            refuse_mismatch(tables, table.provenance.setting, _expected(table.provenance.setting, target, threads))
        if table.provenance.target != target.name:
            raise BadFileError(
                f"The latency table {tables} is of target '{table.provenance.target}', not '{target.name}'."
            )
        return table
    folder = tables if tables is not None else tables_folder()
    if here is not None:
        path = table_path(target, here, folder)
        return read_table(path, here) if path.exists() else None
    found = [p for p in sorted(folder.glob(f"{target.name}--*--t{threads}.csv")) if sidecar(p).exists()]
    newest = sorted((read_table(path) for path in found), key=lambda table: table.provenance.created_at)
    return newest[-1] if newest else None


def _expected(found: Setting, target: Target, threads: int) -> Setting:
    """What a run of ``target`` takes for granted of a table: on this machine all, elsewhere the runtime and threads."""
    here = _setting_here(threads) if is_this_machine(target) else None
    return here or found.model_copy(update={"runtime": target.runtime, "threads": threads})


def _setting_here(threads: int) -> Setting | None:
    from edgecompress.latency_tables.measure import this_setting

    try:
        return this_setting(threads)
    except MissingBackendError:
        return None


def latency_model(
    target: Target,
    *,
    tables: Path | None = None,
    threads: int = 1,
    require_measured: bool = False,
    allow_mismatch: bool = False,
) -> tuple[LatencyModel, str]:
    """The best latency model there is for ``target``, and a sentence that says what it stands on.

    Args:
        tables: a table or a folder of tables; by default the cache.
        require_measured: refuse to estimate.
        allow_mismatch: take a table file that was named although it was measured in another setting.

    Raises:
        MissingBackendError: ``require_measured``, and there is no table.
        BadFileError: a table is broken or belongs to another setting.
    """
    table = find_table(target, tables, threads=threads, allow_mismatch=allow_mismatch)
    if table is not None and table.usable:
        found = table.provenance.setting
        differs = mismatch(found, _expected(found, target, threads))
        warning = f"; NOT this run's setting: {differs}" if differs else ""
        return table_model(table, target), describe(table.provenance, len(table.usable)) + warning
    if require_measured:
        raise MissingBackendError(
            f"There is no latency table for '{target.name}' on this device and runtime. Run 'edgecompress profile "
            f"--target {target.name}' on it and name the file, or accept an estimate."
        )
    estimator = estimator_for(target)
    return estimator, estimator.description


def describe(provenance: Provenance, rows: int) -> str:
    """One sentence on a measured table."""
    setting = provenance.setting
    threads = "1 thread" if setting.threads == 1 else f"{setting.threads} threads"
    return (
        f"measured on {provenance.machine.get('cpu', setting.device)} with {setting.runtime} "
        f"{setting.runtime_version}, {threads}, {rows} rows, begun {provenance.created_at[:10]}"
    )
