"""The finalists of stage 1 get a short recovery: once, resumable, and its result is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sample_networks import Residual, patterns, settled

from edgecompress import channel_stage
from edgecompress.channel_stage import SHORT_EPOCHS, _best_after_training, _short_finetune, _tightened, channels_of
from edgecompress.cost import count
from edgecompress.errors import DivergedError
from edgecompress.job import Job, limits_for, pruner_of
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.progress import Silent
from edgecompress.runs import RunFolder
from edgecompress.spec import CompressionPolicy, Config, Trial, parse_budgets
from edgecompress.trace import trace


class Killed(Exception):
    pass


class Told(Silent):
    """Counts epochs, keeps notes, and is killed after the first epoch where asked."""

    def __init__(self, kill: bool = False) -> None:
        self.epochs, self.notes, self._kill = 0, [], kill

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        self.epochs += 1
        if self._kill:
            raise Killed

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def job_in():
    data, model = patterns(), settled(Residual(4))
    traced = trace(model, (3, 16, 16), "residual")

    def job(folder, progress) -> Job:
        folder.mkdir(exist_ok=True)
        return Job(
            config=Config(budget="flops=0.5x", device="cpu"), target=target_by_name("x86"), data=data, run=RunFolder(folder),
            progress=progress, original=model, traced=traced, limits=(), original_cost=count(traced.network, CompressionPolicy(model="")),
        )  # fmt: skip

    return job


def test_finalist_goes_on_after_its_last_epoch_and_is_trained_once(job_in, tmp_path):
    policy = CompressionPolicy(
        model="residual", keep_channels={group.id: group.width // 2 for group in job_in(tmp_path, Told()).network.prunable_groups}
    )  # fmt: skip

    def short(folder: str, progress: Told) -> tuple[float, float]:
        job = job_in(tmp_path / folder, progress)
        return _short_finetune(job, policy, pruner_of(job))

    whole = short("whole", Told())
    with pytest.raises(Killed):
        short("killed", Told(kill=True))
    resumed = Told()
    assert short("killed", resumed) == whole and resumed.epochs == SHORT_EPOCHS - 1
    again = Told()
    assert short("killed", again) == whole and again.epochs == 0
    assert not list((tmp_path / "killed" / "checkpoints").glob("short-*"))
    other = policy.model_copy(update={"keep_channels": {}})
    job = job_in(tmp_path / "killed", again)
    assert _short_finetune(job, other, pruner_of(job)) != whole and again.epochs == SHORT_EPOCHS


@pytest.fixture
def finalists(job_in, tmp_path):
    """A job, its space and three finalists of it."""
    job = job_in(tmp_path / "run", Told())
    cost = job.cost_model(None, None)
    job = replace(
        job,
        config=job.config.model_copy(update={"max_accuracy_drop": 5.0}),
        limits=limits_for(parse_budgets("flops=0.5x"), job.original_cost),
    )
    space = channels_of(job, cost)
    choices = [space.project(np.full(len(space.levels), wish)) for wish in (0.3, 0.6, 0.9)]
    found = [
        Trial(
            stage="prune", episode=i, arm=f"arm{i}", choice=choice, accuracy=0.5, loss=1.0, reward=0.5, cost=space.price(choice),
        )
        for i, choice in enumerate(choices)
    ]  # fmt: skip
    return job, space, found


def stub(monkeypatch, answers):
    """`_short_finetune` says ``answers`` one after the other, or raises them; the policies that it was asked for."""
    asked, left = [], iter(answers)

    def short(job, policy, build):
        asked.append(policy)
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(channel_stage, "_short_finetune", short)
    return asked


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        ([(0.6, 1.0), (0.8, 2.0), (0.7, 0.1)], 1),  # by accuracy
        ([(0.8, 1.0), (0.8, 0.5), (0.8, 0.7)], 1),  # of equals by the lowest loss
        ([(0.9, 1.0), (0.8, 0.5), (0.8, 0.7)], 0),
        ([DivergedError("The loss became nan"), (0.2, 1.0), (0.1, 1.0)], 1),
        ([(0.2, 1.0), (0.3, 1.0), DivergedError("The loss became nan")], 1),
    ],
)
def test_finalist_that_does_best_after_training_is_chosen(finalists, monkeypatch, answers, best):
    job, space, found = finalists
    asked = stub(monkeypatch, answers)
    assert _best_after_training(job, space, found, pruner_of(job)) is found[best]
    assert asked == [space.to_policy(trial.choice) for trial in found]
    lost = [i for i, answer in enumerate(answers) if isinstance(answer, Exception)]
    assert job.progress.notes == [f"a finalist of arm{i} is left out: The loss became nan" for i in lost]


def test_finalists_that_all_diverge_end_the_run(finalists, monkeypatch):
    job, space, found = finalists
    stub(monkeypatch, [DivergedError("first"), DivergedError("second"), DivergedError("third")])
    with pytest.raises(DivergedError, match="third"):
        _best_after_training(job, space, found, pruner_of(job))


def test_cheaper_policy_that_diverges_is_not_good_enough(finalists, monkeypatch):
    job, space, found = finalists
    asked = stub(monkeypatch, [(1.0, 0.1), DivergedError("The loss became nan in epoch 1"), (1.0, 0.1)])
    assert _tightened(job, space, found[1], pruner_of(job)) == asked[0] != space.to_policy(found[1].choice)
    assert len(asked) == 2 and asked[1] != asked[0]
    assert [note.split(":")[0] for note in job.progress.notes] == ["cheaper by 15%", "cheaper by 28%"]
    assert "not good enough, its training diverges: The loss became nan in epoch 1" in job.progress.notes[1]
