"""What every benchmark shares: bars with limits, provenance, and the one way results are written."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True)
class Bar:
    """One figure with its limit. ``value`` is None when it was not run; ``reason`` then says why."""

    bar: str
    value: float | None
    limit: float
    unit: str
    holds: bool
    reason: str = ""


@dataclass
class Benchmark:
    """Collects bars and details, prints them, and writes ``docs/benchmarks/<name>.json``."""

    name: str
    quick: bool
    bars: list[Bar] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)  # title -> file beside the page
    records: dict[str, Any] = field(default_factory=dict)  # stands in the JSON only
    started: float = field(default_factory=time.monotonic)

    def at_most(self, bar: str, value: float, limit: float, unit: str) -> None:
        """A figure that must not exceed its limit."""
        self._add(Bar(bar, round(value, 6), limit, unit, value <= limit), "<=")

    def at_least(self, bar: str, value: float, limit: float, unit: str) -> None:
        """A figure that must reach its limit."""
        self._add(Bar(bar, round(value, 6), limit, unit, value >= limit), ">=")

    def misses(self, bar: str, value: float, limit: float, unit: str, reason: str) -> None:
        """A figure that does not reach its limit, and why."""
        self._add(Bar(bar, round(value, 6), limit, unit, False, reason), "limit")

    def not_run(self, bar: str, limit: float, unit: str, reason: str) -> None:
        """A figure that is owed."""
        self._add(Bar(bar, None, limit, unit, False, reason), "")

    def _add(self, bar: Bar, sign: str) -> None:
        self.bars.append(bar)
        value = "not run" if bar.value is None else f"{bar.value:.5g}"
        print(
            f"{'ok  ' if bar.holds else 'MISS'} {bar.bar}: {value} {bar.unit} ({sign} {bar.limit:g}) {bar.reason}",
            flush=True,
        )

    def write(self) -> None:
        """Write the results; a quick run is too small to be a result and writes nothing."""
        if self.quick:
            print("--quick: nothing was written")
            return
        import torch

        from edgecompress.report import provenance

        document = {
            "provenance": provenance(torch.get_num_threads())
            | {
                "commit": commit(),
                "seconds": str(round(time.monotonic() - self.started)),
                "command": f"python benchmarks/{self.name}.py",
            },
            "bars": [asdict(bar) for bar in self.bars],
            "details": self.details,
            "records": self.records,
            "pictures": self.pictures,
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        write_page(self.name, document)
        print(f"wrote docs/benchmarks/{self.name}.json and {self.name}.md")


def commit() -> str:
    """Of the working tree, short; marked where files were changed since."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def write_page(name: str, document: dict[str, Any]) -> None:
    """The page beside the JSON: provenance, bars as a table, how far each is from its limit as a plot, the details."""
    bars = document["bars"]
    lines = [f"# Benchmark: {name}", "", f"    {document['provenance']['command']}", ""]
    lines += [f"* {key}: {value}" for key, value in document["provenance"].items() if key != "command"]
    lines += ["", "| | figure | value | limit | unit |", "|---|---|---|---|---|"]
    for bar in bars:
        value = " ".join(
            part for part in ("" if bar["value"] is None else f"{bar['value']:.5g}", bar["reason"]) if part
        )
        lines.append(
            f"| {'holds' if bar['holds'] else '**missed**'} | {bar['bar']} | {value} | {bar['limit']:g} | {bar['unit']} |"
        )
    plot(RESULTS / f"{name}.svg", [bar for bar in bars if bar["value"] is not None and bar["limit"]])
    lines += ["", f"![Every figure as a share of its limit]({name}.svg)", ""]
    for title, file in document["pictures"].items():
        lines += [f"## {title}", "", f"![{title}]({file})", ""]
    for title, values in document["details"].items():
        lines += [f"## {title}", "", *_shown(values), ""]
    (RESULTS / f"{name}.md").write_text("\n".join(lines))


def _shown(values: Any) -> list[str]:
    """A list of rows with equal keys as a table, anything else as JSON."""
    if not (isinstance(values, list) and values and all(isinstance(row, dict) for row in values)):
        return ["```json", json.dumps(values, indent=1), "```"]
    names = list(values[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return lines + [f"| {' | '.join('' if row[n] is None else str(row[n]) for n in names)} |" for row in values]


def plot(path: Path, bars: list[dict[str, Any]]) -> None:
    """Value over limit for every bar, green where it holds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a tenth of the bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.28 * len(bars)))
    shares = [bar["value"] / bar["limit"] for bar in bars]
    axes.barh([bar["bar"] for bar in bars], shares, color=["#177245" if bar["holds"] else "#b3261e" for bar in bars])
    axes.axvline(1, color="#444", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("share of the limit")
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
