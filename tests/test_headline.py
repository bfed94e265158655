"""benchmarks/headline.py without its training: which cells there are, when a bar holds, and what it says where it does not."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cifar10
import headline
import headline_lab
import headline_rows
from cells import Cells, claimed
from command_line import call
from harness import Benchmark
from headline_imagenet import COMMAND
from headline_lab import BusyError, Lab, Stopwatch, search_and_training
from headline_peers import cut, slimming_epochs, slimming_strength
from headline_picture import draw, style_of
from headline_plan import IMAGENET, NETWORKS, Effort, Job, Network, all_jobs, jobs_of

import edgecompress.bit_stage
import edgecompress.pipeline
import edgecompress.recover
from edgecompress.finetune import TrainSettings, _schedule
from edgecompress.models import build_model

VGG, RESNET = NETWORKS["vgg19_bn_cifar"], NETWORKS["resnet56"]
ALL = tuple(NETWORKS.values())


def cell(job: Job, **other) -> dict:
    """A finished, timed cell; ours is small and fast."""
    ours = job.kind in ("ours", "agents")
    return {
        "test": 92.0, "params": 1_400_000 if ours else 20_000_000, "nonzeros": 1_000_000, "macs": 50 if ours else 100,
        "bops": 1, "bytes": 700_000 if ours else 1_000_000, "latency_us": 100.0 if ours else 1000.0,
        "hours": {"search": 1.0, "training": 0.5}, "where": {"machine": "a CPU", "threads": "2"},
    } | other  # fmt: skip


def everything(**of_ours) -> dict[str, dict]:
    """All cells of all networks."""
    jobs = [job for job in all_jobs(ALL) if job.kind != "imagenet"]
    return {job.name: cell(job, **(of_ours if job.kind == "ours" else {})) for job in jobs}


def judged(known: dict[str, dict]) -> dict[str, object]:
    """Every bar by the beginning of its sentence."""
    bench = Benchmark("headline", quick=True)
    headline_rows.rows(bench, known, ALL)
    return {bar.bar.partition(" (torch")[0].partition(" (tuned")[0]: bar for bar in bench.bars}


PEERS = "VGG-19-BN: the best peer of equal accuracy is {} than our file by"
LOSS = "{}: exported file less the unpruned network with the same fine-tuning, test accuracy, mean of seeds{}"


@pytest.mark.parametrize("network", ALL, ids=lambda network: network.name)
@pytest.mark.parametrize("total", [4, 5, 8, 16, 24, 25, 60])
def test_ours_divides_the_epochs_that_everyone_gets(network, total):
    epochs = network.with_effort(tune_epochs=total).epochs
    assert sum(epochs.values()) == total and epochs["finetune"] > 0
    assert (epochs["qat"] > 0) == (network.quantised_share > 0)


def test_epochs_by_default():
    assert VGG.epochs == {"finetune": 5, "qat": 3} and RESNET.epochs == {"finetune": 8, "qat": 0}
    with pytest.raises(ValueError, match=r"1 epochs .* vgg19_bn_cifar; give --tune-epochs 2"):
        assert VGG.with_effort(tune_epochs=1).epochs


def test_cells_have_names_of_their_own_and_come_with_finished_rows_first():
    jobs = list(all_jobs(ALL))
    assert len({job.name for job in jobs}) == len(jobs)
    assert [job.method for job in jobs[:6]] == [
        "original",
        IMAGENET,
        "tuned",
        "tuned+onnxruntime",
        "tuned+nncf",
        "ours",
    ]
    assert jobs[-1].network.name == "vgg16_bn_cifar" and RESNET.budget in jobs[5].name


def test_a_network_with_a_checkpoint_does_not_depend_on_epochs_of_a_baseline():
    jobs = [list(jobs_of(network.with_effort(train_epochs=60, episodes=None))) for network in (RESNET, VGG)]
    assert jobs[0] == list(jobs_of(RESNET)) and jobs[1][0].name != next(jobs_of(VGG)).name


def test_only_ours_depend_on_the_length_of_the_search():
    mine, longer = list(jobs_of(VGG)), list(jobs_of(VGG.with_effort(episodes=999)))
    moved = {job.kind for job, other in zip(mine, longer, strict=True) if job.name != other.name}
    assert moved == {"ours", "agents"}
    moved = {
        job.kind
        for job, other in zip(mine, jobs_of(VGG.with_effort(tune_epochs=99)), strict=True)
        if job.name != other.name
    }
    assert moved == {"original", "tuned", "ours", "agents", "peers"}


def test_everything_finished_and_good_holds():
    bars = judged(everything())
    assert all(bar.holds for title, bar in bars.items() if "224x224" not in title)


def test_no_bar_holds_while_a_cell_is_missing():
    known = everything()
    del known[Job("ours", VGG, "ours", 2, VGG.budget).name]
    bars = judged(known)
    mine = [bar for title, bar in bars.items() if title.startswith("VGG-19")]
    assert len(mine) == 6 and not any(bar.holds for bar in mine)
    assert all(bar.value is not None and bar.reason.startswith("so far: ours@") for bar in mine)
    assert bars[LOSS.format("ResNet-56", ", at 0.5x of its MACs")].holds
    last = next(job for job in reversed(list(jobs_of(RESNET))) if job.kind == "peers")
    del known[last.name]
    bar = judged(known)["ResNet-56: the best peer of equal accuracy is larger than our file by"]
    assert not bar.holds and bar.reason == f"so far: {last.file} is not finished"


def test_bars_of_latency_say_that_files_were_not_timed():
    known = everything()
    for found in known.values():
        del found["latency_us"]
    bars = judged(known)
    assert "(--time)" in bars["VGG-19-BN: latency of the fp32 file over ours, 1 thread"].reason
    assert "not timed" in bars[PEERS.format("slower")].reason and bars[PEERS.format("larger")].holds


def test_a_peer_that_is_better_is_named_with_its_figures():
    known = everything()
    better = next(job for job in jobs_of(VGG) if job.method == "slimming+nncf")
    known[better.name] |= {"bytes": 350_000, "latency_us": 50.0}
    bench = Benchmark("headline", quick=True)
    headline_rows.rows(bench, known, ALL)
    (bar,) = (bar for bar in bench.bars if bar.bar.startswith(PEERS.format("larger")))
    assert bar.value == 0.5 and not bar.holds
    assert (
        f"(slimming+nncf@{better.budget}, seed 0: 92.0 %, 350,000 bytes, 50.0 us; ours is the mean of seeds 0, 1, 2;"
        in bar.bar
    )


def test_no_peer_of_equal_accuracy_is_told():
    bar = judged(everything(test=95.0))[PEERS.format("larger")]
    assert bar.value is None and bar.reason.startswith(
        "no peer is within 0.2 points of our 95.00 %; the most accurate is"
    )


def test_resnet_misses_above_half_of_the_macs():
    bar = judged(everything(macs=51))[LOSS.format("ResNet-56", ", at 0.5x of its MACs")]
    assert not bar.holds and "51 MACs, more than half" in bar.reason


def test_nothing_finished_says_so():
    bars = judged({})
    assert all(bar.value is None and "not finished" in bar.reason for bar in bars.values())


def test_the_command_for_imagenet_is_one_and_only_lacks_the_images(repository, tmp_path, monkeypatch):
    page = (repository / "docs" / "guides" / "data.md").read_text()
    assert COMMAND in " ".join(page.replace("\\\n", " ").split())
    monkeypatch.chdir(tmp_path)
    called = call(*COMMAND.split()[1:])
    assert called.code == 2 and "imagenet" in called.err and "option" not in called.err


def test_rows_of_files_and_of_the_paper():
    known = everything(arms={"prune": "ddpg"})
    row = next(row for row in headline_rows.table(known, VGG) if row["file"].startswith("ours@"))
    assert (row["times faster"], row["hours of search"], row["hours in all"]) == (10.0, 1.0, 1.5)
    assert row["found by"] == "prune: ddpg" and row["non-zeros"] == 1_000_000
    paper = headline_rows.against_the_paper(known, VGG, RESNET)
    assert paper[0]["ours"] == "20.00 M -> 1.40 M (14.3x fewer, 3 of 3 seeds)" and paper[1]["ours"].startswith(
        "+0.00 points"
    )
    (place,) = headline_rows.machines(known, ALL)
    assert place["machine"] == "a CPU" and place["count"] == len(known)


def test_picture_shows_every_file_and_waits_for_two(tmp_path):
    known = everything()
    assert draw(tmp_path / "vgg.svg", known, VGG)
    text = (tmp_path / "vgg.svg").read_text()
    assert "MB on disk" in text and "ms in ONNX Runtime" in text and "edgecompress, DDPG" in text
    assert text.count("network slimming") == 1
    assert not draw(tmp_path / "none.svg", {}, VGG) and not (tmp_path / "none.svg").exists()


@pytest.mark.parametrize(
    ("method", "title"),
    [
        ("original", "original, fp32"), ("tuned", "unpruned, as long tuned, fp32"), ("tuned+nncf", "unpruned, tuned, int8"),
        ("ours", "edgecompress, DDPG"), ("ours-milp", "edgecompress, other searches"), ("slimming+nncf", "network slimming"),
        ("torch-pruning-global+onnxruntime", "Torch-Pruning, global"),
    ],
)  # fmt: skip
def test_methods_are_told_apart_in_the_picture(method, title):
    assert style_of(Job("", VGG, method))[0] == title


@pytest.mark.parametrize(("family", "pull"), [("vgg", 6.6), ("resnet", 0.66)])
def test_slimming_pulls_as_far_as_its_authors_do(family, pull):
    settings = TrainSettings(epochs=slimming_epochs(24), learning_rate=0.02, batch_size=128)
    steps = 352 * settings.epochs
    rates = sum(settings.learning_rate * _schedule(step / steps, settings.epochs) for step in range(steps))
    assert slimming_strength(family, settings, 45_000) * rates / (1 - 0.9) == pytest.approx(pull, rel=0.02)


def test_peers_are_cut_by_macs_or_by_parameters():
    lab = Lab(Network("resnet8", "ResNet-8", "flops=0.5x", (), 0.25))
    model = build_model("resnet8", 10).eval()
    whole = lab.cost_of(model)
    for metric in ("flops", "params"):
        kept = lab.cost_of(cut(lab, model, "torch-pruning-global", f"{metric}=0.5x")).metric(metric)
        assert 0.25 < kept / whole.metric(metric) <= 0.5


def test_seconds_add_up_when_a_work_goes_on(tmp_path, monkeypatch):
    now = iter([0.0, 2.0, 12.0, 100.0, 101.0, 103.0, 104.0])
    monkeypatch.setattr(headline_lab.time, "monotonic", lambda: next(now))
    first = Stopwatch(tmp_path / "a.json", "a")
    first.stage("Fine-tune with distillation", 4)
    first.epoch(1, 4, 0.0)
    again = Stopwatch(tmp_path / "a.json", "a")  # its kill took what came after the epoch
    again.stage("Fine-tune with distillation", 1)  # nothing is left of it: what follows is no training
    again.stage("Export and verify", 1)
    again.tick()
    found = search_and_training(again.seconds)
    assert found == {"search": 5.0, "training": 10.0, "proof": 1.0} and again.peak_bytes > 0


def test_parts_of_a_run_are_called_as_the_hours_expect():
    modules = (edgecompress.recover, edgecompress.bit_stage, edgecompress.pipeline)
    sources = "".join(inspect.getsource(module) for module in modules)
    assert all(f'"{title}"' in sources for title in (*headline_lab.TRAINING, headline_lab.PROOF))


def test_a_cell_that_fails_is_told_and_one_that_waits_is_asked_for_again(tmp_path, monkeypatch, capsys):
    jobs, asked = list(jobs_of(RESNET))[:3], []

    def compute(job, lab):
        asked.append(job.method)
        if job.method == "original":
            raise RuntimeError("no such luck")
        if asked.count("tuned") == 1 and job.method == "tuned":
            raise BusyError("another process trains it")
        return {"test": 1.0}

    monkeypatch.setattr(headline, "compute", compute)
    monkeypatch.setattr(headline, "WAIT_S", 0)
    cells = Cells(tmp_path, None)
    assert headline.work(cells, jobs) == [jobs[0].name]
    assert asked == ["original", "tuned", "tuned+onnxruntime", "tuned"] and set(cells.all()) == {
        jobs[1].name,
        jobs[2].name,
    }
    said = capsys.readouterr().out
    assert "FAIL" in said and "no such luck" in said and f"{jobs[1].name} waits: another process" in said


def test_one_process_trains_a_network(tmp_path):
    lab = Lab(Network("resnet8", "ResNet-8", "flops=0.5x", (), 0.25, Effort(train_epochs=1)), root=tmp_path)
    path = tmp_path / "resnet8" / f"baseline-{lab.network.effort.baseline}.lock"
    with claimed(path) as mine, pytest.raises(BusyError, match="another process trains baseline-1x45000"):
        assert mine
        assert lab.baseline


def test_torchvisions_images_take_the_place_of_jpeg_files(tmp_path, monkeypatch):
    import numpy as np
    import torchvision.datasets

    class Small:
        def __init__(self, root, train, download):
            count = 6000 if train else 20
            self.data = np.zeros((count, 32, 32, 3), np.uint8)
            self.targets = [index % 10 for index in range(count)]

    for name in ("images", "held_out_rows", "seen_rows"):
        monkeypatch.setattr(cifar10, name, getattr(cifar10, name).__wrapped__)
    monkeypatch.setattr(cifar10, "DATA", tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Small)
    data = Lab(VGG).data
    assert data.name == "cifar10" and data.classes[0] == "airplane"
    assert (len(data.train), len(data.search_val), len(data.select_val), len(data.test)) == (1000, 2500, 2500, 20)
    assert not set(cifar10.held_out_rows()) & set(cifar10.seen_rows())
    with pytest.raises(FileNotFoundError, match=r"resnet56 was trained on JPEG files.*EDGECOMPRESS_DATA"):
        cifar10.network("resnet56")
