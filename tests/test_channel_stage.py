"""The finalists of stage 1 get a short recovery: once, resumable, and its result is kept."""

from __future__ import annotations

import pytest
from sample_networks import Residual, patterns, settled

from edgecompress.channel_stage import SHORT_EPOCHS, _short_finetune, finalists_of
from edgecompress.cost import count
from edgecompress.job import Job, pruner_of
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.progress import Silent
from edgecompress.runs import RunFolder
from edgecompress.spec import CompressionPolicy, Config, Cost, Trial
from edgecompress.trace import trace


class Killed(Exception):
    pass


class Told(Silent):
    """Counts epochs, and is killed after the first where asked."""

    def __init__(self, kill: bool = False) -> None:
        self.epochs, self._kill = 0, kill

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        self.epochs += 1
        if self._kill:
            raise Killed


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


def trial(number: int, reward: float, params: int, *, abandoned: bool = False) -> Trial:
    cost = Cost(macs=100, sparse_macs=100, params=params, nonzeros=params, size_bytes=params, bops=100)
    return Trial(
        stage="prune", episode=number, arm="ddpg", choice=(number,), accuracy=reward, loss=0.1, reward=reward, cost=cost,
        abandoned=abandoned,
    )  # fmt: skip


def test_one_finalist_is_the_policy_that_promises_most_after_a_training():
    """A tenth more parameters is worth a point of accuracy before it, and one that was given up promises nothing."""
    best = [trial(0, 0.80, 1000), trial(1, 0.79, 1000), trial(2, 0.785, 1000)]
    others = [trial(3, 0.70, 1500), trial(4, 0.77, 1400), trial(5, 0.79, 3000, abandoned=True)]
    assert [t.episode for t in finalists_of(best + others, best)] == [0, 1, 4]


def test_finalists_are_the_three_best_where_one_of_them_promises_most():
    best = [trial(0, 0.80, 1000), trial(1, 0.79, 1200), trial(2, 0.785, 1000)]
    assert [t.episode for t in finalists_of(best, best)] == [0, 1, 2]
    assert [t.episode for t in finalists_of(best[:1], best[:1])] == [0]
