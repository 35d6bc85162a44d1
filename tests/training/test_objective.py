"""Loss of a stage; memory of a decoder layer for backward against what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.models.families import channel_groups
from permllm.training.learner import Learner, Stage
from permllm.training.objective import Objective, kept_a_token
from tests.conftest import tiny_model
from tests.problems import (
    identities,
    lcp,
    method,
    model_with_scales,
    outputs_of_layers,
    problem,
    random,
    tokens,
)

# In the proportion of LLaMA's.
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_key_value_heads": 4}


def saved_bytes(learns: str, dtype: torch.dtype, layers: int, length: int) -> int:
    """Return the size of all tensors that a step of four samples saves."""
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=layers, **SIZES)
    learning = problem(model, samples=tokens(4, length))
    settings: dict[str, Any] = {"steps": 1, "select_from": 0, "batch_size": 4, "loss": "cosine"}
    settings |= {"activation_checkpointing": False, "compile": False}
    orders = identities(learning.groups)
    found: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)  # so that no other one comes to its place
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if learns == "orders":
            lcp(**settings).permutations(learning)
        else:
            method("mask=score", **settings).masks(learning, orders)
    return sum(found.values())


@pytest.mark.parametrize("learns", ["orders", "masks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_is_estimated(learns: str, dtype: torch.dtype) -> None:
    # What grows with layers and tokens: neither weights nor what learns, nor the loss.
    one, two = (
        saved_bytes(learns, dtype, layers, 64) - saved_bytes(learns, dtype, layers, 32)
        for layers in (1, 2)
    )
    saved = (two - one) / (4 * 32)
    groups = channel_groups(tiny_model("llama", **SIZES))
    a_token = kept_a_token(groups, 96, dtype.itemsize, gathers=learns == "masks")
    assert 0.8 <= saved / (a_token * dtype.itemsize) <= 1.05


class NothingLearns(Learner):
    """Learner that leaves the dense layers as they are."""

    def parameters(self) -> list[Tensor]:
        return [torch.zeros(1, requires_grad=True)]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def test_the_loss_is_that_of_the_whole_model_if_arguments_depend_on_the_tokens() -> None:
    model = model_with_scales()
    learning = problem(model, samples=tokens(5))
    learning.calibration_batch_size = 2
    settings = method("mask=score", batch_size=2, layers_per_stage=1)
    states = outputs_of_layers(model, tokens(5))
    target = random(*states[1].shape).float()
    objective = Objective(
        settings, learning, Stage(1, range(1, 2), states[0], target), NothingLearns()
    )
    similarity = torch.nn.functional.cosine_similarity(states[1].double(), target.double(), dim=2)
    assert objective.mean() == pytest.approx(float((1 - similarity).mean()), rel=1e-6)
