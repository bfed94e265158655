"""From a measured table to one network's latency. Every kernel was measured, or is interpolated, or estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np

from edgecompress.cost import Edge, Kernel, Latency, LatencyModel
from edgecompress.errors import BadFileError, MissingBackendError
from edgecompress.files import cache_folder
from edgecompress.latency_tables.correct import Correction, class_of, network_id
from edgecompress.latency_tables.estimate import estimator_for
from edgecompress.latency_tables.interpolate import Family, family_of
from edgecompress.latency_tables.table import (
    EDGES,
    KernelKey,
    Provenance,
    Row,
    Setting,
    Table,
    edge_key,
    kernel_key,
    mismatch,
    read_table,
    refuse_mismatch,
    sidecar,
    weight_bytes,
)
from edgecompress.latency_tables.targets import is_this_machine, running_precision
from edgecompress.spec import Source, Target

SIGMAS = 1.645  # of the correction's spread: the bounds hold nine networks of ten


@dataclass(frozen=True)
class Value:
    """Microseconds of one kernel with bounds, and the evidence they stand on."""

    us: float
    low_us: float
    high_us: float
    source: Source


@dataclass(frozen=True)
class TableModel:
    """A `LatencyModel` over one table: the sum of its rows, corrected by what whole networks were seen to take.

    A kernel is measured (its row is there), interpolated (its family has rows around it), or estimated (its family's
    rows lie on one side, or only its kind has any). Build it with `table_model`.
    """

    target: Target
    rows: Mapping[KernelKey, Row]
    families: Mapping[tuple[object, ...], tuple[Row, ...]]
    kinds: Mapping[tuple[str, str], tuple[Row, ...]]
    corrections: Mapping[tuple[str, str], Correction] = field(default_factory=dict)
    _answers: dict[object, Value] = field(default_factory=dict, compare=False, repr=False)
    _cold: dict[object, tuple[int, float]] = field(default_factory=dict, compare=False, repr=False)
    _families: dict[object, Family | None] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, kernels: Sequence[Kernel], edges: Sequence[Edge] = ()) -> Latency:
        """Predict one image's latency.

        Raises:
            BadFileError: the table holds nothing that such a kernel could be predicted from.
        """
        dtype = self.dtype_of(kernels)
        values = [self.kernel(kernel) for kernel in kernels]
        between = [self.edge(edge, dtype) for edge in edges]
        counts: dict[Source, int] = {"measured": 0, "interpolated": 0, "estimated": 0}
        for value in (*values, *between):
            counts[value.source] += 1
        parts = tuple((value.us, value.source) for value in values)
        correction = self.corrections.get((network_id(kernels), dtype))
        if correction is None:
            everything = (*values, *between)
            us, low, high = (sum(getattr(v, name) for v in everything) for name in ("us", "low_us", "high_us"))
            return Latency(us=us, low_us=low, high_us=high, counts=counts, kernels=parts)
        sums = _by_class(kernels, values, between) | {"cold": self.cold_us(kernels, dtype)}
        us = max(correction(sums, self.weight_bytes(kernels, dtype)), 0.0)
        reach = min(SIGMAS * max(correction.spread, 0.005), 0.9)
        return Latency(us=us, low_us=us * (1 - reach), high_us=us * (1 + reach), counts=counts, kernels=parts)

    def dtype_of(self, kernels: Sequence[Kernel]) -> str:
        """The precision of the network as a whole: one integer layer makes it an integer network."""
        found = {running_precision(kernel, self.target) for kernel in kernels}
        return next((name for name in ("int8", "fp16") if name in found), "fp32")

    def sums(self, kernels: Sequence[Kernel], edges: Sequence[Edge]) -> dict[str, float]:
        """Microseconds of the rows by class of kernel: what a correction is fitted to."""
        dtype = self.dtype_of(kernels)
        values, between = [self.kernel(k) for k in kernels], [self.edge(e, dtype) for e in edges]
        return _by_class(kernels, values, between) | {"cold": self.cold_us(kernels, dtype)}

    def cold_us(self, kernels: Sequence[Kernel], dtype: str) -> float:
        """What all layers together take longer when no weight is in the cache."""
        return sum(self._weights(kernel, dtype)[1] for kernel in kernels)

    def weight_bytes(self, kernels: Sequence[Kernel], dtype: str) -> int:
        """Bytes of all weights as the kernels read them."""
        return sum(self._weights(kernel, dtype)[0] for kernel in kernels)

    def _weights(self, kernel: Kernel, dtype: str) -> tuple[int, float]:
        """Bytes of a layer's weights, and the microseconds that they cost when they are cold."""
        asked = (kernel.layer.name, kernel.layer.macs, kernel.in_channels, kernel.out_channels, dtype)
        answer = self._cold.get(asked)
        if answer is None:
            key = kernel_key(kernel, dtype)
            cold = key._replace(working_set="cold")
            extra = self.predict(cold).us - self.kernel(kernel).us if cold.family in self.families else 0.0
            answer = self._cold[asked] = (weight_bytes(key), max(extra, 0.0))
        return answer

    def kernel(self, kernel: Kernel) -> Value:
        """Predict one layer. Answers are kept: asked again, it is one dictionary lookup."""
        layer = kernel.layer
        asked = (
            kernel.in_channels, kernel.out_channels, kernel.weight_bits, kernel.activation_bits, layer.kind,
            layer.kernel, layer.stride, layer.groups, layer.input_hw, layer.output_hw,
        )  # fmt: skip
        value = self._answers.get(asked)
        if value is None:
            value = self._answers[asked] = self.predict(kernel_key(kernel, running_precision(kernel, self.target)))
        return value

    def edge(self, edge: Edge, dtype: str) -> Value:
        """Predict one operator without weights; nothing where the table holds none of its kind."""
        spec = edge.spec
        asked = (edge.channels, dtype, spec.kind, spec.kernel, spec.stride, spec.input_hw, spec.output_hw)
        value = self._answers.get(asked)
        if value is None:
            key = edge_key(edge, dtype)
            known = (key.kind, dtype) in self.kinds
            value = self._answers[asked] = self.predict(key) if known else Value(0.0, 0.0, 0.0, "estimated")
        return value

    def predict(self, key: KernelKey) -> Value:
        """Predict the kernel ``key`` from the best evidence there is."""
        row = self.rows.get(key)
        if row is not None:
            return Value(row.median_us, min(row.p10_us, row.median_us), max(row.p90_us, row.median_us), "measured")
        if key.family not in self._families:
            self._families[key.family] = family_of(self.families.get(key.family, ()))
        family = self._families[key.family]
        if family is None:
            return _estimated(key, self._of_kind(key))
        us, low, high = family.predict(key.in_channels, key.out_channels)
        around = family.covers(key.in_channels, key.out_channels)
        return Value(us, low, high, "interpolated" if around else "estimated")

    def _of_kind(self, key: KernelKey) -> tuple[Row, ...]:
        same = self.kinds.get((key.kind, key.weight_dtype))
        if same:
            return same
        found = tuple(
            row
            for (kind, dtype), rows in self.kinds.items()
            if dtype == key.weight_dtype and kind not in EDGES
            for row in rows
        )
        if not found:
            raise BadFileError(
                f"The latency table holds no {key.weight_dtype} kernel to predict {key.kind} {key.in_channels} -> "
                f"{key.out_channels} from. Profile this network with --precision {key.weight_dtype}."
            )
        return found


