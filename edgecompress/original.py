"""The trained network that compression starts from: whose weights it has, and what to say about them.

==================  ===================================  ==================================  ======================
``--weights``       zoo, torchvision, timm               factory                             .onnx, .pt2
==================  ===================================  ==================================  ======================
absent              trained on the data                  as returned; trained if all fresh   as they are
``DEFAULT``         published (zoo: none exist)          as returned                         as they are
``none``            trained on the data                  trained on the data                 refused
a file              loaded                               loaded                              refused
==================  ===================================  ==================================  ======================

A network that is compressed already (`shipped.compressed_run`) brings its weights too, as the last column.

Where loaded weights have a classifier of another size, it is replaced and the network fine-tuned on the data. Images
without labels can train nothing: then the network must bring its weights, and its own answers become the labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from edgecompress.checkpoints import classes_in, fit_state, read_state
from edgecompress.data import Dataset, Split
from edgecompress.describe import GraphModule
from edgecompress.errors import BadFileError, BadModelError, UsageError
from edgecompress.files import read_json
from edgecompress.finetune import accuracy_and_loss, reference_model
from edgecompress.imports import place_of
from edgecompress.models import (
    build_model,
    from_factory,
    is_graph_file,
    own_classes,
    own_preprocessing,
    own_state,
    source_of,
)
from edgecompress.onnx_files import import_graph
from edgecompress.progress import Progress
from edgecompress.runs import RunFolder
from edgecompress.shipped import compressed_run
from edgecompress.spec import Config, Preprocessing, Target, parse_budgets

REFERENCE_EPOCHS = {"digits": 20}
GRAPH_BUDGET = "size=0.3x"  # what 8 bits reach with room for scales and names
WHY_NOT_PRUNED = "a file says what is computed, but not which channels may be cut and trained again together"


def preprocessing_of(config: Config) -> Preprocessing | None:
    """What images go through: as the published weights expect where those are used, or as the user says.

    Returns:
        None where the images themselves decide: their size, and the mean and deviation of the training images.

    Raises:
        BadModelError: the model has no published weights to ask. BadFileError: the named file holds no preprocessing.
    """
    how, run = config.preprocessing, compressed_run(config.model)
    if run is not None and how in ("auto", "weights"):
        return run.architecture().preprocessing
    if how == "data" or (how == "auto" and (config.weights or "").lower() != "default"):
        return None
    if how in ("auto", "weights"):
        found = own_preprocessing(config.model)
        if found is None and how == "weights":
            raise BadModelError(
                f"{config.model} has no published weights that say how images are prepared. Give --preprocessing data, or a "
                "JSON file with size, mean and std."
            )
        return found
    try:
        return Preprocessing.model_validate(read_json(Path(how), "preprocessing"))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadFileError(
            f"The preprocessing {how} is wrong at '{'.'.join(map(str, first['loc']))}': {first['msg']}. Expected for example "
            '{"size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize": 256}.'
        ) from error


def answered(data: Dataset, network: nn.Module, config: Config) -> Dataset:
    """``data`` with the classes that ``network`` gives in place of the labels that the images do not have."""
    if data.labelled:
        return data

    def split(images: torch.Tensor) -> Split:
        unknown = Split(images, torch.zeros(len(images), dtype=torch.long))
        with torch.no_grad():
            return Split(images, torch.cat([network(x).argmax(1) for x, _ in data.batches(unknown, 100)]))

    images, _ = next(data.batches(data.test, 1))
    with torch.no_grad():
        count = network(images).shape[1]
    return replace(
        data,
        classes=class_names(config, count),
        train=split(data.train.images), calibration=split(data.calibration.images),
        search_val=split(data.search_val.images), select_val=split(data.select_val.images),
        test=split(data.test.images),
    )  # fmt: skip


def class_names(config: Config, count: int) -> tuple[str, ...]:
    """Names of the network's own classes: those of the published weights where they fit, else numbers."""
    names = own_classes(config.model) if (config.weights or "").lower() == "default" else ()
    return names if len(names) == count else tuple(map(str, range(count)))


def original_network(model: str | nn.Module, config: Config, data: Dataset, progress: Progress) -> nn.Module:
    """Build, load or train the network; on the CPU, in eval mode.

    Args:
        model: a trained module, which is copied, or a name (`models.build_model`, or a ``.onnx`` or ``.pt2`` file).

    Raises:
        BadModelError: the network cannot be built, its weights cannot be loaded, or it has too few outputs for the data.
        UnknownNameError: no model of that name. MissingBackendError: timm is not installed.
    """
    if isinstance(model, nn.Module):
        _check_filled(model)
        return _checked(copy.deepcopy(model).cpu().eval(), config, data, progress)
    if is_graph_file(model):
        return _checked(_fixed_graph(model, config, data, progress), config, data, progress)
    run = compressed_run(model)
    if run is not None:
        return _compressed(run, config, data, progress)
    weights = config.weights or ""
    if weights.lower() == "none":
        return _trained(model, data, progress, config.device)
    if source_of(model) == "factory" and weights.lower() in ("", "default"):
        return _of_factory(model, config, data, progress)
    if not weights:
        return _trained(model, data, progress, config.device)
    return _loaded(model, config, data, progress)


