"""The methods that order input channels, by the names that settings call them; each is imported when it is asked for."""

from importlib import import_module
from typing import Any

_MODULES = {
    "FromFile": "permllm.permutation.from_file",
    "Heuristic": "permllm.permutation.heuristic",
    "Identity": "permllm.permutation.identity",
    "LCP": "permllm.permutation.lcp.method",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
