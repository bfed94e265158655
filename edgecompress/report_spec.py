"""What a run's report says, as it lies in `report.json`. No torch in here."""

from __future__ import annotations

import math

from pydantic import Field

from edgecompress.spec import Config, Cost, Document, Frozen, Source, Target


class Score(Frozen):
    """What the fields named ``accuracy`` hold, in words. ``percent``: a share in [0, 1], shown as percent.

    More is always better: where the task's own score is better when it is lower, they hold minus that score.
    """

    name: str = "accuracy"
    note: str = "top-1"
    higher_is_better: bool = True
    percent: bool = True

    @property
    def title(self) -> str:
        """The name with a capital letter."""
        return self.name[:1].upper() + self.name[1:]

    def shown(self, value: float) -> float:
        """The number that people know, in percent if it is a share."""
        return (value if self.higher_is_better else -value) * (100 if self.percent else 1)

    def text(self, value: float | None) -> str:
        """``value`` as people know it."""
        if value is None or not math.isfinite(value):
            return "–"
        return f"{self.shown(value):.2f} %" if self.percent else f"{self.shown(value):.4g}"

    def difference(self, value: float, original: float) -> str:
        """How much the score moved, with its sign: in points, or in its own unit."""
        moved = self.shown(value) - self.shown(original)
        return f"{moved:+.2f} points" if self.percent else f"{moved:+.4g}"


class Column(Frozen):
    """One side of the report's table. ``accuracy`` is the run's `Score` on the test split, of the exported file."""

    accuracy: float
    cost: Cost
    average_weight_bits: float
    host_latency_us: float
    host_latency_p90_us: float
    file: str


class Predicted(Frozen):
    """What a latency model says of one network or one layer, in microseconds, and the weakest evidence it stands on."""

    us: float
    low_us: float | None = None
    high_us: float | None = None
    source: Source


class ArtifactRow(Frozen):
    """An exported file as measured; ``accuracy`` is None where no runtime on this machine runs the file as it will run.

    ``predicted_host`` is what the latency model of this machine says of a file that was timed here.
    """

    name: str
    format: str
    size_bytes: int
    accuracy: float | None = None
    host_latency_us: float | None = None
    predicted_host: Predicted | None = None
    checks: dict[str, str | float | int | bool] = Field(default_factory=dict)


class LayerRow(Frozen):
    """One layer before and after. ``latency`` is its part of both predictions for the target."""

    name: str
    kind: str
    in_channels: tuple[int, int]
    out_channels: tuple[int, int]
    macs: tuple[int, int]
    keep_elements: float
    weight_bits: int
    activation_bits: int
    stored_bytes: int
    latency: tuple[Predicted, Predicted] | None = None


class Goal(Frozen):
    """A budget, or the accuracy drop, and whether the run kept it."""

    goal: str
    value: float
    limit: float
    unit: str
    holds: bool


class Rounds(Frozen):
    """What ``--alternate`` came to: the score on select-val of the plain two stages and of every round behind them.

    ``exported`` is the one whose network the files hold; rounds keep their trials in a folder of that name.
    """

    scores: dict[str, float]
    exported: str


class RunReport(Document):
    """Everything that `report.html` shows. ``*_source`` say in a sentence what the latency of the target, and what the
    prediction for the machine that made the run, stand on."""

    name: str
    config: Config
    target: Target
    score: Score = Score()
    latency_source: str
    host_source: str = ""
    original: Column
    compressed: Column
    original_int8_us: float | None
    original_int8_bytes: int | None
    artifacts: tuple[ArtifactRow, ...]
    layers: tuple[LayerRow, ...]
    goals: tuple[Goal, ...]
    found_by: dict[str, str]
    evaluations: dict[str, int]
    rounds: Rounds | None = None
    seconds: dict[str, float]
    provenance: dict[str, str]
