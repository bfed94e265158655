"""Pictures of benchmarks/headline.py: accuracy of every finished file over its bytes and over its time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cells import Cell
from headline_plan import Job, Network, jobs_of

AXES = (("bytes", 1e6, "MB on disk"), ("latency_us", 1e3, "ms in ONNX Runtime, 1 thread, batch 1"))
# (in the legend, how a method's name starts, colour, marker), the first that fits
STYLES = (
    ("original, fp32", "original", "#777777", "s"),
    ("unpruned, as long tuned, fp32", "tuned", "#222222", "D"),
    ("unpruned, tuned, int8", "tuned+", "#222222", "v"),
    ("edgecompress, DDPG", "ours", "#177245", "*"),
    ("edgecompress, other searches", "ours-", "#6abf69", "P"),
    ("Torch-Pruning, uniform", "torch-pruning-uniform", "#b3261e", "o"),
    ("Torch-Pruning, global", "torch-pruning-global", "#e08a00", "o"),
    ("network slimming", "slimming", "#3b6fb6", "o"),
)


def style_of(job: Job) -> tuple[str, str, str]:
    """Legend, colour and marker of a method."""
    fits = [style for style in STYLES if job.method.startswith(style[1])]
    title, _, colour, marker = max(fits, key=lambda style: len(style[1]))
    return title, colour, marker


def draw(path: Path, known: Mapping[str, Cell], network: Network) -> bool:
    """Write the picture of a network; False where it would be empty."""
    cells = [(job, known[job.name]) for job in jobs_of(network) if job.name in known]
    axes_of = [axis for axis in AXES if any(axis[0] in cell for _, cell in cells)]
    if len(cells) < 2 or not axes_of:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot, ticker

    class Plain(ticker.LogFormatter):
        """Leaves out the same ticks, and writes 0.6 where matplotlib writes 6e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure, panels = pyplot.subplots(1, len(axes_of), figsize=(5.6 * len(axes_of), 4.6), sharey=True, squeeze=False)
    for panel, (key, unit, label) in zip(panels[0], axes_of, strict=True):
        seen: set[str] = set()
        for job, cell in cells:
            if key not in cell:
                continue
            title, colour, marker = style_of(job)
            panel.scatter(
                cell[key] / unit, cell["test"], c=colour, marker=marker, s=90 if marker == "*" else 34, zorder=3,
                label=None if title in seen else title,
            )  # fmt: skip
            seen.add(title)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        panel.set_xlabel(label)
        panel.grid(color="#dddddd", linewidth=0.6, zorder=0)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0][0].set_ylabel("accuracy of the file on the test images, %")
    panels[0][0].set_title(network.title, loc="left")
    handles, titles = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncol=4, fontsize=8, frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True
