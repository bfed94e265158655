"""The plan of ``compress --dry-run``: what is searched, how long it takes, and what can be reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgecompress import report_rows as words

if TYPE_CHECKING:
    from edgecompress.plan import Plan, Reach

LEVELS_SHOWN = 8
TITLES = {"prune": "Stage 1: channels", "quantize": "Stage 2: bit-widths"}


def show(plan: Plan, mode: str, as_json: bool) -> None:
    """Print the plan as text, as JSON, or as the last of the JSON lines."""
    if mode == "jsonl":
        from edgecompress.cli.display import emit

        emit({"event": "plan", "plan": plan.model_dump(mode="json")})
    elif as_json:
        click.echo(plan.model_dump_json(indent=1))
    else:
        click.echo("\n".join(lines(plan)))


def lines(plan: Plan) -> list[str]:
    """The plan as lines of text."""
    config = plan.config
    images = ", ".join(f"{count:,} {name}" for name, count in plan.images.items())
    return [
        f"Plan: {config.model} on {config.data} for {plan.device}, budget {config.budget}",
        f"  run      {plan.run}" + (" (exists: needs --resume or --overwrite)" if plan.run_exists else " (not made)"),
        f"  images   {images}",
        f"  latency  {_latency(plan)}",
        "",
        *_groups(plan),
        "",
        *_work(plan),
        "",
        *_reach(plan),
        "",
        "Files: " + ", ".join(plan.files),
    ]


def _latency(plan: Plan) -> str:
    if plan.latency is None:
        return "none: the target has neither a table nor an estimator"
    counts = ", ".join(f"{count} {word}" for word, count in plan.kernels.items() if count)
    return f"{counts} kernels; {plan.latency_about}"


def _groups(plan: Plan) -> list[str]:
    free = [group for group in plan.groups if not group.reason]
    result = [f"{len(free)} of {len(plan.groups)} channel groups may be cut:"]
    width = max((len(group.id) for group in plan.groups), default=0)
    for group in plan.groups:
        others = len(group.layers) - 1
        also = f" (with {others} more layer{'s' if others > 1 else ''})" if others > 0 else ""
        allowed = group.reason or f"of {_few(group.widths)}{also}"
        result.append(f"  {group.id:{width}}  {group.width:5} channels, {'stays: ' if group.reason else ''}{allowed}")
    return result


def _few(widths: tuple[int, ...]) -> str:
    shown = [str(width) for width in widths]
    if len(shown) > LEVELS_SHOWN:
        shown = [*shown[: LEVELS_SHOWN - 2], "...", shown[-1]]
    return " ".join(shown)


def _work(plan: Plan) -> list[str]:
    """What takes how long, in order."""
    rows = [("Load, trace and calibrate", plan.preparing_s, "")]
    searches = {stage.stage: stage for stage in plan.stages}
    for part in ("original", "prune", "quantize"):
        if part in searches:
            search = searches[part]
            each = f"{search.episodes} episodes of {search.episode_s + search.agent_s:.2g} s"
            rows.append(
                (
                    TITLES[part],
                    search.seconds,
                    f"{each}, {search.actions} actions, 10^{search.policies_log10:.1f} policies",
                )
            )
        for training in (training for training in plan.trainings if training.part == part):
            steps = f"{training.epochs} epochs of {training.steps} steps of {training.step_s:.2g} s"
            rows.append((training.title, training.seconds, steps))
    width = max(len(title) for title, _, _ in rows)
    threads = plan.config.threads
    memory = f", {words.short_size(plan.peak_memory_bytes)} of memory" if plan.peak_memory_bytes else ""
    return [
        f"About {_time(plan.seconds)} on {threads} thread{'s' if threads > 1 else ''}{memory}; not timed: {plan.not_timed}",
        *(f"  {title:{width}}  {_time(seconds):>9}  {detail}".rstrip() for title, seconds, detail in rows),
    ]


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _reach(plan: Plan) -> list[str]:
    """The smallest reachable value of every metric beside the original's and the budget."""
    result = ["The search can reach at the least:"]
    for reach in plan.reach:
        ratio = words.ratio(reach.smallest, reach.original)
        line = f"  {reach.metric:8} {_amount(reach, reach.smallest)} of {_amount(reach, reach.original)} ({ratio})"
        if reach.limit is not None:
            verdict = "can be kept" if reach.holds else "CANNOT BE KEPT"
            line += f", the budget {_amount(reach, reach.limit)} {verdict}"
        elif reach.metric == "latency":
            line += f", {plan.latency}"
        result.append(line)
    return result


def _amount(reach: Reach, value: float) -> str:
    if reach.metric == "latency":
        return words.duration(value)
    return words.file_size(value) if reach.metric == "size" else f"{words.quantity(value)} {reach.unit}"
