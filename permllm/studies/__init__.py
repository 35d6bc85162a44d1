"""The studies, by the names that settings call them; each is imported when it is asked for."""

from importlib import import_module
from typing import Any

_MODULES = {
    "ExportMemory": "permllm.studies.export_memory",
    "LCPStep": "permllm.studies.lcp_step",
    "LayerRuntime": "permllm.studies.layer_runtime",
    "SaliencyAndError": "permllm.studies.saliency_and_error",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
