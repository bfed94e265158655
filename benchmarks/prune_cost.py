"""What an episode of stage 1 costs beside a loop that evaluates the full-size masked network on all held-out images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import cifar10
from cells import Cell
from prune_lab import Lab

from edgecompress.agents import SB3_AGENTS
from edgecompress.episodes import Episodes, Part
from edgecompress.reward import accuracy_only
from edgecompress.search import SearchSettings, search
from edgecompress.spaces import Choice
from edgecompress.spec import CompressionPolicy


def seconds_per_episode(lab: Lab, choices: list[Choice]) -> Cell:
    """Policies timed in each way: the factors of fewer images and of the smaller network. Nothing else may run."""
    for part in ("all", "search"):
        lab.measure(lab.pruned(choices[0]), part)  # reads the images, warms up

    def seconds(act: Callable[[Choice], object]) -> float:
        start = time.perf_counter()
        for choice in choices:
            act(choice)
        return round((time.perf_counter() - start) / len(choices), 4)

    return {
        "masked_all_s": seconds(lambda choice: lab.measure(lab.masked(choice), "all")),
        "masked_search_s": seconds(lambda choice: lab.measure(lab.masked(choice), "search")),
        "pruned_search_s": seconds(lambda choice: lab.measure(lab.pruned(choice), "search")),
        "policies": len(choices),
    }


class _Counting(Episodes):
    """Counts the images that it looked at."""

    seen = policies = 0

    def parts(self, policy: CompressionPolicy) -> Iterator[Part]:
        self.policies += 1
        for part in super().parts(policy):
            self.seen += part.images
            yield part


def early_stop(lab: Lab, budget: str, method: str, seed: int, episodes: int) -> Cell:
    """The search as `compress` runs it, hopeless policies given up: the share of images looked at, and what it ends at."""
    space, original = lab.space(budget, sensitivities=method in SB3_AGENTS)
    counted = _Counting(
        lab.build, lab.train_data, cifar10.part("train", lab.rows["search"]), images=len(lab.rows["search"]),
        original=lab.model,
    )  # fmt: skip
    settings = SearchSettings(stage="prune", agent=method, episodes=episodes, seed=seed)
    final = lab.final(search(space, counted, accuracy_only, original, settings))
    return {
        "share_of_images": round(counted.seen / (counted.policies * len(lab.rows["search"])), 4),
        "policies": counted.policies,
        "select": final["select"],
        "choice": final["choice"],
    }
