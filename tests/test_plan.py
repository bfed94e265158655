"""The dry run: it makes no run, plans what the run does, and says what the budget allows before hours are spent."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from command_line import BUDGET, MODEL, TINY, call
from sample_networks import Residual, settled

from edgecompress.cost import count
from edgecompress.errors import BadModelError, UsageError
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.plan import Plan, make_plan
from edgecompress.rehearsal import Step, Training
from edgecompress.rehearsal import planned as planned_trainings
from edgecompress.runs import RunFolder
from edgecompress.spec import CompressionPolicy
from edgecompress.stage_spaces import allowed_widths

OPTIONS = {"episodes": 12, "finetune_epochs": 4, "noise_epochs": 1, "qat_epochs": 2, "threads": 2}


def planned(*, model=None, data="digits", target="jetson", budget=BUDGET, **options) -> Plan:
    return make_plan(model or settled(Residual(10)), data, target, budget, **(OPTIONS | options))


@pytest.fixture(scope="module")
def few(digits):
    """Digits with few images to evaluate on."""
    return replace(
        digits, search_val=digits.search_val.take(range_of(40)), select_val=digits.select_val.take(range_of(40))
    )


def range_of(count: int):
    import torch

    return torch.arange(count)


@pytest.fixture(scope="module")
def plan(few) -> Plan:
    return planned(data=few)


def test_nothing_is_made(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = planned(
        data=few, runs=tmp_path / "runs", name="first", stages=("quantize",), qat_epochs=0, budget="size=0.5x"
    )
    assert list(tmp_path.iterdir()) == [] and found.run == str(tmp_path / "runs" / "first") and not found.run_exists


def test_groups_have_the_widths_that_the_target_allows(plan):
    divisor = target_by_name("jetson").divisor
    free = [group for group in plan.groups if not group.reason]
    assert free and all(group.widths == allowed_widths(group.width, divisor) for group in free)
    kept = [group for group in plan.groups if group.reason]
    assert [group.id for group in kept] == ["fc"] and all(group.widths == (group.width,) for group in kept)
    assert "the network's output" in kept[0].reason


def test_widths_come_in_the_steps_that_were_asked_for(few, plan):
    finer = planned(data=few, divisor=2, stages=("prune",))
    for group, coarse in zip(finer.groups, plan.groups, strict=True):
        assert group.reason or group.widths == allowed_widths(group.width, 2) != coarse.widths


def test_searches_and_trainings_are_those_of_the_run(plan, few):
    assert [(stage.stage, stage.episodes) for stage in plan.stages] == [("prune", 12), ("quantize", 12)]
    assert plan.stages[0].actions == len([group for group in plan.groups if len(group.widths) > 1])
    titles = {training.title: (training.part, training.epochs) for training in plan.trainings}
    assert titles == {
        "Fine-tune the finalists": ("prune", 6), "Fine-tune with distillation": ("prune", 4),
        "Learn the noise of units and weights": ("prune", 1), "Fine-tune the remaining weights": ("prune", 2),
        "Quantisation-aware training": ("quantize", 2),
    }  # fmt: skip
    assert {training.steps for training in plan.trainings} == {-(-len(few.train) // 64)}
    assert plan.images["train"] == len(few.train) and plan.images["search_val"] == 40


def test_expected_time_is_the_sum_of_what_was_timed(plan):
    parts = [stage.seconds for stage in plan.stages] + [training.seconds for training in plan.trainings]
    assert all(seconds > 0 for seconds in parts) and plan.preparing_s > 0
    assert plan.seconds == pytest.approx(sum(parts) + plan.preparing_s)
    first = plan.stages[0]
    assert first.seconds == pytest.approx(12 * (first.episode_s + first.agent_s) + first.finalists_s)
    assert plan.peak_memory_bytes is None or plan.peak_memory_bytes > 10**7


def test_teacher_is_paid_for_once_for_every_batch_that_it_remembers(few):
    job = SimpleNamespace(data=few, config=SimpleNamespace(batch_size=64))
    steps = -(-len(few.train) // 64)

    def seconds_per_step(remembered: int) -> list[float]:
        step = Step(new_s=3.0, known_s=1.0, remembered=remembered)
        trainings = [
            Training("prune", "finalists", 2, step, times=3), Training("prune", "longer", 8, step),
            Training("quantize", "shorter", 4, step),
        ]  # fmt: skip
        return [training.step_s for training in planned_trainings(job, trainings)]

    assert seconds_per_step(100 * steps) == pytest.approx([(2 * 3 + 4) / 6, (6 * 3 + 2) / 8, 1.0])
    assert seconds_per_step(steps) == pytest.approx([(4 * 3 + 2) / 6, (7 * 3 + 1) / 8, (3 * 3 + 1) / 4])
    assert seconds_per_step(0) == [3.0, 3.0, 3.0]


def test_reach_is_what_the_smallest_network_costs(plan, few):
    from edgecompress.trace import trace

    network = trace(settled(Residual(10)), (3, 32, 32), "residual").network
    keep = {group.id: group.widths[0] for group in plan.groups}
    smallest = count(network, CompressionPolicy(model="", keep_channels=keep))
    reach = {reach.metric: reach for reach in plan.reach}
    assert set(reach) == {"flops", "params", "size", "bops", "latency"}
    assert (reach["flops"].smallest, reach["params"].smallest) == (smallest.macs, smallest.params)
    assert reach["flops"].limit == pytest.approx(0.6 * reach["flops"].original) and reach["flops"].holds
    assert reach["bops"].holds is None and reach["bops"].smallest < reach["bops"].original / 64
    assert 0 < reach["size"].smallest < reach["size"].original


def test_latency_says_what_it_stands_on(plan):
    assert plan.latency == "estimated" and "ESTIMATED" in plan.latency_about
    assert plan.kernels["estimated"] > 0 == plan.kernels["measured"]


def test_files_are_those_that_a_run_writes(plan, tiny_run):
    assert set(plan.files) >= {"exports/model.int8.onnx", "exports/tensorrt/model.onnx", "run.toml", "report.html"}
    assert [name for name in plan.files if not (tiny_run / name).exists()] == []


def test_budget_out_of_reach_is_told_with_the_run_s_own_number(few, quick, tmp_path):
    from edgecompress.errors import GoalMissedError
    from edgecompress.pipeline import compress

    found = planned(data=few, budget="flops=0.0001x", qat_epochs=0, noise_epochs=0)
    (flops,) = [reach for reach in found.reach if reach.metric == "flops"]
    assert flops.holds is False and len(found.stages) == 2  # timed all the same
    with pytest.raises(GoalMissedError, match="cannot be met") as error:
        compress(settled(Residual(10)), few, "jetson", "flops=0.0001x", runs=tmp_path, **OPTIONS)
    assert f"is {flops.smallest:.4g}" in str(error.value)


def test_other_targets_and_stages(few):
    bits = planned(data=few, stages=("quantize",), budget="size=0.5x", qat_epochs=0)
    assert [stage.stage for stage in bits.stages] == ["quantize"] and bits.trainings == ()
    assert {group.reason for group in bits.groups} >= {"stage 1 is not run"}
    channels = planned(data=few, target="jetson-nano", budget="flops=0.6x", max_accuracy_drop=1.0)
    assert [stage.stage for stage in channels.stages] == ["prune"]
    assert "Look for a cheaper policy" in [training.title for training in channels.trainings]
    assert "exports/model.int8.onnx" not in channels.files
    sparse = planned(data=few, stages=("prune",), budget="flops=0.6x", single_weights=True, noise_epochs=0)
    assert "Fine-tune the remaining weights" in [training.title for training in sparse.trainings]


def test_what_a_run_would_refuse_is_refused(few):
    from sample_networks import unprunable

    with pytest.raises(BadModelError, match="has nothing to prune"):
        planned(model=unprunable(10), data=few)
    with pytest.raises(UsageError, match="batch_size"):
        planned(data=few, batch_size=1)


def test_training_of_the_original_is_planned_until_it_is_in_the_cache(few, quick, tmp_path, monkeypatch):
    from edgecompress import original
    from edgecompress.progress import Silent
    from edgecompress.spec import Config

    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path / "cache"))
    data = replace(few, train=few.train.take(range_of(100)))
    options = {"stages": ("quantize",), "budget": "size=0.5x", "qat_epochs": 0, "model": MODEL, "data": data}
    first = planned(**options)
    (training,) = first.trainings
    assert training.part == "original" and training.epochs == 2 and training.title.startswith("Reference network")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    original.original_network(MODEL, Config(model=MODEL, budget="size=0.5x"), data, Silent())
    assert planned(**options).trainings == ()


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def pretended(plan, monkeypatch):
    monkeypatch.setattr("edgecompress.plan.make_plan", lambda *a, **k: plan)


def test_plan_on_the_command_line_makes_no_run(quick, tiny_run, tmp_path):
    arguments = [argument for argument in TINY if argument != "--quiet"]
    called = call(
        "compress", *arguments, "--dry-run", "--runs", tiny_run.parent, "--name", "tiny", "--json", "--qat-epochs", "0"
    )
    assert called.code == 0 and called.err == ""
    found = Plan.model_validate_json(called.out)
    assert found.run_exists and found.config.qat_epochs == 0
    assert found.config.model_copy(update={"qat_epochs": 1}) == RunFolder(tiny_run).config()


def test_plan_in_words(pretended, tmp_path):
    called = call("compress", *TINY, "--dry-run", "--runs", tmp_path)
    assert called.code == 0, called.err
    for part in (
        "channel groups may be cut", "stays: its channels are the network's output", "12 episodes of", "not timed: exporting",
        "steps of", "kernels; ESTIMATED", "can be kept", "latency", "exports/model.int8.onnx", "of memory", "(not made)",
    ):  # fmt: skip
        assert part in called.out, part


def test_plan_out_of_reach_in_words(plan, monkeypatch, tmp_path):
    lost = tuple(reach.model_copy(update={"limit": 1.0, "holds": False}) for reach in plan.reach)
    monkeypatch.setattr("edgecompress.plan.make_plan", lambda *a, **k: plan.model_copy(update={"reach": lost}))
    called = call("compress", *TINY, "--dry-run", "--runs", tmp_path)
    assert called.out.count("CANNOT BE KEPT") == len(lost)


def test_plan_is_the_last_of_the_json_lines(pretended, plan, tmp_path):
    called = call("compress", "--dry-run", "--progress", "jsonl", "--runs", tmp_path)
    last = json.loads(called.out.splitlines()[-1])
    assert last["event"] == "plan" and Plan.model_validate(last["plan"]) == plan
