"""Memory of stage 1's search: what 100 episodes leave behind in the process.

python benchmarks/prune_memory.py            # writes docs/benchmarks/prune_memory.json and .md
python benchmarks/prune_memory.py --quick    # 20 episodes; writes nothing
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from harness import Benchmark

from edgecompress.cost import count
from edgecompress.data import load_data
from edgecompress.envs import ELEMENTS, Limit, channel_space
from edgecompress.episodes import Episodes
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.models import build_model
from edgecompress.prune import pruner
from edgecompress.reward import reward_by_name
from edgecompress.search import SearchSettings, search
from edgecompress.spec import Budget, CompressionPolicy, Trial
from edgecompress.trace import trace

WARM_UP, LIMIT_MB = 10, 50.0


def resident_mb() -> float:
    """Memory that this process holds now, in MB (of 1,000,000 bytes)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory_of_episodes(
    episodes: int, *, network: str = "resnet8", agent: str = "ddpg", single_weights: bool = False
) -> list[float]:
    """Resident MB after each of ``WARM_UP + episodes`` distinct evaluations of a whole search, agent and model included."""
    data = load_data("digits")
    model = build_model(network, len(data.classes)).eval()
    traced = trace(model, tuple(data.test.images.shape[1:]), network)
    original = count(traced.network, CompressionPolicy(model=""))
    budget = Budget(metric="params", limit=0.5, relative=True)
    space = channel_space(
        traced.network, target_by_name("x86"), lambda policy: count(traced.network, policy),
        [Limit(budget, 0.5 * original.params)], original, 1,
        elements=ELEMENTS if single_weights else (), only_if_asked=False,
    )  # fmt: skip
    evaluate = Episodes(pruner(model, traced, data), data, data.search_val)
    held: list[float] = []

    def on_trial(trial: Trial, leader: Trial | None) -> None:
        held.append(resident_mb())

    settings = SearchSettings(stage="prune", agent=agent, episodes=WARM_UP + episodes)
    search(space, evaluate, reward_by_name("accuracy-flops-latency"), original, settings, on_trial=on_trial)
    return held


def growth_row(bench: Benchmark, episodes: int = 100) -> None:
    """The figure of the issue: 100 episodes after a warm-up of ten, whatever part of the search asks for them."""
    bar = f"Growth of the process over {episodes} episodes of stage 1 after {WARM_UP}"
    held = memory_of_episodes(episodes)
    distinct = len(held) - WARM_UP
    growth = held[-1] - held[WARM_UP - 1]
    if distinct < episodes:
        bench.misses(bar, growth, LIMIT_MB, "MB", f"the search ran dry after {distinct}")
    else:
        bench.at_most(bar, growth, LIMIT_MB, "MB")
    bench.details["Resident MB after every tenth episode"] = [round(value, 1) for value in held[WARM_UP - 1 :: 10]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    bench = Benchmark("prune_memory", quick)
    growth_row(bench, 20 if quick else 100)
    bench.write()


if __name__ == "__main__":
    main()
