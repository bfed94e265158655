"""Agents learn, searches repeat themselves exactly, and a journal answers for what was already evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from edgecompress.agents import AGENTS, OFF_POLICY, STATIC, make_agent
from edgecompress.arms import ARMS
from edgecompress.envs import PolicyEnv
from edgecompress.errors import GoalMissedError, UnknownNameError
from edgecompress.files import read_lines
from edgecompress.search import Scorer, SearchSettings, best, search, search_budgets, top
from edgecompress.spaces import Limit, Outcome, SearchSpace
from edgecompress.spec import Budget, CompressionPolicy, Cost, Trial

LEVELS = tuple(range(1, 17))
GROUPS = 5


def price(policy: CompressionPolicy) -> Cost:
    macs = 10 * sum(policy.keep_channels.values())
    return Cost(macs=macs, sparse_macs=macs, params=macs, nonzeros=macs, size_bytes=macs, bops=macs)


def simple_space(limit: float | None, groups: int = GROUPS, levels=LEVELS) -> SearchSpace:
    names = tuple(f"g{i}" for i in range(groups))
    budget = Budget(metric="flops", limit=limit or 1, relative=False)
    return SearchSpace(
        names=names,
        levels=(levels,) * groups,
        steps=tuple((i,) for i in range(groups)),
        features=np.eye(groups, dtype=np.float32),
        to_policy=lambda choice: CompressionPolicy(model="", keep_channels=dict(zip(names, choice, strict=True))),
        cost=price,
        limits=(Limit(budget, limit),) if limit else (),
    )


WISH = np.array([0.95, 0.1, 0.6, 0.3, 0.8])


def closeness(space: SearchSpace, choice) -> float:
    """1 at the wish vector, less with the mean distance to it."""
    return 1 - float(np.abs(space.wishes(choice) - WISH).mean())


@pytest.fixture(autouse=True)
def one_thread():
    """Networks of 128 units gain nothing from a second thread, and lose much when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "seed"), [*((name, 0) for name in OFF_POLICY), ("ddpg", 1)])
def test_agent_learns_a_fixed_wish_and_beats_random_search(name, seed):
    """An identity environment (Stable-Baselines3's own test): the reward is how near the policy is to one vector."""
    space = simple_space(None)
    episodes = 120

    def last_rewards(agent_name: str) -> tuple[float, float]:
        torch.manual_seed(seed)
        rewards = []
        env = PolicyEnv(space, lambda choice: rewards.append(closeness(space, choice)) or rewards[-1])
        agent = make_agent(agent_name, env, seed)
        for _ in range(episodes):
            agent.propose(env)
        assert len(rewards) == episodes
        return float(np.mean(rewards[-20:])), max(rewards)

    learned, best_learned = last_rewards(name)
    guessed, best_guessed = last_rewards("random")
    assert learned > 0.85 > guessed
    assert best_learned > best_guessed


@dataclass
class Landscape:
    """A fake network: accuracy falls with the squared distance of every width to its own best one."""

    consumes: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, policy: CompressionPolicy) -> Outcome:
        self.calls += 1
        widths = np.array(list(policy.keep_channels.values()), float)
        self.seen.append(tuple(policy.keep_channels.values()))
        for _ in range(self.consumes):
            torch.rand(1000)
        loss = float((((widths - 16 * WISH) / 16) ** 2).sum())
        return Outcome(accuracy=float(np.exp(-loss)), loss=loss)


def reward(accuracy: float, cost: Cost, original: Cost) -> float:
    return accuracy - 0.02 * cost.macs / original.macs


ORIGINAL = price(CompressionPolicy(model="", keep_channels={f"g{i}": 16 for i in range(GROUPS)}))