def _trained(name: str, data: Dataset, progress: Progress, device: str) -> nn.Module:
    if not data.labelled:
        raise BadModelError(
            f"{name} has no weights, and {data.name} has no labels to train it on. Give --weights DEFAULT or a file."
        )
    epochs = REFERENCE_EPOCHS.get(data.name, 60)
    progress.stage(f"Reference network {name} on {data.name}", epochs)
    return reference_model(name, data, epochs=epochs, on_epoch=progress.epoch, device=device)


def _of_factory(name: str, config: Config, data: Dataset, progress: Progress) -> nn.Module:
    network, has_weights = from_factory(name, len(data.classes) if data.labelled else None)
    if has_weights or config.weights:
        return _checked(network.eval(), config, data, progress)
    progress.note(
        f"{name} returns fresh weights (they change with the random seed), so the reference is trained on {data.name}; "
        "give --weights FILE, or load them in the factory, to start from your own"
    )
    return _trained(name, data, progress, config.device)


def _loaded(name: str, config: Config, data: Dataset, progress: Progress) -> nn.Module:
    """A network with weights from a file or published ones."""
    assert config.weights is not None
    if config.weights.lower() == "default":
        state, what = own_state(name, download=config.download), f"The published checkpoint of {name}"
    else:
        state, what = read_state(Path(config.weights)), f"The checkpoint {config.weights}"
    return _with_state(name, partial(build_model, name), state, what, config, data, progress)


def _compressed(run: RunFolder, config: Config, data: Dataset, progress: Progress) -> nn.Module:
    """The pruned network of a run with its weights."""
    _refuse_weights(config)
    if run.architecture().fixed_graph:
        raise BadModelError(
            f"The run {run.path} was made from a fixed graph. Give its graph.onnx as --model to choose bits anew."
        )
    what = f"The network of {run.path}"
    return _with_state(config.model, run.build_model, run.weights(), what, config, data, progress)


def _with_state(
    name: str,
    build: Callable[[int], nn.Module],
    state: dict[str, torch.Tensor],
    what: str,
    config: Config,
    data: Dataset,
    progress: Progress,
) -> nn.Module:
    """The network that ``build`` makes for a number of classes; fine-tuned where its classifier had to be replaced."""
    classes = len(data.classes) if data.labelled else classes_in(build(10), state, what)
    torch.manual_seed(config.seed)  # decides a classifier that must be made anew
    network = build(classes)
    resized = fit_state(network, state, what)
    if not resized:
        return _checked(network.eval(), config, data, progress)
    epochs = config.finetune_epochs
    progress.note(
        f"the classifier '{resized}' of the weights has another number of outputs than {data.name} has classes "
        f"({len(data.classes)}); it starts anew and the network is fine-tuned for {epochs} epochs (--finetune-epochs)"
    )
    progress.stage(f"Fine-tune {name} on {data.name}", epochs)
    return reference_model(
        name, data, epochs=epochs, seed=config.seed, on_epoch=progress.epoch, start=network,
        learning_rate=config.learning_rate, device=config.device,
    )  # fmt: skip


def _fixed_graph(name: str, config: Config, data: Dataset, progress: Progress) -> nn.Module:
    _refuse_weights(config)
    images, _ = next(data.batches(data.test, 1))
    graph = import_graph(Path(name), tuple(images.shape[1:]), trust=config.trust)
    progress.note(f"{Path(name).name} is a fixed graph: stage 1 (pruning) is skipped, because {WHY_NOT_PRUNED}")
    last = graph.producer(graph.outputs[0])
    if last is not None and last.op == "Softmax":
        progress.note(
            f"{Path(name).name} ends in Softmax; export it without, so that training can learn from its scores"
        )
    return GraphModule(graph)


def _refuse_weights(config: Config) -> None:
    if config.weights and config.weights.lower() != "default":
        raise BadModelError(
            f"{config.model} holds its own weights; --weights {config.weights} cannot be used with it. Leave --weights out."
        )


