"""``edgecompress compress``: the main job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from edgecompress.cli.config import read_options
from edgecompress.cli.flags import switch


@click.command("compress")
@click.option(
    "--config", type=click.Path(), is_eager=True, expose_value=False, callback=read_options, metavar="FILE",
    help="Options from a TOML file such as a run's run.toml; the command line wins.",
)  # fmt: skip
@click.option(
    "--model", default="resnet8", show_default=True,
    help="Zoo or torchvision name, timm:NAME, package.module:factory, or a .onnx or .pt2 file.",
)  # fmt: skip
@click.option(
    "--data", default="digits", show_default=True,
    help="'digits', a torchvision data set, the root of an image folder, or package.module:factory.",
)  # fmt: skip
@click.option(
    "--task", default="classification", show_default=True,
    help="classification, segmentation (folders images/ and masks/), or package.module:task.",
)  # fmt: skip
@switch("unlabelled", help="Use no labels: measure agreement with the original. Images in one folder have none.")
@click.option("--weights", help="DEFAULT (published ones), none (train from scratch), or a checkpoint file.")
@switch("trust", help="Open a .pt2 program, which may carry code.")
@switch("download", help="Let torchvision download its weights or data set.")
@click.option("--image-size", type=click.IntRange(min=8), help="Bring images to this height and width.")
@click.option(
    "--preprocessing", default="auto", show_default=True,
    help="weights (as published ones expect), data (found in the images), a JSON file; auto: weights with --weights DEFAULT.",
)  # fmt: skip
@click.option("--target", default="jetson", show_default=True, help="Device, see 'edgecompress targets'.")
@click.option(
    "--budget",
    help="Limits such as 'flops=0.5x,size=40KB,latency=3ms'.  [default: flops=0.5x,size=0.125x; "
    "flops=0.5x where the target has no integer kernels]",
)
@click.option(
    "--max-accuracy-drop", type=click.FloatRange(min=0), metavar="POINTS",
    help="Look for the cheapest policy that loses at most this much; exit code 3 if the exported file loses more.",
)  # fmt: skip
@click.option("--stages", default="prune,quantize", show_default=True, help="Which stages to run.")
@click.option(
    "--agent",
    default="ddpg",
    show_default=True,
    help="ddpg, td3, sac, ppo, amc, evolution, cma-es, gp, netadapt, random, surrogate; baselines: uniform, greedy, milp.",
)
@click.option(
    "--pick", type=click.Path(file_okay=False), metavar="RUN",
    help="Take the channels from the trials of a finished run of this model, under this budget and target; no search.",
)  # fmt: skip
@click.option(
    "--episodes", type=click.IntRange(min=8), default=80, show_default=True, help="Policies evaluated per stage."
)
@click.option(
    "--importance", default="l2", show_default=True,
    help="Which channels go first: by weights (l2, l1, bn-scale) or by training images (taylor, chip).",
)  # fmt: skip
@switch(
    "reconstruct", default=True,
    help="Refit the layers that lost inputs by least squares, in every episode and before fine-tuning; on by default.",
)  # fmt: skip
@switch(
    "single-weights", default=None,
    help="Let stage 1 also choose how many single weights each group keeps; by default where a budget on bytes asks for it.",
)  # fmt: skip
@click.option(
    "--divisor", type=click.IntRange(min=1), metavar="N",
    help="Widths come in steps of N channels; by default the target's, at which its kernels run full.",
)  # fmt: skip
@click.option(
    "--prune-reward", default="accuracy-flops-latency", show_default=True,
    help="Reward of stage 1: accuracy-flops-latency, accuracy-bytes-latency, paper, accuracy, soft-target or module:function.",
)  # fmt: skip
@click.option(
    "--quantize-reward",
    default="accuracy-bytes-latency",
    show_default=True,
    help="Reward of stage 2, by the same names.",
)
@click.option(
    "--finetune-epochs", type=click.IntRange(min=1), default=12, show_default=True, help="Recovery after pruning."
)
@click.option(
    "--noise-epochs", type=click.IntRange(min=0), default=0, show_default=True,
    help="Information dropout, which says what single weights may go; without it their size does.",
)  # fmt: skip
@switch("two-four", help="Keep two of four neighbouring input channels of every weight, for sparse kernels (Ampere).")
@click.option(
    "--ranges", default="mse", show_default=True,
    help="How activation ranges are set from calibration images: mse, minmax, percentile or entropy.",
)  # fmt: skip
@switch("equalise", help="Balance the channels between layers before calibration (for depthwise networks).")
@switch("bias-correction", help="Move biases by what quantisation shifts their channels, where that does not lose.")
@switch("learned-rounding", help="Choose the rounding of every weight for what its layer answers (AdaRound).")
@click.option(
    "--pin-bits", default="", metavar="LAYER=BITS,...",
    help="Layers whose weights and input keep these bits, by name; first and last stand for those layers.",
)  # fmt: skip
@click.option(
    "--alternate", type=click.IntRange(min=0), default=0, show_default=True,
    help="How often stage 1 is opened again at the bits that stage 2 chose, and stage 2 behind it.",
)  # fmt: skip
@switch("free-activations", help="Search the bits of activations although no budget asks for it.")
@click.option(
    "--reward-steps", type=click.IntRange(min=0), default=0, show_default=True,
    help="Training steps that every policy of stage 2 gets before it is measured.",
)  # fmt: skip
@click.option(
    "--qat-epochs", type=click.IntRange(min=0), default=5, show_default=True, help="Quantisation-aware training."
)
@click.option("--learning-rate", type=float, default=0.02, show_default=True, help="Peak rate of the recovery.")
@click.option(
    "--ema", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True, metavar="DECAY",
    help="Average the weights over the steps of every training, 0.999 for example; 0 takes the last ones.",
)  # fmt: skip
@click.option(
    "--train-precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
    help="Of the passes of the recovery: auto takes fewer bits where the hardware is faster in them.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(min=2), default=64, show_default=True, help="Images per step of the training."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides everything that is random.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for training and search.  [default: all]")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="What trains, and measures stage 1: auto takes a GPU (CUDA) where there is one.",
)  # fmt: skip
@click.option("--table", type=click.Path(), help="Latency table to use.  [default: the cache, then an estimate]")
@switch("require-measured", help="Refuse to estimate latency.")
@switch("allow-mismatch", help="Take --table although it was measured in another setting.")
@click.option("--runs", type=click.Path(file_okay=False), default="runs", show_default=True, help="Folder of all runs.")
@click.option("--name", help="Name of this run.  [default: model-data-target]")
@switch("resume", help="Go on with an interrupted run; it ends as an unbroken one would.")
@switch("overwrite", help="Replace a run of this name.")
@switch("dry-run", help="Print the plan with its time, memory and reach, and make no run.")
@click.option(
    "--progress", "mode", type=click.Choice(["auto", "plain", "quiet", "jsonl"]), default="auto", show_default=True,
    help="auto: a bar on a terminal, lines elsewhere; jsonl: one JSON object per event on stdout, the report last.",
)  # fmt: skip
@switch("quiet", help="The same as --progress quiet.")
@click.option("--tensorboard", type=click.Path(file_okay=False), metavar="DIR", help="Write scalars for TensorBoard.")
@switch("json", "as_json", help="Print the report, or the plan, as JSON.")
def command(
    model: str, data: str, target: str, budget: str | None, stages: str, runs: str, name: str | None, resume: bool,
    overwrite: bool, dry_run: bool, mode: str, quiet: bool, tensorboard: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Prune, quantise, export and prove a network for one device.

    \b
    Examples:
      edgecompress compress --target jetson --budget flops=0.5x,size=0.125x
      edgecompress compress --model resnet18 --data photos --dry-run
      edgecompress compress --config run.toml --seed 1 --name second
    """
    from edgecompress.cli.display import display_for
    from edgecompress.errors import UsageError
    from edgecompress.spec import parse_budgets

    if budget is not None:
        parse_budgets(budget)  # before torch is imported, so that a typo is answered at once
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other; give one of them.")
    options["stages"] = tuple(stage.strip() for stage in stages.split(","))
    mode = "quiet" if quiet or (as_json and mode != "jsonl") else mode
    with display_for(mode, tensorboard) as progress, _memory(options, dry_run):
        if dry_run:
            from edgecompress.cli.show_plan import show
            from edgecompress.plan import make_plan

            plan = make_plan(model, data, target, budget, name=name, runs=runs, progress=progress, **options)
        else:
            from edgecompress.pipeline import compress

            run = compress(
                model, data, target, budget, name=name, runs=Path(runs), resume=resume, overwrite=overwrite,
                progress=progress, **options,
            )  # fmt: skip
    if dry_run:
        show(plan, mode, as_json)
    else:
        _finish(run, mode, as_json)


