"""The updates of kept weights, by the names that settings call them."""

from permllm.reconstruction.base import NoReconstruction
from permllm.reconstruction.block import Block
from permllm.reconstruction.distill import Distill
from permllm.reconstruction.obs import OBS

__all__ = ["OBS", "Block", "Distill", "NoReconstruction"]
