"""The two environments and the projection that keeps every budget: no network is needed for any of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from sample_networks import Concat, Mobile, Residual

from edgecompress.cost import Latency, count
from edgecompress.envs import PolicyEnv
from edgecompress.errors import GoalMissedError
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.models import build_model
from edgecompress.mutations import exchanged
from edgecompress.spaces import Limit, SearchSpace
from edgecompress.spec import Budget, CompressionPolicy, LayerChoice, parse_budgets
from edgecompress.stage_spaces import ELEMENTS, allowed_widths, bitwidth_space, channel_space
from edgecompress.starts import inner_only
from edgecompress.trace import trace

TARGET = target_by_name("x86")
FLOAT = CompressionPolicy(model="")


@pytest.fixture(scope="module")
def networks():
    models = {"residual": Residual(4), "mobile": Mobile(4), "concat": Concat(4)}
    found = {name: trace(model, (3, 16, 16), name).network for name, model in models.items()}
    return found | {"resnet8": trace(build_model("resnet8", 10), (3, 32, 32), "resnet8").network}


def size_of(built, params: int) -> int:
    """A file of packed weights with 300 bytes around them."""
    return 300 + sum(k.in_channels * k.out_channels * k.layer.kernel[0] ** 2 * k.weight_bits // 8 for k in built)


def staircase(built, edges=()) -> Latency:
    """Kernels compute blocks of 16 channels; a block that is begun takes as long as a whole one."""
    us = 5.0
    for kernel in built:
        layer = kernel.layer
        read = 1 if layer.kind == "depthwise" else math.ceil(kernel.in_channels / 16)
        us += math.ceil(kernel.out_channels / 16) * read * math.prod((*layer.kernel, *layer.output_hw)) / 100
    return Latency(us, us, us, {})


def channels(network, budget: str = "flops=0.5x", divisor: int | None = None) -> SearchSpace:
    def cost(policy):
        return count(network, policy, staircase, size_of)

    original = cost(FLOAT)
    limits = [Limit(b, b.absolute(original.metric(b.metric))) for b in parse_budgets(budget)]
    return channel_space(network, TARGET, cost, limits, original, divisor)


def bits(network, budget: str = "size=0.15x", shared=None, target=TARGET, **options) -> SearchSpace:
    def cost(policy):
        return count(network, policy, None, size_of)

    original = cost(FLOAT)
    limits = [Limit(b, b.absolute(original.metric(b.metric))) for b in parse_budgets(budget)]
    shared = shared or [(layer.name,) for layer in network.layers]
    pruned = CompressionPolicy(model="", keep_channels={})
    return bitwidth_space(network, pruned, shared, target, cost, limits, **options)


RESIDUAL_SHARED = [("stem.0",), ("a1.0",), ("a2.0",), ("b1.0", "shortcut.0"), ("b2.0",), ("fc",)]


@pytest.fixture(
    scope="module",
    params=[
        "residual flops", "mobile flops+size", "resnet8 coarse", "concat fine", "residual bits", "residual bops",
        "resnet8 bits+bops", "resnet8 latency", "resnet8 latency+params",
    ],
)  # fmt: skip
def space(request, networks):
    return {
        "residual flops": lambda: channels(networks["residual"], "flops=0.5x", 4),
        "mobile flops+size": lambda: channels(networks["mobile"], "flops=0.6x,size=0.5x", 2),
        "resnet8 coarse": lambda: channels(networks["resnet8"], "flops=0.5x", 16),
        "concat fine": lambda: channels(networks["concat"], "params=0.4x", 1),
        "residual bits": lambda: bits(networks["residual"], "size=0.15x", RESIDUAL_SHARED),
        "residual bops": lambda: bits(networks["residual"], "bops=0.03x", RESIDUAL_SHARED),
        "resnet8 bits+bops": lambda: bits(networks["resnet8"], "size=0.13x,bops=0.03x"),
        "resnet8 latency": lambda: channels(networks["resnet8"], "latency=0.7x", 4),
        "resnet8 latency+params": lambda: channels(networks["resnet8"], "latency=0.8x,params=0.4x", 4),
    }[request.param]()


def random_wishes(space: SearchSpace, seed: int) -> np.ndarray:
    """Uniform, skewed, extreme or equal wishes, some outside [0, 1]."""
    random = np.random.default_rng(seed)
    size = len(space.levels)
    return [
        random.random(size), random.random(size) ** 4, random.integers(0, 2, size).astype(float),
        np.full(size, random.random()), random.normal(0.5, 1, size),
    ][seed % 5]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")
@pytest.mark.parametrize("kind", ["channels", "bits"])
def test_gymnasium_accepts_the_environment(kind, networks):
    space = channels(networks["residual"]) if kind == "channels" else bits(networks["residual"])
    check_env(PolicyEnv(space, lambda choice: float(sum(choice))), skip_render_check=True)


def test_projection_keeps_every_limit_levels_and_ties(space):
    for seed in range(60):
        choice = space.project(random_wishes(space, seed))
        assert all(value in levels for value, levels in zip(choice, space.levels, strict=True))
        cost = space.price(choice)
        for limit in space.limits:
            assert cost.metric(limit.budget.metric) <= limit.value
        for group in space.tied:
            assert len({choice[i] for i in group}) == 1


def test_projection_uses_the_budget_up(space):
    """No single action that relieves a budget can be raised by a level: what is left is smaller than any step."""
    for seed in range(40):
        choice = space.project(random_wishes(space, seed))
        for action in space.bound:
            raised = space.raised(choice, action)
            assert raised == choice or not space.fits(raised), (seed, space.names[action])


def test_projection_of_a_projection_is_itself(space):
    """What the replay stores is the executed action: asked for again, it must come out again."""
    same = [
        (choice := space.project(random_wishes(space, seed))) == space.project(space.wishes(choice))
        for seed in range(40)
    ]
    assert np.mean(same) > 0.9


def test_wishes_of_a_choice_are_in_range_and_executed_actions_too(space):
    env = PolicyEnv(space, lambda choice: 0.0)
    for choice in (space.largest, space.smallest):
        wishes = space.wishes(choice)
        assert wishes.min() >= 0 and wishes.max() <= 1
        assert np.abs(env.executed(choice)).max() <= 1
        assert len(env.executed(choice)) == len(space.steps)


def test_projection_follows_the_wishes(networks):
    """An action that is wished higher than an equal one ends no lower; unlimited, the nearest levels come out."""
    space = channels(networks["resnet8"], "flops=0.5x", 4)
    names = list(space.names)
    a, b = names.index("layer3.0.conv1"), names.index("layer3.0.conv2")
    wishes = np.full(len(names), 0.5)
    wishes[a], wishes[b] = 0.9, 0.2
    up = space.project(wishes)
    wishes[a], wishes[b] = 0.2, 0.9
    down = space.project(wishes)
    assert up[a] > down[a] and up[b] < down[b]
    free = replace(space, limits=())
    assert free.project(np.ones(len(names))) == free.largest and free.project(np.zeros(len(names))) == free.smallest


def test_activation_bits_stay_at_the_top_where_no_budget_asks_for_fewer(networks):
    space = bits(networks["residual"], "size=0.15x")
    activations = [i for i, name in enumerate(space.names) if name.endswith(":activation")]
    assert space.bound == frozenset(range(len(space.names))) - frozenset(activations)
    wishes = np.full(len(space.names), 0.9)
    wishes[activations] = 0.1
    assert {space.project(wishes)[i] for i in activations} == {8}
    assert bits(networks["residual"], "bops=0.05x").bound == frozenset(range(len(space.names)))
    assert space.project(np.ones(len(space.names))) != space.largest


def test_other_actions_that_relieve_no_budget_are_only_rounded(networks):
    space = replace(bits(networks["residual"], "size=0.15x"), only_if_asked=frozenset())
    activations = [i for i, name in enumerate(space.names) if name.endswith(":activation")]
    wishes = np.full(len(space.names), 0.9)
    wishes[activations] = 0.5
    assert {space.project(wishes)[i] for i in activations} == {5}


def test_tied_actions_move_together_and_take_the_largest_wish(networks):
    space = bits(networks["residual"], "size=0.15x", RESIDUAL_SHARED)
    (tie,) = space.tied
    assert [space.names[i] for i in tie] == ["b1.0:activation", "shortcut.0:activation"]
    wishes = np.full(len(space.names), 0.5)
    wishes[tie[0]], wishes[tie[1]] = 0.0, 1.0
    assert {replace(space, only_if_asked=frozenset()).project(wishes)[i] for i in tie} == {8}
    assert {space.with_value(space.largest, tie[0], 3)[i] for i in tie} == {3}
    assert {space.raised(space.largest, tie[1], -2)[i] for i in tie} == {6}


def test_layers_that_are_not_quantisable_stay_float(networks):
    space = bits(networks["residual"], "size=0.5x", RESIDUAL_SHARED[:-1])
    assert not any(name.startswith("fc:") for name in space.names)
    assert space.to_policy(space.smallest).layers.get("fc", LayerChoice()).weight_bits == 32


def test_channel_policy_names_its_groups_and_bit_policy_its_layers(networks):
    space = channels(networks["residual"], "flops=0.5x", 4)
    assert space.to_policy(space.smallest).keep_channels == {"stem.0": 4, "a1.0": 4, "b1.0": 4, "b2.0": 4}
    chosen = bits(networks["residual"])
    policy = chosen.to_policy(tuple([2, 8] * len(networks["residual"].layers)))
    assert {(choice.weight_bits, choice.activation_bits) for choice in policy.layers.values()} == {(2, 8)}
    validated = CompressionPolicy.model_validate(policy.model_dump())
    assert validated.layers == policy.layers


@pytest.mark.parametrize(
    ("width", "divisor", "wanted"),
    [
        (64, 32, (32, 64)), (32, 32, (4, 8, 16, 32)), (16, 32, (4, 8, 16)), (64, 16, (16, 32, 48, 64)),
        (8, 8, (4, 8)), (12, 4, (4, 8, 12)), (24, 16, (4, 8, 16, 24)), (100, 32, (32, 64, 96, 100)), (3, 4, (3,)),
        (4, 32, (4,)), (6, 1, (1, 2, 3, 4, 5, 6)), (63, 32, (4, 8, 16, 32, 63)),
    ],
)  # fmt: skip
def test_allowed_widths(width, divisor, wanted):
    assert allowed_widths(width, divisor) == wanted


@pytest.mark.parametrize("budget", ["flops=0.001x", "flops=0.5x,params=0.001x", "size=10B"])
def test_unreachable_budget_names_the_smallest_that_can_be_reached(networks, budget):
    space = channels(networks["resnet8"], budget, 16)
    with pytest.raises(GoalMissedError) as caught:
        space.check_reachable()
    assert caught.value.exit_code == 3
    limit = space.limits[-1]
    smallest = space.price(space.smallest).metric(limit.budget.metric)
    sentence = str(caught.value)
    assert f"The budget {limit.budget} cannot be met" in sentence and f"{smallest:.4g}" in sentence
    if limit.budget.relative:  # the named number, asked for (rounded up), is indeed reachable
        relative = float(sentence.split("(")[1].split("x)")[0])
        assert smallest / (limit.value / limit.budget.limit) == pytest.approx(relative, abs=6e-4)
    value = smallest * 1.0001
    met = replace(space, limits=(Limit(Budget(metric=limit.budget.metric, limit=value, relative=False), value),))
    met.check_reachable()
    assert met.fits(met.project(np.ones(len(met.levels))))


def test_reachable_budget_passes(space):
    space.check_reachable()


def test_episode_pays_once_with_the_projected_choice(networks):
    space = channels(networks["residual"], "flops=0.5x", 4)
    scored = []
    env = PolicyEnv(space, lambda choice: scored.append(choice) or 0.75)
    observation, _ = env.reset(seed=0)
    assert observation.shape == env.observation_space.shape and observation.dtype == np.float32
    for step in range(len(space.steps)):
        observation, reward, done, truncated, info = env.step(np.ones(1, np.float32))
        assert env.observation_space.contains(observation) and not truncated
        assert done == (step == len(space.steps) - 1) and reward == (0.75 if done else 0.0)
    assert scored == [info["choice"]] == [space.project(np.ones(len(space.levels)))]
    assert np.array_equal(info["executed"], env.executed(info["choice"]))


def test_observations_of_a_choice_are_those_of_playing_it(networks):
    space = bits(networks["residual"], "size=0.15x", RESIDUAL_SHARED)
    env = PolicyEnv(space, lambda choice: 0.0)
    choice = space.project(np.full(len(space.levels), 0.4))
    replayed = env.observations(choice)
    seen = [env.reset()[0]]
    for action in env.executed(choice):
        seen.append(env.step(action)[0])
    assert np.allclose(np.stack(seen), replayed)
    assert replayed.shape == (len(space.steps) + 1, *env.observation_space.shape)


def test_features_are_scaled_and_tell_steps_apart(space):
    assert space.features.shape[0] == len(space.steps)
    assert space.features.min() >= 0 and space.features.max() <= 1 and np.isfinite(space.features).all()
    assert len({tuple(row) for row in space.features.tolist()}) == len(space.steps)


# ------------------------------------------------------------------------------- single weights, the wall, the state


def test_second_action_sets_the_single_weights_of_the_layers_that_a_group_writes(networks):
    network = networks["residual"]

    def space_of(budget: str, **options) -> SearchSpace:
        def nonzero_bytes(policy):
            cost = count(network, policy)
            return cost.model_copy(update={"size_bytes": 4 * cost.nonzeros})

        original = nonzero_bytes(FLOAT)
        limits = [Limit(b, b.absolute(original.metric(b.metric))) for b in parse_budgets(budget)]
        return channel_space(network, TARGET, nonzero_bytes, limits, original, 4, elements=ELEMENTS, **options)

    space = space_of("size=0.3x", bits=8)
    assert space.steps[0] == (0, 1) and space.names[:2] == (network.prunable_groups[0].id, space.names[0] + ":elements")
    choice = space.project(np.full(len(space.levels), 0.5))
    policy = space.to_policy(choice)
    assert space.fits(choice) and min(choice[1::2]) < 1000
    for group, share in zip(network.prunable_groups, choice[1::2], strict=True):
        assert all(policy.layers[name].keep_elements == share / 1000 for name in group.members)
    assert {layer.weight_bits for layer in policy.layers.values()} == {8}
    # A budget on multiply-adds gains nothing from zeros: there every weight stays, unless a reward is to decide.
    assert set(space_of("flops=0.5x").project(np.zeros(len(space.levels)))[1::2]) == {1000}
    free = space_of("flops=0.5x", only_if_asked=False).project(np.zeros(len(space.levels)))
    assert set(free[1::2]) == {250}


@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")
def test_gymnasium_accepts_two_actions_per_group_and_the_wall(networks):
    network = networks["residual"]
    original = count(network, FLOAT, None, size_of)
    limits = [Limit(b, b.absolute(original.metric(b.metric))) for b in parse_budgets("flops=0.5x")]
    space = channel_space(
        network, TARGET, lambda p: count(network, p, None, size_of), limits, original, 4, elements=ELEMENTS
    )
    check_env(PolicyEnv(space, lambda choice: float(sum(choice)), wall=True), skip_render_check=True)


def test_wall_keeps_every_budget_and_starves_what_comes_late(space):
    for seed in range(20):
        assert space.fits(space.walled(random_wishes(space, seed)))
    greedy = space.walled(np.ones(len(space.levels)))
    order = [i for i in range(len(greedy)) if i in space.bound and not any(i in group for group in space.tied)]
    shares = [space.wishes(greedy)[i] for i in order]
    assert shares[0] == 1 and min(shares) < 1


def test_state_tells_the_sensitivity_the_latency_and_how_tight_the_budget_is(networks):
    network = networks["residual"]

    def cost(policy):
        counted = count(network, policy)
        return counted.model_copy(update={"latency_us": 10 + counted.macs / 1e4})

    original = cost(FLOAT)
    most = network.prunable_groups[-1].id

    def state(budget: str, **options) -> np.ndarray:
        limits = [Limit(b, b.absolute(original.metric(b.metric))) for b in parse_budgets(budget)]
        space = channel_space(network, TARGET, cost, limits, original, 4, **options)
        return PolicyEnv(space, lambda choice: 0.0).observations(space.largest)

    plain = state("flops=0.5x")
    blind = count(network, FLOAT)
    without = channel_space(
        network, TARGET, lambda policy: count(network, policy), [Limit(b, b.absolute(blind.metric("flops"))) for b in
        parse_budgets("flops=0.5x")], blind, 4,
    )  # fmt: skip
    latency = plain - PolicyEnv(without, lambda choice: 0.0).observations(without.largest)
    assert (latency != 0).any(0).sum() == 1  # one number of the state
    assert not np.allclose(plain, state("flops=0.4x"))
    assert not np.allclose(plain, state("flops=0.5x", sensitivity=lambda group: float(group == most)))
    assert plain.shape[0] == len(network.prunable_groups) + 1 and plain.min() >= 0 and plain.max() <= 1


def test_exchange_raises_one_action_lowers_another_and_keeps_the_budget(networks):
    space = channels(networks["resnet8"], "flops=0.5x", 4)
    choice = space.project(np.full(len(space.levels), 0.6))
    near = exchanged(space, choice, np.random.default_rng(0), 1000)
    assert len(near) > 3 and choice not in near and len(set(near)) == len(near)
    for other in near:
        assert space.fits(other)
        assert any(new > old for new, old in zip(other, choice, strict=True))
        assert sum(new < old for new, old in zip(other, choice, strict=True)) <= 1
    assert len(exchanged(space, choice, np.random.default_rng(0), 2)) <= 2


def test_relief_is_shared_by_all_budgets(networks):
    network = networks["residual"]
    flops, params, both = (channels(network, budget, 4).relief for budget in (
        "flops=0.5x", "params=0.5x", "flops=0.5x,params=0.5x"))  # fmt: skip
    assert not np.allclose(flops, params) and np.allclose(both, (flops + params) / 2)


def test_inner_only_keeps_the_widths_that_layers_share(networks):
    space = channels(networks["residual"], "flops=0.8x", 1)
    choice = inner_only(space)
    assert choice is not None and space.fits(choice)
    assert all(choice[i] == levels[-1] for i, levels in enumerate(space.levels) if i not in space.inner)
    assert inner_only(channels(networks["residual"], "flops=0.05x", 1)) is None


def test_pinned_layers_keep_their_bits_and_so_does_all_that_reads_their_input(networks):
    space = bits(networks["residual"], shared=RESIDUAL_SHARED, pinned={"b1.0": 6, "fc": 8})
    choice = dict(zip(space.names, space.project(np.random.default_rng(0).random(len(space.names))), strict=True))
    assert choice["b1.0:weight"] == 6 and choice["fc:weight"] == choice["fc:activation"] == 8
    assert choice["b1.0:activation"] == choice["shortcut.0:activation"] == 6
    assert len(space.levels[space.names.index("shortcut.0:weight")]) == 7  # only its input is shared


def test_activations_are_searched_without_a_budget_on_them_only_when_asked(networks):
    wishes = np.full(2 * len(networks["resnet8"].layers), 0.4)
    usual, free = (bits(networks["resnet8"], free_activations=asked).project(wishes) for asked in (False, True))
    assert set(usual[1::2]) == {8} and max(free[1::2]) < 8


def test_the_agent_sees_the_sensitivities_of_every_layer(networks):
    network = networks["residual"]
    shown = {layer.name: (float(number), 1.0) for number, layer in enumerate(network.layers)}
    plain, seeing = bits(network).features, bits(network, sensitivity=shown).features
    assert seeing.shape == (len(plain), plain.shape[1] + 2)
    np.testing.assert_allclose(seeing[:, -2], np.linspace(0, 1, len(plain)), atol=1e-6)
