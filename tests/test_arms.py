"""The parts of the search engine: black boxes, the accuracy model, several budgets at once, early abandonment, picking."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import numpy as np
import pytest
from test_agents_search import GROUPS, LEVELS, ORIGINAL, Landscape, reward, simple_space

from edgecompress.accuracy_model import AccuracyModel, _negative_evidence, expected_improvement
from edgecompress.black_box import CMAES
from edgecompress.cli.main import main
from edgecompress.envs import observed
from edgecompress.errors import BadFileError, GoalMissedError, UsageError
from edgecompress.files import append_line, read_lines, write_document
from edgecompress.machine import give_memory_back, resident_bytes
from edgecompress.pareto import pareto_set, pick, picked
from edgecompress.reward import reward_by_name, soft_target
from edgecompress.scoring import SearchSettings, best, top
from edgecompress.search import search, search_budgets
from edgecompress.spaces import Limit, Outcome
from edgecompress.spec import Budget, Config, Cost, Trial, parse_budgets


def trial(accuracy: float, macs: int, *, latency: float | None = None, choice: tuple[int, ...] = (), **fields) -> Trial:
    cost = Cost(macs=macs, sparse_macs=macs, params=1, nonzeros=1, size_bytes=1, bops=1, latency_us=latency)
    base = {"stage": "prune", "episode": 0, "arm": "ddpg", "choice": choice or (macs,), "loss": 1.0, "reward": accuracy}
    return Trial(accuracy=accuracy, cost=cost, **(base | fields))


# ------------------------------------------------------------------------------------------------------ black boxes


@pytest.mark.parametrize("size", [5, 12])
def test_cma_es_solves_a_rotated_ellipsoid(size):
    random = np.random.default_rng(0)
    turn, _ = np.linalg.qr(random.standard_normal((size, size)))
    scales = 10.0 ** np.linspace(
        0, 3, size
    )  # a condition of a thousand: without adapting the covariance it takes far longer

    def loss(x: np.ndarray) -> float:
        return float((scales * (turn @ (x - 0.3)) ** 2).sum())

    strategy = CMAES(np.zeros(size), 0.3, random)
    for _ in range(600):
        candidates = strategy.ask()
        strategy.tell(candidates, np.array([loss(x) for x in candidates]))
    assert loss(strategy.mean) < 1e-8


def test_accuracy_model_predicts_policies_that_it_has_not_seen():
    space, landscape = simple_space(None), Landscape()
    random = np.random.default_rng(0)
    choices = [tuple(int(v) for v in random.choice(LEVELS, GROUPS)) for _ in range(140)]
    scores = [landscape(space.to_policy(choice)).accuracy for choice in choices]
    model = AccuracyModel(space)
    model.fit(choices[:100], scores[:100])
    mean, deviation = model.predict(choices[100:])
    errors = mean - scores[100:]
    assert np.std(errors) < 0.3 * np.std(scores[100:])
    assert 0.2 < np.mean((errors / deviation) ** 2) < 4  # its own error bars are about right
    near, far = model.predict([choices[0]])[1], model.predict([(1, 16, 1, 16, 1)])[1]
    assert near < far


def test_gradient_of_the_evidence_is_that_of_differences():
    random = np.random.default_rng(0)
    x, y = random.random((12, 3)), random.standard_normal(12)
    squares, linear = (x.T[:, :, None] - x.T[:, None, :]) ** 2, 1 + x @ x.T
    at, ones = random.normal(0, 0.3, 6), np.ones(6)

    def value(parameters):
        return _negative_evidence(parameters, squares, linear, y, np.zeros(6), ones)

    steps = 1e-5 * np.eye(6)
    slopes = [(value(at + step)[0] - value(at - step)[0]) / 2e-5 for step in steps]
    assert np.allclose(value(at)[1], slopes, atol=1e-5)


def test_expected_improvement_is_the_mean_of_what_is_gained():
    drawn = np.random.default_rng(0).normal(0.4, 0.2, 400_000)
    found = expected_improvement(np.array([0.4]), np.array([0.2]), 0.5)
    assert found[0] == pytest.approx(np.maximum(drawn - 0.5, 0).mean(), rel=0.02)


# ------------------------------------------------------------------------------------------------- several budgets


def three_spaces():
    space = simple_space(500)
    budgets = [Budget(metric="flops", limit=value, relative=False) for value in (500, 400, 300)]
    return [replace(space, limits=(Limit(budget, budget.limit),)) for budget in budgets]


def test_one_agent_serves_three_budgets_with_one_set_of_evaluations(tmp_path):
    journal, landscape = tmp_path / "trials.jsonl", Landscape()
    settings = SearchSettings(stage="prune", episodes=41, imagined=8)
    found = search_budgets(three_spaces(), landscape, reward, ORIGINAL, settings, journal=journal)
    assert landscape.calls == 41
    assert all(t.cost.macs <= limit for trials, limit in zip(found, (500, 400, 300), strict=True) for t in trials)
    assert len(found[0]) >= len(found[1]) >= len(found[2]) > 3
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:31]))
    known = read_lines(journal, Trial, "journal")
    again = search_budgets(three_spaces(), landscape, reward, ORIGINAL, settings, journal=journal, known=known)
    assert again == found and landscape.calls == 41 + 41 - 31
    assert journal.read_bytes() == b"".join(lines)


def test_one_agent_serves_two_devices_at_the_prices_of_each():
    """The second device computes the even groups for nothing."""
    here = simple_space(200)

    def price_there(policy):
        widths = list(policy.keep_channels.values())
        return here.cost(policy).model_copy(update={"macs": 20 * sum(widths[1::2])})

    limit = Budget(metric="flops", limit=200, relative=False)
    there = replace(here, cost=price_there, limits=(Limit(limit, 200),))
    settings = SearchSettings(stage="prune", episodes=60, imagined=8)
    landscape = Landscape()
    found = search_budgets([here, there], landscape, reward, ORIGINAL, settings)
    assert landscape.calls == 60
    whole = [ORIGINAL, price_there(there.to_policy(there.largest))]
    for space, trials, original in zip((here, there), found, whole, strict=True):
        assert trials and all(t.cost == space.price(t.choice) and t.cost.macs <= 200 for t in trials)
        assert all(t.reward == reward(t.accuracy, t.cost, original) for t in trials)
    # What costs nothing on the second device stays there, and is cut on the first.
    assert sum(best(found[1]).choice[0::2]) > sum(best(found[0]).choice[0::2])
    assert best(found[1]).accuracy > best(found[0]).accuracy
    seen = [observed(space, np.ones((1, 1, 1), np.float32)) for space in (here, there)]
    assert not np.array_equal(*seen)


def test_several_budgets_need_an_agent_that_sees_them_and_the_same_actions():
    with pytest.raises(UsageError, match="'evolution' cannot search several budgets at once; choose ddpg, td3, sac"):
        search_budgets(three_spaces(), Landscape(), reward, ORIGINAL, SearchSettings(stage="prune", agent="evolution"))
    with pytest.raises(UsageError, match="only over the same actions"):
        spaces = [simple_space(500), simple_space(500, levels=(8, 16))]
        search_budgets(spaces, Landscape(), reward, ORIGINAL, SearchSettings(stage="prune"))


# --------------------------------------------------------------------------------------------------- abandonment


class Hasty(Landscape):
    """Gives up on whatever its first images say cannot win."""

    def __init__(self) -> None:
        super().__init__()
        self.abandoned: list[tuple[int, ...]] = []

    def unless_hopeless(self, policy, could_win) -> Outcome:
        outcome = self(policy)
        if could_win(outcome.accuracy):
            return outcome
        self.abandoned.append(self.seen[-1])
        return replace(outcome, abandoned=True)


def test_abandoned_trials_are_marked_and_never_chosen(tmp_path):
    hasty, settings = Hasty(), SearchSettings(stage="prune", agent="evolution", episodes=50)
    trials = search(simple_space(400), hasty, reward, ORIGINAL, settings, journal=tmp_path / "trials.jsonl")
    assert {t.choice for t in trials if t.abandoned} == set(hasty.abandoned) and hasty.abandoned
    whole = search(simple_space(400), Landscape(), reward, ORIGINAL, settings)
    # Nothing that could have become one of the five best was given up.
    assert [t.choice for t in top(trials, 5)] == [t.choice for t in top(whole, 5)] and best(trials).choice == best(
        whole
    ).choice
    assert best([trial(0.9, 5, abandoned=True)]) is None and top([trial(0.9, 5, abandoned=True)], 3) == []


# --------------------------------------------------------------------------------------------------------- picking


def test_pareto_set_holds_what_nothing_beats():
    trials = [trial(0.9, 10), trial(0.8, 5), trial(0.8, 6), trial(0.7, 4, abandoned=True), trial(0.9, 10, choice=(99,))]
    assert pareto_set(trials) == [trials[0], trials[1]]
    times = [trial(0.9, 10, latency=4.0), trial(0.9, 12, latency=3.0), trial(0.8, 12, latency=3.5)]
    assert pareto_set(times) == times[:2]


def test_pareto_set_and_pick_go_by_what_the_search_believes():
    lucky = trial(0.9, 10).model_copy(update={"estimate": 0.7})
    better = trial(0.8, 10, choice=(7,)).model_copy(update={"estimate": 0.85})
    assert pareto_set([lucky, better]) == [better]
    assert pick([lucky, better], "prune", parse_budgets("flops=20")).trial == better


def test_pick_answers_relative_and_absolute_budgets():
    trials = [trial(0.95, 100, arm="original"), trial(0.9, 60), trial(0.8, 40), trial(0.85, 39)]
    assert pick(trials, "prune", parse_budgets("flops=0.4x")).trial == trials[3]
    assert pick(trials, "prune", parse_budgets("flops=60")).trial == trials[1]
    assert pick(trials, "prune", parse_budgets("flops=0.1x")).trial is None
    with pytest.raises(BadFileError, match="no trials of stage 'quantize'"):
        pick(trials, "quantize", ())
    with pytest.raises(BadFileError, match="did not measure the uncompressed network"):
        pick(trials[1:], "prune", parse_budgets("flops=0.4x"))


def test_picked_trials_are_priced_anew_for_another_budget_and_device():
    settings = SearchSettings(stage="prune", agent="evolution", episodes=40)
    trials = search(simple_space(500), Landscape(), reward, ORIGINAL, settings)

    def slower(policy):
        cost = simple_space(None).cost(policy)
        return cost.model_copy(update={"macs": cost.macs + 50})

    elsewhere = replace(simple_space(560), cost=slower)
    found = picked(elsewhere, trials, "prune", reward, ORIGINAL)
    assert found and all(t.cost == slower(elsewhere.to_policy(t.choice)) and t.cost.macs <= 560 for t in found)
    with pytest.raises(GoalMissedError, match=r"None of the \d+ trials of stage 'prune' to pick from keeps flops=60"):
        picked(simple_space(60), trials, "prune", reward, ORIGINAL)


def test_pick_command_shows_the_set_and_says_what_fits(tmp_path, capsys):
    write_document(tmp_path / "config.json", Config(budget="flops=0.5x"))
    for found in [trial(0.95, 100, arm="original"), trial(0.9, 60), trial(0.8, 40)]:
        append_line(tmp_path / "trials.jsonl", found)
    main(["pick", str(tmp_path), "flops=0.5x", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["picked"]["accuracy"] == 0.8 and [t["accuracy"] for t in answer["pareto"]] == [0.95, 0.9, 0.8]
    main(["pick", str(tmp_path)])
    assert "0.9000" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["pick", str(tmp_path), "flops=0.1x"])
    assert left.value.code == 3 and "Search with it" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["pick", str(tmp_path), "latency@int8=1ms"])
    assert left.value.code == 2 and "not priced at int8" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- rewards and memory


def test_soft_target_pays_nothing_beyond_the_target_and_takes_little_above_it():
    original = trial(1.0, 100, latency=10.0).cost
    paid = soft_target()
    at = {latency: paid(0.8, trial(0, 100, latency=latency).cost, original) for latency in (2.0, 5.0, 10.0)}
    assert at[2.0] == at[5.0] == 0.8 and at[10.0] == pytest.approx(0.8 * 2**-0.07)
    assert soft_target(target=1.0)(0.8, trial(0, 100).cost, trial(0, 100).cost) == 0.8  # without latency: MACs


def test_a_users_function_is_a_reward():
    assert reward_by_name("edgecompress.reward:accuracy_only")(0.5, ORIGINAL, ORIGINAL) == 0.5
    with pytest.raises(UsageError, match=r"Cannot import the reward 'edgecompress.reward:none'"):
        reward_by_name("edgecompress.reward:none")
    with pytest.raises(UsageError, match="expected a function"):
        reward_by_name("edgecompress.reward:REWARDS")


def test_searches_leave_no_memory_behind():
    """What an agent learns in goes with its search; tests/test_episodes.py asks the same of the networks."""
    if not resident_bytes():
        pytest.skip("the system does not say what a process holds")

    def held_after(episodes: int) -> int:
        settings = SearchSettings(stage="prune", episodes=episodes, imagined=1)
        search(simple_space(400), Landscape(), reward, ORIGINAL, settings)
        gc.collect()
        give_memory_back()
        return resident_bytes()

    before = held_after(16)
    assert held_after(40) - before < 20_000_000
