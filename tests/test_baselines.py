"""Baselines of stage 2: uniform bits, integer programming over sensitivities, and the sensitivities themselves."""

from __future__ import annotations

from itertools import islice, product

import numpy as np
import pytest
import torch
from sample_networks import integer_case

from edgecompress.baselines import integer_program, programs, uniform
from edgecompress.errors import BadFileError
from edgecompress.fidelity import QUANTIZED, divergence
from edgecompress.search import Scorer, SearchSettings, search
from edgecompress.sensitivity import sensitivities
from edgecompress.spaces import Limit, Outcome, SearchSpace
from edgecompress.spec import Budget, CompressionPolicy, Cost, LayerChoice
from edgecompress.starts import sensitivities_of

BITS = (2, 4, 8)
MACS = np.array([40, 10, 25])
PARAMS = np.array([10, 60, 30])


def price(policy: CompressionPolicy) -> Cost:
    bits = [(choice.weight_bits, choice.activation_bits) for choice in policy.layers.values()]
    size = sum(int(p) * w for p, (w, _) in zip(PARAMS, bits, strict=True))
    bops = sum(int(m) * w * a for m, (w, a) in zip(MACS, bits, strict=True))
    return Cost(macs=75, sparse_macs=75, params=100, nonzeros=100, size_bytes=size, bops=bops)


def bit_space(tied: bool = False, **limits: float) -> SearchSpace:
    def to_policy(choice: tuple[int, ...]) -> CompressionPolicy:
        layers = {f"l{i}": LayerChoice(weight_bits=choice[2 * i], activation_bits=choice[2 * i + 1]) for i in range(3)}
        return CompressionPolicy(model="", layers=layers)

    return SearchSpace(
        names=tuple(f"l{i}:{what}" for i in range(3) for what in ("weight", "activation")),
        levels=(BITS,) * 6,
        steps=((0, 1), (2, 3), (4, 5)),
        features=np.eye(3, dtype=np.float32),
        to_policy=to_policy,
        cost=price,
        limits=tuple(
            Limit(Budget.model_validate({"metric": metric, "limit": value, "relative": False}), value)
            for metric, value in limits.items()
        ),
        tied=((1, 3),) if tied else (),
        only_if_asked=frozenset({1, 3, 5}),
    )


