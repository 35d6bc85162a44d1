"""The studies, by the names that settings call them; each is imported when it is asked for."""

from permllm.lazy import imported_when_asked

__getattr__ = imported_when_asked(
    __name__,
    {
        "ExportMemory": "permllm.studies.export_memory",
        "LCPStep": "permllm.studies.lcp_step",
        "LayerRuntime": "permllm.studies.layer_runtime",
        "SaliencyAndError": "permllm.studies.saliency_and_error",
    },
)
