"""The two searches as Gymnasium environments: one step per channel group (stage 1) or per layer (stage 2).

A `SearchSpace` says which integers may be built and projects a whole vector of wishes onto the budget; the environment
only does bookkeeping. Accuracy comes from an injected `Evaluator`, so no network is needed to test either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from edgecompress.cost import CostModel, channels, layer_macs, layer_params
from edgecompress.errors import GoalMissedError
from edgecompress.spec import FLOAT_BITS, Budget, CompressionPolicy, Cost, LayerChoice, Metric, Network, Target

Choice = tuple[int, ...]
Vector = NDArray[np.float64]
ELEMENTS = (1.0, 0.75, 0.5, 0.35, 0.25)  # shares of single weights that a group may keep


@dataclass(frozen=True)
class Outcome:
    """How well a policy does on the search split: top-1 in [0, 1] and cross-entropy in nats.

    ``abandoned``: the evaluator gave up after a part of the images, because the policy could not become one of the best.
    ``estimate``: what the evaluator believes of the accuracy on other images, where it knows better than these few say;
    rewards are then of the estimate.
    """

    accuracy: float
    loss: float
    abandoned: bool = False
    estimate: float | None = None

    @property
    def believed(self) -> float:
        """The estimate where there is one, else the accuracy."""
        return self.accuracy if self.estimate is None else self.estimate


class Evaluator(Protocol):
    """Builds a policy and measures it; the one expensive call of a search."""

    def __call__(self, policy: CompressionPolicy) -> Outcome: ...


@dataclass(frozen=True)
class Limit:
    """A budget in the metric's own unit."""

    budget: Budget
    value: float