@contextmanager
def _memory(options: dict[str, Any], dry_run: bool) -> Iterator[None]:
    """Turn running out of memory, on the CPU or a GPU, into the sentence that says what to try."""
    from edgecompress.errors import EdgeCompressError

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kind, text = type(error).__name__, str(error)
        # torch raises OutOfMemoryError for a GPU and a plain RuntimeError for the CPU.
        if not (isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in text):
            raise
        size = max(2, options["batch_size"] // 2)
        kept = "" if dry_run else "; what was finished is kept"
        again = "try" if dry_run else "go on with --resume"
        raise EdgeCompressError(
            f"The memory ran out ({kind}){kept}: {again} --batch-size {size} --threads 1, or start anew with a smaller "
            "--image-size if that is not enough."
        ) from error


def _finish(run: Any, mode: str, as_json: bool) -> None:
    from rich.console import Console

    from edgecompress.cli.display import emit
    from edgecompress.errors import GoalMissedError
    from edgecompress.report_page import summary_table

    if mode == "jsonl":
        emit({"event": "report", "path": str(run.path), "report": run.report.model_dump(mode="json")})
    elif as_json:
        click.echo(run.report.model_dump_json(indent=1))
    else:
        console = Console()
        console.print(summary_table(run.report))
        console.print(f"Report: {run.path / 'report.html'}", highlight=False, soft_wrap=True)
    if run.missed:
        raise GoalMissedError(f"The run {run.path} is complete, but missed its goal: {'; '.join(run.missed)}.")
