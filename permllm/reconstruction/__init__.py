"""The updates of kept weights, by the names that settings call them; each is imported when it is asked for."""

from importlib import import_module
from typing import Any

_MODULES = {
    "OBS": "permllm.reconstruction.obs",
    "Block": "permllm.reconstruction.block",
    "Distill": "permllm.reconstruction.distill",
    "NoReconstruction": "permllm.reconstruction.base",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