@dataclass(frozen=True)
class SearchSpace:
    """What one stage may choose.

    ``levels[i]`` are the integers that action ``i`` may build, ascending; ``steps`` groups actions into the steps of an
    episode; ``features[s]`` describe step ``s`` in [0, 1]; ``to_policy`` turns a choice into a policy. Actions of one
    ``tied`` set take one value; those in ``only_if_asked`` stay at their largest level unless a budget binds them.
    ``inner`` are the actions that decide about one layer's output alone, not about a width that several layers share.
    """

    names: tuple[str, ...]
    levels: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    features: NDArray[np.float32]
    to_policy: Callable[[Choice], CompressionPolicy]
    cost: CostModel
    limits: tuple[Limit, ...]
    tied: tuple[tuple[int, ...], ...] = ()
    only_if_asked: frozenset[int] = frozenset()
    inner: frozenset[int] = frozenset()

    def price(self, choice: Choice) -> Cost:
        """The cost of a finished choice."""
        return self.cost(self.to_policy(choice))

    def pressure(self, choice: Choice) -> float:
        """The largest ratio of a metric to its limit; a choice fits while this is at most 1."""
        cost = self.price(choice)
        return max((cost.metric(limit.budget.metric) / limit.value for limit in self.limits), default=0.0)

    def fits(self, choice: Choice) -> bool:
        """Whether every budget holds."""
        return self.pressure(choice) <= 1.0

    @property
    def largest(self) -> Choice:
        """Nothing compressed."""
        return tuple(levels[-1] for levels in self.levels)

    @property
    def smallest(self) -> Choice:
        """Everything compressed as far as it goes."""
        return tuple(levels[0] for levels in self.levels)

    def wishes(self, choice: Choice) -> Vector:
        """The wish in [0, 1] whose nearest level is ``choice``."""
        return np.array(
            [(value - ls[0]) / max(ls[-1] - ls[0], 1) for value, ls in zip(choice, self.levels, strict=True)]
        )

    def project(self, wishes: Vector) -> Choice:
        """The choice nearest to ``wishes`` that uses the budget up.

        One multiplier on all bound values is bisected, values are rounded down to a level, and what is left of the
        budget goes to the actions that lost most by rounding. Actions that relieve no budget are only rounded.
        """
        low = np.array([levels[0] for levels in self.levels], float)
        high = np.array([levels[-1] for levels in self.levels], float)
        values = low + np.clip(wishes, 0, 1) * (high - low)
        bound = self.bound
        idle = self.only_if_asked - bound

        def rounded(multiplier: float) -> Choice:
            scaled = np.clip(values * multiplier, low, high)
            return self._tie(
                tuple(
                    _floor(levels, scaled[i])
                    if i in bound
                    else levels[-1]
                    if i in idle
                    else _nearest(levels, values[i])
                    for i, levels in enumerate(self.levels)
                )
            )

        if not bound:
            return rounded(1.0)
        lower, upper = 0.0, max(high[i] / max(values[i], 1e-9) for i in bound)
        if self.fits(rounded(upper)):
            return rounded(upper)
        seen: dict[Choice, bool] = {}  # late halvings mostly round to what was priced before
        for _ in range(14):
            middle = (lower + upper) / 2
            candidate = rounded(middle)
            if candidate not in seen:
                seen[candidate] = self.fits(candidate)
            lower, upper = (middle, upper) if seen[candidate] else (lower, middle)
        return self.fill(rounded(lower), values * max(lower, 1e-9))

    def walled(self, wishes: Vector) -> Choice:
        """AMC's sequential wall (He et al. 2018, algorithm 1): each action in turn is lowered until the budgets can still
        be met with everything after it at its smallest. Late actions starve and budget is left unused; for comparison."""
        idle = self.only_if_asked - self.bound
        choice = tuple(levels[-1] if i in idle else levels[0] for i, levels in enumerate(self.levels))
        for action, (wish, levels) in enumerate(zip(np.clip(wishes, 0, 1), self.levels, strict=True)):
            if action in idle:
                continue
            wanted = _nearest(levels, levels[0] + wish * (levels[-1] - levels[0]))
            for level in reversed([level for level in levels if level <= wanted]):
                candidate = self.with_value(choice, action, level)
                if level == levels[0] or self.fits(candidate):
                    choice = candidate
                    break
        return choice

    @cached_property
    def _alone(self) -> tuple[Cost, ...]:
        """The cost with each action alone at its smallest level."""
        return tuple(self.price(self.with_value(self.largest, i, levels[0])) for i, levels in enumerate(self.levels))

    @cached_property
    def bound(self) -> frozenset[int]:
        """Actions that relieve a budget when they are lowered."""
        metrics = [limit.budget.metric for limit in self.limits]
        full = self.price(self.largest)
        return frozenset(
            i
            for i, levels in enumerate(self.levels)
            if len(levels) > 1 and any(self._alone[i].metric(metric) < full.metric(metric) for metric in metrics)
        )

    @cached_property
    def relief(self) -> NDArray[np.float32]:
        """``[steps, width]``: the share of all that single actions can save which this one saves, of the first limit's metric."""
        metric: Metric = self.limits[0].budget.metric if self.limits else "flops"
        full = self.price(self.largest).metric(metric)
        saved = np.array([max(full - cost.metric(metric), 0.0) for cost in self._alone])
        shares = saved / max(saved.sum(), 1e-9)
        return np.array([[shares[i] for i in step] for step in self.steps], np.float32)

    @cached_property
    def tightness(self) -> NDArray[np.float32]:
        """Every metric's limit as a share of the largest policy's cost; 1 where there is no limit."""
        full = self.price(self.largest)
        shares = dict.fromkeys(get_args(Metric), 1.0)
        for limit in self.limits:
            shares[limit.budget.metric] = min(limit.value / max(full.metric(limit.budget.metric), 1e-9), 1.0)
        return np.array(list(shares.values()), np.float32)

    def fill(self, choice: Choice, wanted: Vector) -> Choice:
        """Raise one bound action by one level while a budget allows it, the one furthest below ``wanted`` first."""
        blocked: set[int] = set(range(len(choice))) - self.bound
        while len(blocked) < len(choice):
            gaps = [
                (wanted[i] - value) / max(wanted[i], 1e-9) if i not in blocked else -np.inf
                for i, value in enumerate(choice)
            ]
            best = int(np.argmax(gaps))
            raised = self.raised(choice, best)
            if raised != choice and self.fits(raised):
                choice = raised
            else:
                blocked.add(best)
        return choice

    def raised(self, choice: Choice, action: int, by: int = 1) -> Choice:
        """``choice`` with one action (and those tied to it) moved by ``by`` levels, clipped to the ends."""
        levels = self.levels[action]
        position = min(max(levels.index(choice[action]) + by, 0), len(levels) - 1)
        return self.with_value(choice, action, levels[position])

    def with_value(self, choice: Choice, action: int, value: int) -> Choice:
        """``choice`` with one action, and those tied to it, set to ``value``."""
        together = next((group for group in self.tied if action in group), (action,))
        return tuple(value if i in together else old for i, old in enumerate(choice))

    def _tie(self, choice: Choice) -> Choice:
        """Actions that share one tensor take the largest value among them."""
        result = list(choice)
        for group in self.tied:
            for i in group:
                result[i] = max(choice[j] for j in group)
        return tuple(result)

    def check_reachable(self) -> None:
        """Refuse budgets below what this space can build.

        Raises:
            GoalMissedError: names the smallest value of the metric that can be reached.
        """
        cost = self.price(self.smallest)
        for limit in self.limits:
            reached = cost.metric(limit.budget.metric)
            if reached > limit.value:
                relative = f" ({reached / (limit.value / limit.budget.limit):.3f}x)" if limit.budget.relative else ""
                raise GoalMissedError(
                    f"The budget {limit.budget} cannot be met: the smallest {limit.budget.metric} that this network can "
                    f"reach on this target is {reached:.4g}{relative}. Raise the budget or choose another target."
                )