def searched(evaluate=None, *, agent="ddpg", episodes=36, seed=0, limit: float | None = 400, **options) -> list[Trial]:
    settings = SearchSettings(stage="prune", agent=agent, episodes=episodes, seed=seed, imagined=8)
    return search(simple_space(limit), evaluate or Landscape(), reward, ORIGINAL, settings, **options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """One whole search with its journal."""
    journal = tmp_path_factory.mktemp("search") / "trials.jsonl"
    return searched(journal=journal), journal


def test_search_keeps_the_budget_counts_distinct_policies_and_names_arms(unbroken):
    trials, journal = unbroken
    lines = read_lines(journal, Trial, "journal")
    assert len(lines) == len({trial.choice for trial in lines}) == 36
    assert [trial.episode for trial in lines] == list(range(36))
    assert all(trial.cost.macs <= 400 for trial in trials)
    assert trials == [trial for trial in lines if trial.cost.macs <= 400]
    arms = {trial.arm for trial in lines}
    assert {"uniform", "original", "sensitivity", "ddpg", "mutation"} <= arms
    assert any(arm.startswith(("greedy", "surrogate")) for arm in arms)


def test_search_finds_a_good_policy(unbroken):
    trials, _ = unbroken
    found = best(trials)
    space = simple_space(400)
    reachable = max(
        reward(Landscape()(policy).accuracy, price(policy), ORIGINAL)
        for seed in range(300)
        for policy in [space.to_policy(space.project(np.random.default_rng(seed).random(GROUPS)))]
    )
    assert found.reward > reachable
    assert (
        top(trials, 3)[0] == found
        and [t.reward for t in top(trials, 3)] == sorted((t.reward for t in trials), reverse=True)[:3]
    )


def test_every_arm_has_its_name():
    assert set(AGENTS) == {*ARMS, *STATIC}


@pytest.mark.parametrize("agent", [name for name in AGENTS if name != "milp"])
def test_every_arm_keeps_to_the_one_budget(agent):
    landscape = Landscape()
    trials = searched(landscape, agent=agent, episodes=34)
    assert landscape.calls <= 34 and trials and all(trial.cost.macs <= 400 for trial in trials)
    assert landscape.calls == 34 or agent in {*STATIC, "netadapt"}
    arms = {trial.arm for trial in trials}
    if agent in ARMS:
        assert arms & {agent, "mutation"}
        assert ((16,) * GROUPS in landscape.seen) == (agent not in {"amc", "random", "netadapt", "uniform"})


@pytest.mark.parametrize("agent", ["ddpg", "ppo", "amc", "gp", "cma-es", "evolution", "surrogate"])
def test_same_seed_gives_the_same_trials(agent, unbroken):
    first = searched(agent=agent, episodes=28)
    assert searched(agent=agent, episodes=28) == first
    if agent != "surrogate":
        assert [t.choice for t in searched(agent=agent, episodes=28, seed=1)] != [t.choice for t in first]


@pytest.mark.parametrize(("agent", "same"), [("amc", True), ("ddpg", False)])
def test_amc_as_published_learns_from_the_accuracy_and_our_agents_from_the_estimate(agent, same):
    plain, landscape = searched(agent=agent, episodes=70), Landscape()

    def misled(policy: CompressionPolicy) -> Outcome:
        outcome = landscape(policy)
        return replace(outcome, estimate=1 - outcome.accuracy)

    found = searched(misled, agent=agent, episodes=70)
    assert ([t.choice for t in found] == [t.choice for t in plain]) == same


def test_the_callers_random_state_does_not_decide(unbroken):
    torch.manual_seed(12345)
    np.random.seed(54321)
    assert searched() == unbroken[0]


def test_evaluator_that_consumes_random_numbers_changes_nothing(unbroken):
    assert searched(Landscape(consumes=3)) == unbroken[0]


def test_no_policy_is_evaluated_twice():
    landscape = Landscape()
    searched(landscape)
    assert landscape.calls == len(set(landscape.seen)) == 36


@pytest.mark.parametrize(
    ("kept", "torn"), [(0, True), (1, False), (7, True), (20, False), (25, True), (33, True), (36, False)]
)
def test_search_resumes_to_the_identical_trials(unbroken, tmp_path, kept, torn):
    trials, journal = unbroken
    lines = journal.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "trials.jsonl"
    cut.write_bytes(b"".join(lines[:kept]) + (lines[kept][:-9] if torn and kept < len(lines) else b""))
    landscape = Landscape(consumes=2)
    known = read_lines(cut, Trial, "journal")
    assert len(known) == kept
    assert searched(landscape, journal=cut, known=known) == trials
    assert landscape.calls == 36 - kept
    assert cut.read_bytes() == journal.read_bytes()


@pytest.mark.parametrize("agent", ["td3", "ppo", "gp"])
def test_other_agents_resume_identically_too(agent, tmp_path):
    journal = tmp_path / "trials.jsonl"
    whole = searched(agent=agent, journal=journal)
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:30]))
    known = read_lines(journal, Trial, "journal")
    assert searched(agent=agent, journal=journal, known=known) == whole