def _by_class(kernels: Sequence[Kernel], values: Sequence[Value], between: Sequence[Value]) -> dict[str, float]:
    sums = {"edges": sum(value.us for value in between)}
    for kernel, value in zip(kernels, values, strict=True):
        name = class_of(kernel)
        sums[name] = sums.get(name, 0.0) + value.us
    return sums


def table_model(table: Table, target: Target) -> TableModel:
    """Index the usable rows of ``table``.

    Raises:
        BadFileError: there is no usable row.
    """
    rows = table.usable
    if not any(key.kind not in EDGES for key in rows):
        raise BadFileError(
            f"The latency table {table.path} holds no measured kernel. Go on with 'edgecompress profile'."
        )
    families: dict[tuple[object, ...], list[Row]] = {}
    kinds: dict[tuple[str, str], list[Row]] = {}
    for key, row in rows.items():
        families.setdefault(key.family, []).append(row)
        if key.working_set == "warm":
            kinds.setdefault((key.kind, key.weight_dtype), []).append(row)
    return TableModel(
        target, rows, {k: tuple(v) for k, v in families.items()}, {k: tuple(v) for k, v in kinds.items()},
        {(c.network, c.dtype): c for c in table.provenance.corrections},
    )  # fmt: skip


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


def shipped_tables() -> Path:
    """Where the tables lie that ship with edgecompress; one is used where its device and runtime are this machine's."""
    return Path(str(files("edgecompress.latency_tables").joinpath("data", "tables")))


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
    folder, only a table of this very device and runtime counts for the machine that this program runs on (the cache's,
    then one that ships); for another device, the newest of its tables.

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
        places = (folder,) if tables is not None else (folder, shipped_tables())
        found_here = [path for path in (table_path(target, here, place) for place in places) if path.exists()]
        return read_table(found_here[0], here) if found_here else None
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