def fixed_graph_options(model: str, target: Target, budget: str | None, stages: object) -> dict[str, object]:
    """The options of a run on a ``.onnx`` or ``.pt2`` file: stage 2 alone, and a budget that bits can meet.

    Raises:
        UsageError: only pruning is asked for, the budget needs it, or the target has no integers to go to.
    """
    instead = "Give the network in code (package.module:factory) to prune it."
    if isinstance(stages, list | tuple) and "quantize" not in stages:
        raise UsageError(f"{model} cannot be pruned: {WHY_NOT_PRUNED}. Run --stages quantize. {instead}")
    if not target.integer_kernels:
        raise UsageError(
            f"{model} cannot be pruned and {target.name} computes no integers, so there is nothing to compress. {instead}"
        )
    for part in parse_budgets(budget or GRAPH_BUDGET):
        if part.metric in ("flops", "params"):
            raise UsageError(
                f"The budget {part} needs pruning, and {model} cannot be pruned: {WHY_NOT_PRUNED}. "
                f"Budget size, bops or latency. {instead}"
            )
    return {"stages": ("quantize",), "budget": budget or GRAPH_BUDGET}


def _check_filled(model: nn.Module) -> None:
    """Refuse weights that were never given values; those on any device are brought to the CPU."""
    empty = [key for key, value in model.state_dict().items() if value.is_meta]
    if empty:
        raise BadModelError(
            f"The weight '{empty[0]}' of {type(model).__name__} is on the meta device and holds no numbers "
            f"({len(empty)} such tensors). Load its checkpoint first: to_empty(device='cpu'), then load_state_dict."
        )


def _checked(network: nn.Module, config: Config, data: Dataset, progress: Progress) -> nn.Module:
    """``network``, if its outputs are what the task wants; a note where it answers no better than by guessing."""
    images, labels = next(data.batches(data.select_val, 1))
    try:
        with torch.no_grad():
            outputs = network(images)
    except Exception as error:
        raise BadModelError(
            f"{config.model} fails on one image of shape {tuple(images.shape[1:])}: {error}. Give images of the size it was made for."
        ) from error
    _check_outputs(outputs, config.model, data)
    classes = len(data.classes)
    if data.task.class_scores and data.labelled and outputs.shape[1] > classes:
        progress.note(
            f"{config.model} has {outputs.shape[1]} outputs, {data.name} has {classes} classes; the first ones count"
        )
    if data.task.outputs_rank == 2:
        two, _ = next(data.batches(data.select_val, 2))
        with torch.no_grad():
            shape = tuple(network(two).shape)
        if shape != (len(two), *outputs.shape[1:]):
            raise BadModelError(
                f"{config.model} gives {shape} for {len(two)} images and {tuple(outputs.shape)} for one; expected one row of "
                "scores per image. Let the shape follow the batch: x.flatten(1) or x.shape[0] in its forward."
            )
        if data.labelled:
            _note_guessing(network, config, data, progress)
        return network
    try:
        data.task.merit([data.task.measure(outputs, labels)])
        data.task.loss(outputs, labels, "mean")
    except Exception as error:
        raise BadModelError(
            f"The task '{data.task.name}' cannot score what {config.model} gives for one image, {tuple(outputs.shape[1:])}, "
            f"with labels {tuple(labels.shape[1:])}: {error}{place_of(error)}. Give a network and labels of the task."
        ) from error
    return network


def _check_outputs(outputs: object, name: str, data: Dataset) -> None:
    """Refuse outputs that are no tensor, or no score per class where the task wants one."""
    task, classes = data.task, len(data.classes)
    rank = task.outputs_rank
    if (
        isinstance(outputs, torch.Tensor)
        and rank in (None, outputs.dim())
        and (not task.class_scores or not data.labelled or outputs.shape[1] >= classes)
    ):
        return
    found = tuple(outputs.shape[1:]) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    if not task.class_scores:
        raise BadModelError(
            f"{name} gives {found} for one image; the task '{task.name}' wants one tensor of {rank} dimensions."
        )
    wanted = f"({classes or 'classes'},)" if rank == 2 else f"({classes or 'classes'}, height, width)"
    raise BadModelError(
        f"{name} gives {found} for one image; {data.name} has {classes} classes, so expected {wanted}. "
        "Give a network with one score per class."
    )


def _note_guessing(network: nn.Module, config: Config, data: Dataset, progress: Progress) -> None:
    share = float(data.select_val.labels.bincount().max()) / len(data.select_val)
    accuracy, _ = accuracy_and_loss(network, data, data.select_val, device=config.device)
    if accuracy <= share < 1:
        progress.note(
            f"{config.model} answers {accuracy:.1%} of the select-val images right, no better than guessing ({share:.1%}): check its "
            "weights, the order of the classes and the preprocessing"
        )