def tables(seed: int) -> dict[int, dict[int, float]]:
    random = np.random.default_rng(seed)
    return {i: {2: 1 + random.random(), 4: random.random(), 8: 0.0} for i in range(6)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tied", "limits"), [(False, {"size": 450}), (True, {"size": 500, "bops": 2400})])
def test_integer_program_is_the_best_of_all_policies(seed: int, tied: bool, limits: dict[str, float]) -> None:
    space, costs = bit_space(tied, **limits), tables(seed)

    def loss(choice: tuple[int, ...]) -> float:
        return sum(costs[action][value] for action, value in enumerate(choice))

    found = integer_program(space, costs)
    assert found is not None and space.fits(found)
    idle = space.only_if_asked - space.bound
    allowed = [
        choice
        for choice in product(BITS, repeat=6)
        if space.fits(choice) and (not tied or choice[1] == choice[3]) and all(choice[i] == 8 for i in idle)
    ]
    assert loss(found) == pytest.approx(min(map(loss, allowed)))


def test_uniform_policies_have_one_bit_width_and_leave_idle_activations() -> None:
    found = dict(uniform(bit_space(size=450)))
    assert found["uniform-8"] == (8,) * 6 and found["uniform-4"] == (4, 8) * 3
    assert dict(uniform(bit_space(bops=2400)))["uniform-4"] == (4,) * 6


ORIGINAL = Cost(macs=75, sparse_macs=75, params=100, nonzeros=100, size_bytes=3200, bops=75 * 1024)


def run_search(agent: str, **options: object) -> tuple[set[str], int]:
    calls = []

    def evaluate(policy: CompressionPolicy) -> Outcome:
        calls.append(policy)
        loss = sum(1 / choice.weight_bits for choice in policy.layers.values())
        return Outcome(accuracy=float(np.exp(-loss)), loss=loss)

    settings = SearchSettings(stage="quantize", agent=agent, episodes=40)
    trials = search(
        bit_space(size=450), evaluate, lambda accuracy, cost, original: accuracy, ORIGINAL, settings, **options
    )
    assert all(trial.cost.size_bytes <= 450 for trial in trials) and trials
    return {trial.arm for trial in trials}, len(calls)


def test_baselines_are_arms_of_the_one_loop() -> None:
    assert run_search("uniform")[0] == {"uniform", "uniform-4"}
    arms, _ = run_search("greedy")
    assert arms >= {"uniform", "sensitivity"} and not arms & {"surrogate", "mutation", "ddpg"}
    asked = []
    arms, calls = run_search("milp", tables=lambda: asked.append(1) or tables(0))
    assert "milp" in arms and len(asked) == 1 and calls == 3  # uniform, original, the program's
    assert "sensitivity" in run_search("milp")[0]  # without tables it measures its own


def test_tables_replace_the_sensitivities_that_a_search_would_measure() -> None:
    arms, calls = run_search("ddpg", tables=lambda: tables(0))
    assert "sensitivity" not in arms and {"milp", "surrogate"} & arms and calls <= 40
    assert "sensitivity" in run_search("ddpg")[0]
    assert "sensitivity" in run_search("greedy", tables=lambda: tables(0))[0]  # greedy is the arm that measures


def test_programs_start_at_the_best_and_spread_around_it() -> None:
    space, costs = bit_space(size=450, bops=2400), tables(1)
    found = list(islice(programs(space, costs, seed=0), 20))
    assert found[0] == integer_program(space, costs) and len(set(found)) > 1
    assert all(space.fits(choice) for choice in found)
    assert found == list(islice(programs(space, costs, seed=0), 20))


def test_rewards_and_starts_are_of_the_estimate_where_there_is_one() -> None:
    def evaluate(policy: CompressionPolicy) -> Outcome:
        loss = sum(1 / choice.weight_bits for choice in policy.layers.values())
        return Outcome(accuracy=1 - np.exp(-loss), loss=-loss, estimate=float(np.exp(-loss)))  # labels say the opposite

    def reward(accuracy: float, cost: Cost, original: Cost) -> float:
        return accuracy

    settings = SearchSettings(stage="quantize", agent="ddpg", episodes=40)
    space = bit_space(size=450)
    trials = search(space, evaluate, reward, ORIGINAL, settings)
    assert all(trial.reward == trial.estimate == trial.believed != trial.accuracy for trial in trials)
    allowed = [choice for choice in product(BITS, (8,), BITS, (8,), BITS, (8,)) if space.fits(choice)]
    least = min(sum(1 / bits for bits in choice[::2]) for choice in allowed)
    assert max(trial.reward for trial in trials) == pytest.approx(np.exp(-least))
    deltas = sensitivities_of(space, Scorer(space, evaluate, reward, ORIGINAL, settings), settings)
    assert deltas and all(rise[0] > 0 and drop[0] > 0 for _, rise, drop in deltas.values())


def test_estimate_falls_with_the_divergence_from_the_float_network() -> None:
    wanted = [torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * 3]
    noise = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    found = [QUANTIZED.expected(0.9, divergence(wanted, [wanted[0] + share * noise])) for share in (0.0, 0.3, 1.0)]
    assert found[0] == pytest.approx(0.9) and 0.9 > found[1] > found[2]


def test_sensitivities_fall_with_bits_and_are_read_back(tmp_path) -> None:
    case = integer_case("residual")
    path = tmp_path / "sensitivities.json"
    told: list[tuple[int, int]] = []
    found = sensitivities(
        case.simulator, [case.images[:8], case.images[8:12]], path, on_step=lambda *step: told.append(step)
    )
    total = len(found.weight) + len(set(case.simulator.points.layer_input.values()))
    assert told == [(done, total) for done in range(total + 1)]
    assert found.images == 12 and set(found.weight) == {layer.name for layer in case.graph.layers}
    for layer in found.weight:
        for what in ("weight", "activation"):
            table = found.table(what, layer)
            assert set(table) == set(range(2, 9)) and table[2] > 2 * table[8] >= 0
            assert [table[bits] for bits in range(2, 9)] == sorted(table.values(), reverse=True)
    shared = case.simulator.points.layers_of(case.simulator.points.layer_input["shortcut.0"])
    assert len({tuple(found.activation[layer].items()) for layer in shared}) == 1
    assert sensitivities(case.simulator, iter(()), path) == found
    path.write_text("{")
    with pytest.raises(BadFileError):
        sensitivities(case.simulator, [torch.zeros(1, 3, 16, 16)], path)