def _floor(levels: Sequence[int], value: float) -> int:
    return max((level for level in levels if level <= value + 1e-9), default=levels[0])


def _nearest(levels: Sequence[int], value: float) -> int:
    return min(levels, key=lambda level: abs(level - value))


def allowed_widths(width: int, divisor: int) -> tuple[int, ...]:
    """Widths that may be built: multiples of the target's divisor; a group narrower than twice the divisor may also be
    cut to powers of two down to 4 (it is then priced at the padded width)."""
    widths = set(range(divisor, width + 1, divisor)) | {width}
    if width < 2 * divisor:
        widths |= {2**power for power in range(2, 16) if 2**power < width}
    return tuple(sorted(widths))


def channel_space(  # noqa: PLR0913 (what a stage knows)
    network: Network,
    target: Target,
    cost: CostModel,
    limits: Sequence[Limit],
    original: Cost,
    divisor: int | None = None,
    *,
    elements: Sequence[float] = (),
    only_if_asked: bool = True,
    bits: int = FLOAT_BITS,
    sensitivity: Callable[[str], float] | None = None,
) -> SearchSpace:
    """Stage 1: per prunable channel group one action, the channels it keeps; with ``elements`` a second one.

    Args:
        elements: shares of single weights that the layers which a group writes may keep, for example `ELEMENTS`. The
            second action's levels are these in thousandths.
        only_if_asked: the second action stays at 1 unless a budget binds it; otherwise a reward decides, as the paper's.
        bits: of weights and inputs in the policies; a latency or a size may be asked for at these.
        sensitivity: group id -> how much the outputs move when it alone is cut (any unit); a feature of the state.
    """
    groups = network.prunable_groups
    width = 2 if elements else 1
    shares = tuple(sorted({round(1000 * share) for share in (*elements, 1.0)}))

    def to_policy(choice: Choice) -> CompressionPolicy:
        kept: dict[str, LayerChoice] = {}
        for group, share in zip(groups, choice[1::2] if elements else (), strict=False):
            for member in group.members:
                # A layer has one output: it is a member of one group.
                kept[member] = LayerChoice.model_construct(
                    keep_elements=share / 1000, weight_bits=bits, activation_bits=bits
                )
        channels_kept = {group.id: count for group, count in zip(groups, choice[::width], strict=True)}
        return CompressionPolicy.model_construct(
            model=network.model, keep_channels=channels_kept, layers=kept, provenance={}
        )

    names = [(group.id, f"{group.id}:elements")[:width] for group in groups]
    levels = [(allowed_widths(group.width, divisor or target.divisor), shares)[:width] for group in groups]
    return SearchSpace(
        names=tuple(name for pair in names for name in pair),
        levels=tuple(values for pair in levels for values in pair),
        steps=tuple(tuple(range(width * i, width * (i + 1))) for i in range(len(groups))),
        features=_group_features(network, original, cost, sensitivity),
        to_policy=to_policy,
        cost=cost,
        limits=tuple(limits),
        only_if_asked=frozenset(range(1, 2 * len(groups), 2)) if elements and only_if_asked else frozenset(),
        inner=frozenset(width * i for i, group in enumerate(groups) if len(group.members) == 1),
    )


