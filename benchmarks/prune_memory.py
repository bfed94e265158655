"""Memory of stage 1's search: what 100 episodes leave behind in the process.

python benchmarks/prune_memory.py            # writes docs/benchmarks/prune_memory.json and .md
python benchmarks/prune_memory.py --quick    # 20 episodes; writes nothing
"""

from __future__ import annotations

import argparse

import torch
from harness import Benchmark

from edgecompress.cost import count
from edgecompress.data import load_data
from edgecompress.episodes import Episodes
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.machine import resident_bytes
from edgecompress.models import build_model
from edgecompress.prune import pruner
from edgecompress.reward import reward_by_name
from edgecompress.search import SearchSettings, search
from edgecompress.spaces import Limit
from edgecompress.spec import Budget, CompressionPolicy, Trial
from edgecompress.stage_spaces import channel_space
from edgecompress.trace import trace

WARM_UP, LIMIT_MB = 60, 50.0


def memory_of_episodes(episodes: int, *, network: str = "resnet8", agent: str = "ddpg") -> dict[str, list[float]]:
    """Resident MB after each distinct evaluation of two searches in one process, agent and model of the accuracy included.

    The first, of `WARM_UP` evaluations, loads libraries and fills their caches; what the second leaves behind is a leak.
    """
    data = load_data("digits")
    model = build_model(network, len(data.classes)).eval()
    traced = trace(model, tuple(data.test.images.shape[1:]), network)
    original = count(traced.network, CompressionPolicy(model=""))
    budget = Budget(metric="params", limit=0.5, relative=True)
    space = channel_space(
        traced.network, target_by_name("x86"), lambda policy: count(traced.network, policy),
        [Limit(budget, 0.5 * original.params)], original, 1,
    )  # fmt: skip
    evaluate = Episodes(pruner(model, traced, data), data, data.search_val, original=model)
    reward = reward_by_name("accuracy-flops-latency")

    def held(count: int, seed: int) -> list[float]:
        found: list[float] = []

        def on_trial(trial: Trial, leader: Trial | None) -> None:
            found.append(resident_bytes() / 1e6)

        settings = SearchSettings(stage="prune", agent=agent, episodes=count, seed=seed)
        search(space, evaluate, reward, original, settings, on_trial=on_trial)
        return found

    return {"first search": held(WARM_UP, 0), "second search": held(episodes, 1)}


def growth_row(bench: Benchmark, episodes: int = 100) -> None:
    """The figure of the issue, behind a search that has loaded everything: the most that is held at any time above its end."""
    found = memory_of_episodes(episodes)
    second = found["second search"]
    growth = max(second) - found["first search"][-1]
    bar = f"Growth of the process over a search of {episodes} episodes, behind one of {WARM_UP}"
    if len(second) < episodes:
        bench.misses(bar, growth, LIMIT_MB, "MB", f"the search ran dry after {len(second)}")
    else:
        bench.at_most(bar, growth, LIMIT_MB, "MB")
    bench.details["Growth of the first search of a process, MB (libraries and their caches)"] = round(
        found["first search"][-1] - found["first search"][0], 1
    )
    bench.details["Resident MB after every episode"] = {
        name: " ".join(f"{value:.0f}" for value in held) for name, held in found.items()
    }


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
