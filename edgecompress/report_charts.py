"""Small charts as inline SVG without any script: the trials of a search as points, and the best so far as a line.

The drawing area is an SVG in percent and pixels and the numbers around it are text, so a chart keeps its font size at
every width. Colours are classes (``a0`` to ``a9``) that the page's style sheet gives a light and a dark value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

COLOURS = 10


@dataclass(frozen=True)
class Mark:
    """One point. ``hollow`` marks a point that does not count, a ``small`` one is beaten by others in everything, ``label``
    is what a reader sees on hovering."""

    x: float
    y: float
    colour: int
    label: str
    hollow: bool = False
    chosen: bool = False
    small: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows and how its numbers are written."""

    title: str
    write: Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """A range of values with round tick marks; ``low`` and ``high`` are the first and the last tick."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where ``value`` lies, in percent of the range."""
        return 100 * (value - self.low) / (self.high - self.low)


def scale(values: Sequence[float], wanted: int = 4) -> Scale:
    """Round ticks around ``values``; one value alone gets a range of its own."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = 0.05 * abs(low) or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def tag(name: str, content: str = "", **attributes: object) -> Markup:
    """One element; every value is escaped, ``_`` in a name stands for ``-``, and ``class_`` for ``class``."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}>{escape(content)}</{name}>")


def chart(
    marks: Sequence[Mark],
    x: Axis,
    y: Axis,
    label: str,
    *,
    line: Sequence[tuple[float, float]] = (),
    limit: tuple[float, str] | None = None,
) -> Markup:
    """Draw points with an optional stepped line and an optional upright limit.

    Args:
        label: what a screen reader says instead of the picture.
        line: corners; the line keeps a corner's height until the next one.
        limit: a value on the x axis and what it is.
    """
    xs = scale([mark.x for mark in marks] + ([limit[0]] if limit else []))
    ys = scale([mark.y for mark in marks])
    inside = [_grid(xs, ys)]
    if limit:
        inside.append(_limit(xs.at(limit[0]), limit[1]))
    inside.append(_steps(line, xs, ys))
    for mark in sorted(marks, key=lambda mark: (mark.chosen, not mark.hollow)):
        inside.append(_point(mark, xs.at(mark.x), 100 - ys.at(mark.y)))
    drawing = tag("svg", Markup("").join(inside), class_="plot", role="img", aria_label=label)
    y_numbers = Markup("").join(
        tag("span", y.write(tick), style=f"bottom:{ys.at(tick):.2f}%") for tick in ys.ticks
    )  # fmt: skip
    x_numbers = Markup("").join(
        tag("span", x.write(tick), style=f"left:{xs.at(tick):.2f}%") for tick in xs.ticks
    )  # fmt: skip
    parts = (
        tag("div", y.title, class_="ytitle"),
        tag("div", y_numbers, class_="yticks", aria_hidden="true"),
        drawing,
        tag("div", x_numbers, class_="xticks many" if len(xs.ticks) > 4 else "xticks", aria_hidden="true"),
        tag("div", x.title, class_="xtitle"),
    )
    return tag("div", Markup("").join(parts), class_="chart")


def _grid(xs: Scale, ys: Scale) -> Markup:
    lines = [
        tag("line", x1="0%", x2="100%", y1=f"{100 - ys.at(t):.2f}%", y2=f"{100 - ys.at(t):.2f}%") for t in ys.ticks
    ]
    lines += [tag("line", x1=f"{xs.at(t):.2f}%", x2=f"{xs.at(t):.2f}%", y1="0%", y2="100%") for t in xs.ticks]
    return tag("g", Markup("").join(lines), class_="grid")


def _limit(at: float, text: str) -> Markup:
    left = at > 60
    return tag("line", class_="limit", x1=f"{at:.2f}%", x2=f"{at:.2f}%", y1="0%", y2="100%") + tag(
        "text", text, class_="limit", x=f"{at:.2f}%", y="100%", dx=-5 if left else 5, dy=-6, text_anchor="end" if left else "start"
    )  # fmt: skip


def _steps(line: Sequence[tuple[float, float]], xs: Scale, ys: Scale) -> Markup:
    lines: list[Markup] = []
    for (x, y), (next_x, next_y) in pairwise(line):
        at, to = 100 - ys.at(y), 100 - ys.at(next_y)
        lines.append(tag("line", x1=f"{xs.at(x):.2f}%", x2=f"{xs.at(next_x):.2f}%", y1=f"{at:.2f}%", y2=f"{at:.2f}%"))
        if next_y != y:
            x2 = f"{xs.at(next_x):.2f}%"
            lines.append(tag("line", x1=x2, x2=x2, y1=f"{at:.2f}%", y2=f"{to:.2f}%"))
    return tag("g", Markup("").join(lines), class_="best")


def _point(mark: Mark, x: float, y: float) -> Markup:
    kind = f"dot a{mark.colour % COLOURS}" + (" hollow" if mark.hollow else "")
    where = {"cx": f"{x:.2f}%", "cy": f"{y:.2f}%"}
    point = tag("circle", tag("title", mark.label), class_=kind, r=2.5 if mark.small else 4.5, **where)
    if not mark.chosen:
        return point
    left, below = x > 60, y < 50
    text = tag(
        "text", "built", class_="built", x=where["cx"], y=where["cy"], dx=-11 if left else 11, dy=20 if below else -12,
        text_anchor="end" if left else "start",
    )  # fmt: skip
    return tag("circle", class_="ring", r=9, **where) + point + text
