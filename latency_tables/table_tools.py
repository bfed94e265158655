"""What can be done with measured tables: describe one, compare two, merge several, check a file, validate predictions."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.errors import BadFileError, UsageError
from edgecompress.files import read_document
from edgecompress.graph import Graph
from edgecompress.latency_tables import agent
from edgecompress.latency_tables.measure import this_setting
from edgecompress.latency_tables.onelayer import resized
from edgecompress.latency_tables.predict import table_model
from edgecompress.latency_tables.table import (
    EDGES,
    USABLE,
    KernelKey,
    Provenance,
    Row,
    Table,
    append_row,
    disagree,
    numbered_rows,
    open_table,
    read_table,
    refuse_mismatch,
    scan,
    sidecar,
    whole_lines,
)
from edgecompress.latency_tables.whole import Check, check, measure_network, policy_at, sub_networks
from edgecompress.spec import Network, Target


@dataclass(frozen=True)
class Holes:
    """What a table lacks: kernels without a measurement by status, disturbed ones, and families of a single width,
    between whose rows nothing can be interpolated."""

    without: dict[str, int]
    contended: int
    single: int


def counts(table: Table) -> dict[tuple[str, str, str], int]:
    """Rows by kind, precision and status."""
    found = Counter((key.kind, key.weight_dtype, row.status) for key, row in table.rows.items())
    return dict(sorted(found.items()))


def holes(table: Table) -> Holes:
    """What is missing in ``table``."""
    status = Counter(row.status for row in table.rows.values())
    families = Counter(key.family for key in table.usable if key.kind not in EDGES)
    return Holes(
        {name: count for name, count in status.items() if name not in USABLE}, status["contended"],
        sum(count == 1 for count in families.values()),
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One kernel in two tables; ``ratio`` is the second's median over the first's."""

    first: Row
    second: Row

    @property
    def ratio(self) -> float:
        return self.second.median_us / self.first.median_us


@dataclass(frozen=True)
class Comparison:
    """Two tables joined on their keys; ``disagreeing`` pairs differ by more than `table.MADS` deviations."""

    pairs: tuple[Pair, ...]
    only_first: int
    only_second: int
    disagreeing: int

    def quantiles(self, dtype: str) -> dict[str, float]:
        """Number of pairs of one precision, and the 10 %, 50 % and 90 % points of their ratios."""
        ratios = [pair.ratio for pair in self.pairs if pair.first.key.weight_dtype == dtype]
        p10, median, p90 = np.percentile(ratios, (10, 50, 90))
        return {"pairs": len(ratios), "p10": float(p10), "median": float(median), "p90": float(p90)}

    @property
    def precisions(self) -> list[str]:
        return sorted({pair.first.key.weight_dtype for pair in self.pairs})

    def worst(self, count: int) -> list[Pair]:
        """The pairs whose ratio is furthest from one."""
        return sorted(self.pairs, key=lambda pair: -abs(np.log(pair.ratio)))[:count]


def compare(first: Table, second: Table) -> Comparison:
    """Join two tables, of whatever settings, on the keys of their kernels.

    Raises:
        UsageError: they have no kernel in common.
    """
    one, two = ({key: row for key, row in t.usable.items() if key.kind not in EDGES} for t in (first, second))
    pairs = tuple(Pair(row, two[key]) for key, row in one.items() if key in two)
    if not pairs:
        raise UsageError(f"{first.path} and {second.path} have no kernel in common. Compare tables of one network.")
    differ = sum(disagree(pair.first, pair.second) for pair in pairs)
    return Comparison(pairs, len(one) - len(pairs), len(two) - len(pairs), differ)


