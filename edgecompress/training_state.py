"""What a training holds beside its network: momentum, averaged weights, the precision of its passes; on disk after every epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgecompress.checkpoints import load_tensors
from edgecompress.errors import BadFileError, UnknownNameError
from edgecompress.files import written_whole

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_on(device: torch.device, wanted: str, model: nn.Module) -> str:
    """The precision, a key of `PRECISIONS`, of the passes of a training of ``model`` on ``device``.

    Args:
        wanted: such a key, or ``auto``: on CUDA bfloat16 where the GPU computes it (Ampere and later), otherwise float16; on an
            x86 CPU that multiplies bfloat16 (AVX512-BF16, AMX) bfloat16 for networks without grouped convolutions, whose
            steps take 1.5 to 2 times as long in float32, those of MobileNet-V2 and ShuffleNet-V2 however 0.9 and 0.7 times
            (Zen 4, torch 2.14, one thread); float32 anywhere else.

    Raises:
        UnknownNameError: ``wanted`` is no precision.
    """
    if wanted not in ("auto", *PRECISIONS):
        raise UnknownNameError("precision of training", wanted, ["auto", *PRECISIONS])
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "bf16" if _cpu_multiplies_bf16() and not _has_grouped_convolutions(model) else "fp32"
    if device.type != "cuda":
        return "fp32"
    # Without the argument a GPU that has to emulate bfloat16 says yes, too.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _cpu_multiplies_bf16() -> bool:
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _has_grouped_convolutions(model: nn.Module) -> bool:
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d
    return any(isinstance(module, convolutions) and module.groups > 1 for module in model.modules())


class Average:
    """Exponential moving average of all floating-point state of a network (Polyak and Juditsky 1992); integers are copied.

    After t steps the decay is ``min(decay, (1 + t) / (10 + t))``, so that a short training is not held to its start. A decay
    of 0 holds nothing and costs nothing.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        held = model.state_dict() if decay else {}
        self.state = {key: value.detach().clone() for key, value in held.items()}

    def add(self, model: nn.Module) -> None:
        """Take the state after one more step."""
        if not self.state:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    self.state[key].lerp_(value, 1 - decay)
                else:
                    self.state[key].copy_(value)


@dataclass(frozen=True)
class TrainingState:
    """All that a training changes. ``settings`` decide it: a checkpoint of others is not used.

    scaler: keeps float16's gradients from vanishing (Micikevicius et al. 2018, section 3.2); switched off otherwise.
    adam: of parameters that are trained apart; None where there are none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average
    scaler: torch.amp.GradScaler
    settings: Mapping[str, object]
    adam: torch.optim.Optimizer | None = None

    def save(self, path: Path | None, epoch: int) -> None:
        """Write everything after ``epoch`` epochs, in one piece; None writes nothing."""
        if path is None:
            return
        from safetensors.torch import save_file

        tensors = {f"model.{key}": value.contiguous() for key, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            if state.get("momentum_buffer") is not None:
                tensors[f"momentum.{index}"] = state["momentum_buffer"].contiguous()
        for index, state in (self.adam.state_dict()["state"] if self.adam else {}).items():
            tensors |= {f"adam.{index}.{name}": value.contiguous() for name, value in state.items()}
        tensors |= {f"ema.{key}": value.contiguous() for key, value in self.average.state.items()}
        metadata = {
            "epoch": str(epoch),
            "settings": json.dumps(self.settings),
            "ema_steps": str(self.average.steps),
            "scaler": json.dumps(self.scaler.state_dict()),
        }
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def restore(self, path: Path | None) -> int:
        """Take everything from ``path`` and return its epochs; 0, and nothing changes, where there is nothing to go on from.

        Raises:
            BadFileError: the file is broken.
        """
        from safetensors import SafetensorError, safe_open

        if path is None or not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise BadFileError(
                f"The checkpoint {path} is broken ({error}). Delete it: its training then starts anew."
            ) from error
        # Those that were written before there was a choice come from float32.
        if {"precision": "fp32", **json.loads(metadata.get("settings", "{}"))} != self.settings:
            return 0
        load_tensors(self.model, _named("model.", tensors))
        state = self.optimizer.state_dict()
        state["state"] = {
            int(index): {"momentum_buffer": value} for index, value in _named("momentum.", tensors).items()
        }
        self.optimizer.load_state_dict(state)
        if self.adam is not None:
            state = self.adam.state_dict()
            state["state"] = {}
            for key, value in _named("adam.", tensors).items():
                index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
            self.adam.load_state_dict(state)
        self.average.steps = int(metadata["ema_steps"])
        for key, value in self.average.state.items():
            value.copy_(tensors[f"ema.{key}"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(json.loads(metadata["scaler"]))
        return int(metadata["epoch"])


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


__all__ = ["PRECISIONS", "Average", "TrainingState", "precision_on"]
