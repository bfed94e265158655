"""edgecompress: two-stage deep-RL compression for embedded targets.

    import edgecompress
    run = edgecompress.compress("resnet8", "digits", target="x86", budget="flops=0.5x")
    run.export("onnxruntime")

Names are imported when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecompress.pipeline import Run as Run
    from edgecompress.pipeline import compress as compress
    from edgecompress.pipeline import load as load
    from edgecompress.run_exports import export_run as export_run

__version__ = version("edgecompress")
_LAZY = {"Run": "pipeline", "compress": "pipeline", "export_run": "run_exports", "load": "pipeline"}
__all__ = ["Run", "__version__", "compress", "export_run", "load"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"edgecompress.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'edgecompress' has no attribute '{name}'")