def merge(paths: Sequence[Path], out: Path) -> Table:
    """Write the union of tables of one setting. Of two rows of one kernel the one with more runs stays.

    Raises:
        UsageError: ``out`` exists. BadFileError: a table is broken or of another setting or target than the first, or two
            of them disagree on a kernel by more than `table.MADS` deviations; the message names the lines.
    """
    if out.exists():
        raise UsageError(f"{out} exists. Name a new file with --out.")
    provenances = [read_document(sidecar(path), Provenance, "provenance of the latency table") for path in paths]
    first = provenances[0]
    kept: dict[KernelKey, tuple[Path, int, Row]] = {}
    for path, provenance in zip(paths, provenances, strict=True):
        refuse_mismatch(path, provenance.setting, first.setting)
        if provenance.target != first.target:
            raise BadFileError(f"{path} is of target '{provenance.target}', {paths[0]} of '{first.target}'.")
        own = {row.key: (number, row) for number, row in numbered_rows(path, provenance, whole_lines(path, mend=False))}
        for key, (number, row) in own.items():
            where, line, other = kept.get(key, (path, number, row))
            if disagree(other, row):
                raise BadFileError(
                    f"Line {number} of {path} says {row.median_us:.1f} us where line {line} of {where} says "
                    f"{other.median_us:.1f} us for the same kernel. Measure again, or delete the wrong line."
                )
            kept[key] = max((where, line, other), (path, number, row), key=lambda found: _worth(found[2]))
    machine = {**first.machine, "merged_from": " ".join(path.name for path in paths)}
    created = min(provenance.created_at for provenance in provenances)
    table = open_table(out, first.model_copy(update={"machine": machine, "created_at": created}))
    for _, _, row in kept.values():
        append_row(table, row)
    return read_table(out)


def _worth(row: Row) -> tuple[bool, int]:
    return row.status in USABLE, row.n_runs


def check_file(path: Path) -> list[str]:
    """Everything that is wrong with the table at ``path``, one sentence each; the file is left as it is.

    Raises:
        BadFileError: the provenance beside it cannot be read.
    """
    provenance = read_document(sidecar(path), Provenance, "provenance of the latency table")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = whole_lines(path, mend=False)
        findings = [str(found) for _, found in scan(path, provenance, lines) if isinstance(found, BadFileError)]
    return [*(str(item.message) for item in caught), *findings]


@dataclass(frozen=True)
class Validation:
    """Held-out networks of one precision: predicted against measured."""

    checks: tuple[Check, ...]

    @property
    def mape(self) -> float:
        """Mean absolute error as a fraction of the measured time."""
        return float(np.mean([abs(check.error) for check in self.checks]))

    @property
    def within_10(self) -> float:
        """Share of the networks within 10 %."""
        return float(np.mean([abs(check.error) <= 0.1 for check in self.checks]))

    @property
    def spearman(self) -> float | None:
        """Rank correlation; None for fewer than three networks."""
        if len(self.checks) < 3:
            return None
        from scipy.stats import spearmanr

        pairs: Any = spearmanr([c.predicted_us for c in self.checks], [c.measured_us for c in self.checks])
        return float(pairs.statistic)


def validate(
    table: Table,
    target: Target,
    network: Network,
    graph: Graph,
    *,
    count: int = 10,
    seconds: float = 1.0,
    seed: int = 1000,
    allow_mismatch: bool = False,
) -> dict[str, Validation]:
    """Predict and measure ``count`` random pruned networks per precision of ``table`` on this machine.

    Raises:
        BadFileError: the table is of another setting than this machine has.
        MissingBackendError: ONNX Runtime is not installed.
    """
    threads = table.provenance.setting.threads
    if not allow_mismatch:
        refuse_mismatch(table.path, table.provenance.setting, this_setting(threads))
    model = table_model(table, target)
    result: dict[str, list[Check]] = {dtype: [] for dtype in sorted({key.weight_dtype for key in table.usable})}
    for keep in islice(sub_networks(network, target.divisor, seed), 1, count + 1):  # the first is unpruned
        for dtype, checks in result.items():
            sized = resized(graph, network, policy_at(network, keep, dtype))
            row = measure_network(network, sized, keep, dtype, threads=threads, seconds=seconds, now=agent.now())
            checks.append(check(model, network, row))
    return {dtype: Validation(tuple(checks)) for dtype, checks in result.items()}
