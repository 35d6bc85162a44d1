"""The studies, by the names that settings call them."""

from permllm.studies.layer_runtime import LayerRuntime
from permllm.studies.saliency_and_error import SaliencyAndError

__all__ = ["LayerRuntime", "SaliencyAndError"]
