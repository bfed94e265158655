"""One measured device as a CSV that only grows, with a JSON file of provenance beside it.

A row is keyed by the shape and precision of one fused kernel, never by a layer's position in a network. A later row
with the same key replaces an earlier one if it says that it was measured again (`AGAIN`) or agrees with it; two that
disagree in silence, as in files that were pasted together, are refused. Rows of another device, runtime, version or
thread count have their own file.
"""

from __future__ import annotations

import csv
import io
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from pydantic import Field

from edgecompress.cost import Edge, Kernel
from edgecompress.errors import BadFileError
from edgecompress.files import disk_error, read_document, write_bytes, write_document, write_text
from edgecompress.latency_tables.correct import Correction
from edgecompress.spec import Document, EdgeKind, Frozen, Network

Dtype = Literal["fp32", "fp16", "int8"]
Status = Literal["ok", "contended", "throttled", "unsupported", "failed"]
WORD_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
EDGES: tuple[str, ...] = get_args(EdgeKind)
STATUSES: tuple[str, ...] = get_args(Status)
USABLE: tuple[Status, ...] = ("ok", "contended")
AGAIN = " again"  # ends the method of a row that replaces an earlier one of its key
MADS = 3  # median absolute deviations by which two measurements of one kernel may differ
RESOLUTION_US = 1.0  # of ONNX Runtime's profiler: the smallest difference that means anything