def bitwidth_space(  # noqa: PLR0913 (what may be chosen, and what it costs)
    network: Network,
    pruned: CompressionPolicy,
    shared_inputs: Sequence[Sequence[str]],
    target: Target,
    cost: CostModel,
    limits: Sequence[Limit],
    *,
    pinned: Mapping[str, int] | None = None,
    free_activations: bool = False,
    sensitivity: Mapping[str, Sequence[float]] | None = None,
) -> SearchSpace:
    """Stage 2: two actions per layer, the bits of its weights and of its input; layers that share an input are tied.

    ``pruned`` is stage 1's policy: channels and elements stay as it says. ``shared_inputs`` names the quantisable layers,
    those that read one tensor together; a layer of the network that is not named stays float.

    Args:
        pinned: layers whose weights and input have these bits; an input that is shared is pinned for all that read it.
        free_activations: search activation bits although no budget asks for fewer.
        sensitivity: numbers of every layer for the agent to see, such as KL divergences at a few bit-widths.
    """
    named = {name for group in shared_inputs for name in group}
    layers = [layer.name for layer in network.layers if layer.name in named]
    index = {name: i for i, name in enumerate(layers)}

    def to_policy(choice: Choice) -> CompressionPolicy:
        choices = {
            name: LayerChoice.model_construct(
                keep_elements=pruned.layers.get(name, LayerChoice()).keep_elements,
                weight_bits=choice[2 * i],
                activation_bits=choice[2 * i + 1],
            )
            for name, i in index.items()
        }
        return CompressionPolicy.model_construct(
            model=network.model, keep_channels=pruned.keep_channels, layers=choices, provenance={}
        )

    return SearchSpace(
        names=tuple(f"{name}:{what}" for name in layers for what in ("weight", "activation")),
        levels=_bit_levels(layers, shared_inputs, target, pinned or {}),
        steps=tuple((2 * i, 2 * i + 1) for i in range(len(layers))),
        features=_layer_features(network, pruned.keep_channels, named, sensitivity or {}),
        to_policy=to_policy,
        cost=cost,
        limits=tuple(limits),
        tied=tuple(tuple(2 * index[name] + 1 for name in group) for group in shared_inputs if len(group) > 1),
        # No runtime of ours is faster below 8 activation bits, and the file does not shrink: only a bops budget asks.
        only_if_asked=frozenset(() if free_activations else (2 * i + 1 for i in range(len(layers)))),
    )


def _bit_levels(
    layers: Sequence[str], shared_inputs: Sequence[Sequence[str]], target: Target, pinned: Mapping[str, int]
) -> tuple[tuple[int, ...], ...]:
    """Levels of weights and input of every layer; where two pins meet at one input, the larger counts."""
    inputs = {
        name: max(pinned[other] for other in group if other in pinned)
        for group in shared_inputs
        if any(other in pinned for other in group)
        for name in group
    }
    return tuple(
        (bits[name],) if name in bits else levels
        for name in layers
        for bits, levels in ((pinned, target.weight_bits), (inputs, target.activation_bits))
    )


