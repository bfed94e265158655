"""A run folder: what is in it, and how it is opened again. No pickle is ever written or read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecompress.errors import BadFileError, BadModelError, UsageError
from edgecompress.files import locked, read_document, read_lines, write_document, write_text, written_whole
from edgecompress.report_spec import RunReport
from edgecompress.run_toml import FILE_NAME, to_toml
from edgecompress.spec import Architecture, CompressionPolicy, Config, Network, Trial

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgecompress.quantize import QuantizedGraph


ORIGINAL = "original.onnx"  # in exports/
ORIGINAL_INT8 = "original.int8.onnx"
MEMORY = ("batch_size", "threads", "device")  # what a resumed run may change: memory may have run out


@dataclass(frozen=True)
class RunFolder:
    """Paths and typed contents of ``runs/<name>/`` (docs/file-formats.md)."""

    path: Path

    def file(self, name: str) -> Path:
        """A path inside the run."""
        return self.path / name

    def config(self) -> Config:
        return read_document(self._existing() / "config.json", Config, "run configuration")

    def network(self) -> Network:
        return read_document(self._existing() / "layers.json", Network, "layer list")

    def policy(self) -> CompressionPolicy:
        """What was chosen.

        Raises:
            BadFileError: it is missing or broken, or names a layer or a channel group that the network does not have.
        """
        policy = read_document(self._existing() / "policy.json", CompressionPolicy, "policy")
        network = self.network()
        for kind, named, known in (
            ("layer", policy.layers, [layer.name for layer in network.layers]),
            ("channel group", policy.keep_channels, [group.id for group in network.groups]),
        ):
            for name in named:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                    raise BadFileError(
                        f"The policy {self.path / 'policy.json'} names the {kind} '{name}', which the run's network does not have"
                        f"{f' (the nearest is {near[0]!r})' if near else ''}. Mend that name, or compress again with --overwrite."
                    )
        return policy

    def report(self) -> RunReport:
        return read_document(self._existing() / "report.json", RunReport, "run report")

    def trials(self) -> list[Trial]:
        return read_lines(self.path / "trials.jsonl", Trial, "trial journal")

    def architecture(self) -> Architecture:
        return read_document(self._existing() / "arch.json", Architecture, "architecture")

    def quantized(self) -> QuantizedGraph:
        """The integer network of a finished run."""
        from edgecompress.exporters.quantized_file import load_quantized

        for name in ("quantized.safetensors", "graph.onnx"):
            if not (self._existing() / name).exists():
                raise BadFileError(
                    f"The run {self.path} has no {name}: it did not finish. Go on with 'edgecompress compress --resume'."
                )
        return load_quantized(self.path / "quantized.safetensors", self.path / "graph.onnx")

    def _existing(self) -> Path:
        if not self.path.is_dir():
            raise BadFileError(
                f"There is no run at {self.path}. Make one with 'edgecompress compress', or check the path."
            )
        return self.path

    def save_model(self, model: nn.Module, architecture: Architecture) -> None:
        """Write the pruned float network: `model.safetensors` beside `arch.json`; of a fixed graph only the latter."""
        from safetensors.torch import save_file

        if not architecture.fixed_graph:
            with written_whole(self.path / "model.safetensors") as temporary:
                save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
        write_document(self.path / "arch.json", architecture)

    def load_model(self, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
        """Rebuild the pruned float network.

        Args:
            factory: builds the original architecture; needed when the run was given a module, not a name.

        Raises:
            BadFileError: the run is missing or broken. BadModelError: another architecture comes out.
        """
        from edgecompress.checkpoints import load_tensors

        architecture = self.architecture()
        if architecture.fixed_graph:
            return self._graph_module()
        model = self.build_model(factory=factory)
        try:
            load_tensors(model, self.weights())
        except RuntimeError as error:
            raise BadModelError(
                f"The weights of {self.path} do not fit the network that {architecture.model} builds: {error}"
            ) from error
        return model.eval()

    def build_model(self, classes: int | None = None, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
        """The pruned architecture with fresh weights.

        Args:
            classes: outputs; those of the run where None.
            factory: see `load_model`.
        """
        from edgecompress.models import build_model
        from edgecompress.prune import prune
        from edgecompress.trace import trace

        architecture = self.architecture()
        if factory is None and architecture.model.startswith("<"):
            raise UsageError(
                f"The run {self.path} was made from a module in memory; pass factory= to build the original network."
            )
        model = factory() if factory else build_model(architecture.model, classes or architecture.classes)
        traced = trace(model, architecture.input_shape, architecture.model)
        return prune(model, traced, architecture.keep_channels)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of `model.safetensors` by name; those stored as float16 are widened."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(self.path / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise BadFileError(
                f"The weights {self.path / 'model.safetensors'} cannot be read ({error}). Compress again with --overwrite."
            ) from error
        return {key: value.float() if value.dtype is torch.float16 else value for key, value in found.items()}

    def _graph_module(self) -> nn.Module:
        from edgecompress.describe import GraphModule
        from edgecompress.graph import read_graph

        path = self.path / "graph.onnx"
        if not path.exists():
            raise BadFileError(
                f"The run {self.path} has no graph.onnx, which is its network. Compress again with --overwrite."
            )
        return GraphModule(read_graph(path)).eval()


@contextmanager
def opened(path: Path, config: Config, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Create or continue a run and hold its lock. A run that never evaluated a policy holds nothing and is replaced.

    Raises:
        UsageError: the run exists and neither ``resume`` nor ``overwrite`` is given, the resumed run was made with other
            options, or another process works on it.
    """
    from edgecompress.files import disk_error

    run = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    with locked(path):
        known, began = (path / "config.json").exists(), (path / "trials.jsonl").exists()
        if known and began and not overwrite:
            if not resume:
                raise UsageError(
                    f"The run {path} exists. Go on with --resume, replace it with --overwrite, or choose another --name."
                )
            _check_same(run.config(), config, path)
        elif known or overwrite:
            _clear(path)
        write_document(path / "config.json", config)
        write_text(path / FILE_NAME, to_toml(config, path))
        yield run


def _check_same(old: Config, new: Config, path: Path) -> None:
    differing = [key for key, value in new if getattr(old, key) != value and key not in MEMORY]
    if differing:
        key = differing[0]
        raise UsageError(
            f"The run {path} was made with {key}={getattr(old, key)!r}, this call has {getattr(new, key)!r}. "
            "Resume with the same options, or start over with --overwrite."
        )


def _clear(path: Path) -> None:
    """Remove what a run writes, and nothing else that a user may have put beside it."""
    import shutil

    for name in ("checkpoints", "exports"):
        shutil.rmtree(path / name, ignore_errors=True)
    for pattern in ("*.json", "*.jsonl", "*.safetensors", "*.html", "graph.onnx", FILE_NAME):
        for file in path.glob(pattern):
            file.unlink()