class KernelKey(NamedTuple):
    """Shape and precision of one fused kernel (convolution or linear layer with folded BatchNorm and activation).

    ``working_set`` is ``warm`` where the weights were in the cache, ``cold`` where they came from memory.
    One of the kinds `EDGES` is an operator without weights: what it adds to the time of the layers around it, which is
    zero where the runtime fuses it.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    groups: int
    in_h: int
    in_w: int
    out_h: int
    out_w: int
    weight_dtype: str
    activation_dtype: str
    working_set: str = "warm"

    @property
    def family(self) -> tuple[object, ...]:
        """Everything but the channels: rows of one family can be interpolated."""
        return (self.kind, self.groups if self.kind == "grouped" else 0, *self[3:7], *self[8:])

    @property
    def macs(self) -> int:
        """Dense multiply-adds of one image; of an edge, the elements that it writes."""
        if self.kind in EDGES:
            return self.out_channels * self.out_h * self.out_w
        inputs = 1 if self.kind == "depthwise" else self.in_channels // self.groups
        where = self.in_h * self.in_w if self.kind == "transposed" else self.out_h * self.out_w
        return inputs * self.out_channels * self.kernel_h * self.kernel_w * where


def weight_bytes(key: KernelKey) -> int:
    """Bytes of the weights as the kernel reads them."""
    if key.kind in EDGES:
        return 0
    inputs = 1 if key.kind == "depthwise" else key.in_channels // key.groups
    return inputs * key.out_channels * key.kernel_h * key.kernel_w * WORD_BYTES[key.weight_dtype]


def kernel_key(kernel: Kernel, dtype: str) -> KernelKey:
    """The key of ``kernel`` when it runs in ``dtype``."""
    layer = kernel.layer
    groups = kernel.out_channels if layer.kind == "depthwise" else layer.groups
    return KernelKey(
        layer.kind, kernel.in_channels, kernel.out_channels, *layer.kernel, *layer.stride, groups, *layer.input_hw,
        *layer.output_hw, dtype, dtype,
    )  # fmt: skip


def edge_key(edge: Edge, dtype: str) -> KernelKey:
    """The key of ``edge`` when the network runs in ``dtype``."""
    spec = edge.spec
    return KernelKey(
        spec.kind, edge.channels, edge.channels, *spec.kernel, *spec.stride, 1, *spec.input_hw, *spec.output_hw, dtype,
        dtype,
    )  # fmt: skip


class Setting(Frozen):
    """What all rows of one table share."""

    device: str
    runtime: str
    runtime_version: str
    provider: str
    threads: int
    batch: int = 1


class Session(Frozen):
    """One uninterrupted series of measurements."""

    ended_at: str
    load_before: str
    load_after: str
    anchors_us: tuple[float, ...] = ()


class Profile(Frozen):
    """A network that was profiled into the table, and the channels of its versions that only check the correction."""

    network: Network
    held_out: tuple[dict[str, int], ...] = ()


class Provenance(Document):
    """The JSON file beside a table: what was measured on, with what, when.

    ``sessions`` has one entry for each time that rows were added: when it ended, the load before and after, and what the
    anchor kernel took, in order. ``divisors`` are the channel divisors found on the device, by precision;
    ``networks`` by `correct.network_id`, so that ``corrections`` can be fitted anew when rows are added.
    """

    target: str
    setting: Setting
    machine: dict[str, str]
    edgecompress_version: str
    created_at: str
    sessions: tuple[Session, ...] = ()
    divisors: dict[str, int] = Field(default={})
    corrections: tuple[Correction, ...] = ()
    networks: dict[str, Profile] = Field(default={})


@dataclass(frozen=True)
class Row:
    """One measured kernel: statistics of its runs in microseconds, and the operator that the runtime really ran."""

    key: KernelKey
    median_us: float
    mad_us: float
    p10_us: float
    p90_us: float
    n_runs: int
    method: str
    actual_kernel: str
    status: Status
    measured_at: str


@dataclass(frozen=True)
class Table:
    """Rows by key; only the last row of each key, whatever its status."""

    path: Path
    provenance: Provenance
    rows: dict[KernelKey, Row]

    @property
    def usable(self) -> dict[KernelKey, Row]:
        """Rows that hold a measurement."""
        return {key: row for key, row in self.rows.items() if row.status in USABLE}


TEXTS = 3  # fields at the end of a key that are no sizes
_SETTING = tuple(Setting.model_fields)
_VALUES = ("median_us", "mad_us", "p10_us", "p90_us", "n_runs", "method", "actual_kernel", "status", "measured_at")
COLUMNS = (*_SETTING, *KernelKey._fields, *_VALUES)


def sidecar(path: Path) -> Path:
    """Where the provenance of the table ``path`` lies."""
    return path.with_suffix(".json")


def open_table(path: Path, provenance: Provenance) -> Table:
    """Read the table at ``path`` to go on with it, or begin a new one.

    Raises:
        BadFileError: the table there is broken or belongs to another device, runtime, version or thread count.
    """
    if path.exists():
        return read_table(path, provenance.setting)
    write_document(sidecar(path), provenance)
    write_text(path, ",".join(COLUMNS) + "\n")
    return Table(path, provenance, {})


def append_row(table: Table, row: Row) -> None:
    """Add one row to the file and push it to the disk, so that a kill loses at most the line being written.

    A row whose key the table holds already is marked as measured again.
    """
    if row.key in table.rows and not row.method.endswith(AGAIN):
        row = replace(row, method=row.method + AGAIN)
    setting = table.provenance.setting
    shared = [str(getattr(setting, name)) for name in _SETTING]
    values = [
        f"{value:.4f}" if isinstance(value, float) else str(value) for value in (getattr(row, n) for n in _VALUES)
    ]
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([*shared, *row.key, *values])
    try:
        with table.path.open("a", encoding="utf-8", newline="") as file:
            file.write(line.getvalue())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(table.path, error) from error
    table.rows[row.key] = row


def read_table(path: Path, expected: Setting | None = None, *, allow_mismatch: bool = False) -> Table:
    """Read and check a table. A last line torn by a kill is cut off the file, a truncated one left out, with a warning.

    Args:
        expected: the setting that the caller will run; None takes whatever the table holds.
        allow_mismatch: use a table of another setting all the same.

    Raises:
        BadFileError: missing, broken, of another schema, a value that is no measurement, or another setting.
    """
    provenance = read_document(sidecar(path), Provenance, "provenance of the latency table")
    if expected is not None and not allow_mismatch:
        refuse_mismatch(path, provenance.setting, expected)
    rows: dict[KernelKey, Row] = {}
    for _, row in numbered_rows(path, provenance, whole_lines(path)):
        rows[row.key] = row
    return Table(path, provenance, rows)


def numbered_rows(path: Path, provenance: Provenance, lines: list[str]) -> Iterator[tuple[int, Row]]:
    """Each row with the number of its line; the first of ``lines`` must be the columns' names.

    Raises:
        BadFileError: at the first line that is no row of this table.
    """
    for number, found in scan(path, provenance, lines):
        if isinstance(found, BadFileError):
            raise found
        yield number, found


def scan(path: Path, provenance: Provenance, lines: list[str]) -> Iterator[tuple[int, Row | BadFileError]]:
    """Like `numbered_rows`, but an error stands where the row would, and the lines behind it follow."""
    if not lines or tuple(lines[0].split(",")) != COLUMNS:
        yield (
            1,
            BadFileError(
                f"The latency table {path} has other columns than this edgecompress writes. Profile the device again."
            ),
        )
        return
    own = [str(getattr(provenance.setting, name)) for name in _SETTING]
    seen: dict[KernelKey, tuple[int, Row]] = {}
    for number, fields in enumerate(csv.reader(lines[1:]), start=2):
        if len(fields) < len(COLUMNS):
            warnings.warn(f"Line {number} of the latency table {path} is truncated and left out.", stacklevel=4)
            continue
        try:
            row = _row(path, number, fields, own)
        except BadFileError as error:
            yield number, error
            continue
        before, earlier = seen.setdefault(row.key, (number, row))
        if disagree(earlier, row) and not row.method.endswith(AGAIN):
            yield (
                number,
                BadFileError(
                    f"Line {number} of the latency table {path} says {row.median_us:.1f} us where line {before} says "
                    f"{earlier.median_us:.1f} us for the same kernel. Delete the wrong one, or profile the device again."
                ),
            )
            continue
        seen[row.key] = (number, row)
        yield number, row


def disagree(one: Row, other: Row) -> bool:
    """Whether two measurements of one kernel differ by more than `MADS` of the larger deviation."""
    if one.status not in USABLE or other.status not in USABLE:
        return False
    return abs(one.median_us - other.median_us) > max(MADS * max(one.mad_us, other.mad_us), RESOLUTION_US)


def refuse_mismatch(path: Path, found: Setting, expected: Setting) -> None:
    """Raise BadFileError if ``found`` differs from ``expected``, naming the first field that does."""
    differs = mismatch(found, expected)
    if differs:
        raise BadFileError(
            f"The latency table {path} was measured in another setting than this run's: {differs}. Profile this setting "
            "into its own table, or take it on purpose with --allow-mismatch."
        )


def mismatch(found: Setting, expected: Setting) -> str:
    """The fields in which two settings differ, as ``threads = 2 instead of 1``; empty where they agree."""
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in _SETTING]
    return ", ".join(f"{name} = {own} instead of {wanted}" for name, own, wanted in pairs if own != wanted)


def whole_lines(path: Path, *, mend: bool = True) -> list[str]:
    """The lines of the file; what stands behind the last line's end is dropped, and with ``mend`` cut off the file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadFileError(f"There is no latency table at {path}. Make one with 'edgecompress profile'.") from error
    whole, newline, torn = raw.rpartition(b"\n")
    if torn:
        warnings.warn(f"The last line of the latency table {path} was torn by a kill and is dropped.", stacklevel=3)
        if mend:
            write_bytes(path, whole + newline)
    try:
        return whole.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BadFileError(f"The latency table {path} is no text file. Profile the device again.") from error