def test_trials_of_another_stage_do_not_answer(unbroken):
    landscape = Landscape()
    known = [trial.model_copy(update={"stage": "quantize", "reward": 99.0}) for trial in unbroken[0]]
    assert searched(landscape, known=known) == unbroken[0] and landscape.calls == 36


def test_listener_hears_every_trial_with_the_best_so_far(unbroken):
    heard = []
    searched(on_trial=lambda trial, leader: heard.append((trial, leader)))
    assert len(heard) == 36
    fitting: list[Trial] = []
    for trial, leader in heard:
        fitting += [trial] if trial.cost.macs <= 400 else []
        assert leader == best(fitting)


def test_search_ends_when_there_is_nothing_new_left():
    settings = SearchSettings(stage="prune", agent="ddpg", episodes=50)
    landscape = Landscape()
    trials = search(simple_space(None, GROUPS, (8, 16)), landscape, reward, ORIGINAL, settings)
    assert landscape.calls == len(trials) <= 32


def test_stage_without_a_choice_returns_its_one_policy():
    settings = SearchSettings(stage="prune", agent="ddpg", episodes=12)
    trials = search(simple_space(None, GROUPS, (16,)), Landscape(), reward, ORIGINAL, settings)
    assert [trial.choice for trial in trials] == [(16,) * GROUPS]


def test_unreachable_budget_is_refused_before_anything_is_evaluated():
    landscape = Landscape()
    with pytest.raises(GoalMissedError, match=r"the smallest flops that this network can .*reach on this target is 50"):
        searched(landscape, limit=40)
    assert landscape.calls == 0


def test_unknown_agent_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"Unknown agent 'dpg'\. Did you mean 'ddpg'"):
        SearchSettings(stage="prune", agent="dpg")
    with pytest.raises(UnknownNameError, match="Unknown agent"):
        make_agent("dpg", PolicyEnv(simple_space(None), lambda choice: 0.0), 0)


def test_executed_actions_and_returns_fill_the_replay():
    space = simple_space(400)
    env = PolicyEnv(space, lambda choice: 0.5)
    agent = make_agent("ddpg", env, 0)
    choice = space.project(np.ones(GROUPS))
    agent.remember(env, choice, 0.5)
    buffer = agent.model.replay_buffer
    assert buffer.size() == GROUPS
    assert np.allclose(buffer.actions[:GROUPS, 0], env.executed(choice))
    assert np.allclose(buffer.rewards[:GROUPS], 0.5) and buffer.dones[:GROUPS].all()
    assert np.allclose(buffer.observations[:GROUPS, 0], env.observations(choice)[:-1])


def test_scorer_answers_from_its_memory_before_its_journal():
    landscape = Landscape()
    scorer = Scorer(simple_space(None), landscape, reward, ORIGINAL, SearchSettings(stage="prune"))
    first = scorer((4,) * GROUPS, "a")
    assert scorer((4,) * GROUPS, "b") is first and landscape.calls == 1 and first.arm == "a"


@pytest.mark.parametrize("several", [False, True])
def test_search_evaluates_inner_only_widths_where_some_are_shared(several):
    """Groups 1 and 3 decide about one layer alone: the others stay whole, and these pay for the budget by themselves."""
    space, landscape = replace(simple_space(600), inner=frozenset({1, 3})), Landscape()
    settings = SearchSettings(stage="prune", episodes=14, imagined=1)
    if several:
        trials = search_budgets([space], landscape, reward, ORIGINAL, settings)[0]
    else:
        trials = search(space, landscape, reward, ORIGINAL, settings)
    (found,) = [trial for trial in trials if trial.arm == "inner-only"]
    assert found.choice in landscape.seen and space.fits(found.choice)
    assert [found.choice[i] for i in (0, 2, 4)] == [16, 16, 16] and found.choice[1] == found.choice[3] < 16
    others = search(simple_space(600), Landscape(), reward, ORIGINAL, settings)
    assert "inner-only" not in {trial.arm for trial in others}
