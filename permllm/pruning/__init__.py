"""The base pruners, by the names that settings call them."""

from permllm.pruning.gblm import GBLM
from permllm.pruning.magnitude import Magnitude
from permllm.pruning.ria import RIA
from permllm.pruning.sparsegpt import SparseGPT
from permllm.pruning.wanda import Wanda

__all__ = ["GBLM", "RIA", "Magnitude", "SparseGPT", "Wanda"]