def _row(path: Path, number: int, fields: list[str], own: list[str]) -> Row:
    try:
        return _parsed(fields, own)
    except ValueError as error:
        text = f"Line {number} of the latency table {path} {error}. Delete that line."
        raise BadFileError(text) from error


def _parsed(fields: list[str], own: list[str]) -> Row:
    """A row from the fields of its line; ValueError says what is wrong with them."""
    if len(fields) != len(COLUMNS):
        raise ValueError(f"has {len(fields)} fields, expected {len(COLUMNS)}")
    shared, shape, values = fields[: len(own)], fields[len(own) : -len(_VALUES)], fields[-len(_VALUES) :]
    if shared != own:
        name = next(n for n, a, b in zip(_SETTING, shared, own, strict=True) if a != b)
        raise ValueError(f"is of another {name} than the rest of the table (the .json beside it)")
    try:
        sizes = list(map(int, shape[1:-TEXTS]))
        median, mad, p10, p90 = map(float, values[:4])
        runs = int(values[4])
    except ValueError as error:
        raise ValueError(f"does not parse: {error}") from error
    status = values[7]
    if status not in STATUSES:
        raise ValueError(f"has the unknown status '{status}'; known: {', '.join(STATUSES)}")
    if min(sizes) < 1:
        raise ValueError(f"holds a size of {min(sizes)}, expected 1 or more")
    key = KernelKey._make([shape[0], *sizes, *shape[-TEXTS:]])
    if status in USABLE:
        enough = median >= 0 if key.kind in EDGES else median > 0
        if not (enough and math.isfinite(median + mad + p10 + p90) and min(mad, p10, p90) >= 0):
            raise ValueError(f"holds {values[0]} us, which is no latency; expected a number above zero")
    return Row(key, median, mad, p10, p90, runs, values[5], values[6], cast(Status, status), values[8])
