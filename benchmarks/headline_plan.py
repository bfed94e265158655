"""What the headline consists of: networks with their budgets and effort, and all of its cells in the order of work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

SEEDS = (0, 1, 2)
AGENTS = ("uniform", "random", "greedy", "milp")  # our own baselines, in both stages
PRUNERS = ("torch-pruning-uniform", "torch-pruning-global", "slimming")
QUANTISERS = ("onnxruntime", "nncf")
IMAGENET = "vgg16_224"
KINDS = ("original", "tuned", "ours", "agents", "peers", "imagenet")


@dataclass(frozen=True)
class Effort:
    """How much training and search one network gets; cells of another effort are other cells.

    train_epochs: of the baseline; 0 where a checkpoint is the baseline. tune_epochs: of every network afterwards, in all: the
    unpruned one's, the peers' and ours. train_images: of the 45,000. episodes: of each of our two stages.
    """

    train_epochs: int = 16
    tune_epochs: int = 8
    train_images: int = 45_000
    episodes: int = 200

    @property
    def baseline(self) -> str:
        """What the baseline alone depends on."""
        return f"{self.train_epochs}x{self.train_images}" if self.train_epochs else "checkpoint"

    @property
    def training(self) -> str:
        """What networks depend on that nothing of ours searched."""
        return f"{self.baseline}-tune{self.tune_epochs}x{self.train_images}"

    @property
    def search(self) -> str:
        """What ours depend on besides."""
        return f"search{self.episodes}"


@dataclass(frozen=True)
class Network:
    """One network of the headline.

    budget: ours. shares: what the pruned peers keep, around what ours does. quantised_share: of our epochs of tuning, the part
        that is quantisation-aware: none at six bits or so, where rounding loses nothing that a search can see. divisor: channels
        come in steps of it, ours and the peers'; None: of the target's. seeds: of ours and of the tuned original. agents: our
        own baselines.
    """

    name: str
    title: str
    budget: str
    shares: tuple[str, ...]
    quantised_share: float
    effort: Effort = Effort()
    divisor: int | None = None
    seeds: tuple[int, ...] = SEEDS
    agents: tuple[str, ...] = AGENTS

    @property
    def epochs(self) -> dict[str, int]:
        """Our trainings after the search, `Effort.tune_epochs` in all.

        Raises:
            ValueError: there are too few to divide.
        """
        total = self.effort.tune_epochs
        quantised = math.ceil(total * self.quantised_share)
        if quantised >= total:
            raise ValueError(f"{total} epochs of tuning do not suffice for {self.name}; give --tune-epochs 2 or more")
        return {"finetune": total - quantised, "qat": quantised}

    def with_effort(self, **wanted: int | None) -> Network:
        """With other numbers where they are given; a baseline that is a checkpoint is never trained."""
        given = {key: value for key, value in wanted.items() if value is not None}
        if not self.effort.train_epochs:
            given.pop("train_epochs", None)
        return replace(self, effort=replace(self.effort, **given))


# In the order of work: what takes longest comes last.
NETWORKS = {
    network.name: network
    for network in (
        Network(
            "resnet56", "ResNet-56", "flops=0.5x,size=0.125x", ("flops=0.4x", "flops=0.5x", "flops=0.65x"),
            quantised_share=0.0, divisor=4, effort=Effort(train_epochs=0),
        ),
        Network(
            "vgg19_bn_cifar", "VGG-19-BN", "params=0.074x,flops=0.25x,size=0.8MB",
            ("params=0.07x", "params=0.14x", "params=0.28x"), quantised_share=0.375,
        ),
        # Only its peers are a bar of it: one seed, and one share that they keep.
        Network(
            "vgg16_bn_cifar", "VGG-16-BN", "params=0.1x,flops=0.25x,size=0.8MB", ("params=0.14x",), quantised_share=0.375,
            seeds=(0,), agents=(),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One cell. ``method``: who made the file; a peer's is ``PRUNER+QUANTISER``, or ``tuned+QUANTISER`` for what is not pruned."""

    kind: str
    network: Network
    method: str
    seed: int = 0
    budget: str = ""

    @property
    def file(self) -> str:
        """Tells it from the other cells of its network."""
        return f"{self.method}{'@' if self.budget else ''}{self.budget}/{self.seed}"

    @property
    def name(self) -> str:
        """Of the cell."""
        if self.kind == "imagenet":
            return IMAGENET
        effort = self.network.effort
        searched = f"-{effort.search}" if self.kind in ("ours", "agents") else ""
        return f"{self.network.name}/{effort.training}{searched}/{self.file}"


def jobs_of(network: Network) -> Iterator[Job]:
    """All cells of a network, in the order of work: rows of one seed first."""
    yield Job("original", network, "original")
    yield Job("tuned", network, "tuned")
    for quantiser in QUANTISERS:
        yield Job("peers", network, f"tuned+{quantiser}")
    yield Job("ours", network, "ours", budget=network.budget)
    for pruner in PRUNERS:
        for share in network.shares:
            for quantiser in QUANTISERS:
                yield Job("peers", network, f"{pruner}+{quantiser}", budget=share)
    for seed in network.seeds[1:]:
        yield Job("tuned", network, "tuned", seed)
        yield Job("ours", network, "ours", seed, network.budget)
    for agent in network.agents:
        yield Job("agents", network, f"ours-{agent}", budget=network.budget)


def all_jobs(networks: tuple[Network, ...]) -> Iterator[Job]:
    """Everything, the size of VGG-16 at 224x224 as the second."""
    first, *rest = [job for network in networks for job in jobs_of(network)]
    yield from (first, Job("imagenet", first.network, IMAGENET), *rest)
