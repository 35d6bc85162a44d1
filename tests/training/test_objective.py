"""Memory of a decoder layer for backward: the estimate against what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.config import NMPattern
from permllm.mask.learned import ScoreMask
from permllm.models.families import channel_groups
from permllm.permutation.heuristic import Heuristic
from permllm.pruning.wanda import Wanda
from permllm.sparsity.calibrate import calibrate_dense
from permllm.training.objective import kept_a_token
from permllm.training.problem import LearningProblem
from tests.conftest import tiny_model
from tests.problems import lcp

HIDDEN, INNER = 96, 256  # in the proportion of LLaMA's


def saved_bytes(learns: str, dtype: torch.dtype, layers: int, length: int) -> int:
    """Return the size of all tensors that a step of four samples saves."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_key_value_heads": 4}
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=layers, **sizes)
    groups, pattern = channel_groups(model), NMPattern(2, 4)
    tokens = torch.randint(0, 259, (4, length), generator=torch.Generator().manual_seed(0))
    dense = calibrate_dense(model, groups, tokens, Wanda(), batch_size=4)
    learning = LearningProblem(model, groups, tokens, dense.factors, dense.target, pattern, seed=0)
    settings: dict[str, Any] = {"steps": 1, "select_from": 0, "batch_size": 4, "loss": "cosine"}
    settings |= {"activation_checkpointing": False, "compile": False}
    orders = Heuristic().orders(learning)
    found: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)  # so that no other one comes to its place
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if learns == "orders":
            lcp(**settings).orders(learning)
        else:
            ScoreMask(**settings).masks(learning, orders)
    return sum(found.values())


@pytest.mark.parametrize("learns", ["orders", "masks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_is_estimated(learns: str, dtype: torch.dtype) -> None:
    # What grows with layers and tokens: neither weights nor what learns, nor the loss.
    of_tokens = [
        saved_bytes(learns, dtype, layers, 64) - saved_bytes(learns, dtype, layers, 32)
        for layers in (1, 2)
    ]
    saved = (of_tokens[1] - of_tokens[0]) / (4 * 32)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_key_value_heads": 4}
    groups = channel_groups(tiny_model("llama", **sizes))
    a_token = kept_a_token(groups, HIDDEN, dtype.itemsize, gathers=learns == "masks")
    assert 0.8 <= saved / (a_token * dtype.itemsize) <= 1.05