def _scaled(columns: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """Min-max scale every column over the steps; constant columns become 0 (AMC's state)."""
    table = np.array(columns, np.float32).T
    low, high = table.min(0), table.max(0)
    return np.where(high > low, (table - low) / np.where(high > low, high - low, 1), 0).astype(np.float32)


def _group_features(
    network: Network, original: Cost, cost: CostModel, sensitivity: Callable[[str], float] | None
) -> NDArray[np.float32]:
    """AMC's and Distiller's layer features, summed over the layers whose output or input a group cuts; then the share of
    the predicted latency that goes with half of its channels, and its sensitivity, where they are known."""
    rows = []
    whole = cost(CompressionPolicy(model=network.model))
    for number, group in enumerate(network.prunable_groups):
        written = [layer for layer in network.layers if any(term.group == group.id for term in layer.out_terms)]
        read = [layer for layer in network.layers if any(term.group == group.id for term in layer.in_terms)]
        first = written[0]
        rows.append([
            number, group.width, first.in_channels, first.kernel[0], first.stride[0], first.output_hw[0], len(written),
            sum(layer.macs for layer in written) / original.macs, sum(layer.macs for layer in read) / original.macs,
            sum(layer.params for layer in (*written, *read)) / original.params,
            _latency_share(network, group.id, group.width, cost, whole), sensitivity(group.id) if sensitivity else 0.0,
        ])  # fmt: skip
    return _scaled(list(zip(*rows, strict=True)))


def _latency_share(network: Network, group: str, width: int, cost: CostModel, whole: Cost) -> float:
    if not whole.latency_us:
        return 0.0
    halved = cost(CompressionPolicy(model=network.model, keep_channels={group: max(width // 2, 1)}))
    return max(1 - (halved.latency_us or 0.0) / whole.latency_us, 0.0)


def _layer_features(
    network: Network, keep_channels: Mapping[str, int], named: set[str], sensitivity: Mapping[str, Sequence[float]]
) -> NDArray[np.float32]:
    widths = network.widths | dict(keep_channels)
    rows = []
    for number, layer in enumerate(layer for layer in network.layers if layer.name in named):
        inputs, outputs = channels(layer, widths, network.widths)
        rows.append([
            number, layer.kind == "depthwise", inputs, outputs, layer.kernel[0], layer.stride[0], layer.input_hw[0],
            layer_macs(layer, inputs, outputs), layer_params(layer, inputs, outputs), layer.kind == "linear",
            *sensitivity.get(layer.name, ()),
        ])  # fmt: skip
    return _scaled(list(zip(*rows, strict=True)))


class PolicyEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One episode writes one policy; the last step projects the whole vector, evaluates it and pays the reward.

    Args:
        space: what may be chosen.
        score: choice -> reward (a search counts, caches and journals behind it).

    Observation: `observed`. Action: wishes in [-1, 1]. The last step's ``info`` holds ``choice`` and ``executed``: the
    projected actions of all steps, which belong in the replay.
    ``wall``: keep the budget as AMC does, one action after the other, instead of projecting the whole vector.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own signature)

    def __init__(self, space: SearchSpace, score: Callable[[Choice], float], *, wall: bool = False) -> None:
        self.space = space
        self.score = score
        self.wall = wall
        self.width = len(space.steps[0])
        size = observed(space, np.zeros((1, 0, self.width), np.float32)).shape[1]
        self.observation_space = spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (self.width,), np.float32)
        self._wishes: list[NDArray[np.float32]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._wishes = []
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        wished = (np.clip(action, -1, 1) + 1) / 2
        self._wishes.append(wished.astype(np.float32))
        if len(self._wishes) < len(self.space.steps):
            return self._observe(), 0.0, False, False, {}
        wishes = np.zeros(len(self.space.levels))
        for step, wish in zip(self.space.steps, self._wishes, strict=True):
            wishes[list(step)] = wish
        choice = self.space.walled(wishes) if self.wall else self.space.project(wishes)
        reward = self.score(choice)
        return self._observe(), reward, True, False, {"choice": choice, "executed": self.executed(choice)}

    def executed(self, choice: Choice) -> NDArray[np.float32]:
        """The actions ``[steps, width]`` in [-1, 1] that stand for ``choice``."""
        wishes = self.space.wishes(choice)
        return np.array([[2 * wishes[i] - 1 for i in step] for step in self.space.steps], np.float32)

    def observations(self, choice: Choice) -> NDArray[np.float32]:
        """What the agent would have seen on its way to ``choice``, ``[steps + 1, size]``."""
        wishes = ((self.executed(choice)[None] + 1) / 2).astype(np.float32)
        return np.concatenate([observed(self.space, wishes[:, :step]) for step in range(wishes.shape[1] + 1)])

    def _observe(self) -> NDArray[np.float32]:
        wishes = np.reshape(np.array(self._wishes, np.float32), (1, len(self._wishes), self.width))
        seen: NDArray[np.float32] = observed(self.space, wishes)[0]
        return seen


def observed(space: SearchSpace, wishes: NDArray[np.float32]) -> NDArray[np.float32]:
    """What an agent sees after the wishes ``[episodes, steps done, width]`` in [0, 1]: ``[episodes, size]`` in [0, 1].

    AMC's state (He et al. 2018, section 3.1): features of the step at hand, what the wishes so far give up of the budget and
    what the steps after this one could (`SearchSpace.relief`), and the previous wish; beside it the mean wish, and how
    tight each metric's budget is, so that one agent can serve several budgets.
    """
    count, done, width = wishes.shape
    step = min(done, len(space.steps) - 1)
    previous = wishes[:, -1] if done else np.ones((count, width), np.float32)
    mean = wishes.mean((1, 2)) if done else np.ones(count, np.float32)
    relief = space.relief
    reduced = ((1 - wishes) * relief[:done]).sum((1, 2))
    rest = np.full(count, relief[step + 1 :].sum())
    alike = np.tile(np.concatenate([space.features[step], space.tightness]), (count, 1))
    return np.column_stack([alike, previous, mean, reduced, rest]).astype(np.float32).clip(0, 1)


__all__ = [
    "ELEMENTS",
    "FLOAT_BITS", "Choice", "Evaluator", "Limit", "Outcome", "PolicyEnv", "SearchSpace", "allowed_widths",
    "bitwidth_space", "channel_space", "observed",
]  # fmt: skip
