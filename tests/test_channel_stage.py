"""The finalists of stage 1 get a short recovery: once, resumable, and its result is kept."""

from __future__ import annotations

import pytest
from sample_networks import Residual, patterns, settled

from edgecompress.channel_stage import SHORT_EPOCHS, _short_finetune
from edgecompress.cost import count
from edgecompress.job import Job, pruner_of
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.progress import Silent
from edgecompress.runs import RunFolder
from edgecompress.spec import CompressionPolicy, Config
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
