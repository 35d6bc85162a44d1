"""The methods that order input channels, by the names that settings call them; each is imported when it is asked for."""

from permllm.lazy import imported_when_asked

__getattr__ = imported_when_asked(
    __name__,
    {
        "FromFile": "permllm.permutation.from_file",
        "Heuristic": "permllm.permutation.heuristic",
        "Identity": "permllm.permutation.identity",
        "LCP": "permllm.permutation.lcp.method",
    },
)
